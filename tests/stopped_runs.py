"""What the tests of resuming share: a quick run that saves at every step, and what a kill leaves of it."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from ptft_hf import checkpoints, train
from tests.conftest import rows, write_rows

# 48 rows: 3 optimizer steps of 2 x 8 rows an epoch, 6 in all; every step saved and kept. The losses of four
# steps stand in one log line, so that saves fall between two logs.
SETTINGS = {
    "num_train_epochs": 2,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "eval_strategy": "steps",
    "save_steps": 1,
    "eval_steps": 1,
    "save_total_limit": 20,
    "logging_steps": 4,
    "adapter.trunk_dropout": True,
    "learning_rate": 1e-3,
}
TASK = """family: sequence_classification
data:
  path: json
  data_files: {train: train.jsonl, validation: dev.jsonl, test: test.jsonl}
"""
TIMES = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")


class Place:
    """A folder with a task and its data, in which a tiny BERT is trained into folders by name."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        for name, count, seed in (("train", 48, 1), ("dev", 16, 2), ("test", 16, 3)):
            write_rows(folder / f"{name}.jsonl", rows(count, seed))
        (folder / "task.yaml").write_text(TASK, encoding="utf-8")

    def run(self, name: str, adapter: str = "full/default", settings: Any = None, **options: Any) -> Any:
        return train(
            model=str(self.model),
            task=self.folder / "task.yaml",
            adapter=adapter,
            output_dir=self.folder / name,
            settings={**SETTINGS, **(settings or {})},
            **options,
        )

    def stopped(self, step: int, finished: Path) -> Path:
        """A copy of a finished run as a kill after this step's save would have left it."""
        folder = self.folder / f"stopped-{step}"
        shutil.copytree(finished, folder)
        for path in folder.iterdir():
            if path.is_file() and path.name not in ("settings.json", "metrics.jsonl"):
                path.unlink()
        for number, path in checkpoints.steps(folder / "checkpoints"):
            if number > step:
                shutil.rmtree(path)
        return folder


def weights(folder: Path) -> dict[str, str]:
    """SHA-256 of the final weights' file."""
    (file,) = folder.glob("*.safetensors")
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest()}


def logged(folder: Path) -> list[dict[str, Any]]:
    """``metrics.jsonl`` without what a clock says."""
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def assert_same(one: Path, other: Path) -> None:
    """Two finished runs have equal weights, logs, metrics and files."""
    assert weights(one) == weights(other)
    assert logged(one) == logged(other)
    records = [json.loads((folder / "run.json").read_text("utf-8")) for folder in (one, other)]
    assert records[0]["metrics"] == records[1]["metrics"]
    assert records[0]["training"]["best_step"] == records[1]["training"]["best_step"]
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in other.iterdir())
    assert [n for n, _ in checkpoints.steps(one / "checkpoints")] == [
        n for n, _ in checkpoints.steps(other / "checkpoints")
    ]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 0x40
    path.write_bytes(content)
