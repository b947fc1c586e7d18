"""How well predicted entities match the true ones: whole (seqeval, strict) and in part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ptft_hf.metrics import LabelReport
from ptft_hf.tasks.tags import Entity, entities


def strict(gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> dict[str, dict[str, Any]]:
    """seqeval's report in strict mode: an entity counts if type, first and last word are all right.

    Args:
        gold: IOB2 tags of each row.
        predicted: The same.

    Returns:
        ``precision``, ``recall``, ``f1-score`` and ``support`` of each type that occurs in either, and of
        ``micro avg``, ``macro avg``, ``weighted avg``; empty where neither has an entity.
    """
    from seqeval.metrics import classification_report
    from seqeval.scheme import IOB2

    if not any(tag != "O" for rows in (gold, predicted) for tags in rows for tag in tags):
        return {}
    pair = [list(map(list, rows)) for rows in (gold, predicted)]
    report: dict[str, dict[str, Any]] = classification_report(
        *pair, output_dict=True, mode="strict", scheme=IOB2, zero_division=0
    )
    return report


def by_type(report: dict[str, dict[str, Any]], types: Sequence[str]) -> list[LabelReport]:
    """The figures of each type; zeros for one that is neither there nor predicted."""
    none = {"precision": 0.0, "recall": 0.0, "f1-score": 0.0, "support": 0}
    rows = [(name, report.get(name, none)) for name in types]
    return [
        LabelReport(
            label=name,
            precision=float(row["precision"]),
            recall=float(row["recall"]),
            f1=float(row["f1-score"]),
            support=int(row["support"]),
        )
        for name, row in rows
    ]


def partial(gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> dict[str, float]:
    """Matches in part: the same type, and at least one word in common, count one half (MUC-5's rule).

    Each true entity is matched with at most one predicted one: first those that are equal, then, from left to
    right, those that overlap.

    Returns:
        ``exact``, ``partial``, ``missed`` and ``spurious`` entities, and ``precision``, ``recall``, ``f1``.
    """
    exact = overlapping = true = said = 0
    for gold_tags, predicted_tags in zip(gold, predicted, strict=True):
        wanted, found = entities(gold_tags), entities(predicted_tags)
        true, said = true + len(wanted), said + len(found)
        equal = set(wanted) & set(found)
        exact += len(equal)
        left = [e for e in found if e not in equal]
        for entity in wanted:
            if entity not in equal and (match := _first_overlap(entity, left)):
                left.remove(match)
                overlapping += 1
    score = exact + overlapping / 2
    return {
        "exact": exact,
        "partial": overlapping,
        "missed": true - exact - overlapping,
        "spurious": said - exact - overlapping,
        "precision": score / said if said else 0.0,
        "recall": score / true if true else 0.0,
        "f1": 2 * score / (said + true) if said + true else 0.0,
    }


def _first_overlap(entity: Entity, others: Sequence[Entity]) -> Entity | None:
    return next(
        (
            other
            for other in others
            if other.type == entity.type and other.start < entity.end and entity.start < other.end
        ),
        None,
    )
