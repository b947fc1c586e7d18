"""SIGKILL at random moments of a run that saves all the time, and a resume that ends as if nothing had been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import kill_harness

ROOT = Path(__file__).parents[1]


def killed_and_resumed(kills: int, *options: str) -> str:
    """What the harness says; in a process of its own, because a fork of this one would not be safe."""
    command = [sys.executable, "-m", "tests.kill_harness", "--kills", str(kills), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_two_killed_runs_are_resumed_bit_for_bit() -> None:
    said = killed_and_resumed(2, "--adapter", "lora/r8_attention")  # in a save, and while publishing
    assert "2 of 2 killed and resumed runs are equal" in said


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["full/default", "lora/r16_all_linear"])
def test_25_killed_runs_are_resumed_bit_for_bit(adapter: str) -> None:
    assert "25 of 25 killed and resumed runs are equal" in killed_and_resumed(25, "--adapter", adapter)


@pytest.mark.slow
def test_the_command_itself_is_killed_and_resumed(tmp_path: Path) -> None:
    command = kill_harness.prepare(tmp_path, "full/default")
    start = [sys.executable, "-m", "ptft_hf"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*start, *command("unbroken")], cwd=ROOT, env=environment, check=True, capture_output=True)
    with (tmp_path / "log").open("wb") as log:
        child = subprocess.Popen(
            [*start, *command("killed")], cwd=ROOT, env=environment, stdout=log, stderr=log
        )
        while not (tmp_path / "killed" / "checkpoints" / "checkpoint-3").exists():
            assert child.poll() is None
            time.sleep(0.001)
        child.kill()
    assert child.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "run.json").exists()
    resumed = subprocess.run(
        [*start, *command("killed"), "--resume"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming from checkpoint-" in resumed.stderr
    assert kill_harness.outcome(tmp_path / "killed") == kill_harness.outcome(tmp_path / "unbroken")
