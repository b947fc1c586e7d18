"""The proof that what was saved is what was trained: a changed weight is named."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ptft_hf import checkpoints
from ptft_hf.errors import RoundTripError


class Model(torch.nn.Module):
    """Logits of three tokens' embeddings; row 3 of the embedding belongs to no probe."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(4, 2)
        self.head = torch.nn.Linear(2, 2)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.arange(parameter.numel()).view_as(parameter))

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.head(self.embedding(ids).sum(1)),)


PROBE = [
    {"ids": torch.tensor([[0, 1]])},
    {"ids": torch.tensor([[1, 2], [0, 2]]), "labels": torch.tensor([0, 1])},
]


def changed(change: Callable[[Model], Any]) -> Callable[[], Model]:
    def reload() -> Model:
        model = Model()
        with torch.no_grad():
            change(model)
        return model

    return reload


def test_an_equal_model_is_proven() -> None:
    assert checkpoints.prove(Model(), Model, PROBE) == {"max_difference": 0.0, "examples": 3}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        # The bias enters each logit as it is.
        (lambda m: m.head.bias.add_(0.5), ["logits differ by up to 0.5 on 3 examples", "head.bias"]),
        (lambda m: m.embedding.weight[3].add_(1), ["logits differ by up to 0 ", "embedding.weight"]),
        (lambda m: m.head.bias.fill_(torch.nan), ["logits differ by up to inf", "head.bias"]),
        # Only the last batch has token 2: a comparison that stops at the first would not see it.
        (lambda m: m.embedding.weight[2].fill_(torch.nan), ["up to inf", "embedding.weight"]),
        (
            lambda m: setattr(m, "head", torch.nn.Linear(2, 1)),
            ["shapes [(1, 1), (2, 1)]"],
        ),
        (lambda m: m.register_buffer("extra", torch.ones(1)), ["extra"]),
    ],
)
def test_a_changed_weight_is_named(change: Callable[[Model], Any], words: list[str]) -> None:
    with pytest.raises(RoundTripError) as caught:
        checkpoints.prove(Model(), changed(change), PROBE)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_only_the_weights_that_differ_are_named() -> None:
    with pytest.raises(RoundTripError, match=r"weights that differ: head\.bias$"):
        checkpoints.prove(Model(), changed(lambda m: m.head.bias.add_(1)), PROBE)


def test_where_a_weight_lies_in_memory_makes_no_difference() -> None:
    class Placed(Model):
        """Its logits tell where the head lies, as those of kernels may that add up from there."""

        def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor]:
            return (super().forward(ids)[0] + 1e-6 * (self.head.weight.data_ptr() % 64),)

    def reload() -> Placed:
        model = Placed()
        file = torch.empty(6)
        file[1:5] = model.head.weight.data.flatten()
        model.head.weight.data = file[1:5].view(2, 2)  # as a file's header would shift it
        return model

    assert not torch.equal(Placed()(PROBE[0]["ids"])[0], reload()(PROBE[0]["ids"])[0])
    assert checkpoints.prove(Placed(), reload, PROBE) == {"max_difference": 0.0, "examples": 3}


def test_a_difference_that_no_weight_explains_is_none_by_name() -> None:
    class Other(Model):
        def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor]:
            return (super().forward(ids)[0] + 1,)

    with pytest.raises(RoundTripError, match="weights that differ: none by name"):
        checkpoints.prove(Model(), Other, PROBE)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_logit_that_is_no_number_is_seen(bad: float) -> None:
    logits = torch.randn(4, 9)
    assert checkpoints.are_finite([logits])
    logits[2, 3] = bad
    assert not checkpoints.are_finite([torch.zeros(2), logits])


def test_a_model_that_diverged_is_not_proven() -> None:
    broken = changed(lambda m: m.head.weight.fill_(torch.inf))()
    with pytest.raises(RoundTripError, match="training diverged"):
        checkpoints.prove(broken, Model, PROBE)
