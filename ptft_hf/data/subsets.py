"""Smaller training sets for learning curves: nested, stratified, the same for every method at a given seed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np


def nested_order(labels: Sequence[Any], seed: int) -> list[int]:
    """An order of the rows of which every beginning is a fair sample, so that 500 rows are among the 2,000.

    First come as few rows as hold every label once (greedily, the rarest label first), since a label that is not
    in the training set cannot be learnt; after them each beginning has the labels' own proportions, to within a
    row a label. A row of several labels (multi-label, tags) counts for its rarest one.

    Args:
        labels: [rows] A label, or a list of labels, each; numbers with a fraction (regression) give a random order.
        seed: Decides the order within a label.

    Returns:
        All row numbers.
    """
    chance = [int(row) for row in np.random.default_rng(seed).permutation(len(labels))]
    if any(isinstance(value, float) for value in labels):
        return chance
    sets = [_labels_of(value) for value in labels]
    frequency = Counter(label for found in sets for label in found)
    cover: dict[int, None] = {}
    covered: set[Hashable] = set()
    holders: dict[Hashable, int] = {}
    groups: dict[Hashable, list[int]] = {}
    for row in chance:
        for label in sets[row]:
            holders.setdefault(label, row)
        groups.setdefault(min(sets[row], key=frequency.__getitem__, default=None), []).append(row)
    for label in sorted(holders, key=frequency.__getitem__):
        if label not in covered:
            cover[holders[label]] = None
            covered |= set(sets[holders[label]])
    rest = [
        ((place + 0.5) / len(rows), row)
        for rows in groups.values()
        for place, row in enumerate(rows)
        if row not in cover
    ]
    rest.sort(key=lambda item: item[0])
    return [*cover, *(row for _, row in rest)]


def _labels_of(value: Any) -> list[Hashable]:
    """In a fixed order, so that ties between labels do not hang on hashing."""
    return list(dict.fromkeys(value)) if isinstance(value, list | tuple) else [value]
