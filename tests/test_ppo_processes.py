"""Two processes of PPO give the updates of one process with twice the batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ppo_runs import QUICK, make_language_model, metrics, task_file


@pytest.mark.parametrize("minibatches", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_two_processes_are_one_with_twice_the_batch(minibatches: int, tmp_path: Path) -> None:
    policy, task = make_language_model("llama", tmp_path / "llama"), task_file(tmp_path, 16)
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")

    def run(name: str, rows: int, *launcher: str) -> list[dict[str, float]]:
        settings = {**QUICK, "num_mini_batches": minibatches, "per_device_train_batch_size": rows}
        settings |= {"total_episodes": 16, "learning_rate": 1e-3}
        sets = [part for key, value in settings.items() for part in ("--set", f"{key}={json.dumps(value)}")]
        command = ["-m", "ptft_hf.rlhf.ppo", "--policy", str(policy), "--task", str(task)]
        command += ["--reward", "tests.ppo_runs:characters", "--adapter", "lora/r8_attention"]
        done = subprocess.run(
            [sys.executable, *launcher, *command, "--output", str(tmp_path / name), *sets],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return metrics(tmp_path / name)

    alone, both = run("alone", 8 // minibatches), run("both", 4 // minibatches, *launch)
    assert len(alone) == len(both) == 2
    for one, other in zip(alone, both, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert other[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key
