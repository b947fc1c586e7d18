"""Image processors, which stand where a text model's tokenizer does."""

from __future__ import annotations

from typing import Any

from ptft_hf.models.reading import from_pretrained

DEFAULT_SIZE = 224
"""Pixels of a side where neither a configuration names them (ResNet's does not) nor all images have the same, as
ImageNet's models have."""


def load_image_processor(reference: str, **options: Any) -> Any:
    """The image processor of a checkpoint, on Pillow, so that the same pixels come out with torchvision and without.

    Args:
        reference: Hub id, ``name@revision``, or folder.
        **options: ``from_pretrained``'s own arguments.

    Raises:
        ModelError: There is none, or it cannot be read.
    """
    return from_pretrained("AutoImageProcessor", reference, options, backend="pil")


def default_processor(config: Any, size: tuple[int, int] = (DEFAULT_SIZE, DEFAULT_SIZE)) -> Any:
    """Resizes to the size that a configuration names, else to ``size`` (height, width), and takes values from -1 to
    1."""
    import transformers

    size, channels = getattr(config, "image_size", None) or size, getattr(config, "num_channels", 3)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    half = [0.5] * channels
    return transformers.ViTImageProcessorPil(
        size={"height": height, "width": width}, image_mean=half, image_std=half
    )
