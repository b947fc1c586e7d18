"""Kill a run with SIGKILL at random moments, resume it, and compare it with the run that was never killed.

``python -m tests.kill_harness --kills 25`` prints where each kill fell and ``25 of 25``. The runs are forked
from this process, which has imported everything and computed nothing, so that a run costs seconds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import tqdm

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from tests.conftest import rows, write_rows
from tests.tiny import make_checkpoint

# Bars' own lock is one of all processes of a fork, and a process that is killed while it holds it stops the others.
tqdm.tqdm.set_lock(threading.RLock())
tqdm.tqdm.monitor_interval = 0  # no thread that could hold it in a fork
KINDS = ("in a save", "while publishing", "any moment", "near the end", "any moment", "any moment")
"""When to kill, in turn: half of the moments are drawn evenly over the whole run, the others where it matters."""
PATIENCE = 300.0
TASK = """family: sequence_classification
data:
  path: json
  data_files: {train: train.jsonl, validation: dev.jsonl, test: test.jsonl}
training:
  num_train_epochs: 2
  per_device_train_batch_size: 4
  gradient_accumulation_steps: 2
  save_strategy: steps
  save_steps: 1
  eval_steps: 1
  save_total_limit: 2
  logging_steps: 3
"""
Command = list[str]


class Kill(NamedTuple):
    """One kill: when it was meant to fall, what the folder looked like, and whether the resumed run is equal."""

    kind: str
    stage: str
    equal: bool


# ---- what is run ----


def prepare(folder: Path, adapter: str) -> Callable[[str], Command]:
    """Checkpoint, task and data in a folder; returns the command line of a run into ``NAME``.

    The checkpoint has 1.3M weights, so that writing, flushing and hashing it (weights and AdamW's two moments)
    takes a good part of a step.
    """
    make_checkpoint("bert", folder / "model", hidden_size=128, intermediate_size=1024)
    for name, count, seed in (("train", 40, 1), ("dev", 8, 2), ("test", 8, 3)):
        write_rows(folder / f"{name}.jsonl", rows(count, seed))
    (folder / "task.yaml").write_text(TASK, encoding="utf-8")
    fixed = ["--model", str(folder / "model"), "--task", str(folder / "task.yaml"), "--adapter", adapter]
    options = ["--set", "adapter.trunk_dropout=true", "--set", "learning_rate=1e-3"]
    return lambda name: ["train", *fixed, *options, "--output", str(folder / name)]


def outcome(folder: Path) -> dict[str, Any]:
    """All that a resumed run must have in common with the unbroken one, and the names of all its files."""
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    weights = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("*.safetensors")}
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    timed = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
    log = [{k: v for k, v in json.loads(line).items() if k not in timed} for line in lines]
    metrics = json.loads((folder / "run.json").read_text("utf-8"))["metrics"]
    return {"files": files, "weights": weights, "log": log, "metrics": metrics}


def stage(folder: Path) -> str:
    """Where in its life a run's folder is."""
    if (folder / "run.json").exists():
        return "finished"
    if (folder / "manifest.json").exists():
        return "while publishing"
    if (folder / ".staging").exists():
        return "in the final save"
    if any((folder / "checkpoints").glob(".staging*")):
        return "in a save"
    if any((folder / "checkpoints").glob(".deleted*")):
        return "in the deletion of an old checkpoint"
    if any((folder / "checkpoints").glob("checkpoint-*")):
        return "between two saves"
    return "before the first save" if (folder / "settings.json").exists() else "before training"


# ---- processes ----


def import_everything() -> None:
    """What a run imports; without a computation, after which a fork would not be safe."""
    import torch

    torch.set_num_threads(1)
    import matplotlib.figure
    import peft
    import sklearn.metrics
    import transformers
    from transformers.models.bert import modeling_bert

    from ptft_hf import cli, inference, resuming, trainer, training

    modules = (
        matplotlib.figure,
        peft,
        sklearn.metrics,
        modeling_bert,
        cli,
        inference,
        resuming,
        trainer,
        training,
    )
    assert all(modules) and transformers.Trainer and transformers.AutoModelForSequenceClassification


def fork(command: Command, log: Path) -> int:
    """Run ``ptft COMMAND`` in a child; returns its process id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with log.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.argv = ["ptft", *command]
        from ptft_hf.cli import main

        main()
        code = 0
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def exited(child: int) -> int | None:
    """Exit code of a child, None while it runs."""
    done, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def finish(command: Command, log: Path) -> None:
    """Run to the end.

    Raises:
        RuntimeError: The run failed; with the end of its log.
    """
    child, started = fork(command, log), time.monotonic()
    while (code := exited(child)) is None:
        if time.monotonic() - started > PATIENCE:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    if code:
        raise RuntimeError(f"exit code {code} of ptft {' '.join(command)}\n{log.read_text('utf-8')[-3000:]}")


def kill(command: Command, log: Path, is_time: Callable[[float], bool]) -> bool:
    """Start a run and kill it as soon as ``is_time(seconds since its start)``; False if it ended before."""
    child, started = fork(command, log), time.monotonic()
    while exited(child) is None:
        if is_time(time.monotonic() - started):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return True
        time.sleep(0.0005)
    return False


# ---- moments ----


def moment(
    kind: str, part: float, folder: Path, seconds: float, draw: random.Random
) -> Callable[[float], bool]:
    """The test for the moment to kill.

    Args:
        kind: One of :data:`KINDS`.
        part: Of the run's time, from 0 to 1, for ``any moment``.
        folder: The run's output folder.
        seconds: What an unbroken run takes.
        draw: Draws what is left to chance.
    """
    if kind == "any moment":
        return lambda now: now >= part * seconds
    save, delay = draw.randrange(1, 10), draw.uniform(0.0, 0.06 if kind == "in a save" else 0.2)
    places = {
        "in a save": folder / "checkpoints" / f".staging-{save}",
        "near the end": folder / ".staging",
        "while publishing": folder / "manifest.json",
    }
    if kind == "while publishing":
        delay = draw.choice((0.0, 0.0, 0.002))
    seen: list[float] = []

    def is_time(now: float) -> bool:
        if not seen and places[kind].exists():
            seen.append(now)
        return bool(seen) and now >= seen[0] + delay

    return is_time


def run_all(kills: int, seed: int, adapter: str, root: Path) -> list[Kill]:
    """One unbroken run, then ``kills`` runs that are killed and resumed; each fifth is killed again while it is
    being resumed."""
    draw = random.Random(seed)
    command = prepare(root, adapter)
    import_everything()
    started = time.monotonic()
    finish(command("unbroken"), root / "unbroken.log")
    seconds = time.monotonic() - started
    expected = outcome(root / "unbroken")
    print(f"an unbroken run takes {seconds:.1f} s; kills drawn with seed {seed}")
    results = []
    for i in range(kills):
        folder, log = root / f"run-{i}", root / f"run-{i}.log"
        kind, part = KINDS[i % len(KINDS)], (i + draw.random()) / kills
        while not kill(command(folder.name), log, moment(kind, part, folder, seconds, draw)):
            shutil.rmtree(folder)  # it was faster than the unbroken run: no kill
            part *= 0.8
        found = stage(folder)
        again = draw.random() * seconds
        if i % 5 == 4 and kill([*command(folder.name), "--resume"], log, lambda now, at=again: now >= at):
            found += f", then {stage(folder)}"
        finish([*command(folder.name), "--resume"], log)
        results.append(Kill(kind, found, outcome(folder) == expected))
        print(
            f"{i + 1:3} {kind:17} killed {found}: {'equal' if results[-1].equal else 'DIFFERENT'}", flush=True
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--adapter", default="full/default")
    given = parser.parse_args()
    seed = random.randrange(1_000_000) if given.seed is None else given.seed
    with tempfile.TemporaryDirectory() as root:
        results = run_all(given.kills, seed, given.adapter, Path(root))
    for found, count in Counter(kill.stage for kill in results).most_common():
        print(f"{count:3} {found}")
    equal = sum(kill.equal for kill in results)
    print(f"{equal} of {given.kills} killed and resumed runs are equal to the unbroken run, bit for bit")
    sys.exit(0 if equal == given.kills else 1)


if __name__ == "__main__":
    main()
