"""Labels and texts: which types are kept, what is dropped and counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest

from ptft_hf.data import files
from tests.data_builders import ROWS, SPLITS, load, problems_of, split_files, three


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["a", "b"], ["a", "b"]),
        ([1, 0], [1, 0]),
        ([True, False], [True, False]),
        ([1.5, 0.0], [1.5, 0.0]),
        ([1, 0.5], [1.0, 0.5]),
        ([["x", "y"], []], [["x", "y"], []]),
        ([[1, 0], [0, 0]], [[1, 0], [0, 0]]),
    ],
)
def test_labels_keep_their_type(labels: list[Any], expected: list[Any], tmp_path: Path) -> None:
    rows = [{"text": f"t{i}", "label": label} for i, label in enumerate(labels)]
    splits = load(split_files(tmp_path, train=rows, validation=rows, test=rows))
    assert [repr(value) for value in splits.test["label"][:]] == [repr(value) for value in expected]


def test_integers_beside_numbers_and_empty_lists_take_the_type_of_the_other_splits(tmp_path: Path) -> None:
    numbers = {"train": [1, 2], "validation": [1.5, 2.0], "test": [0, 1]}
    lists: dict[str, list[Any]] = {"train": [["a"], []], "validation": [[], []], "test": [["b"], ["a"]]}
    for labels in (numbers, lists):
        rows = {n: [{"text": f"{n}{i}", "label": v} for i, v in enumerate(vs)] for n, vs in labels.items()}
        splits = load(split_files(tmp_path, **rows))
        assert len({str(getattr(splits, name).features["label"]) for name in SPLITS}) == 1
        assert splits.validation["label"][:] == labels["validation"]


def test_class_labels_become_names_and_minus_one_is_no_label() -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    table = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [0, 1, -1]}, features=features)
    unlabelled = datasets.Dataset.from_dict({"text": ["d", "e"], "label": [-1, -1]}, features=features)
    many = datasets.Dataset.from_dict(
        {"text": [f"t{i}" for i in range(30)], "label": [0, 1, 1] * 10}, features=features
    )
    splits = load(datasets.DatasetDict(train=many, validation=table, test=unlabelled))
    assert splits.validation["label"][:] == ["no", "yes"]
    assert "validation: 1 of 3 rows have no label: dropped" in splits.notes
    assert "test: none of its 2 rows has a label: the split is treated as missing" in splits.notes
    assert (len(splits.train), len(splits.test)) == (27, 3)
    assert set(splits.train["label"]) == {"no", "yes"}


def test_lists_of_class_labels_become_names() -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.List(datasets.ClassLabel(names=["x", "y"]))}
    )
    table = datasets.Dataset.from_dict(
        {"text": ["a", "b", "c"], "label": [[0, 1], [], [1]]}, features=features
    )
    splits = load(datasets.DatasetDict(train=table, validation=table, test=table))
    assert splits.train["label"][:] == [["x", "y"], [], ["y"]]


@pytest.mark.parametrize("missing", [None, float("nan"), ""])
def test_rows_without_label_are_dropped_and_counted(missing: Any, tmp_path: Path) -> None:
    kind: Any = 1.5 if isinstance(missing, float) else "a"
    rows = [
        {"text": "one", "label": kind},
        {"text": "two", "label": missing},
        {"text": "three", "label": kind},
    ]
    splits = load(split_files(tmp_path, train=rows, validation=rows, test=rows))
    assert splits.train["text"][:] == ["one", "three"]
    assert [note for note in splits.notes if "1 of 3 rows have no label: dropped" in note] == splits.notes
    assert len(splits.notes) == 3


def test_integers_with_gaps_that_pandas_made_floats_are_integers_again() -> None:
    nan = float("nan")
    rows = {"train": [1.0, nan, 0.0], "validation": [1, 0, 1], "test": [0, 1, 1]}
    tables = {
        n: datasets.Dataset.from_dict({"text": list("abc"), "label": labels}) for n, labels in rows.items()
    }
    splits = load(datasets.DatasetDict(tables))
    assert [type(label) for label in splits.train["label"]] == [int, int]


def test_train_without_any_label_is_an_error() -> None:
    given = three(train=[{"text": "a", "label": None}, {"text": "b", "label": None}])
    assert "no row of train has a label in column 'label'" in problems_of(given)[0]


def test_a_test_split_without_the_label_column_is_treated_as_missing(tmp_path: Path) -> None:
    source = split_files(tmp_path, train=ROWS, validation=ROWS[:4], test=[{"text": "x"}])
    splits = load(source)
    assert "test: no column 'label': the split is treated as missing" in splits.notes
    assert (len(splits.train), len(splits.test)) == (36, 4)


def test_labels_of_several_kinds_are_refused_with_an_example_each(tmp_path: Path) -> None:
    problems = problems_of(
        split_files(tmp_path, train=ROWS, validation=ROWS, test=[{"text": "x", "label": 7}])
    )
    assert len(problems) == 3
    assert "the labels of test are integers, such as 7" in problems[2]
    mixed = [{"text": "a", "label": "x"}, {"text": "b", "label": 3}, {"text": "c", "label": True}]
    (problem,) = problems_of(split_files(tmp_path, train=mixed, validation=ROWS, test=ROWS))
    assert (
        "column 'label' mixes strings ('x' in row 1) and integers (3 in row 2) and booleans (True in row 3)"
        in problem
    )
    objects = [{"text": "a", "label": {"x": 1}}]
    assert (
        "are objects"
        in problems_of(split_files(tmp_path, train=objects, validation=objects, test=objects))[0]
    )


@pytest.mark.parametrize(
    ("spelt", "expected"),
    [
        ([["1", "-2"], ["0", ""]], [[1, -2], [0, None]]),
        ([["1", "2"], ["0.5", "1e3"]], [[1.0, 2.0], [0.5, 1000.0]]),
        ([["true", "False"], ["TRUE"]], [[True, False], [True]]),
        ([["1", "2"], ["three"]], [["1", "2"], ["three"]]),
        ([["007", "010"]], [["007", "010"]]),
        ([["None", "NA", "nan"]], [["None", "NA", "nan"]]),
        ([["123456789012345678901"]], [["123456789012345678901"]]),
        ([["", " "]], [[None, None]]),
    ],
)
def test_csv_labels_are_what_they_spell_in_all_splits(
    spelt: list[list[str]], expected: list[list[Any]]
) -> None:
    assert repr(files.typed([list(column) for column in spelt])) == repr(expected)


def test_csv_texts_stay_text_and_none_is_a_word(tmp_path: Path) -> None:
    for name in SPLITS:
        (tmp_path / f"{name}.csv").write_text('text,label\n007,NA\nNone,1\n"a\nb",2\n', encoding="utf-8")
    splits = load(str(tmp_path))
    assert splits.train.to_list() == [
        {"text": "007", "label": "NA"},
        {"text": "None", "label": "1"},
        {"text": "a\nb", "label": "2"},
    ]


# --- Texts ------------------------------------------------------------------------------------------------


def test_empty_texts_are_dropped_from_train_and_kept_elsewhere() -> None:
    rows = [{"text": text, "label": "a"} for text in ("x", "", None, " \n", "y")]
    splits = load(three(train=rows, validation=rows, test=rows))
    assert splits.train["text"][:] == ["x", "y"]
    assert splits.test["text"][:] == ["x", "", "", " \n", "y"]
    assert splits.notes == [
        "train: 3 of 5 rows have an empty text: dropped",
        "validation: 3 of 5 rows have an empty text: kept",
        "test: 3 of 5 rows have an empty text: kept",
    ]


def test_empty_token_lists_count_as_empty() -> None:
    rows = [{"tokens": ["a"], "tags": ["O"]}, {"tokens": [], "tags": []}, {"tokens": None, "tags": ["O"]}]
    table = datasets.Dataset.from_list(rows)
    splits = load(
        datasets.DatasetDict(train=table, validation=table, test=table),
        required=["tokens", "tags"],
        label_column="tags",
    )
    assert splits.train["tokens"][:] == [["a"]]
    assert splits.test["tokens"][:] == [["a"], [], []]


@pytest.mark.parametrize(
    ("values", "expected"),
    [([1, 2], ["1", "2"]), (["a", None], ["a", ""]), ([[{"a": "b"}], None], [[{"a": "b"}], []])],
)
def test_the_only_column_may_hold_numbers_and_empty_rows(values: list[Any], expected: list[Any]) -> None:
    table = datasets.Dataset.from_dict({"prompt": values})
    source = datasets.DatasetDict(train=table, validation=table, test=table)
    splits = load(source, required=["prompt"], label_column=None)
    assert splits.validation["prompt"][:] == expected


def test_numbers_in_a_text_column_are_taken_as_text_and_said_aloud() -> None:
    table = datasets.Dataset.from_list([{"text": 12, "label": "a"}, {"text": None, "label": "b"}])
    splits = load(datasets.DatasetDict(train=table, validation=table, test=table))
    assert splits.train["text"][:] == ["12"]
    assert "train: column 'text' holds int64, taken as text" in splits.notes


def test_an_optional_column_is_taken_if_there_and_must_be_in_all_splits(tmp_path: Path) -> None:
    pairs = [{"text": "a", "text_pair": None, "label": "x"}, {"text": "b", "text_pair": "c", "label": "y"}]
    options: dict[str, Any] = {"optional": ["text_pair"]}
    splits = load(split_files(tmp_path, train=pairs, validation=pairs, test=pairs), **options)
    assert splits.train["text_pair"][:] == ["", "c"]
    assert load(three(), **options).train.column_names == ["text", "label"]
    (problem,) = problems_of(split_files(tmp_path, train=pairs, validation=pairs, test=ROWS), **options)
    assert "split 'test' has no column 'text_pair'" in problem


def test_no_row_left_is_an_error_with_the_counts() -> None:
    (problem,) = problems_of(three(train=[{"text": "", "label": "a"}, {"text": "x", "label": None}]))
    assert "no row of train is left" in problem
    assert "1 of 2 rows have no label" in problem
    assert "1 of 1 rows have an empty text" in problem
