"""Learning rates by depth, a rate of the head's own, and gradual unfreezing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from ptft_hf.callbacks import GradualUnfreezing
from ptft_hf.recipes import FullRecipe
from ptft_hf.trainer import Trainer
from tests.conftest import rows
from tests.runs import build, splits, weights

DATA = splits(rows(32, 1), validation=rows(16, 2), test=rows(16, 3))
NO_EVALUATION = {"eval_strategy": "no", "save_strategy": "no"}


@pytest.fixture(scope="module")
def bert(checkpoint: Any) -> Path:
    """BERT of three layers, with dropout of 0.1 everywhere."""
    path: Path = checkpoint("bert")
    return path


def full(**fields: Any) -> FullRecipe:
    return FullRecipe(name="full", family="full", **fields)


# --- learning rates ---------------------------------------------------------------------------------------


def rates(trainer: Trainer) -> dict[str, tuple[float, float]]:
    """Rate and weight decay of every trained weight."""
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    groups = trainer.create_optimizer().param_groups
    found = [(names[id(p)], (g["lr"], g["weight_decay"])) for g in groups for p in g["params"]]
    assert len(found) == len(dict(found)) == sum(p.requires_grad for p in trainer.model.parameters())
    return dict(found)


def test_rates_by_depth_by_hand(bert: Path, tmp_path: Path) -> None:
    adapter = full(layerwise_lr_decay=0.5)
    trainer, _ = build(bert, DATA, tmp_path, adapter=adapter, learning_rate=1e-3, weight_decay=0.1)
    found = rates(trainer)
    # 1e-3 x 0.5 ** (4 - depth): three layers, so the head is at depth 4; the pooler is as deep as the top layer.
    expected = {
        "classifier.weight": (1e-3, 0.1),
        "classifier.bias": (1e-3, 0.0),
        "bert.pooler.dense.weight": (5e-4, 0.1),
        "bert.encoder.layer.2.output.dense.weight": (5e-4, 0.1),
        "bert.encoder.layer.2.output.LayerNorm.weight": (5e-4, 0.0),
        "bert.encoder.layer.1.output.dense.weight": (2.5e-4, 0.1),
        "bert.encoder.layer.0.attention.self.query.bias": (1.25e-4, 0.0),
        "bert.embeddings.word_embeddings.weight": (6.25e-5, 0.1),
    }
    assert {name: found[name] for name in expected} == {k: pytest.approx(v) for k, v in expected.items()}


def test_a_rate_of_the_heads_own(bert: Path, tmp_path: Path) -> None:
    trainer, _ = build(
        bert,
        DATA,
        tmp_path,
        adapter=full(head_learning_rate=0.02, layerwise_lr_decay=0.1),
        learning_rate=1e-3,
    )
    found = rates(trainer)
    assert found["classifier.weight"][0] == 0.02
    assert found["bert.encoder.layer.2.output.dense.weight"][0] == pytest.approx(1e-4)


def test_rates_of_an_adapter_are_those_of_the_layer_it_stands_in(bert: Path, tmp_path: Path) -> None:
    settings = {"adapter.layerwise_lr_decay": 0.5, "adapter.head_learning_rate": 0.02, "learning_rate": 1e-3}
    trainer, _ = build(bert, DATA, tmp_path, adapter="lora/r8_attention", **settings)
    found = rates(trainer)
    head = {rate for name, (rate, _) in found.items() if "classifier" in name}
    by_layer = {i: {r for n, (r, _) in found.items() if f"layer.{i}." in n} for i in range(3)}
    assert head == {0.02}
    assert by_layer == {0: {1.25e-4}, 1: {2.5e-4}, 2: {5e-4}}


def test_the_schedule_scales_every_rate_alike(bert: Path, tmp_path: Path) -> None:
    trainer, _ = build(
        bert,
        DATA,
        tmp_path,
        adapter=full(layerwise_lr_decay=0.5),
        learning_rate=1e-3,
        max_steps=2,
        **NO_EVALUATION,
    )
    trainer.train()  # linear to zero in two steps
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {0.0}
    assert {round(rate / 1e-3, 4) for rate in trainer.lr_scheduler.base_lrs} == {
        0.0625,
        0.125,
        0.25,
        0.5,
        1.0,
    }


def test_without_a_wish_for_rates_upstream_makes_the_optimizer(bert: Path, tmp_path: Path) -> None:
    trainer, _ = build(bert, DATA, tmp_path, learning_rate=1e-3)
    assert {rate for rate, _ in rates(trainer).values()} == {1e-3}
    assert len(trainer.optimizer.param_groups) == 2


# --- gradual unfreezing -----------------------------------------------------------------------------------


def test_one_layer_more_each_epoch_until_all_are_trained_in_the_last() -> None:
    # L = 3 layers: depth 0 are the embeddings, 4 is the head.
    depth = {"embeddings": 0, "a": 1, "b": 2, "c": 3, "head": 4}

    def schedule(epochs: int) -> list[int]:
        return [GradualUnfreezing(depth, set(depth), epochs).lowest_depth(e) for e in range(epochs)]

    assert schedule(5) == [4, 3, 2, 1, 0]
    assert schedule(3) == [4, 2, 0]
    assert schedule(2) == [4, 0]
    assert schedule(9) == [4, 3, 3, 2, 2, 1, 1, 0, 0]


def test_an_epoch_entered_in_its_middle_is_still_that_epoch() -> None:
    model = nn.ModuleDict({name: nn.Linear(1, 1) for name in ("low", "head")})
    depth = {f"{name}.{part}": i for i, name in enumerate(("low", "head")) for part in ("weight", "bias")}
    callback = GradualUnfreezing(depth, set(depth), 3)  # head alone, then everything from epoch 1 on

    for epoch, trained in ((0, False), (0.75, False), (1.0, True), (1.5, True)):
        callback.on_epoch_begin(None, SimpleNamespace(epoch=epoch), None, model=model)
        assert model["low"].weight.requires_grad is trained, epoch
        assert model["head"].weight.requires_grad


PARTS = ("embeddings", "layer.0", "layer.1", "layer.2", "pooler", "classifier")


class Changes(transformers.TrainerCallback):
    """Which modules' weights an epoch has changed."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.before = model, weights(model)
        self.epochs: list[set[str]] = []

    def on_epoch_end(self, *_: Any, **kwargs: Any) -> None:
        now = weights(self.model)
        changed = {name for name in now if not torch.equal(now[name], self.before[name])}
        self.before = now
        self.epochs.append({part for part in PARTS if any(part in name for name in changed)})


def test_weights_change_from_the_top_down(bert: Path, tmp_path: Path) -> None:
    trainer, ready = build(
        bert, DATA, tmp_path, adapter=full(gradual_unfreezing=True), num_train_epochs=5, **NO_EVALUATION
    )
    seen = Changes(ready.model)
    trainer.add_callback(seen)
    trainer.train()
    assert seen.epochs == [set(PARTS[i:]) for i in (5, 3, 2, 1, 0)]
