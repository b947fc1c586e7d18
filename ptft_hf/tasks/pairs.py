"""Rows of preferences as the data has them: two answers, each behind the prompt, a margin, a tie."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ptft_hf.tasks import conversations, rivals
from ptft_hf.tasks.conversations import Turns

ANSWERS = ("chosen", "rejected")
TRUTH = {"true": True, "1": True, "false": False, "0": False, "": False}
"""What a ``tie`` of a csv file may be."""


def conversations_of(row: Mapping[str, Any]) -> list[Turns]:
    """Of a row of the data, or one of ``predict``'s: its answers, each behind the prompt."""
    if "conversations" in row:
        return list(row["conversations"])
    return [conversations.conversation(row.get("prompt"), row[name]) for name in ANSWERS]


def is_tie(row: Mapping[str, Any]) -> bool:
    """
    Raises:
        KeyError: It is neither true nor false.
    """
    value = row.get("tie")
    return value if isinstance(value, bool) else TRUTH["" if value is None else str(value).strip().lower()]


def margin_of(row: Mapping[str, Any]) -> float:
    """
    Raises:
        ValueError, TypeError: It is no number from 0 on.
    """
    value = row.get("margin")
    if value is None or value == "":
        return 0.0
    margin = float(value)
    if isinstance(value, bool) or not 0 <= margin < math.inf:
        raise ValueError(value)
    return margin


def label_of(row: Mapping[str, Any]) -> list[float]:
    """The probability that the chosen answer is the better one, and the margin."""
    return [0.5 if is_tie(row) else 1.0, margin_of(row)]


def answers_of(row: Mapping[str, Any]) -> list[str]:
    """The answers alone, as texts."""
    return [turns[-1]["content"] for turns in conversations_of(row)]


def faults(split: str, rows: Any) -> list[str]:
    """What is wrong with a split's rows; of each kind the first three."""
    found: dict[str, list[str]] = {}
    for number, row in enumerate(rows, 1):
        for kind, fault in _faults(row):
            found.setdefault(kind, []).append(f"{split}: row {number}: {fault}")
    return [problem for kind in found.values() for problem in kind[:3]]


def _faults(row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name in ("prompt", *ANSWERS):
        if row.get(name) is not None and (problem := conversations.fault(row[name])):
            yield name, f"{name!r} {problem}"
    margin = tie = None
    try:
        margin = margin_of(row)
    except (ValueError, TypeError):
        yield (
            "margin",
            f"'margin' is {row['margin']!r}; expected a number from 0 on, by which the chosen answer is better",
        )
    try:
        tie = is_tie(row)
    except KeyError:
        yield "tie", f"'tie' is {row['tie']!r}; expected true or false"
    if tie and margin:
        yield "both", f"a tie with a margin of {margin:g}; leave one out"


def described(split: str, rows: Any) -> str:
    """How many pairs there are, and how long their answers."""
    lengths = [[rivals.words_of(answer) for answer in answers_of(row)] for row in rows]
    chosen, rejected = np.mean(lengths, axis=0)
    labels = [label_of(row) for row in rows]
    counts = {"ties": sum(p == 0.5 for p, _ in labels), "with a margin": sum(margin > 0 for _, margin in labels)}
    more = "".join(f", {count:,} {what}" for what, count in counts.items() if count)
    return (
        f"{split}: {len(rows):,} pairs{more}; answers have {chosen:.0f} words on average if chosen, {rejected:.0f} "
        "if rejected"
    )
