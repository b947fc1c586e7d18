"""Classification of images: single-label, multi-label, and regression."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ptft_hf import models
from ptft_hf.data import images
from ptft_hf.data.sources import quiet
from ptft_hf.errors import DataError
from ptft_hf.recipes import ImageClassificationRecipe
from ptft_hf.tasks import Usage
from ptft_hf.tasks.classification import Classification
from ptft_hf.tasks.marks import Segment

USAGE = """from PIL import Image, ImageOps

image = ImageOps.exif_transpose(Image.open({image!r})).convert({mode!r})
inputs = processor(image, return_tensors="pt")
with torch.no_grad():
    logits = model(**inputs).logits
print(logits)"""
SAMPLE = "photo.png"
SHOWN = 20
"""Faults of images that are named."""
SIZED, SMALLEST = 100, 32
"""Images that are looked at for their size; and the least side, of which a ResNet's five halvings leave one."""


class ImageClassification(Classification):
    """One label, several labels or a number for each image: columns ``image`` (of ``datasets.Image``) and ``label``.

    Encoded rows keep the image as it is stored; a batch decodes its own. In the tokenizer's place stands the
    checkpoint's image processor.
    """

    auto_class = "AutoModelForImageClassification"
    peft_task_type: str | None = None
    """PEFT has no name for it, and needs none."""
    reads = "images"
    unit = "pixels"
    required = ("image", "label")
    text_columns = ("image",)
    long_inputs = "are resized"
    loses_tails = False
    begins_from_nothing = True

    def __init__(self, recipe: ImageClassificationRecipe) -> None:
        super().__init__(recipe)
        self.mode = "RGB"

    # ---- before training ----

    def reader_from_nothing(self, reference: str, config: Any, rows: Any) -> tuple[Any, list[str]]:
        """See :func:`ptft_hf.models.default_processor`; where the configuration names no size and the first images
        all have the same, theirs."""
        if getattr(config, "image_size", None):
            return models.default_processor(config), []
        first = _column(images.undecoded(rows.select(range(min(SIZED, len(rows))))))
        found = {images.opened(value).size for value in first}
        if len(found) > 1:
            return models.default_processor(config), []
        height, width = (max(SMALLEST, side) for side in reversed(found.pop()))
        said = f"{reference} names no size: images are read as {height} x {width} pixels"
        return models.default_processor(config, (height, width)), [said]

    def look_at(self, splits: Any) -> list[str]:
        """Learn problem type, labels and class weights.

        Raises:
            DataError: The column ``image`` holds no images; else as for texts.
        """
        kind = splits.train.features["image"]
        if not images.is_image(kind):
            raise DataError(
                f"image: the column holds {getattr(kind, 'dtype', kind)}, not images; use path: imagefolder or "
                "idx, or cast the column of a Dataset to datasets.Image()"
            )
        return super().look_at(splits)

    # ---- rows to batches ----

    def encode(self, rows: Any, tokenizer: Any, max_length: int) -> tuple[Any, int]:
        """The images as they are stored, under the name by which a model takes them; labels; ``length`` in pixels
        of what the model reads, the same for all.

        Raises:
            DataError: Images that Pillow does not know, named.
        """
        rows, self.mode = images.undecoded(rows), _mode(tokenizer)
        problems, size = [], None
        for number, value in enumerate(_column(rows), 1):
            try:
                images.opened(value).close()
                size = size or self._size(value, tokenizer)
            except DataError as error:
                problems += [f"row {number}: {problem}" for problem in error.problems]
        if problems:
            more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
            raise DataError(*problems[:SHOWN], *more)
        height, width = size or (0, 0)
        with quiet():
            encoded = rows.select_columns(["image"]).rename_column("image", "pixel_values")
            encoded = encoded.add_column("length", [height * width] * len(rows))
            if "label" in rows.column_names:
                index = {label: i for i, label in enumerate(self.labels)}
                encoded = encoded.add_column("labels", [self.encode_label(x, index) for x in rows["label"][:]])
        return encoded, 0

    def _size(self, value: Mapping[str, Any], processor: Any) -> tuple[int, int]:
        """Height and width as the model reads an image."""
        return tuple(_pixels(processor, [value]).shape[-2:])  # type: ignore[return-value]

    def collator(self, tokenizer: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Decodes, resizes and normalises: ``pixel_values`` ``[B, channels, height, width]``."""

        def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
            batch = {"pixel_values": _pixels(tokenizer, [row["pixel_values"] for row in rows])}
            if "labels" in rows[0]:
                batch["labels"] = torch.tensor([row["labels"] for row in rows])
            return batch

        return collate

    def segments(self, row: Mapping[str, Any], tokenizer: Any) -> list[Segment]:
        """The label, and what kind of image it is learnt from."""
        image = images.opened(row["pixel_values"])
        channels, height, width = _pixels(tokenizer, [row["pixel_values"]]).shape[1:]
        stored = f"image of {image.height} x {image.width} pixels ({image.mode})"
        read = f"read as {channels} x {height} x {width}"
        return [Segment(self.answer(row), "trained"), Segment(f" <- {stored}, {read}")]

    # ---- in use ----

    def input_row(self, value: Any, columns: Sequence[str]) -> dict[str, Any]:
        """A path, a ``PIL.Image``, an array ``[H, W]`` or ``[H, W, 3]`` of 0 to 255, or an object with one of these
        under ``image``."""
        if isinstance(value, Mapping) and set(value) != {"bytes", "path"}:
            if "image" not in value:
                raise DataError(f"'image' must be given; the input has {sorted(map(str, value))}")
            value = value["image"]
        if isinstance(value, str | PathLike):
            if not Path(value).is_file():
                raise DataError(f"{fspath(value)}: no such file; an input is the path of an image")
            value = {"bytes": None, "path": fspath(value)}
        elif isinstance(value, np.ndarray | list | torch.Tensor):
            value = images.as_value(images.from_array(value))
        elif hasattr(value, "save") and hasattr(value, "mode"):
            value = images.as_value(value)
        if not isinstance(value, Mapping) or set(value) != {"bytes", "path"}:
            raise DataError(f"{type(value).__name__} is neither the path of an image, nor an image, nor an array")
        return {"image": dict(value)}

    def usage(self, columns: Sequence[str], max_length: int) -> Usage:
        shades = np.linspace(0, 255, 64).reshape(8, 8)
        return Usage(
            USAGE.format(image=SAMPLE, mode=self.mode),
            [SAMPLE],
            "predicts a label among",
            reader="AutoImageProcessor",
            samples=[shades, shades.T],
        )


    def state(self) -> dict[str, Any]:
        return {**super().state(), "mode": self.mode}

    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        self.mode = state["mode"]


def _column(rows: Any) -> Any:
    for batch in rows.select_columns(["image"]).iter(batch_size=1000):
        yield from batch["image"]


def _pixels(processor: Any, values: Sequence[Mapping[str, Any]]) -> torch.Tensor:
    """``[B, channels, height, width]``, in float32.

    Raises:
        DataError: Broken images.
    """
    decoded = [images.decoded(value, _mode(processor)) for value in values]
    pixels: torch.Tensor = processor(decoded, return_tensors="pt")["pixel_values"]
    return pixels


def _mode(processor: Any) -> str:
    """Grey (``L``) for a processor of one channel, else ``RGB``."""
    return "L" if len(getattr(processor, "image_mean", None) or ()) == 1 else "RGB"


