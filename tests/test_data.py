"""Splits cut from train, one split for evaluation, fingerprints, converters, and real data sets."""

from __future__ import annotations

import hashlib
import importlib.util
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from ptft_hf import data
from ptft_hf.data import splitting
from ptft_hf.errors import DataError
from ptft_hf.recipes import DataSource
from tests.data_builders import ROWS, SPLITS, load, problems_of, three, write_jsonl

# --- Cutting a missing split ------------------------------------------------------------------------------


def test_missing_splits_are_cut_stratified_seeded_and_said_aloud() -> None:
    rows = [{"text": f"t{i}", "label": "rare" if i % 10 == 0 else "often"} for i in range(200)]
    first, again, other = (load(datasets.Dataset.from_list(rows), seed=seed) for seed in (0, 0, 1))
    for name in ("validation", "test"):
        assert Counter(getattr(first, name)["label"]) == {"often": 18, "rare": 2}
        note = f"there is no {name} split: 20 rows of train are held out (stratified by label, seed 0)"
        assert note in first.notes
        assert (
            getattr(first, name).to_list() == getattr(again, name).to_list() != getattr(other, name).to_list()
        )
    everything = [row for name in SPLITS for row in getattr(first, name).to_list()]
    assert sorted(everything, key=str) == sorted(rows, key=str)


def test_a_cut_never_separates_duplicates() -> None:
    rows = [{"text": f"Text {i % 30}{'!' * (i // 30)}", "label": i % 2} for i in range(90)]
    splits = load(datasets.Dataset.from_list(rows))
    assert not any("leakage" in note for note in data.check_leakage(splits, ["text"], "label", "error").notes)
    assert len(splits.test) == len(splits.validation) == 9


@pytest.mark.parametrize(
    "labels", [[i / 7 for i in range(50)], [["a"] * (i % 3) for i in range(50)], list(range(50))]
)
def test_numbers_lists_and_classes_of_one_row_are_cut_at_random(labels: list[Any]) -> None:
    rows = [{"text": f"t{i}", "label": label} for i, label in enumerate(labels)]
    splits = load(datasets.Dataset.from_list(rows))
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (40, 5, 5)
    assert "(at random, seed 0)" in splits.notes[0]


@pytest.mark.parametrize("seed", range(5))
def test_stratified_counts_are_within_one_of_the_proportion(seed: int) -> None:
    chance = random.Random(seed)
    classes = [chance.choice("aaaaabbc") for _ in range(100)] + ["d", "d"]
    found = splitting.cut(range(102), classes, 0.15, np.random.default_rng(seed))
    assert found is not None and found[1]
    taken, total = Counter(classes[row] for row in found[0]), Counter(classes)
    assert len(found[0]) == 15
    assert all(abs(taken[name] - total[name] * 15 / 102) <= 1 for name in total)
    assert all(taken[name] < total[name] for name in total)


@pytest.mark.parametrize(
    ("classes", "fraction", "expected"),
    [
        ("aaaaaaabbb", 0.2, {"a": 1, "b": 1}),  # shares 1.4 and 0.6: the larger remainder gets the second row
        ("aaaaaaaabb", 0.8, {"a": 7, "b": 1}),  # shares 6.4 and 1.6, but b keeps a row
    ],
)
def test_shares_by_hand(classes: str, fraction: float, expected: dict[str, int]) -> None:
    found = splitting.cut(range(10), classes, fraction, np.random.default_rng(0))
    assert found is not None and found[1]
    assert Counter(classes[row] for row in found[0]) == expected


def test_too_few_rows_to_cut_is_an_error() -> None:
    (problem,) = problems_of(datasets.Dataset.from_list(ROWS[:2]))
    assert "too few to cut" in problem


# --- One split, for evaluation ----------------------------------------------------------------------------


def one_split(source: Any, split: str) -> tuple[datasets.Dataset, list[str]]:
    return data.load_split(source, split, columns={}, required=["text", "label"])


def test_a_file_or_dataset_alone_is_the_split_asked_for(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "rows.jsonl", [*ROWS, {"text": "x", "label": None}, {"text": "", "label": "odd"}]
    )
    table, notes = one_split(path, "test")
    assert table.to_list() == [*ROWS, {"text": "", "label": "odd"}]
    assert notes == [
        "test: 1 of 42 rows have no label: dropped",
        "test: 1 of 41 rows have an empty text: kept",
    ]
    assert one_split(datasets.Dataset.from_list(ROWS), "validation")[0].to_list() == ROWS
    assert one_split(DataSource(data_files={"test": path}), "test")[0].to_list() == table.to_list()


def test_a_split_among_others_is_read_without_them() -> None:
    given = three(train=[{"text": "a", "label": None}])
    assert one_split(given, "test")[0].to_list() == given["test"].to_list()
    with pytest.raises(DataError, match="no row of train has a label"):
        one_split(given, "train")


def test_a_split_that_is_not_there(tmp_path: Path) -> None:
    both = datasets.DatasetDict({n: datasets.Dataset.from_list(ROWS) for n in ("validation", "test")})
    with pytest.raises(DataError, match="there is no split 'train', only validation, test"):
        one_split(both, "train")
    with pytest.raises(DataError, match="no row of test has a label"):
        one_split(write_jsonl(tmp_path / "a.jsonl", [{"text": "a", "label": None}]), "test")


# --- Fingerprints -----------------------------------------------------------------------------------------


def test_fingerprint_is_of_the_rows_only() -> None:
    table = datasets.Dataset.from_list([{"text": "\u00e9", "label": 1}, {"text": "b", "label": None}])
    by_hand = b'{"label":1,"text":"\\u00e9"}\n{"label":null,"text":"b"}\n'
    assert data.fingerprint(table) == "sha256:" + hashlib.sha256(by_hand).hexdigest()
    assert data.fingerprint(table.select_columns(["label", "text"]).with_format("numpy")) == data.fingerprint(
        table
    )
    assert data.fingerprint(table.select([1, 0])) != data.fingerprint(table)


# --- Converters -------------------------------------------------------------------------------------------

PAPER = {
    "id": "p",
    "sentences": {"abstract": ["one", "two"], "conclusion": ["three", "four"]},
    "highlights": {
        "outcome": {"abstract": [0, 1], "conclusion": [0, 1]},
        "challenge": {"abstract": [1, 0], "conclusion": [0, 1]},
        "approach": {"abstract": [0, 1], "conclusion": [0, 0]},
    },
}


def test_aclsum_counts_the_first_of_challenge_approach_outcome() -> None:
    assert [(row["text"], row["label"]) for row in data.aclsum_roles([PAPER])] == [
        ("one", "challenge"),
        ("two", "approach"),
        ("three", "none"),
        ("four", "challenge"),
    ]
    assert [row["label"] for row in data.aclsum_roles_multilabel([PAPER])] == [
        ["challenge"],
        ["approach", "outcome"],
        [],
        ["challenge", "outcome"],
    ]


def fewer_marks(rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """A converter for the next test, found by its import path."""
    for row in rows:
        yield from data.aclsum_roles([row | {"highlights": {a: {} for a in row["highlights"]}}])


@pytest.mark.parametrize(
    ("converter", "expected"),
    [
        (
            f"{__name__}:fewer_marks",
            "failed on split 'train': ValueError: paper 'p', section 'abstract': 2 sentences but 0",
        ),
        ("ptft_hf.data:aclsum_rolls", "'ptft_hf.data:aclsum_rolls' cannot be imported"),
        ("no_such_package.x:f", "No module named 'no_such_package'"),
        ("ptft_hf.data:SPLITS", "is a tuple, not a function"),
    ],
)
def test_a_converter_that_fails_is_named(converter: str, expected: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "papers.jsonl", [PAPER])
    (problem,) = problems_of(DataSource(path=path, converter=converter))
    assert expected in problem


# --- Real data --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("converter", ["aclsum_roles", "aclsum_roles_multilabel"])
def test_aclsum_as_published(converter: str) -> None:
    if importlib.util.find_spec("aclsum") is None:
        pytest.skip("the package aclsum, which holds the data, is not installed")
    names = {"train": "train", "validation": "val", "test": "test"}
    paths = {ours: f"package:aclsum/dataset/{theirs}.jsonl" for ours, theirs in names.items()}
    splits = load(DataSource(path="json", data_files=paths, converter=f"ptft_hf.data:{converter}"))
    assert [len(splits.train), len(splits.validation), len(splits.test)] == [3868, 1978, 3766]
    counts = Counter(map(str, splits.train["label"]))
    none = counts["none" if converter == "aclsum_roles" else "[]"]
    assert round(none / 3868, 2) == 0.58
    assert len(counts) == (4 if converter == "aclsum_roles" else 6)
    assert splits.notes == []


@pytest.mark.parametrize(
    ("name", "sizes", "classes"),
    [("sentence_polarity", (8529, 1066, 1067), 2), ("clinc_imbalanced", (10625, 3100, 5500), 151)],
)
def test_real_classification_data(real_data: Path, name: str, sizes: tuple[int, ...], classes: int) -> None:
    splits = load(str(real_data / name))
    assert (len(splits.train), len(splits.validation), len(splits.test)) == sizes
    assert len(set(splits.train["label"])) == classes
    assert splits.notes == []
    dropped = data.check_leakage(splits, ["text"], "label", "drop")
    assert len(dropped.test) == sizes[2] and len(dropped.train) < sizes[0]
    clean = data.check_leakage(dropped._replace(notes=[]), ["text"], "label", "error")
    assert clean.notes == ["no text stands twice in train or in two splits"]


def test_real_tokens_documents_and_messages(real_data: Path) -> None:
    tokens = load(str(real_data / "wnut17"), required=["tokens", "ner_tags"], label_column="ner_tags")
    assert (len(tokens.train), len(tokens.validation), len(tokens.test)) == (3394, 1009, 1287)
    messages = load(str(real_data / "instructions"), required=["messages"], label_column=None)
    assert (len(messages.train) + len(messages.validation), len(messages.test)) == (899, 100)
    papers = load(
        str(real_data / "scitldr"),
        required=["document", "summary"],
        optional=["references"],
        label_column="summary",
    )
    assert papers.test.column_names == ["document", "summary", "references"]
