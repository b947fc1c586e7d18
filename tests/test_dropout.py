"""Dropout where it helps, gradient checkpointing with every gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import transformers
from torch import nn

from ptft_hf.by_recipe import without_dropout
from ptft_hf.recipes import PartialRecipe
from tests.conftest import rows
from tests.runs import build, equal_weights, splits, weights

DATA = splits(rows(32, 1), validation=rows(16, 2), test=rows(16, 3))
NO_EVALUATION = {"eval_strategy": "no", "save_strategy": "no"}


@pytest.fixture(scope="module")
def bert(checkpoint: Any) -> Path:
    """BERT of three layers, with dropout of 0.1 everywhere."""
    path: Path = checkpoint("bert")
    return path


def partial(**fields: Any) -> PartialRecipe:
    return PartialRecipe(name="partial", family="partial", **fields)


# --- dropout ----------------------------------------------------------------------------------------------


def noisy(model: Path, folder: Path, adapter: Any, **settings: Any) -> set[str]:
    """Names of the dropout layers that are on during a training step; a layer's number is kept."""
    trainer, _ = build(model, DATA, folder, adapter=adapter, max_steps=1, **NO_EVALUATION, **settings)
    found: set[str] = set()
    for name, module in trainer.model.named_modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda m, *_, name=name: found.add(name) if m.training else None)
    trainer.train()
    plain = {name.removeprefix("base_model.model.").removeprefix("bert.") for name in found}
    return {name.removeprefix("encoder.layer.") for name in plain}


LAYERS = {f"{i}.{part}.dropout" for i in range(3) for part in ("attention.output", "output")}
HEAD = {"dropout"}


def test_a_trained_trunk_keeps_its_dropout(bert: Path, tmp_path: Path) -> None:
    found = noisy(bert, tmp_path, "full/default")
    assert found >= LAYERS | HEAD | {"embeddings.dropout"}


@pytest.mark.parametrize("adapter", ["partial/head_only", "lora/r8_attention"])
def test_a_frozen_trunk_has_no_dropout_but_the_head_has(adapter: str, bert: Path, tmp_path: Path) -> None:
    assert noisy(bert, tmp_path, adapter) == HEAD


def test_frozen_layers_below_trained_ones_have_no_dropout(bert: Path, tmp_path: Path) -> None:
    top = {name for name in LAYERS if name[0] in "12"}
    found = noisy(bert, tmp_path, "partial/top_2_layers")
    assert {name for name in found if not name.endswith("self.dropout")} == top | HEAD


def test_a_layer_with_one_trained_weight_keeps_all_its_dropout(bert: Path, tmp_path: Path) -> None:
    adapter = partial(parameters=[r"bert\.encoder\.layer\.1\.output\.dense\.bias"])
    found = noisy(bert, tmp_path, adapter)
    assert {name for name in found if not name.endswith("self.dropout")} == HEAD | {
        name for name in LAYERS if name[0] == "1"
    }


def test_the_adapters_own_dropout_stays_on(bert: Path, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, lora_dropout=0.5)
    found = noisy(bert, tmp_path, config)
    assert found > HEAD
    assert all("lora_dropout" in name for name in found - HEAD)
    assert len(found - HEAD) == 6  # query and value of three layers


def test_dropout_of_a_frozen_trunk_can_be_asked_for(bert: Path, tmp_path: Path) -> None:
    adapter = partial(trunk_dropout=True)
    assert noisy(bert, tmp_path, adapter) >= LAYERS | HEAD | {"embeddings.dropout"}


def test_evaluation_and_the_trained_model_are_in_evaluation_mode(bert: Path, tmp_path: Path) -> None:
    trainer, _ = build(bert, DATA, tmp_path, adapter="lora/r8_attention", max_steps=1, **NO_EVALUATION)
    trainer.train()
    trainer.evaluate()
    assert not any(module.training for module in trainer.model.modules())


def test_quiet_modules_are_those_of_the_trunk_without_trained_weights() -> None:
    config = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8, vocab_size=10
    )
    model = transformers.BertForSequenceClassification(config).requires_grad_(False)
    model.classifier.requires_grad_(True)
    everything = {id(m) for m in model.bert.modules()}
    assert {id(m) for m in without_dropout(model)} == everything
    model.bert.encoder.layer[1].requires_grad_(True)
    kept = {id(m) for m in (model.bert, model.bert.encoder, model.bert.encoder.layer)}
    kept |= {id(m) for m in model.bert.encoder.layer[1].modules()}
    assert {id(m) for m in without_dropout(model)} == everything - kept


# --- trap 3: gradient checkpointing -----------------------------------------------------------------------

REENTRANT = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}


class Gradients(transformers.TrainerCallback):
    """Largest gradient of every trained weight, just before the optimizer's first step."""

    def __init__(self) -> None:
        self.largest: dict[str, float] = {}

    def on_pre_optimizer_step(self, *_: Any, model: Any = None, **kwargs: Any) -> None:
        self.largest = {
            name: 0.0 if p.grad is None else p.grad.abs().max().item()
            for name, p in model.named_parameters()
            if p.requires_grad
        }


def lora_gradients(trainer: transformers.Trainer, model: nn.Module) -> tuple[dict[str, float], list[int]]:
    """Gradients of LoRA's second matrices (the first ones' are zero at the start, because the second ones are),
    and how often each layer's attention ran: once, or twice if it was computed again for the backward pass."""
    seen, runs = Gradients(), [0, 0, 0]
    layers = model.get_base_model().bert.encoder.layer

    def count(index: int) -> None:
        runs[index] += 1

    for i in range(3):
        layers[i].attention.register_forward_hook(lambda *_, i=i: count(i))
    trainer.add_callback(seen)
    trainer.train()
    return {name: value for name, value in seen.largest.items() if "lora_B" in name}, runs


def test_checkpointing_with_lora_leaves_no_gradient_zero(bert: Path, tmp_path: Path) -> None:
    settings = {**NO_EVALUATION, **REENTRANT, "max_steps": 1}
    trainer, ready = build(bert, DATA, tmp_path, adapter="lora/r8_attention", **settings)
    largest, runs = lora_gradients(trainer, ready.model)
    assert len(largest) == 6 and min(largest.values()) > 0
    assert runs == [2, 2, 2]  # a layer in evaluation mode, as frozen ones are otherwise, would run once


class PlainInputs(transformers.TrainerCallback):
    """Takes back what transformers does since 5.x when checkpointing is switched on."""

    def on_train_begin(self, *_: Any, model: Any = None, **kwargs: Any) -> None:
        model.disable_input_require_grads()


# torch's own words for the trap, where it is real
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
@pytest.mark.parametrize("closed", [False, True])
def test_upstream_leaves_them_zero_unless_inputs_require_gradients(
    closed: bool, bert: Path, tmp_path: Path
) -> None:
    settings = {**NO_EVALUATION, **REENTRANT, "max_steps": 1}
    ours, ready = build(bert, DATA, tmp_path, adapter="lora/r8_attention", **settings)
    ready.model.disable_input_require_grads()  # whatever our own path has done
    upstream = transformers.Trainer(
        model=ready.model,
        args=ours.args,
        train_dataset=ready.encoded["train"].remove_columns("length"),
        data_collator=ready.task.collator(ready.tokenizer),
        callbacks=[] if closed else [PlainInputs()],
    )
    largest, runs = lora_gradients(upstream, ready.model)
    assert len(largest) == 6
    if closed:  # transformers 5.23 makes inputs require gradients by itself
        assert min(largest.values()) > 0
        assert runs == [2, 2, 2]
    else:
        assert max(largest.values()) == 0
        assert runs == [1, 1, 1]  # nothing is computed again, for there is no backward pass


@pytest.mark.parametrize("adapter", ["lora/r8_attention", "partial/top_2_layers"])
def test_checkpointing_changes_no_weight(adapter: str, bert: Path, tmp_path: Path) -> None:
    found = []
    for name, settings in (("without", {}), ("with", {"activation_checkpointing": True})):
        trainer, _ = build(bert, DATA, tmp_path / name, adapter=adapter, **NO_EVALUATION, **settings)
        trainer.train()
        found.append(weights(trainer.model))
    assert equal_weights(*found)
