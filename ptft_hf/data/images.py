"""Images in tables: kept as the bytes or the file that they are, compared by them, decoded by the batch."""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from ptft_hf.errors import DataError

KINDS = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
"""Types of values in idx files, by the third byte of their magic number."""


# ---- columns ----


def is_image(feature: Any) -> bool:
    return isinstance(feature, datasets.Image)


def undecoded(table: datasets.Dataset) -> datasets.Dataset:
    """Images as ``{"bytes", "path"}``: a table of them is read many times before any is looked at."""
    for name, feature in table.features.items():
        if is_image(feature) and feature.decode:
            table = table.cast_column(name, datasets.Image(decode=False))
    return table


def present(table: datasets.Dataset, name: str) -> list[bool]:
    """Whether each row of an undecoded column has an image."""
    return [value is not None and bool(value["bytes"] or value["path"]) for value in _values(table, name)]


def hashed(table: datasets.Dataset) -> datasets.Dataset:
    """Image columns as SHA-256 of each encoded image: what they hold, wherever their files are.

    Raises:
        DataError: Files that cannot be read.
    """
    names = [name for name, feature in table.features.items() if is_image(feature)]
    if not names:
        return table
    columns = {name: table[name][:] for name in table.column_names if name not in names}
    for name in names:
        columns[name] = [None if v is None else hashlib.sha256(encoded(v)).hexdigest() for v in _values(table, name)]
    return datasets.Dataset.from_dict(columns)


def _values(table: datasets.Dataset, name: str) -> Iterator[Any]:
    for batch in undecoded(table.select_columns([name])).iter(batch_size=1000):
        yield from batch[name]


def encoded(value: Mapping[str, Any]) -> bytes:
    """The bytes of an image file."""
    if value["bytes"]:
        return bytes(value["bytes"])
    try:
        return Path(value["path"]).read_bytes()
    except OSError as error:
        raise DataError(f"{value['path']}: {error.strerror or error}") from error


# ---- images ----


def opened(value: Mapping[str, Any]) -> Any:
    """A ``PIL.Image``, of which no more than its header is read yet.

    Raises:
        DataError: It is no image.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(io.BytesIO(encoded(value)))
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise DataError(f"{_name(value)}: not an image that Pillow can read: {error}") from error


def decoded(value: Mapping[str, Any], mode: str) -> Any:
    """A ``PIL.Image``, upright and of this mode (``RGB``, ``L``).

    Raises:
        DataError: It is no image, or a broken one.
    """
    from PIL import ImageOps

    image = opened(value)
    try:
        return ImageOps.exif_transpose(image).convert(mode)
    except (OSError, SyntaxError, ValueError) as error:  # truncated files, broken chunks
        raise DataError(f"{_name(value)}: a broken image: {error}") from error


def _name(value: Mapping[str, Any]) -> str:
    return str(value["path"] or "an image of the table")


def from_array(array: Any) -> Any:
    """A ``PIL.Image`` of an array ``[H, W]`` or ``[H, W, 3]`` of values from 0 to 255.

    Raises:
        DataError: Another shape, or values out of this range.
    """
    from PIL import Image

    array = np.asarray(array)
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3)) or 0 in array.shape:
        raise DataError(f"an array of shape {array.shape} is no image: [height, width] or [height, width, 3]")
    if array.dtype.kind not in "biuf" or not np.isfinite(array).all() or array.min() < 0 or array.max() > 255:
        raise DataError("an array of an image has values from 0 to 255")
    if array.dtype.kind == "f" and array.max() <= 1 and (array % 1).any():
        raise DataError("an array of an image has values from 0 to 255; these go from 0 to 1: multiply them by 255")
    array = array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array
    return Image.fromarray(np.round(array).astype(np.uint8))


def as_value(image: Any) -> dict[str, Any]:
    """A ``PIL.Image`` as a table holds it, in PNG, which loses nothing."""
    file = io.BytesIO()
    image.save(file, format="PNG")
    return {"bytes": file.getvalue(), "path": None}


# ---- idx files, as of MNIST ----


def read_idx(path: Path) -> np.ndarray:
    """The array in an idx file (LeCun's format of MNIST), packed by gzip or not.

    Raises:
        DataError: It is missing, no idx file, or has fewer or more bytes than its header says.
    """
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    kind, dimensions = (data[2], data[3]) if len(data) > 3 else (0, 0)
    if data[:2] != b"\0\0" or kind not in KINDS or not dimensions:
        raise DataError(
            f"{path}: not an idx file: it begins with {data[:4].hex(' ') or 'nothing'}, and not with 00 00, a type "
            f"({', '.join(f'{k:02x}' for k in KINDS)}) and a number of dimensions"
        )
    begin = 4 + 4 * dimensions
    if len(data) < begin:
        raise DataError(f"{path}: ends within its header, after {len(data)} bytes")
    shape = struct.unpack(f">{dimensions}I", data[4:begin])
    dtype = np.dtype(KINDS[kind])
    expected = begin + math.prod(shape) * dtype.itemsize
    if len(data) != expected:
        raise DataError(
            f"{path}: {len(data):,} bytes, and its header, which says {' x '.join(map(str, shape))} values, asks for "
            f"{expected:,}; is it the whole file?"
        )
    return np.frombuffer(data, dtype, offset=begin).reshape(shape)


def idx_split(name: str, paths: Sequence[Path]) -> datasets.Dataset:
    """A split of two idx files, images and labels, in either order: columns ``image`` and ``label``.

    Raises:
        DataError: Not one file of each, or they do not belong together.
    """
    arrays = {path: read_idx(path) for path in paths}
    images = [(path, array) for path, array in arrays.items() if array.ndim in (3, 4)]
    labels = [(path, array) for path, array in arrays.items() if array.ndim == 1]
    if len(images) != 1 or len(labels) != 1 or len(arrays) != 2:
        found = ", ".join(f"{path.name} {list(array.shape)}" for path, array in arrays.items())
        raise DataError(
            f"data_files: {name}: idx files come in pairs, images [rows, height, width] and labels [rows]; there are "
            f"{found}"
        )
    (image_path, pixels), (label_path, classes) = images[0], labels[0]
    if len(pixels) != len(classes):
        raise DataError(
            f"{image_path} has {len(pixels):,} images, and {label_path} {len(classes):,} labels; do they belong "
            "together?"
        )
    features = datasets.Features(image=datasets.Image(decode=False), label=datasets.Value("int64"))
    columns = {"image": [as_value(from_array(p)) for p in pixels], "label": [int(label) for label in classes]}
    return datasets.Dataset.from_dict(columns, features=features)
