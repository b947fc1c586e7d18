"""Frozen layers computed once: equal results where they are used, and out of use where they would not be exact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
from torch import nn

from ptft_hf import frozen
from ptft_hf.frozen import probing
from ptft_hf.frozen.layers import Key, Rows, keys_of
from ptft_hf.recipes import TokenClassificationRecipe
from tests.conftest import rows
from tests.runs import build, equal_weights, logged, recipe, splits, weights
from tests.stopped_runs import Place, assert_same
from tests.tiny import SIZES

# PEFT asks a transformers model for an attribute that was renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

Checkpoint = Callable[[str], Path]
DATA = splits(rows(20, 1), validation=rows(12, 2), test=rows(4, 3))
SAME_BATCHES = {"num_train_epochs": 3, "train_sampling_strategy": "sequential", "learning_rate": 1e-2}
OFF = {"adapter.frozen_cache_gb": 0}
TOP_LORA = peft.LoraConfig(r=4, lora_dropout=0.1, layers_to_transform=[2])


def trained(model: Path, folder: Path, adapter: Any, data: Any = DATA, **settings: Any) -> Any:
    trainer, _ = build(model, data, folder, adapter=adapter, **{**SAME_BATCHES, **settings})
    trainer.train()
    return trainer


def assert_equal(one: Any, other: Any) -> None:
    """Two runs are the same to the last bit: every loss, every metric, every weight."""
    for name in ("loss", "grad_norm", "eval_loss", "eval_accuracy"):
        assert logged(one, name) == logged(other, name)
    assert equal_weights(weights(one.model), weights(other.model))


# --- equal results ----------------------------------------------------------------------------------------


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("adapter", "layers", "bf16"),
    [
        ("partial/head_only", 3, False),
        ("partial/top_2_layers", 1, True),
        (TOP_LORA, 2, True),
        pytest.param("partial/head_only", 3, True, marks=SLOW),
        pytest.param("partial/top_2_layers", 1, False, marks=SLOW),
        pytest.param(TOP_LORA, 2, False, marks=SLOW),
    ],
)
def test_where_batches_recur_every_bit_is_equal(
    adapter: Any, layers: int, bf16: bool, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """With dropout in what is trained: the frozen layers draw no random numbers, so it is the same."""
    runs = [
        trained(checkpoint("bert"), tmp_path / name, adapter, bf16=bf16, **settings)
        for name, settings in (("with", {}), ("without", OFF))
    ]
    assert [run.layers_computed_once for run in runs] == [layers, 0]
    assert_equal(*runs)


def test_shuffled_the_first_epoch_is_equal_and_later_ones_within_rounding(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    shuffled = {"train_sampling_strategy": "group_by_length"}
    one, other = (
        trained(checkpoint("bert"), tmp_path / name, "partial/head_only", **shuffled, **settings)
        for name, settings in (("with", {}), ("without", OFF))
    )
    assert one.layers_computed_once == 3
    with_, without = logged(one), logged(other)
    assert with_[:3] == without[:3]  # an epoch's steps
    assert with_ == pytest.approx(without, abs=1e-6)
    assert len({*with_}) == 9


def test_the_frozen_layers_run_once_for_each_batch_of_the_first_epoch_and_of_validation(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    trainer, _ = build(checkpoint("bert"), DATA, tmp_path, adapter="partial/top_2_layers", **SAME_BATCHES)
    runs = [0, 0, 0]

    def count(index: int) -> None:
        runs[index] += 1

    layers = trainer.model.bert.encoder.layer
    for i, layer in enumerate(layers):
        layer.attention.register_forward_hook(lambda *_, i=i: count(i))
    trainer.train()
    probes, filled, steps, evaluations = 2, 3 + 1, 9, 3
    assert runs[0] == probes + filled
    assert runs[2] >= steps + evaluations
    assert not any("forward" in vars(layer) for layer in layers)  # as it was


def test_oversampled_rows_are_kept_all_the_same(checkpoint: Checkpoint, tmp_path: Path) -> None:
    unequal = [row for i, row in enumerate(rows(24, 1)) if row["label"] == "neg" or i < 8]
    data = splits(unequal, validation=rows(8, 2), test=rows(4, 3))
    trainer, _ = build(
        checkpoint("bert"), data, tmp_path, task=recipe(oversample=True), adapter="partial/head_only",
        num_train_epochs=4,
    )  # fmt: skip
    misses: list[int] = []
    with frozen.kept(trainer) as layers:
        assert layers == 3
        attention = trainer.model.bert.encoder.layer[0].attention
        attention.register_forward_hook(lambda *_: misses.append(1))
        for row in range(len(data["train"])):
            batch = trainer.data_collator(trainer.train_dataset.select([row]).to_list())
            trainer.model.train()(input_ids=batch["input_ids"], **_others(batch))
        assert not misses
        ids = torch.tensor([[1, 9, 9, 9, 2]])  # a row that it has never seen
        trainer.model(input_ids=ids, attention_mask=torch.ones_like(ids))
        assert misses == [1]


def _others(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in batch.items() if name not in ("labels", "input_ids")}


def test_a_tagger_s_tokens(checkpoint: Checkpoint, tmp_path: Path) -> None:
    words = [row["text"].split() for row in rows(20, 1)]
    tagged = [{"tokens": w, "tags": ["B-x" if i % 4 == 1 else "O" for i in range(len(w))]} for w in words]
    data = datasets.DatasetDict(
        train=datasets.Dataset.from_list(tagged[:12]),
        validation=datasets.Dataset.from_list(tagged[12:16]),
        test=datasets.Dataset.from_list(tagged[16:]),
    )
    task = TokenClassificationRecipe(name="tags", family="token_classification")
    runs = []
    for name, settings in (("with", {}), ("without", OFF)):
        trainer, _ = build(
            checkpoint("bert"), data, tmp_path / name, task=task, adapter="partial/top_2_layers",
            **SAME_BATCHES, **settings,
        )  # fmt: skip
        trainer.train()
        runs.append(trainer)
    assert [run.layers_computed_once for run in runs] == [1, 0]
    assert logged(runs[0]) == logged(runs[1]) and logged(runs[0], "eval_loss") == logged(runs[1], "eval_loss")
    assert equal_weights(weights(runs[0].model), weights(runs[1].model))


def test_a_resumed_run_is_the_unbroken_run(checkpoint: Checkpoint, tmp_path: Path) -> None:
    place = Place(tmp_path, checkpoint("bert"))
    settings = {"adapter.trunk_dropout": False}
    whole = place.run("whole", "partial/top_2_layers", settings)
    assert whole.run["training"]["layers_computed_once"] == 1
    for step in (1, 4):
        folder = place.stopped(step, place.folder / "whole")
        place.run(folder.name, "partial/top_2_layers", settings, resume=True)
        assert_same(folder, place.folder / "whole")


# --- architectures ----------------------------------------------------------------------------------------

OUT_OF_USE = {
    "albert": "one layer, run many times",
    "bart": "two stacks",
    "t5": "two stacks",
    "xlm": "no layer is a module of its own",
    "xlnet": "[T, B, H], and hands on more than a hidden state",
}
FAST = ("gpt2", "deberta-v2")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FAST else SLOW) for n in SIZES]
)
def test_every_architecture_is_equal_with_it_or_does_without(
    name: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    runs = [
        trained(checkpoint(name), tmp_path / part, "partial/head_only", num_train_epochs=2, **settings)
        for part, settings in (("with", {}), ("without", OFF))
    ]
    assert_equal(*runs)
    assert (runs[0].layers_computed_once == 0) == (name in OUT_OF_USE)


# --- out of use -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("adapter", "settings"),
    [
        ("full/default", {}),
        pytest.param("partial/bias_only", {}, marks=SLOW),
        ("lora/r8_attention", {}),
        ("prompt/tokens20", {}),
        pytest.param("prefix/tokens20", {}, marks=SLOW),
        pytest.param("bottleneck/pfeiffer", {}, marks=SLOW),
        ("partial/head_only", {"num_train_epochs": 1}),
        ("partial/head_only", {"max_steps": 4}),
        ("partial/head_only", {"adapter.trunk_dropout": True}),
        ("partial/top_2_layers", {"adapter.gradual_unfreezing": True}),
        ("partial/top_2_layers", {"activation_checkpointing": True}),
        ("partial/head_only", {"neftune_noise_alpha": 5.0}),
    ],
)
def test_where_it_would_not_be_exact_or_of_no_use_there_is_none(
    adapter: str, settings: dict[str, Any], checkpoint: Checkpoint, tmp_path: Path
) -> None:
    trainer, _ = build(checkpoint("bert"), DATA, tmp_path, adapter=adapter, **{**SAME_BATCHES, **settings})
    with frozen.kept(trainer) as layers:
        assert layers == 0


def test_dropout_in_frozen_layers_is_seen_and_said(
    checkpoint: Checkpoint, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trainer = trained(checkpoint("bert"), tmp_path, "partial/head_only", **{"adapter.trunk_dropout": True})
    assert trainer.layers_computed_once == 0
    assert "computed anew in every epoch: the frozen layers draw random numbers (dropout)" in capfd.readouterr().err


def test_the_activations_must_fit_all_or_none(
    checkpoint: Checkpoint, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trainer, ready = build(checkpoint("bert"), DATA, tmp_path, adapter="partial/head_only", **SAME_BATCHES)
    needed = 4 * 32 * sum(sum(ready.encoded[name]["length"][:]) for name in ("train", "validation"))
    for limit, layers in ((needed, 3), (needed - 1, 0)):
        trainer.recipe = trainer.recipe.model_copy(update={"frozen_cache_gb": limit / 1e9})
        with frozen.kept(trainer) as found:
            assert found == layers
    assert "are allowed (adapter.frozen_cache_gb)" in capfd.readouterr().err


def test_inputs_that_are_drawn_anew_are_not_kept(
    checkpoint: Checkpoint, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trainer, _ = build(checkpoint("bert"), DATA, tmp_path, adapter="partial/head_only", **SAME_BATCHES)
    collate = trainer.data_collator

    def masked(rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = collate(rows)
        batch["input_ids"][torch.rand(batch["input_ids"].shape) < 0.5] = 4
        return batch

    trainer.data_collator = masked
    with frozen.kept(trainer) as layers:
        assert layers == 0
    assert "a row's inputs are drawn anew each time" in capfd.readouterr().err


def test_rows_that_depend_on_their_neighbours_are_not_kept(
    checkpoint: Checkpoint, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trainer, _ = build(checkpoint("bert"), DATA, tmp_path, adapter="partial/head_only", **SAME_BATCHES)
    hook = trainer.model.bert.embeddings.register_forward_hook(lambda _m, _a, x: x + x.mean(0, keepdim=True))
    with frozen.kept(trainer) as layers:
        assert layers == 0
    hook.remove()
    assert "a row's activations depend on its neighbours" in capfd.readouterr().err


def test_a_head_that_reads_lower_layers_does_without(
    checkpoint: Checkpoint, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trainer, _ = build(checkpoint("bert"), DATA, tmp_path, adapter="partial/head_only", **SAME_BATCHES)
    lower: list[torch.Tensor] = []
    trainer.model.bert.encoder.layer[0].attention.register_forward_hook(lambda _m, _a, x: lower.append(x[0]))
    trainer.model.bert.pooler.register_forward_hook(lambda _m, _a, x: x + lower.pop()[:, 0] if lower else x)
    with frozen.kept(trainer) as layers:
        assert layers == 0
    assert "reads more than their hidden state" in capfd.readouterr().err


# --- rows -------------------------------------------------------------------------------------------------


def test_rows_come_back_to_their_places_without_padding() -> None:
    kept = Rows(5)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]]).bool()
    hidden = torch.arange(12.0).view(2, 3, 2)
    keys: list[Key] = [(b"a",), (b"b",)]
    kept.put(keys, mask, hidden)
    wider = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]]).bool()  # the other way round, one padded on the left
    found = kept.get(keys[::-1], wider)
    assert found is not None
    assert found.tolist() == [[[0, 0], [6, 7], [8, 9], [10, 11]], [[0, 1], [2, 3], [0, 0], [0, 0]]]
    assert kept.get([(b"c",)], mask[:1]) is None


def test_a_row_is_known_by_all_that_the_model_reads_and_not_by_its_padding() -> None:
    ids = torch.tensor([[5, 6, 0], [5, 6, 7], [5, 6, 0]])
    kinds = torch.tensor([[0, 0, 0], [0, 0, 0], [0, 1, 0]])
    batch = {"input_ids": ids, "attention_mask": (ids > 0).long(), "token_type_ids": kinds}
    first, second, third = keys_of(batch)
    assert len({first, second, third}) == 3  # the third differs in its token types
    short = {name: value[:1, :2] for name, value in batch.items()}
    assert keys_of(short) == [first]


def test_a_model_of_one_layer_type_alone_has_a_stack() -> None:
    assert probing.only_stack(nn.Linear(2, 2)) is None
