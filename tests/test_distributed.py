"""Two processes give the loss curve of one process with twice the batch, and only one of them writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ptft_hf import training
from ptft_hf.errors import RecipeError
from tests.conftest import rows, write_rows
from tests.runs import bert_without_dropout, curve

COMMON = {
    "num_train_epochs": 2,
    "logging_steps": 1,
    "learning_rate": 1e-3,
    "bf16": False,
    "per_device_eval_batch_size": 3,
}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bert_without_dropout(tmp_path_factory.mktemp("bert"))


def task_of(folder: Path, count: int) -> Path:
    """A task of ``count`` training rows; 17 rows of validation, so that processes do not share them evenly."""
    labels = ("neg", "neg", "pos")
    for name, number, seed in (("train", count, 1), ("dev", 17, 2), ("test", 9, 3)):
        write_rows(folder / f"{name}.jsonl", rows(number, seed, labels))
    path = folder / "task.yaml"
    path.write_text(
        "family: sequence_classification\n"
        "data:\n"
        "  path: json\n"
        "  data_files: {train: train.jsonl, validation: dev.jsonl, test: test.jsonl}\n"
        "class_weights: {neg: 1, pos: 5}\n",
        encoding="utf-8",
    )
    return path


def on_two_processes(
    bert: Path, task: Path, adapter: str, output: Path, settings: dict[str, Any], *flags: str
) -> subprocess.CompletedProcess[str]:
    """The command as the README shows it; ``--standalone`` takes a free port of its own."""
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    command = ("-m", "ptft_hf", "train", "--model", str(bert), "--task", str(task), "--adapter", adapter)
    sets = [part for name, value in settings.items() for part in ("--set", f"{name}={json.dumps(value)}")]
    return subprocess.run(
        [*launcher, *command, "--output", str(output), "--seed", "1", *sets, *flags],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def on_one_process(bert: Path, task: Path, adapter: str, output: Path, settings: dict[str, Any]) -> Any:
    return training.train(
        model=str(bert), task=task, adapter=adapter, output_dir=output, seed=1, settings=settings
    ).run


def assert_same_curves(one: Path, two: Path, names: Sequence[str]) -> None:
    for name in names:
        expected = curve(one, name)
        assert len(expected) > 1
        assert curve(two, name) == pytest.approx(expected, abs=1e-5), name


CURVES = ("step", "loss", "grad_norm", "learning_rate", "eval_loss", "eval_macro_f1")


def test_two_processes_give_the_curve_of_one_with_twice_the_batch(bert: Path, tmp_path: Path) -> None:
    task = task_of(tmp_path, 48)
    one = on_one_process(
        bert, task, "full/default", tmp_path / "one", {**COMMON, "per_device_train_batch_size": 16}
    )
    finished = on_two_processes(
        bert, task, "full/default", tmp_path / "two", {**COMMON, "per_device_train_batch_size": 8}
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert_same_curves(tmp_path / "one", tmp_path / "two", CURVES)
    two = json.loads((tmp_path / "two/run.json").read_text("utf-8"))
    assert two["metrics"]["test"] == pytest.approx(one["metrics"]["test"], abs=1e-5)
    assert two["hardware"]["processes"] == 2
    # One process speaks and writes, the other is silent.
    assert finished.stdout.count("task.yaml · full/default") == 1
    assert finished.stderr.count("labels in 48 training rows") == 1
    assert len(curve(tmp_path / "two", "step")) == len(curve(tmp_path / "one", "step"))


def test_rows_that_fill_up_the_last_batch_do_not_count(bert: Path, tmp_path: Path) -> None:
    # 35 rows in global batches of 2 x 8: the last one has 3, all on the first process. accelerate fills it up
    # with 13 rows of the epoch's begin. Two batches are one step, so the last batch shares its step with none.
    task = task_of(tmp_path, 35)
    steps = {"gradient_accumulation_steps": 2}
    on_one_process(
        bert,
        task,
        "lora/r8_attention",
        tmp_path / "one",
        {**COMMON, **steps, "per_device_train_batch_size": 16},
    )
    finished = on_two_processes(
        bert,
        task,
        "lora/r8_attention",
        tmp_path / "two",
        {**COMMON, **steps, "per_device_train_batch_size": 8},
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert len(curve(tmp_path / "two")) == 4
    assert_same_curves(tmp_path / "one", tmp_path / "two", CURVES)


def test_fsdp_on_one_process_is_refused(bert: Path, tmp_path: Path) -> None:
    settings = {**COMMON, "fsdp": "full_shard"}
    with pytest.raises(RecipeError, match=r"training\.fsdp: needs several processes"):
        on_one_process(bert, task_of(tmp_path, 16), "full/default", tmp_path / "one", settings)
    assert not (tmp_path / "one").exists()


def test_fsdp_which_would_be_data_parallelism_is_refused(bert: Path, tmp_path: Path) -> None:
    settings = {**COMMON, "fsdp": "full_shard"}
    finished = on_two_processes(bert, task_of(tmp_path, 16), "full/default", tmp_path / "two", settings)
    assert finished.returncode != 0
    assert "training.fsdp: needs several processes, each with an accelerator of its own" in finished.stderr
    assert not (tmp_path / "two").exists()
