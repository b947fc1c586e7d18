"""Batches in few lengths: padded on to a multiple of four tokens, with nothing lost and nothing learnt."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ptft_hf.rounding import RoundedLengths
from tests.tiny import make_tokenizer


def collated(labels: torch.Tensor, width: int, **more: Any) -> dict[str, Any]:
    ids = torch.arange(2 * width).reshape(2, width) + 5
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, **more}


@pytest.mark.parametrize(
    ("width", "longest", "padded"), [(5, 20, 8), (8, 20, 8), (9, 10, 10), (1, 20, 4), (10, 10, 10)]
)
def test_to_a_multiple_of_four_but_not_beyond_the_longest_row(width: int, longest: int, padded: int) -> None:
    tokenizer = make_tokenizer("bert")
    labels = torch.ones(2, width, dtype=torch.long)
    batch = RoundedLengths(lambda rows: collated(labels, width), tokenizer, longest)([])
    assert {name: value.shape[1] for name, value in batch.items()} == dict.fromkeys(batch, padded)
    assert torch.equal(batch["input_ids"][:, :width], collated(labels, width)["input_ids"])
    assert (batch["input_ids"][:, width:] == tokenizer.pad_token_id).all()
    assert not batch["attention_mask"][:, width:].any()
    assert (batch["labels"][:, width:] == -100).all() and (batch["labels"][:, :width] == 1).all()


def test_labels_of_rows_stay_and_what_is_not_known_is_left_alone() -> None:
    tokenizer = make_tokenizer("bert")
    for labels in (torch.tensor([0, 1]), torch.rand(2, 5)):
        batch = RoundedLengths(lambda rows, labels=labels: collated(labels, 5), tokenizer, 20)([])
        assert batch["input_ids"].shape == (2, 8)
        assert batch["labels"] is labels
    odd = collated(torch.tensor([0, 1]), 5, position_ids=torch.zeros(2, 5))
    assert RoundedLengths(lambda rows: odd, tokenizer, 20)([]) is odd
    tokenizer.padding_side = "left"
    left = collated(torch.tensor([0, 1]), 5)
    assert RoundedLengths(lambda rows: left, tokenizer, 20)([]) is left
