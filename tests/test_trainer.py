"""A run's records, its best checkpoint and its end."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import safetensors.torch
import torch

from ptft_hf import training
from ptft_hf.adapters.peft import Peft
from ptft_hf.callbacks import MetricsLog
from ptft_hf.errors import RecipeError
from tests.conftest import rows
from tests.runs import QUICK, build, curve, equal_weights, learner, logged, recipe, splits, told, weights

DATA = splits(rows(32, 1), validation=rows(16, 2), test=rows(16, 3))


@pytest.fixture(scope="module")
def bert(checkpoint: Any) -> Path:
    path: Path = checkpoint("bert")
    return path


# --- a run's records --------------------------------------------------------------------------------------


def trained(bert: Path, folder: Path, adapter: Any, **settings: Any) -> Any:
    return training.train(
        model=str(bert),
        task=recipe(),
        adapter=adapter,
        output_dir=folder,
        data=DATA,
        seed=1,
        settings={**QUICK, "num_train_epochs": 2, "learning_rate": 1e-3, **settings},
    )


@pytest.mark.parametrize("adapter", ["full/default", "lora/r8_attention"])
def test_the_same_seed_gives_the_same_bits(adapter: str, bert: Path, tmp_path: Path) -> None:
    one = trained(bert, tmp_path / "one", adapter)
    torch.rand(7)  # what drew random numbers before does not matter
    two = trained(bert, tmp_path / "two", adapter)
    assert equal_weights(weights(one.model), weights(two.model))
    assert curve(tmp_path / "one") == curve(tmp_path / "two")
    assert one.run["metrics"] == two.run["metrics"]


def test_pefts_casts_to_float32_and_back_are_left_out_and_change_no_bit(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enabled: dict[str, set[bool]] = {"without": set(), "with": set()}
    cast, now = peft.tuners.lora.LoraLayer._cast_input_dtype, "without"

    def watched(layer: Any, x: Any, dtype: Any) -> Any:
        if torch.is_autocast_enabled("cpu"):
            enabled[now].add(layer.cast_input_dtype_enabled)
        return cast(layer, x, dtype)

    monkeypatch.setattr(peft.tuners.lora.LoraLayer, "_cast_input_dtype", watched)
    without = trained(bert, tmp_path / "without", "lora/r16_all_linear", bf16=True)
    now = "with"
    monkeypatch.setattr(Peft, "while_training", lambda *args, **kwargs: nullcontext())
    with_casts = trained(bert, tmp_path / "with", "lora/r16_all_linear", bf16=True)
    assert enabled["with"] == {True}
    assert False in enabled["without"]
    assert equal_weights(weights(without.model), weights(with_casts.model))
    assert curve(tmp_path / "without") == curve(tmp_path / "with")


def test_every_logged_step_is_a_line_of_metrics_jsonl(bert: Path, tmp_path: Path) -> None:
    trained(bert, tmp_path / "run", "full/default")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text("utf-8").splitlines()]
    # 32 rows in batches of 8: four steps an epoch, and an evaluation after each epoch.
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8]
    steps = [line for line in lines if "loss" in line]
    assert all(set(line) == {"step", "loss", "grad_norm", "learning_rate", "epoch"} for line in steps)
    assert [line["learning_rate"] for line in steps] == pytest.approx([1e-3 * (8 - i) / 8 for i in range(8)])
    for line in lines:
        if "loss" not in line:
            assert {"eval_loss", "eval_accuracy", "eval_macro_f1", "eval_mcc"} <= set(line)


def test_a_loss_that_is_no_number_is_null_in_json(bert: Path, tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    state = SimpleNamespace(is_world_process_zero=True, global_step=3, log_history=[{"step": 1, "loss": 0.5}])
    log.on_train_begin(None, state, None)
    log.on_log(None, state, None, logs={"loss": float("nan"), "epoch": 1.0})
    lines = (tmp_path / "metrics.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line, parse_constant=pytest.fail) for line in lines] == [
        {"step": 1, "loss": 0.5, "epoch": None},
        {"step": 3, "loss": None, "epoch": 1.0},
    ]


# --- the best checkpoint ----------------------------------------------------------------------------------

# The loss falls while the model learns; who takes the greatest for the best must not end where training ended.
WORST = {
    "num_train_epochs": 4,
    "per_device_train_batch_size": 16,
    "learning_rate": 5e-3,
    "metric_for_best_model": "loss",
    "greater_is_better": True,
    "save_total_limit": 10,
}


LEARNT = splits([{"text": text, "label": kind[0]} for text, kind in told(96, (["neg"], ["pos"]))])


def state_of(model: Any) -> dict[str, torch.Tensor]:
    """What a checkpoint holds of a model: all of it, or the adapter."""
    if isinstance(model, peft.PeftModel):
        return dict(peft.get_peft_model_state_dict(model, save_embedding_layers=False))
    return weights(model)


@pytest.mark.parametrize(
    ("adapter", "file"),
    [("full/default", "model.safetensors"), ("lora/r8_attention", "adapter_model.safetensors")],
)
def test_training_ends_with_the_best_checkpoints_weights(adapter: str, file: str, tmp_path: Path) -> None:
    bert = learner(tmp_path / "bert")
    trainer, _ = build(bert, LEARNT, tmp_path / "run", adapter=adapter, **WORST)
    trainer.train()
    losses = logged(trainer, "eval_loss")
    best = 6 * (1 + losses.index(max(losses)))  # six steps an epoch
    assert trainer.state.best_global_step == best < 24
    folder = tmp_path / "run/checkpoints"
    saved = {step: safetensors.torch.load_file(folder / f"checkpoint-{step}" / file) for step in (best, 24)}
    assert equal_weights(state_of(trainer.model), saved[best])
    assert not equal_weights(saved[best], saved[24])


def test_the_best_checkpoint_is_kept_when_others_are_deleted(tmp_path: Path) -> None:
    bert = learner(tmp_path / "bert")
    settings = {**WORST, "save_total_limit": 1}
    run = training.train(
        model=str(bert),
        task=recipe(),
        adapter="full/default",
        output_dir=tmp_path / "run",
        data=LEARNT,
        seed=1,
        settings={**QUICK, **settings},
    )
    losses = curve(tmp_path / "run", "eval_loss")
    best = 6 * (1 + losses.index(max(losses)))
    assert run.run["training"]["best_step"] == best < 24
    (left,) = (tmp_path / "run/checkpoints").iterdir()
    assert left.name == f"checkpoint-{best}"
    saved = safetensors.torch.load_file(left / "model.safetensors")
    assert equal_weights(weights(run.model), saved)


def test_early_stopping_waits_as_long_as_it_is_told(tmp_path: Path) -> None:
    bert = learner(tmp_path / "bert")
    task = recipe(early_stopping_patience=2)
    trainer, _ = build(bert, LEARNT, tmp_path / "run", task=task, **{**WORST, "num_train_epochs": 9})
    trainer.train()
    losses = logged(trainer, "eval_loss")
    assert losses.index(max(losses)) == len(losses) - 3 < 9 - 3  # two more without a better one
    assert trainer.state.global_step == 6 * len(losses)


def test_early_stopping_without_evaluation_is_refused(bert: Path, tmp_path: Path) -> None:
    task = recipe(early_stopping_patience=2)
    with pytest.raises(RecipeError, match="early_stopping_patience: needs evaluation and saving"):
        build(bert, DATA, tmp_path / "run", task=task, eval_strategy="no")
    assert not (tmp_path / "run").exists()
