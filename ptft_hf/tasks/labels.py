"""Labels of the classifiers: of which kind they are, and in which order they stand."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"


def infer(values: Iterable[Any]) -> str:
    values = list(values)
    if any(isinstance(value, (list, tuple)) for value in values):
        return MULTI
    return REGRESSION if any(isinstance(value, float) for value in values) else SINGLE


def flat(values: Iterable[Any]) -> Iterable[Any]:
    """Every label of every row; one that a row names twice counts once."""
    return (x for value in values for x in (set(value) if isinstance(value, (list, tuple)) else [value]))


def wrong_kind(split: str, values: Iterable[Any], problem_type: str) -> list[str]:
    kinds: tuple[type, ...] = {SINGLE: (str, int, bool), MULTI: (list, tuple), REGRESSION: (int, float)}[
        problem_type
    ]
    wrong = [value for value in values if not isinstance(value, kinds)]
    if not wrong:
        return []
    expected = {SINGLE: "strings, integers or booleans", MULTI: "lists of labels", REGRESSION: "numbers"}
    return [
        f"{split}: {len(wrong)} labels such as {wrong[0]!r} ({type(wrong[0]).__name__}) do not fit "
        f"{problem_type}, which needs {expected[problem_type]}; set problem_type or mend the data"
    ]


def label_order(label: Any) -> tuple[bool, Any]:
    return (isinstance(label, str), label)
