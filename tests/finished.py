"""Finished runs that many tests look at: one in full and one with LoRA, each trained once a session."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import ptft_hf
from tests.conftest import rows, write_rows

# Enough for the tiny model to tell both labels apart, so that a test may ask whether a label has changed.
METHODS = {
    "full": ("full/default", {"num_train_epochs": 20, "learning_rate": 1e-3}),
    "lora": ("lora/r16_all_linear", {"num_train_epochs": 12, "learning_rate": 1e-2}),
}
QUICK = {"per_device_train_batch_size": 8, "bf16": False, "eval_strategy": "no", "save_strategy": "no"}
_made: dict[str, Finished] = {}


class Finished(NamedTuple):
    """A finished run: its folder, its pretrained base, and the folder of ``{train,dev,test}.jsonl``."""

    folder: Path
    base: Path
    data: Path

    @property
    def run(self) -> dict[str, Any]:
        return json.loads((self.folder / "run.json").read_text("utf-8"))

    @property
    def texts(self) -> list[str]:
        return [row["text"] for row in read_rows(self.data / "test.jsonl")]


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def logits_of(model: ptft_hf.TrainedModel, texts: list[str]) -> torch.Tensor:
    """As plain transformers gives them, one text at a time: no batches, no padding."""
    with torch.no_grad():
        each = [model.model(**model.tokenizer(text, return_tensors="pt")).logits for text in texts]
    return torch.cat(each)


def finished(name: str, checkpoint: Callable[[str], Path], factory: pytest.TempPathFactory) -> Finished:
    """The run of one of METHODS; made when it is first asked for."""
    if name not in _made:
        root = factory.mktemp(f"finished-{name}")
        for split, count, seed in (("train", 48, 1), ("dev", 16, 2), ("test", 16, 3)):
            write_rows(root / f"{split}.jsonl", rows(count, seed))
        task = root / "task.yaml"
        task.write_text(
            "family: sequence_classification\n"
            "data: {path: json, data_files: {train: train.jsonl, validation: dev.jsonl, test: test.jsonl}}\n",
            encoding="utf-8",
        )
        adapter, settings = METHODS[name]
        base, folder = checkpoint("bert"), root / "output"
        ptft_hf.train(
            model=str(base), task=task, adapter=adapter, output_dir=folder, settings={**QUICK, **settings}
        )
        _made[name] = Finished(folder, base, root)
    return _made[name]


@pytest.fixture(scope="session")
def full(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return finished("full", checkpoint, tmp_path_factory)


@pytest.fixture(scope="session")
def lora(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return finished("lora", checkpoint, tmp_path_factory)
