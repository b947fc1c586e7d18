"""Images as a source: folders, idx files, arrays and scikit-learn's digits; what is compared and what is refused."""

from __future__ import annotations

import gzip
import hashlib
import io
import struct
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from ptft_hf import data, recipes, tasks
from ptft_hf.data import images
from ptft_hf.errors import DataError
from ptft_hf.recipes import DataSource

WANTED: dict[str, Any] = {"columns": {}, "required": ("image", "label"), "seed": 1}


def idx(array: np.ndarray, kind: int = 0x08) -> bytes:
    """The format as it is described beside MNIST: 0, 0, type, dimensions; big-endian sizes; values."""
    return bytes([0, 0, kind, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_pair(folder: Path, split: str, count: int, *, packed: bool = False) -> list[str]:
    rng = np.random.default_rng(count)
    pixels = rng.integers(0, 256, (count, 5, 4), dtype=np.uint8)
    classes = np.arange(count, dtype=np.uint8) % 2
    names = [f"{split}-images-idx3-ubyte", f"{split}-labels-idx1-ubyte"]
    for name, array in zip(names, (pixels, classes), strict=True):
        content = idx(array)
        (folder / name).write_bytes(gzip.compress(content, mtime=0) if packed else content)
    return [str(folder / name) for name in names]


def folder_of_images(root: Path, sizes: dict[str, int]) -> Path:
    for split, count in sizes.items():
        for label, shade in (("dark", 20), ("light", 220)):
            (root / split / label).mkdir(parents=True)
            for i in range(count):
                picture = np.full((6, 6, 3), shade, dtype=np.uint8)
                picture[0, 0] = (i, len(split), 0)
                Image.fromarray(picture).save(root / split / label / f"{i}.png")
    return root


# ---- idx ----


@pytest.mark.parametrize("packed", [False, True])
def test_idx_files_give_their_images_and_labels(tmp_path: Path, packed: bool) -> None:
    files = {name: write_pair(tmp_path, name, count, packed=packed) for name, count in (("train", 8), ("test", 4))}
    files["test"].reverse()
    source = DataSource(path="idx", data_files=files)
    splits = data.load_splits(source, **WANTED)
    assert [len(splits.train) + len(splits.validation), len(splits.test)] == [8, 4]
    rng = np.random.default_rng(4)
    expected = rng.integers(0, 256, (4, 5, 4), dtype=np.uint8)
    found = [np.asarray(images.decoded(value, "L")) for value in splits.test["image"][:]]
    assert np.array_equal(found, expected)
    assert splits.test["label"][:] == [0, 1, 0, 1]


def test_values_of_several_bytes_are_big_endian(tmp_path: Path) -> None:
    path = tmp_path / "values"
    path.write_bytes(b"\0\0\x0c\x02" + struct.pack(">II", 1, 3) + struct.pack(">iii", -5, 0, 70000))
    assert images.read_idx(path).tolist() == [[-5, 0, 70000]]


GOOD = idx(np.zeros((2, 3, 3), np.uint8))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x89PNG", "not an idx file: it begins with 89 50 4e 47"),
        (b"", "not an idx file: it begins with nothing"),
        (b"\0\0\x07\x01", "not an idx file"),
        (GOOD[:7], "ends within its header, after 7 bytes"),
        (GOOD[:-1], "33 bytes, and its header, which says 2 x 3 x 3 values, asks for 34; is it the whole file"),
        (GOOD + b"\0", "35 bytes"),
        (gzip.compress(GOOD, mtime=0)[:-9], "cannot be read"),
    ],
)
def test_broken_idx_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "train-images"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        images.read_idx(path)
    assert str(path) in str(caught.value)


def test_idx_files_that_are_no_pair_are_refused(tmp_path: Path) -> None:
    pixels, labels = write_pair(tmp_path, "train", 4)
    (tmp_path / "more").write_bytes(idx(np.zeros(5, np.uint8)))
    for files, message in (
        ([pixels], r"come in pairs, .*there are train-images-idx3-ubyte \[4, 5, 4\]"),
        ([labels, str(tmp_path / "more")], "come in pairs"),
        ([pixels, str(tmp_path / "more")], "has 4 images, and .*more 5 labels; do they belong"),
        ([pixels, str(tmp_path / "mre")], "mre does not exist"),
    ):
        with pytest.raises(DataError, match=message):
            data.load_splits(DataSource(path="idx", data_files={"train": files}), **WANTED)


# ---- folders and tables ----


def test_a_folder_of_images_is_read_by_its_folders(tmp_path: Path) -> None:
    folder_of_images(tmp_path, {"train": 4, "validation": 2, "test": 2})
    splits = data.load_splits(DataSource(path="imagefolder", data_dir=str(tmp_path)), **WANTED)
    assert sorted(splits.train["label"][:]) == ["dark"] * 4 + ["light"] * 4
    (value,) = splits.test.select([0])["image"][:]
    assert set(value) == {"bytes", "path"}
    assert images.decoded(value, "RGB").size == (6, 6)


def test_images_are_compared_and_named_by_their_content(tmp_path: Path) -> None:
    """The same picture in two splits is a leak; a folder that has moved is the same data."""
    for name in ("one", "two"):
        root = folder_of_images(tmp_path / name, {"train": 3, "test": 2})
        (root / "test/dark/again.png").write_bytes((root / "train/dark/1.png").read_bytes())
    found = []
    for name in ("one", "two"):
        splits = data.load_splits(DataSource(path="imagefolder", data_dir=str(tmp_path / name)), **WANTED)
        checked = data.check_leakage(splits, ["image"], "label", "warn")
        found.append([data.fingerprint(part) for part in splits[:3]])
        leaks = [note for note in checked.notes if note.startswith("leakage: 1 of")]
        assert leaks and "(1 exactly" in leaks[0]
    assert found[0] == found[1]
    content = (tmp_path / "one/train/dark/1.png").read_bytes()
    table = datasets.Dataset.from_dict({"image": [content]}).cast_column("image", datasets.Image())
    assert images.hashed(table)["image"][:] == [hashlib.sha256(content).hexdigest()]


def test_rows_without_image_are_dropped() -> None:
    picture = Image.new("RGB", (4, 4))
    features = datasets.Features(image=datasets.Image(), label=datasets.Value("string"))
    table = datasets.Dataset.from_dict(
        {"image": [picture, None, picture], "label": ["a", "b", "b"]}, features=features
    )
    splits = data.load_splits(datasets.DatasetDict(train=table, validation=table, test=table), **WANTED)
    assert [len(part) for part in splits[:3]] == [2, 2, 2]
    assert "test: 1 of 3 rows have no image: dropped" in splits.notes


def test_scikit_learns_digits_are_its_own(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    recipe = recipes.load_task("image_classification/digits")
    task = tasks.build(recipe)
    splits = tasks.load_splits(task, recipe.data, recipe, 3)
    expected = load_digits()
    rows = {
        (np.asarray(images.decoded(image, "L")).tobytes(), label)
        for part in splits[:3]
        for image, label in zip(part["image"][:], part["label"][:], strict=True)
    }
    assert sum(len(part) for part in splits[:3]) == 1797
    assert rows == {
        (np.round(image * 255 / 16).astype(np.uint8).tobytes(), int(label))
        for image, label in zip(expected.images, expected.target, strict=True)
    }


# ---- single images ----


def png(picture: Image.Image, **options: Any) -> dict[str, Any]:
    file = io.BytesIO()
    picture.save(file, **{"format": "PNG", **options})
    return {"bytes": file.getvalue(), "path": None}


def test_a_photograph_is_turned_upright() -> None:
    picture = Image.new("RGB", (4, 2))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    assert images.decoded(png(picture, exif=exif), "RGB").size == (2, 4)
    assert images.decoded(png(picture), "L").mode == "L"


def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    for content, message in ((b"text", "not an image that Pillow can read"), (b"", "not an image")):
        path.write_bytes(content)
        with pytest.raises(DataError, match=message) as caught:
            images.decoded({"bytes": None, "path": str(path)}, "RGB")
        assert str(path) in str(caught.value)
    with pytest.raises(DataError, match=r"b\.png: No such file"):
        images.opened({"bytes": None, "path": str(tmp_path / "b.png")})
    rng = np.random.default_rng(0)
    whole = png(Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)))["bytes"]
    with pytest.raises(DataError, match="a broken image"):
        images.decoded({"bytes": whole[: len(whole) // 2], "path": None}, "RGB")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 2, 5)), "shape"),
        (np.zeros(4), "shape"),
        (np.zeros((0, 4)), "shape"),
        (np.full((2, 2), 300), "from 0 to 255"),
        (np.full((2, 2), -1.0), "from 0 to 255"),
        (np.full((2, 2), np.nan), "from 0 to 255"),
        (np.full((2, 2), 0.5), "multiply them by 255"),
    ],
)
def test_arrays_that_are_no_images_are_refused(array: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        images.from_array(array)


def test_arrays_are_images() -> None:
    assert images.from_array(np.zeros((2, 3))).size == (3, 2)
    assert images.from_array(np.full((2, 3, 1), 7)).getpixel((0, 0)) == 7
    assert images.from_array(np.full((2, 3, 3), 7, np.uint8)).mode == "RGB"
