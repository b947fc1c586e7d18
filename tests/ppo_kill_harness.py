"""Kill a PPO run with SIGKILL at random moments, resume it, and compare it with the run that was never killed.

``python -m tests.ppo_kill_harness --kills 10`` prints where each kill fell and ``10 of 10``. The runs are forked from
this process, as in :mod:`tests.kill_harness`, whose moments it uses.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests import kill_harness
from tests.kill_harness import KINDS, Command, finish, kill, moment, stage
from tests.ppo_runs import make_language_model, prompts

SETTINGS = {
    "per_device_train_batch_size": 4,
    "num_mini_batches": 2,
    "num_ppo_epochs": 2,
    "response_length": 6,
    "learning_rate": 1e-2,
    "adap_kl_ctrl": "true",
    "target": 0.5,
    "horizon": 100,
    "save_steps": 1,
    "save_total_limit": 2,
    "num_sample_generations": 3,
    "bf16": "false",
}


def prepare(folder: Path, episodes: int) -> Callable[[str], Command]:
    """Policy, prompts and task in a folder; returns the command line of a run into ``NAME``."""
    policy = make_language_model("llama", folder / "policy")
    for name, rows in prompts().items():
        rows.to_json(str(folder / f"{name}.jsonl"))
    files = ", ".join(f"{name}: {name}.jsonl" for name in prompts())
    task = folder / "task.yaml"
    task.write_text(f"family: prompts\ndata: {{path: json, data_files: {{{files}}}}}\n", encoding="utf-8")
    fixed = ["--policy", str(policy), "--reward", "tests.ppo_runs:share_of_good", "--task", str(task)]
    settings = {**SETTINGS, "total_episodes": episodes}
    sets = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    return lambda name: ["ppo", *fixed, *sets, "--adapter", "lora/r8_attention", "--output", str(folder / name)]


def outcome(folder: Path) -> dict[str, Any]:
    """All that a resumed run must have in common with the unbroken one, and the names of all its files."""
    weights = {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in [*folder.rglob("*.safetensors"), folder / "samples.jsonl"]
    }
    lines = map(json.loads, (folder / "metrics.jsonl").read_text("utf-8").splitlines())
    log = [{name: value for name, value in line.items() if "time/" not in name} for line in lines]
    record = json.loads((folder / "run.json").read_text("utf-8"))
    return {
        "files": sorted(str(path.relative_to(folder)) for path in folder.rglob("*")),
        "weights": weights,
        "log": log,
        "metrics": record["metrics"],
        "findings": record["findings"],
    }


def import_everything() -> None:
    """What a run imports; without a computation, after which a fork would not be safe."""
    kill_harness.import_everything()
    import accelerate
    from transformers.models.llama import modeling_llama

    from ptft_hf.rlhf import ppo

    assert all((accelerate, modeling_llama, ppo))


def run_all(kills: int, seed: int, episodes: int, root: Path) -> int:
    """How many of the runs that were killed and resumed are equal to the unbroken one."""
    draw = random.Random(seed)
    import_everything()
    command = prepare(root, episodes)
    started = time.monotonic()
    finish(command("unbroken"), root / "unbroken.log")
    seconds, expected = time.monotonic() - started, outcome(root / "unbroken")
    print(f"an unbroken run takes {seconds:.1f} s; kills drawn with seed {seed}")
    equal = 0
    for i in range(kills):
        folder, log = root / f"run-{i}", root / f"run-{i}.log"
        kind, part = KINDS[i % len(KINDS)], (i + draw.random()) / kills
        while not kill(command(folder.name), log, moment(kind, part, folder, seconds, draw)):
            shutil.rmtree(folder)  # it was faster than the unbroken run: no kill
            part *= 0.8
        found = stage(folder)
        finish([*command(folder.name), "--resume"], log)
        same = outcome(folder) == expected
        equal += same
        print(f"{i + 1:3} {kind:17} killed {found}: {'equal' if same else 'DIFFERENT'}", flush=True)
    return equal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--episodes", type=int, default=40)
    given = parser.parse_args()
    seed = random.randrange(1_000_000) if given.seed is None else given.seed
    with tempfile.TemporaryDirectory() as root:
        equal = run_all(given.kills, seed, given.episodes, Path(root))
    print(f"{equal} of {given.kills} killed and resumed runs are equal to the unbroken run, bit for bit")
    sys.exit(0 if equal == given.kills else 1)


if __name__ == "__main__":
    main()
