"""BERT's pairs of texts, of which half follow each other (Devlin et al. 2019, 3.1); upstream makes none any more."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ptft_hf.errors import DataError

IS_NEXT, IS_RANDOM = 0, 1
"""Labels, as BERT and transformers have them."""
FAR = 50
"""Paragraphs between a text and a random one where both are of the same document."""


class Unit(NamedTuple):
    """A piece of text that is never cut: a paragraph, or a part of a long one."""

    paragraph: int
    """Its number in the document."""
    tokens: int


class Pair(NamedTuple):
    """Two texts, each some neighbouring units of a document."""

    document: int
    first: range
    other: int
    """The second text's document."""
    second: range
    label: int


def pairs_of(documents: Sequence[Sequence[Unit]], room: int, rng: np.random.Generator) -> list[Pair]:
    """Pairs that fill inputs, half of them (one more or less) of texts that follow each other.

    A first text has as many units as half of the room takes; the second, which takes the rest, is what follows or
    what stands at a random place of another document. Where it is random, what follows begins the next pair, so that
    no text is lost but the end of a document that nothing follows.

    Args:
        documents: Their units in order, each of at most half the room. If there is but one, random texts are of the
            same document, at least :data:`FAR` paragraphs away.
        room: Tokens of an input without its marks.
        rng: Decides which pairs are random, and what they hold.

    Raises:
        DataError: No text follows another, or a single document is too short for random ones.
    """
    pairs, turns = list[Pair](), _turns(rng)
    places = [(d, i) for d, units in enumerate(documents) for i in range(len(units))]
    starts = np.cumsum([0, *map(len, documents)])
    label = next(turns)
    for d, units in enumerate(documents):
        at = 0
        while at < len(units):
            first = _filled(units, at, room // 2)
            left = room - sum(units[i].tokens for i in first)
            if label == IS_NEXT:
                if first.stop == len(units):
                    break
                second, other = _filled(units, first.stop, left), d
            elif len(documents) > 1:
                place = int(rng.integers(len(places) - len(units)))
                other, start = places[place if place < starts[d] else place + len(units)]
                second = _filled(documents[other], start, left)
            else:
                second, other = _far(units, first, left, rng), d
            pairs.append(Pair(d, first, other, second, label))
            at = second.stop if label == IS_NEXT else first.stop
            label = next(turns)
    if all(pair.label == IS_RANDOM for pair in pairs):
        raise DataError("next_sentence: no document has two texts, so none follows another")
    return pairs


def _turns(rng: np.random.Generator) -> Iterator[int]:
    """Both labels equally often: of each two one has either, in random order."""
    while True:
        yield from rng.permutation([IS_NEXT, IS_RANDOM]).tolist()


def _filled(units: Sequence[Unit], start: int, room: int, end: int | None = None) -> range:
    """As many units from ``start`` on as there is room for, and at least one."""
    stop, left = start + 1, room - units[start].tokens
    while stop < (len(units) if end is None else end) and units[stop].tokens <= left:
        left -= units[stop].tokens
        stop += 1
    return range(start, stop)


def _far(units: Sequence[Unit], first: range, room: int, rng: np.random.Generator) -> range:
    """A random text of the same document, all of it far from the first one."""
    lowest = units[first.start].paragraph - FAR
    highest = units[first.stop - 1].paragraph + FAR
    before = [i for i in range(first.start) if units[i].paragraph <= lowest]
    after = [i for i in range(first.stop, len(units)) if units[i].paragraph >= highest]
    if not before and not after:
        raise DataError(
            f"next_sentence: the only document has {units[-1].paragraph + 1} paragraphs, too few for random texts "
            f"that are at least {FAR} paragraphs away from any other; name several documents (columns: document)"
        )
    start = int(rng.choice([*before, *after]))
    return _filled(units, start, room, len(before) if start < first.start else None)
