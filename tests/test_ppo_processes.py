"""Two processes of PPO, with the layers whole in each or sharded, give the updates of one with twice the batch."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from ptft_hf.errors import ModelError, RecipeError
from ptft_hf.rlhf import sharding, zero
from tests.ppo_runs import QUICK, make_language_model, metrics, reward_folder, task_file

LAUNCH = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true"}
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}


class Runs:
    """PPO of one tiny model, by the command."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.policy, self.task = make_language_model("llama", folder / "llama"), task_file(folder, 16)

    def start(
        self,
        name: str,
        *arguments: str,
        launcher: tuple[str, ...] = (),
        env: dict[str, str] | None = None,
        adapter: str = "lora/r8_attention",
        reward: str = "tests.ppo_runs:characters",
        **settings: Any,
    ) -> subprocess.CompletedProcess[str]:
        settings = {**QUICK, "total_episodes": 16, "learning_rate": 1e-3, **settings}
        sets = [part for key, value in settings.items() for part in ("--set", f"{key}={json.dumps(value)}")]
        command = ["-m", "ptft_hf.rlhf.ppo", "--policy", str(self.policy), "--task", str(self.task)]
        command += ["--reward", reward, "--adapter", adapter, "--output", str(self.folder / name)]
        return subprocess.run(
            [sys.executable, *launcher, *command, *arguments, *sets],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
        )

    def run(self, name: str, *arguments: str, **options: Any) -> list[dict[str, float]]:
        done = self.start(name, *arguments, **options)
        assert done.returncode == 0, done.stderr[-9000:]
        record = json.loads((self.folder / name / "run.json").read_text("utf-8"))
        assert record["forecast"]["peak_memory_mb"] > 0, done.stderr[-9000:]
        assert ("resuming from checkpoint-" in done.stdout + done.stderr) == ("--resume" in arguments)
        return metrics(self.folder / name)

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        files = sorted((self.folder / name).glob("*.safetensors"))
        files += sorted((self.folder / name / "critic").glob("*.safetensors"))
        each = ((file.relative_to(self.folder / name), load_file(file)) for file in files)
        return {f"{place}/{key}": value for place, tensors in each for key, value in tensors.items()}


def assert_same(alone: list[dict[str, float]], both: list[dict[str, float]], updates: int = 2) -> None:
    assert len(alone) == len(both) == updates
    for one, other in zip(alone, both, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert other[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key


@pytest.mark.parametrize("minibatches", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_two_processes_are_one_with_twice_the_batch(minibatches: int, tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    alone = runs.run("alone", num_mini_batches=minibatches, per_device_train_batch_size=8 // minibatches)
    size = 4 // minibatches
    both = runs.run("both", launcher=LAUNCH, num_mini_batches=minibatches, per_device_train_batch_size=size)
    assert_same(alone, both)


@pytest.mark.parametrize(
    ("adapter", "checkpointing"),
    [
        ("lora/r8_attention", False),
        pytest.param("lora/r8_attention", True, marks=pytest.mark.slow),
        pytest.param("full/default", False, marks=pytest.mark.slow),
    ],
    ids=["lora", "lora-checkpointing", "full"],
)
def test_sharded_layers_learn_what_whole_ones_do(adapter: str, checkpointing: bool, tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    given = {"adapter": adapter, "gradient_checkpointing": checkpointing, "save_steps": 1, "max_grad_norm": 0.05}
    given |= {"num_mini_batches": 2, "num_sample_generations": 1, "save_total_limit": 2}
    given |= {"stop_token_id": 7, "response_length": 20}  # so that one process has written before the other
    if checkpointing:
        given["reward"] = str(reward_folder(runs.policy, tmp_path / "reward"))  # a part on the sharded base
    alone = runs.run("alone", per_device_train_batch_size=4, **given)
    sharded = {"launcher": LAUNCH, "env": FSDP, "per_device_train_batch_size": 2, **given}
    assert_same(alone, runs.run("both", **sharded))
    assert all(5 < line["val/answer_length"] < 20 for line in alone)
    first, second = runs.weights("alone"), runs.weights("both")
    assert first.keys() == second.keys() and len(first) > 2
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-3, atol=1e-5)
    assert (tmp_path / "alone" / "samples.jsonl").read_text() == (tmp_path / "both" / "samples.jsonl").read_text()
    # Stopped after its first update, and resumed.
    shutil.copytree(tmp_path / "both", tmp_path / "again", ignore=shutil.ignore_patterns("checkpoint-2", "run.json"))
    again = runs.run("again", "--resume", **sharded)
    assert again == metrics(tmp_path / "both")
    assert all(torch.equal(value, second[name]) for name, value in runs.weights("again").items())


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.parametrize(
    ("stage", "adapter", "value_model"),
    [(1, "lora/r8_attention", "adapter"), (2, "lora/r8_attention", "policy_trunk"), (2, "full/default", "adapter")],
)
def test_shared_out_states_learn_what_whole_ones_do(
    stage: int, adapter: str, value_model: str, tmp_path: Path
) -> None:
    runs = Runs(tmp_path)
    given = {"adapter": adapter, "value_model": value_model, "save_steps": 1, "max_grad_norm": 0.05}
    given |= {"num_mini_batches": 2, "total_episodes": 24, "save_total_limit": 3}
    alone = runs.run("alone", per_device_train_batch_size=4, **given)
    given |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    env = {**DEEPSPEED, "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)}
    shared: dict[str, Any] = {"launcher": LAUNCH, "env": env, **given}
    both = runs.run("both", **shared)
    assert_same(alone, both, 3)
    first, second = runs.weights("alone"), runs.weights("both")
    assert first.keys() == second.keys() and len(first) > 2
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-3, atol=1e-5)
    # The optimizer's states are written as those of one that has them whole.
    one, other = (
        torch.load(tmp_path / name / "checkpoints" / "checkpoint-2" / "optimizer.pt", weights_only=True)["optimizer"]
        for name in ("alone", "both")
    )
    assert one["param_groups"] == other["param_groups"] and one["state"].keys() == other["state"].keys()
    for number, state in one["state"].items():
        assert state.keys() == other["state"][number].keys()
        for key, value in state.items():
            torch.testing.assert_close(other["state"][number][key], value, rtol=1e-3, atol=1e-6)
    # Stopped after its second update, and resumed.
    shutil.copytree(tmp_path / "both", tmp_path / "again", ignore=shutil.ignore_patterns("checkpoint-3", "run.json"))
    again = runs.run("again", "--resume", **shared)
    assert again == metrics(tmp_path / "both")
    assert all(torch.equal(value, second[name]) for name, value in runs.weights("again").items())


def test_what_deepspeed_cannot_do_here_is_named_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "deepspeed.json"
    stage = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "round_robin_gradients": True}
    config = {"zero_optimization": stage, "fp16": {"enabled": True}, "bf16": {"enabled": False}}
    file.write_text(json.dumps({**config, "gradient_clipping": 0.5, "train_batch_size": "auto"}))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    with pytest.raises(RecipeError) as raised:
        zero.settings()
    for part in (
        "zero_optimization.stage 3: is 1 or 2 here; FSDP 2 shares out the weights, too",
        "zero_optimization.offload_optimizer.device 'cpu': leave it out",
        "zero_optimization.round_robin_gradients: leave it out",
        "fp16: leave it out; --set bf16=true",
        "gradient_clipping: leave it out; --set max_grad_norm=...",
        "one process has nobody to share with",
    ):
        assert part in str(raised.value)
    assert "train_batch_size" not in str(raised.value) and "bf16: leave" not in str(raised.value)
    # By the command it is said before anything is loaded, a line for each.
    runs = Runs(tmp_path)
    done = runs.start("run", env={**DEEPSPEED, "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)})
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    first, *lines = done.stderr.splitlines()
    assert first.startswith("error: ") and len(lines) >= 6
    assert all(line.startswith("  - DeepSpeed: ") for line in lines)
    file.write_text("{")
    with pytest.raises(RecipeError, match="DeepSpeed: "):
        zero.settings()
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED")
    assert zero.settings() is None


def test_what_cannot_be_sharded_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    done = runs.start("run", launcher=LAUNCH, env={**FSDP, "FSDP_VERSION": "1"})
    assert done.returncode != 0
    assert "FSDP 1 cannot hold PPO's parts; set fsdp_version: 2" in done.stderr
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(RecipeError, match="FSDP: one process has nobody to share with; set --num_processes"):
        sharding.settings()


def test_layers_that_cannot_be_sharded_are_named() -> None:
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=3, num_attention_heads=1
    )
    model = transformers.LlamaForCausalLM(config)
    assert list(map(id, sharding.layers_of(model))) == list(map(id, model.model.layers))
    model.model.layers[0].packed = torch.nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ModelError, match="LlamaForCausalLM: a base in 4 or 8 bits cannot be sharded"):
        sharding.layers_of(model)
    model._no_split_modules = None
    with pytest.raises(ModelError, match="does not say what its layers are"):
        sharding.layers_of(model)
