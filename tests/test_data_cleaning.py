"""Cleaning of running text: what each step does, and that it is counted."""

from __future__ import annotations

import datasets
import pytest

from ptft_hf import data
from ptft_hf.data.cleaning import clean, plain_white_space, without_repeated_lines
from ptft_hf.errors import DataError
from ptft_hf.recipes import Cleaning

TEXTS = ["a  b", "cafe\u0301", "\ufb01n", "x\nx\ny", "short", "a  b", "  long enough \u00a0 text\r\nnext "]


def rows(texts: list[str]) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": texts, "document": [f"d{i}" for i in range(len(texts))]})


def test_every_step_is_done_in_order_and_counted() -> None:
    how = Cleaning(
        unicode="NFKC",
        white_space=True,
        duplicate_lines=True,
        min_characters=3,
        max_characters=20,
        duplicate_texts=True,
    )
    cleaned, notes = clean("train", rows([*TEXTS, "ab", "very " * 10]), how)
    assert cleaned["text"][:] == ["a b", "caf\u00e9", "fin", "x\ny", "short", "long enough text\nnext"][:5]
    assert cleaned["document"][:] == ["d0", "d1", "d2", "d3", "d4"]
    assert notes == [
        "cleaning, train: Unicode form NFKC changed 3 of 9 texts",
        "cleaning, train: white space changed 4 of 9 texts",
        "cleaning, train: duplicate lines changed 1 of 9 texts",
        "cleaning, train: length of 3 to 20 characters: 3 of 9 texts dropped",
        "cleaning, train: duplicate texts: 1 of 6 texts dropped",
    ]


def test_what_is_not_asked_for_is_not_done() -> None:
    same, notes = clean("test", rows(TEXTS), Cleaning())
    assert same["text"][:] == TEXTS
    assert notes == []
    composed, notes = clean("test", rows(TEXTS), Cleaning(unicode="NFC"))
    assert composed["text"][1:3] == ["caf\u00e9", "\ufb01n"]  # a ligature stays under NFC
    assert notes == ["cleaning, test: Unicode form NFC changed 1 of 7 texts"]
    least, notes = clean("test", rows(TEXTS), Cleaning(min_characters=5))
    assert least["text"][:] == ["cafe\u0301", "x\nx\ny", "short", TEXTS[-1]]
    assert notes == ["cleaning, test: length of 5 or more characters: 3 of 7 texts dropped"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\t b \u2003c", "a b c"),
        (" a \r\n b\rc\u2028d ", "a\nb\nc\nd"),
        ("one\n\ntwo", "one\n\ntwo"),
        ("\n \n", ""),
    ],
)
def test_white_space(text: str, expected: str) -> None:
    assert plain_white_space(text) == expected


def test_repeated_lines_go_and_empty_ones_stay() -> None:
    assert without_repeated_lines("a\n\nb\n\na\nc\nb") == "a\n\nb\n\nc"


def test_a_document_is_held_out_whole() -> None:
    texts = [f"text {i}" for i in range(60)]
    table = datasets.Dataset.from_dict({"text": texts, "document": [f"book {i // 6}" for i in range(60)]})
    fields = {"columns": {}, "required": ("text",), "optional": ("document",), "seed": 1, "label_column": None}
    splits = data.load_splits(table, **fields, group_column="document")
    books = [set(getattr(splits, name)["document"]) for name in ("train", "validation", "test")]
    assert [len(found) for found in books] == [8, 1, 1]
    assert set.union(*books) == set(table["document"])
    assert splits.notes == [
        f"there is no {name} split: 6 rows of train are held out (at random, each document whole, seed 1)"
        for name in ("test", "validation")
    ]
    two = table.map(lambda row: {"document": "one"})
    splits = data.load_splits(two, **fields, group_column="document")
    assert "(at random, seed 1)" in splits.notes[0]


def test_a_split_that_cleaning_empties_is_refused_with_what_was_done() -> None:
    splits = data.Splits(rows(["long enough"]), rows(["a"]), rows(["long enough"]), [])
    with pytest.raises(DataError, match="1 of 1 texts dropped") as caught:
        data.clean_splits(splits, Cleaning(min_characters=5))
    assert "cleaning leaves no text of validation: change its steps" in str(caught.value)
