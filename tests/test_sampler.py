"""The order of rows: a function of seed and epoch alone, in batches of like length."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from ptft_hf.sampling import EpochSampler


def lengths_of(rows: int) -> list[int]:
    return torch.randint(3, 60, (rows,), generator=torch.Generator().manual_seed(0)).tolist()


def batches_of(order: list[int], size: int) -> list[list[int]]:
    return [order[i : i + size] for i in range(0, len(order), size)]


@pytest.mark.parametrize("lengths", [None, lengths_of(103)])
@pytest.mark.parametrize("batch", [1, 8, 32, 200])
def test_every_row_stands_in_an_epoch_once(lengths: list[int] | None, batch: int) -> None:
    sampler = EpochSampler(103, batch, seed=5, lengths=lengths)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        assert sorted(sampler) == list(range(103))
    assert len(sampler) == 103


def orders(seed: int, count: int = 3) -> list[tuple[int, ...]]:
    sampler = EpochSampler(64, 8, seed, lengths=lengths_of(64))
    found = []
    for epoch in range(count):
        sampler.set_epoch(epoch)
        found.append(tuple(sampler))
    return found


def test_the_order_is_a_function_of_seed_and_epoch_alone() -> None:
    assert orders(1) == orders(1)
    assert len({*orders(1), *orders(2)}) == 6
    late = EpochSampler(64, 8, 1, lengths=lengths_of(64))
    late.set_epoch(2)  # as a resumed run, which never saw epochs 0 and 1
    with torch.random.fork_rng():
        torch.manual_seed(99)
        assert tuple(late) == orders(1)[2] == tuple(late)


def test_rows_of_a_batch_are_of_like_length() -> None:
    lengths = lengths_of(400)
    grouped = list(EpochSampler(400, 8, 0, lengths=lengths))
    plain = list(EpochSampler(400, 8, 0))

    def padded(order: list[int]) -> int:
        return sum(len(b) * max(lengths[i] for i in b) for b in batches_of(order, 8))

    # 50 batches are one pool, so it is sorted as a whole: no two batches overlap in length by more than an end.
    spans = sorted((min(lengths[i] for i in b), max(lengths[i] for i in b)) for b in batches_of(grouped, 8))
    assert all(low[1] <= high[0] for low, high in pairwise(spans))
    assert padded(grouped) < 1.05 * sum(lengths) < 1.5 * sum(lengths) < padded(plain)


def test_batches_of_like_length_come_in_random_order_but_the_longest_first() -> None:
    lengths = lengths_of(400)
    sampler = EpochSampler(400, 8, 0, lengths=lengths)
    for epoch in range(5):
        sampler.set_epoch(epoch)
        longest = [max(lengths[i] for i in batch) for batch in batches_of(list(sampler), 8)]
        assert longest[0] == max(lengths)
        assert longest[1:] not in (sorted(longest[1:]), sorted(longest[1:], reverse=True))


def test_the_incomplete_batch_is_the_last() -> None:
    # 5 rows in batches of 2: two full batches, each of equal lengths, and one row left over.
    sampler = EpochSampler(5, 2, 0, lengths=[9, 9, 9, 9, 9])
    assert [len(b) for b in batches_of(list(sampler), 2)] == [2, 2, 1]


def test_rare_classes_are_drawn_as_often_as_their_weights_say() -> None:
    # Nine rows of class a and one of b, each with 1 / its class's size: half of all draws are row 9.
    weights = [1 / 9] * 9 + [1.0]
    sampler = EpochSampler(10, 4, 0, weights=weights)
    drawn: Counter[int] = Counter()
    for epoch in range(2000):
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert len(order) == 10
        drawn.update(order)
    # 20,000 draws with chance 1/2: the standard deviation is 71. With chance 1/18: 32.
    assert abs(drawn[9] - 10_000) < 4 * 71
    assert all(abs(drawn[row] - 20_000 / 18) < 4 * 32.4 for row in range(9))


def test_oversampled_rows_are_grouped_by_length_too() -> None:
    lengths = lengths_of(400)
    order = list(EpochSampler(400, 8, 0, lengths=lengths, weights=[1.0] * 400))
    assert len(set(order)) < 400
    spans = sorted((min(lengths[i] for i in b), max(lengths[i] for i in b)) for b in batches_of(order, 8))
    assert all(low[1] <= high[0] for low, high in pairwise(spans))


@pytest.mark.parametrize("rows", [128, 103])
def test_a_step_has_the_same_rows_for_one_process_and_for_two(rows: int) -> None:
    sampler = EpochSampler(rows, 32, 3, lengths=lengths_of(rows))
    one = list(BatchSampler(sampler, 32, drop_last=False))
    halves = [list(BatchSamplerShard(BatchSampler(sampler, 16, False), 2, i)) for i in range(2)]
    two = [left + right for left, right in zip(*halves, strict=True)]
    assert len(one) == len(two) == 4
    assert two[:3] == one[:3]
    assert (
        two[3][: len(one[3])] == one[3]
    )  # what follows are accelerate's repeats, which the Trainer takes out
