"""Annotated rows, whether words with tags or text with character spans: checked, and read as words and IOB2 tags."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ptft_hf.tasks import alignment
from ptft_hf.tasks.alignment import Words
from ptft_hf.tasks.tags import Entity, entities, iob2

SHOWN = 3
"""Faulty rows that are shown of each kind; the others are counted."""


class Annotated(NamedTuple):
    """One row: its words, and an IOB2 tag for each of them, or None where none are given."""

    words: Words
    tags: list[str] | None


class Moved(NamedTuple):
    """What words cannot say of a row's spans."""

    widened: int  # spans that begin or end inside a word, and are taken to the word's borders
    dropped: int  # spans that share words with a longer one


def read(row: Mapping[str, Any], names: Sequence[str], pattern: str) -> Annotated:
    """A checked row: ``tokens`` with ``tags``, or ``text`` with ``spans``; tags and spans may be absent.

    Args:
        row: As in the data, or as ``predict`` was given it.
        names: What integer tags stand for.
        pattern: Finds the words of a running text.
    """
    if (tokens := row.get("tokens")) is not None:
        words, tags = alignment.joined(tokens), row.get("tags")
        found = None if tags is None else iob2(entities(named(tags, names)), len(tokens))
        return Annotated(words, found)
    words, spans = alignment.split(row["text"], pattern), row.get("spans")
    return Annotated(words, None if spans is None else tags_of_spans(words, spans)[0])


def named(tags: Sequence[Any], names: Sequence[str]) -> list[str]:
    """Tags as strings; integers are numbers of ``names``."""
    return [names[tag] if isinstance(tag, int) else str(tag) for tag in tags]


def tags_of_spans(words: Words, spans: Iterable[Mapping[str, Any]]) -> tuple[list[str], Moved]:
    """IOB2 tags of the words that spans touch; where spans share a word, the longest of them stays."""
    widened = dropped = 0
    taken: list[Entity] = []
    for span in sorted(spans, key=lambda s: (s["start"] - s["end"], s["start"])):
        start, end = span["start"], span["end"]
        inside = [i for i, (a, b) in enumerate(words.spans) if a < end and start < b]
        if not inside or any(e.start <= inside[-1] and inside[0] < e.end for e in taken):
            dropped += 1
            continue
        first, last = words.spans[inside[0]][0], words.spans[inside[-1]][1]
        widened += first < start or end < last
        taken.append(Entity(str(span["label"]), inside[0], inside[-1] + 1))
    return iob2(taken, len(words.spans)), Moved(widened, dropped)


def faults(split: str, rows: Any, names: Sequence[str]) -> list[str]:
    """What is wrong with the annotations of a split, row by row; of each kind the first are shown."""
    if "tokens" in rows.column_names:
        return _shown(split, rows, ("tokens", "tags"), lambda t, g: _tag_fault(t, g, names))
    return _shown(split, rows, ("text", "spans"), _span_fault)


def _shown(
    split: str, rows: Any, columns: Sequence[str], check: Callable[[Any, Any], tuple[str, str] | None]
) -> list[str]:
    values = zip(*(rows[name][:] for name in columns), strict=True)
    by_kind: dict[str, list[str]] = {}
    for number, (text, annotation) in enumerate(values, 1):
        if fault := check(text, annotation):
            by_kind.setdefault(fault[0], []).append(f"row {number}: {fault[1]}")
    problems = []
    for kind, found in by_kind.items():
        more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        problems.append(f"{split}: {kind} ({'; '.join(found[:SHOWN])}{more})")
    return problems


def _tag_fault(tokens: Any, tags: Any, names: Sequence[str]) -> tuple[str, str] | None:
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        return "tokens must be lists of words, as text", _short(tokens)
    if not isinstance(tags, list):
        return "tags must be lists, one tag a word", _short(tags)
    if len(tokens) != len(tags):
        return "there must be one tag a word", f"{len(tokens)} tokens, {len(tags)} tags: {_short(tokens)}"
    numbers = [tag for tag in tags if isinstance(tag, int)]
    if numbers and not names:
        return "tags are numbers without names: name them all under tag_names", _short(tags)
    if wrong := [tag for tag in numbers if not 0 <= tag < len(names)]:
        return f"tag_names has {len(names)} names, from 0 on", f"tag {wrong[0]}"
    return None


def _span_fault(text: Any, spans: Any) -> tuple[str, str] | None:
    if not isinstance(spans, list) or not all(isinstance(span, dict) for span in spans):
        return "spans must be lists of objects with start, end and label", _short(spans)
    for span in spans:
        start, end, label = (span.get(name) for name in ("start", "end", "label"))
        if not isinstance(start, int) or not isinstance(end, int) or not isinstance(label, str) or not label:
            return "a span needs start and end, as whole numbers, and label, as text", _short(span)
        if not 0 <= start < end <= len(text):
            return "a span must lie in its text: 0 <= start < end <= length", f"{_short(span)} of {len(text)}"
        if not text[start:end].strip():
            return "a span holds nothing but white space", _short(span)
    return None


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:59]}…"
