"""Cleaning of running text, step by step, each step saying what it changed."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator

import datasets

from ptft_hf.recipes import Cleaning

BLANKS = re.compile(r"[^\S\n]+")
LINE_ENDS = re.compile(r"\r\n?|[\x0b\x0c\x85\u2028\u2029]")


def clean(name: str, rows: datasets.Dataset, how: Cleaning) -> tuple[datasets.Dataset, list[str]]:
    """The rows of a split after the steps of ``how``, and a sentence for each step.

    Args:
        name: The split, as the notes call it.
        rows: With a column ``text``; the other columns of a kept row stay as they are.
        how: The steps, done in the order in which :class:`Cleaning` names them.
    """
    texts, notes = list(rows["text"][:]), []
    for step, change in _changes(how):
        changed = [change(text) for text in texts]
        count = sum(a != b for a, b in zip(texts, changed, strict=True))
        notes.append(f"cleaning, {name}: {step} changed {count:,} of {len(texts):,} texts")
        texts = changed
    kept = list(range(len(texts)))
    for step, keep in _filters(how):
        left = [row for row in kept if keep(texts[row])]
        notes.append(f"cleaning, {name}: {step}: {len(kept) - len(left):,} of {len(kept):,} texts dropped")
        kept = left
    rows = rows.remove_columns("text").add_column("text", texts, feature=rows.features["text"])
    return rows.select(kept), notes


def _changes(how: Cleaning) -> Iterator[tuple[str, Callable[[str], str]]]:
    if (form := how.unicode) is not None:
        yield f"Unicode form {form}", lambda text: unicodedata.normalize(form, text)
    if how.white_space:
        yield "white space", plain_white_space
    if how.duplicate_lines:
        yield "duplicate lines", without_repeated_lines


def _filters(how: Cleaning) -> Iterator[tuple[str, Callable[[str], bool]]]:
    least, most = how.min_characters or 0, how.max_characters
    if how.min_characters is not None or most is not None:
        limits = f"{least:,} or more" if most is None else f"{least:,} to {most:,}"
        yield f"length of {limits} characters", lambda text: least <= len(text) <= (most or len(text))
    if how.duplicate_texts:
        yield "duplicate texts", _not_seen(set())


def _not_seen(seen: set[str]) -> Callable[[str], bool]:
    def keep(text: str) -> bool:
        new = text not in seen
        seen.add(text)
        return new

    return keep


def plain_white_space(text: str) -> str:
    """Runs of blanks as one space, every kind of line end as a line feed, nothing at the ends of lines and text."""
    lines = BLANKS.sub(" ", LINE_ENDS.sub("\n", text)).split("\n")
    return "\n".join(line.strip() for line in lines).strip()


def without_repeated_lines(text: str) -> str:
    """A text without the lines that stood in it before; empty lines, which separate paragraphs, stay."""
    seen: set[str] = set()
    kept = []
    for line in text.split("\n"):
        if not line.strip() or line not in seen:
            kept.append(line)
        seen.add(line)
    return "\n".join(kept)
