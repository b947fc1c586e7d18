"""Image processors, which stand where a text model's tokenizer does."""

from __future__ import annotations

from typing import Any

from ptft_hf.models.reading import from_pretrained

DEFAULT_SIZE = 224
"""Pixels of a side, for configurations that name none (ResNet's), as ImageNet's models have."""


def load_image_processor(reference: str, **options: Any) -> Any:
    """The image processor of a checkpoint, on Pillow, so that the same pixels come out with torchvision and without.

    Args:
        reference: Hub id, ``name@revision``, or folder.
        **options: ``from_pretrained``'s own arguments.

    Raises:
        ModelError: There is none, or it cannot be read.
    """
    return from_pretrained("AutoImageProcessor", reference, options, backend="pil")


def default_processor(config: Any) -> Any:
    """Resizes to the size that a configuration names, and takes values from -1 to 1."""
    import transformers

    size, channels = getattr(config, "image_size", None) or DEFAULT_SIZE, getattr(config, "num_channels", 3)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    half = [0.5] * channels
    return transformers.ViTImageProcessorPil(
        size={"height": height, "width": width}, image_mean=half, image_std=half
    )
