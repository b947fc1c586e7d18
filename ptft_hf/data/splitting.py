"""Cutting a validation or test split from train: seeded, stratified, with no text on both sides."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np


def cut(
    groups: Sequence[Hashable], classes: Sequence[Hashable] | None, fraction: float, rng: np.random.Generator
) -> tuple[list[int], bool] | None:
    """Rows to hold out.

    Args:
        groups: [rows] Rows of one group (duplicates of one text) stay together.
        classes: [rows] Each class gives the same share of its groups (largest remainders, ties by chance),
            and keeps at least one; a group counts for the class of its first row. None for a plain random
            choice.
        fraction: Share of the groups to hold out, at least one group.
        rng: Decides which.

    Returns:
        The rows in order, and whether the choice is stratified (it is random where the classes are too small
        to give enough); None if there are not at least two groups.
    """
    members: dict[Hashable, list[int]] = {}
    for row, group in enumerate(groups):
        members.setdefault(group, []).append(row)
    groups_in_order = list(members.values())
    if len(groups_in_order) < 2:
        return None
    size = max(1, round(fraction * len(groups_in_order)))
    chosen = (
        None if classes is None else _stratified([classes[rows[0]] for rows in groups_in_order], size, rng)
    )
    stratified = chosen is not None
    if chosen is None:
        chosen = [int(index) for index in rng.permutation(len(groups_in_order))[:size]]
    return sorted(row for index in chosen for row in groups_in_order[index]), stratified


def _stratified(classes: Sequence[Hashable], size: int, rng: np.random.Generator) -> list[int] | None:
    """``size`` indices with the proportions of ``classes``, or None if each class cannot keep one."""
    by_class: dict[Hashable, list[int]] = {}
    for index, name in enumerate(classes):
        by_class.setdefault(name, []).append(index)
    pools = [[pool[i] for i in rng.permutation(len(pool))] for pool in by_class.values()]
    if sum(len(pool) - 1 for pool in pools) < size:
        return None
    quotas = [len(pool) * size / len(classes) for pool in pools]
    counts = [min(int(quota), len(pool) - 1) for quota, pool in zip(quotas, pools, strict=True)]
    chance = rng.permutation(len(pools))
    by_remainder = sorted(range(len(pools)), key=lambda i: (counts[i] - quotas[i], chance[i]))
    while sum(counts) < size:
        for index in by_remainder:
            if sum(counts) < size and counts[index] < len(pools[index]) - 1:
                counts[index] += 1
    return [index for pool, count in zip(pools, counts, strict=True) for index in pool[:count]]
