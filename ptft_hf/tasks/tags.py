"""Tags of named entities: the schemes in use, all read into IOB2 (``B-`` begins an entity, ``I-`` continues it).

The reading is that of conlleval (Tjong Kim Sang & De Meulder 2003), which loses no tag: an entity begins at
``B-``, ``S-`` and ``U-``, and at any other tag that does not go on with an entity of its type; it ends after
``E-``, ``L-``, ``S-`` and ``U-``, and where the type changes. It is the same for every scheme, so a scheme is
told only to say it aloud and to count what does not fit it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

OUTSIDE = "O"
UNNAMED = "entity"
"""The type of tags that name none: ``B``, ``I``, ``O``."""
_PREFIXED = re.compile(r"([BIESLUM])-(.+)", re.DOTALL)
_BARE = frozenset("BIESLUM")


class Entity(NamedTuple):
    """Words ``start`` to ``end`` (exclusive) of a row, counted from 0."""

    type: str
    start: int
    end: int


def parse(tag: str) -> tuple[str, str]:
    """Prefix and type of a tag; ``("O", "")`` outside, and prefix ``I`` for a type that stands alone."""
    if tag == OUTSIDE:
        return OUTSIDE, ""
    if found := _PREFIXED.fullmatch(tag):
        return found[1], found[2]
    return (tag, UNNAMED) if tag in _BARE else ("I", tag)


def entities(tags: Sequence[str]) -> list[Entity]:
    """The entities of one row, from left to right."""
    found: list[Entity] = []
    start, open_type = -1, ""
    for i, (prefix, kind) in enumerate(map(parse, (*tags, OUTSIDE))):
        if start >= 0 and (prefix in "OBSU" or kind != open_type):
            found.append(Entity(open_type, start, i))
            start = -1
        if start < 0 and prefix != OUTSIDE:
            start, open_type = i, kind
        if prefix in "SUEL":
            found.append(Entity(open_type, start, i + 1))
            start = -1
    return found


def iob2(found: Iterable[Entity], length: int) -> list[str]:
    """IOB2 tags of a row of ``length`` words; the inverse of :func:`entities`."""
    tags = [OUTSIDE] * length
    for kind, start, end in found:
        tags[start:end] = [f"B-{kind}", *[f"I-{kind}"] * (end - start - 1)]
    return tags


def scheme_of(rows: Iterable[Sequence[str]]) -> str:
    """The scheme of all these rows: ``IOB2``, ``IOB1``, ``I- only``, ``BIOES``, ``BILOU`` or ``types only``.

    In IOB1 ``B-`` stands only between two entities of one type that touch; rows in which it *always* does, and
    in which other entities begin with ``I-``, are IOB1.

    Raises:
        ValueError: Some tags have a prefix and some have none, or a tag is empty.
    """
    prefixes: set[str] = set()
    forms: dict[str, str] = {}
    always_between, begins_inside = True, False
    for tags in rows:
        before = OUTSIDE, ""
        for tag in tags:
            prefix, kind = parse(tag)
            if tag != OUTSIDE:
                form = "a prefix" if _PREFIXED.fullmatch(tag) else "no type" if tag in _BARE else "no prefix"
                forms.setdefault(form if tag else "no letters", tag)
                prefixes.add(prefix)
                if prefix == "B" and kind != before[1]:
                    always_between = False
                begins_inside |= prefix == "I" and kind != before[1]
            before = prefix, kind
    if "no letters" in forms or len(forms) > 1:
        shown = " and ".join(f"some with {form} ({tag!r})" for form, tag in forms.items())
        raise ValueError(f"tags of several schemes, {shown}; use one, such as IOB2: O, B-person, I-person")
    if "no prefix" in forms:
        return "types only"
    if prefixes & set("UL"):
        return "BILOU"
    if prefixes & set("SEM"):
        return "BIOES"
    if "B" in prefixes:
        return "IOB1" if always_between and begins_inside else "IOB2"
    return "I- only" if prefixes else "IOB2"


def misfits(tags: Sequence[str], scheme: str) -> int:
    """How many tags of a row break its scheme: an ``I-`` that continues nothing, an entity never ended."""
    if scheme not in ("IOB2", "BIOES", "BILOU"):
        return 0  # any sequence of these tags is a good one
    ends = scheme != "IOB2"
    count, open_type = 0, ""
    for prefix, kind in map(parse, (*tags, OUTSIDE)):
        if prefix in "IMEL":
            count += kind != open_type
        else:
            count += ends and open_type != ""
        open_type = kind if prefix in "BIM" else ""
    return count
