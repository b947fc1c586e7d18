"""The same text twice, in one split or in two: counts against brute force, and the three policies."""

from __future__ import annotations

import itertools
import random

import datasets
import pytest

from ptft_hf import data
from ptft_hf.data import duplicates
from ptft_hf.errors import DataError
from tests.data_builders import SPLITS, load, three


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Hello, World!", "hello world"),
        ("don't", "DONT"),
        ("don\u2019t", "don't"),
        ("well-known", "well known"),
        ("caf\u00e9", "cafe\u0301"),
        ("\uff21\uff22\uff11", "ab1"),
        ("stra\u00dfe", "STRASSE"),
        ("a\u200bb", "ab"),
        ("a\u00a0 b\n", "a b"),
    ],
)
def test_folding_makes_equal(one: str, other: str) -> None:
    assert duplicates.fold(one) == duplicates.fold(other)


@pytest.mark.parametrize(
    ("one", "other"), [(":)", ":("), ("a part", "apart"), ("1.5", "15"), ("c+", "c"), ("a", "\u00e4")]
)
def test_folding_keeps_apart(one: str, other: str) -> None:
    assert duplicates.fold(one) != duplicates.fold(other)


def _same(one: str, other: str) -> bool:
    """The definition, pair by pair, for ASCII letters, blanks, dots, dashes and apostrophes."""

    def words(text: str) -> list[str]:
        bare = text.replace("'", "")
        groups = itertools.groupby(bare.lower(), str.isalpha)
        return ["".join(group) for letters, group in groups if letters] or bare.split()

    return words(one) == words(other)


def _random_rows(chance: random.Random, n: int) -> list[tuple[str, str]]:
    return [
        ("".join(chance.choices("aAb .-'", k=chance.randint(0, 4))), chance.choice("xy")) for _ in range(n)
    ]


@pytest.mark.parametrize("seed", range(30))
def test_counts_equal_brute_force(seed: int) -> None:
    chance = random.Random(seed)
    first, second = _random_rows(chance, 60), _random_rows(chance, 40)
    keys = [
        duplicates.keys(name, [[text for text, _ in rows]], [label for _, label in rows])
        for name, rows in (("train", first), ("test", second))
    ]
    earlier = [first[:i] for i in range(len(first))]
    cases = [
        (duplicates.within(keys[0]), earlier),
        (duplicates.between(*keys), [second] * len(first)),
    ]
    for overlap, others in cases:
        twins = [[o for o in found if _same(row[0], o[0])] for row, found in zip(first, others, strict=True)]
        assert overlap.rows == tuple(i for i, found in enumerate(twins) if found)
        assert overlap.exact == sum(
            any(t == row[0] for t, _ in found) for row, found in zip(first, twins, strict=True)
        )
        conflicts = (any(y != row[1] for _, y in found) for row, found in zip(first, twins, strict=True))
        assert overlap.conflicting == sum(conflicts)
        assert overlap.total == 60 and 0 < overlap.exact < len(overlap.rows) and overlap.conflicting > 0


def leaky() -> data.Splits:
    return load(
        three(
            train=[
                {"text": "alone", "label": "a"},
                {"text": "In test", "label": "a"},
                {"text": "in validation", "label": "a"},
                {"text": "Alone.", "label": "b"},
                {"text": "last", "label": "b"},
            ],
            validation=[{"text": "in validation", "label": "a"}, {"text": "both", "label": "a"}],
            test=[
                {"text": "in test!", "label": "b"},
                {"text": "both", "label": "a"},
                {"text": "both", "label": "a"},
            ],
        )
    )


def test_warn_counts_and_changes_nothing() -> None:
    before = leaky()
    after = data.check_leakage(before, ["text"], "label", "warn")
    assert [getattr(after, name).to_list() for name in SPLITS] == [
        getattr(before, name).to_list() for name in SPLITS
    ]
    near = "in all but case, white space and punctuation"
    assert after.notes == [
        f"duplicates: 1 of 5 train rows repeat an earlier train row (0 exactly, 1 {near}; 1 of them with another label), such as 'Alone.'",  # noqa: E501
        f"leakage: 1 of 5 train rows stand in validation too (1 exactly, 0 {near}), such as 'in validation'",
        f"leakage: 1 of 5 train rows stand in test too (0 exactly, 1 {near}; 1 of them with another label), such as 'In test'",  # noqa: E501
        f"leakage: 1 of 2 validation rows stand in test too (1 exactly, 0 {near}), such as 'both'",
    ]


def test_drop_cleans_train_and_validation_and_never_test() -> None:
    after = data.check_leakage(leaky(), ["text"], "label", "drop")
    assert after.train["text"][:] == ["alone", "last"]
    assert after.validation["text"][:] == ["in validation"]
    assert len(after.test) == 3
    assert "train: 3 duplicates dropped, 2 rows left" in after.notes
    again = data.check_leakage(after._replace(notes=[]), ["text"], "label", "error")
    assert again.notes == ["no text stands twice in train or in two splits"]


def test_error_names_counts_and_examples_but_not_for_repeats_within_train() -> None:
    with pytest.raises(DataError, match=r"1 of 5 train rows stand in test too.*such as 'In test'"):
        data.check_leakage(leaky(), ["text"], "label", "error")
    only_within = load(three(train=[{"text": "x", "label": "a"}, {"text": "X", "label": "b"}]))
    assert (
        "repeat an earlier train row" in data.check_leakage(only_within, ["text"], "label", "error").notes[0]
    )


def test_drop_that_would_leave_nothing_is_an_error() -> None:
    rows = [{"text": "same", "label": "a"}]
    with pytest.raises(DataError, match="would leave no row of train"):
        data.check_leakage(load(three(train=rows, test=rows)), ["text"], "label", "drop")


def test_pairs_are_duplicates_only_if_both_texts_are() -> None:
    rows = [{"text": "a", "text_pair": pair, "label": "x"} for pair in ("b", "c", "B.")]
    splits = load(three(train=rows, validation=rows[:1], test=rows[1:2]), optional=["text_pair"])
    notes = data.check_leakage(splits, ["text", "text_pair"], "label", "warn").notes
    assert [note.partition("rows")[0] for note in notes] == [
        "duplicates: 1 of 3 train ",
        "leakage: 2 of 3 train ",
        "leakage: 1 of 3 train ",
    ]


def test_token_lists_messages_and_no_labels() -> None:
    tokens = datasets.Dataset.from_list([{"tokens": ["New", "York"]}, {"tokens": ["new", "york", "."]}])
    splits = data.Splits(tokens, tokens.select([0]), tokens.select([1]), [])
    assert "1 of 2 train rows" in data.check_leakage(splits, ["tokens"], None, "warn").notes[0]
    assert duplicates.flatten([{"role": "user", "content": "hi"}, None]) == "user hi "
