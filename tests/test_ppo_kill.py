"""SIGKILL at random moments of a PPO run that saves all the time, and a resume that ends as if nothing had been."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def killed_and_resumed(kills: int, *options: str) -> str:
    """What the harness says; in a process of its own, because a fork of this one would not be safe."""
    command = [sys.executable, "-m", "tests.ppo_kill_harness", "--kills", str(kills), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_killed_run_is_resumed_bit_for_bit() -> None:
    assert "1 of 1 killed and resumed runs are equal" in killed_and_resumed(1, "--episodes", "16")


@pytest.mark.slow
def test_10_killed_runs_are_resumed_bit_for_bit() -> None:
    said = killed_and_resumed(10)
    print(said)
    assert "10 of 10 killed and resumed runs are equal" in said
