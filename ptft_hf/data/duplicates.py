"""Rows that stand twice, in one split or in two, exactly or in all but case, white space, punctuation."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple

_APOSTROPHES = "'`´ʼ‘’＇"  # noqa: RUF001
_EXAMPLES = 3


class Keys(NamedTuple):
    """The rows of one split as they are compared."""

    split: str
    exact: list[str]  # [rows] the texts as they are
    folded: list[str]  # [rows] the texts after `fold`
    labels: list[str]  # [rows] anything that is equal for equal labels


class Overlap(NamedTuple):
    """Rows of split ``first`` that stand in ``second`` too, or, in the same split, repeat an earlier row."""

    first: str
    second: str
    total: int  # rows of `first`
    rows: tuple[int, ...]  # indices into `first`, ascending
    exact: int  # how many of `rows` are equal to the letter
    conflicting: int  # how many of `rows` have a twin with another label
    examples: tuple[str, ...]

    def __str__(self) -> str:
        where = (
            f"repeat an earlier {self.first} row"
            if self.first == self.second
            else f"stand in {self.second} too"
        )
        near = len(self.rows) - self.exact
        parts = f"{self.exact:,} exactly, {near:,} in all but case, white space and punctuation"
        conflict = f"; {self.conflicting:,} of them with another label" if self.conflicting else ""
        shown = ", ".join(map(repr, self.examples))
        rows = f"{len(self.rows):,} of {self.total:,} {self.first} rows"
        return f"{rows} {where} ({parts}{conflict}), such as {shown}"


def fold(text: str) -> str:
    """``text`` without differences in case, white space, punctuation, Unicode form or invisible characters.

    Apostrophes vanish ("don't" is "dont"), other punctuation separates words ("well-known" is "well known");
    symbols such as ``+`` and ``$`` and emojis stay. A text of punctuation only keeps it: ":)" is not ":(".
    """
    plain = text.translate(_folding_table()[0])
    plain = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", plain).casefold())
    return " ".join(plain.translate(_folding_table()[1]).split()) or " ".join(plain.split())


@cache
def _folding_table() -> tuple[dict[int, None], dict[int, str]]:
    categories = [(code, unicodedata.category(chr(code))) for code in range(sys.maxunicode + 1)]
    vanishing = {code: None for code, category in categories if category == "Cf"}
    return vanishing | dict.fromkeys(map(ord, _APOSTROPHES)), {
        code: " " for code, category in categories if category[0] == "P"
    }


def flatten(value: Any) -> str:
    """The text in a column's value: a string, a list of tokens, or messages (their strings in order)."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        return " ".join(flatten(item) for item in value.values())
    if isinstance(value, list | tuple):
        return " ".join(flatten(item) for item in value)
    return str(value)


def keys(split: str, columns: Sequence[Sequence[Any]], labels: Sequence[Any] | None) -> Keys:
    """`Keys` of a split from its text columns ([columns][rows]) and its labels ([rows], or None)."""
    texts = [tuple(flatten(value) for value in row) for row in zip(*columns, strict=True)]
    return Keys(
        split,
        exact=["\x1e".join(row) for row in texts],
        folded=["\x1e".join(map(fold, row)) for row in texts],
        labels=[""] * len(texts) if labels is None else [repr(label) for label in labels],
    )


def within(rows: Keys) -> Overlap:
    """Rows of a split that repeat an earlier one; a conflict is an earlier twin with another label."""
    exact: set[str] = set()
    labels: dict[str, set[str]] = {}
    found: list[tuple[int, bool, bool]] = []
    for index, (text, folded, label) in enumerate(zip(rows.exact, rows.folded, rows.labels, strict=True)):
        if folded in labels:
            found.append((index, text in exact, bool(labels[folded] - {label})))
        exact.add(text)
        labels.setdefault(folded, set()).add(label)
    return _overlap(rows, rows.split, found)


def between(first: Keys, second: Keys) -> Overlap:
    """Rows of ``first`` that stand in ``second``; a conflict is a twin there with another label."""
    exact = set(second.exact)
    labels: dict[str, set[str]] = {}
    for folded, label in zip(second.folded, second.labels, strict=True):
        labels.setdefault(folded, set()).add(label)
    rows = enumerate(zip(first.exact, first.folded, first.labels, strict=True))
    found = [
        (index, text in exact, bool(labels[folded] - {label}))
        for index, (text, folded, label) in rows
        if folded in labels
    ]
    return _overlap(first, second.split, found)


def _overlap(first: Keys, second: str, found: Iterable[tuple[int, bool, bool]]) -> Overlap:
    found = list(found)
    examples: dict[str, str] = {}  # one per group of twins, those with conflicting labels first
    for index, _, _ in sorted(found, key=lambda item: not item[2]):
        if len(examples) < _EXAMPLES:
            examples.setdefault(first.folded[index], shorten(first.exact[index].replace("\x1e", " | ")))
    return Overlap(
        first.split,
        second,
        total=len(first.exact),
        rows=tuple(index for index, _, _ in found),
        exact=sum(exact for _, exact, _ in found),
        conflicting=sum(conflict for _, _, conflict in found),
        examples=tuple(examples.values()),
    )


def shorten(text: str, width: int = 60) -> str:
    """``text`` on one line, cut to ``width`` characters."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"
