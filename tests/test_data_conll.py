"""CoNLL files as a source, by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from ptft_hf import data
from ptft_hf.data.files import read_rows
from ptft_hf.errors import DataError
from ptft_hf.recipes import DataSource

NEWS = """-DOCSTART- -X- -X- O

EU NNP B-NP B-ORG
rejects VBZ B-VP O

# CD B-NP O
Peter  NNP I-NP B-PER
Blackburn NNP I-NP I-PER
"""
SENTENCES = [["EU", "rejects"], ["#", "Peter", "Blackburn"]]


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def test_the_first_column_is_the_word_and_the_last_one_the_tag(tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path / "a.conll", NEWS))
    assert [row["tokens"] for row in rows] == SENTENCES
    assert [row["tags"] for row in rows] == [["B-ORG", "O"], ["O", "B-PER", "I-PER"]]
    assert rows[0]["column_2"] == ["NNP", "VBZ"]
    assert list(rows[0]) == ["tokens", "column_2", "column_3", "tags"]


def test_line_ends_a_byte_order_mark_and_a_last_line_without_end(tmp_path: Path) -> None:
    expected = read_rows(write(tmp_path / "a.conll", NEWS))
    other = "\ufeff" + NEWS.replace("\n", "\r\n").rstrip()
    assert read_rows(write(tmp_path / "b.iob2", other)) == expected


def test_with_tabs_a_word_may_hold_spaces(tmp_path: Path) -> None:
    text = "# id 7f\tdomain=en\nNew York\tB-LOC\n\u00a0\tO\na\u2028b\tO\n\n \nx\tO\n"
    assert read_rows(write(tmp_path / "a.bio", text)) == [
        {"tokens": ["New York", "\u00a0", "a\u2028b"], "tags": ["B-LOC", "O", "O"]},
        {"tokens": ["x"], "tags": ["O"]},
    ]


def test_lines_of_other_widths_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.conll", "a B-X O\nb O\n\nc\nd I-X O\n")
    with pytest.raises(DataError) as caught:
        read_rows(path)
    assert caught.value.problems == (
        f"{path}, line 2: 2 columns between spaces, not 3 columns as above: 'b O'",
        f"{path}, line 4: 1 columns between spaces, not 3 columns as above: 'c'",
    )
    with pytest.raises(DataError, match="line 1: 1 columns between spaces, not at least a word and its tag"):
        read_rows(write(path, "word\nword\n"))


def test_files_are_a_source_with_any_column_as_the_tags(tmp_path: Path) -> None:
    for name in ("train", "dev", "test"):
        write(tmp_path / f"{name}.txt", NEWS.replace("EU", name))
    files = {name: str(tmp_path / f"{name}.txt") for name in ("train", "dev", "test")}
    source = DataSource(path="conll", data_files=files)
    options = {"required": ["tokens", "tags"], "label_column": "tags", "seed": 0}
    splits = data.load_splits(source, columns={}, **options)
    assert splits.validation["tokens"][:] == [["dev", "rejects"], SENTENCES[1]]
    chunks = data.load_splits(source, columns={"tags": "column_3"}, **options)
    assert chunks.train["tags"][0] == ["B-NP", "B-VP"]
    file = str(write(tmp_path / "x.conll", NEWS))
    rows, _ = data.load_split(file, columns={}, required=["tokens", "tags"], label_column="tags")
    assert rows["tokens"][:] == SENTENCES


def test_a_compressed_file_is_refused(tmp_path: Path) -> None:
    import gzip

    path = tmp_path / "a.conll.gz"
    path.write_bytes(gzip.compress(NEWS.encode()))
    with pytest.raises(DataError, match="compressed CoNLL files are not read: unpack them first"):
        data.load_split(str(path), columns={}, required=["tokens", "tags"], label_column="tags")
