"""What the tests of training share: a Trainer as a run builds it, on rows given in Python."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch

from ptft_hf import preparing, training
from ptft_hf.preparing import Ready
from ptft_hf.recipes import SequenceClassificationRecipe
from ptft_hf.trainer import Trainer
from tests.conftest import WORDS, rows
from tests.tiny import make_checkpoint

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
QUICK = {
    "num_train_epochs": 1,
    "per_device_train_batch_size": 8,
    "logging_steps": 1,
    "warmup_steps": 0,
    "bf16": False,
}


def bert_without_dropout(folder: Path) -> Path:
    return make_checkpoint("bert", folder, **NO_DROPOUT)


def splits(train: Sequence[Mapping[str, Any]], **others: Sequence[Mapping[str, Any]]) -> datasets.DatasetDict:
    """A DatasetDict; splits that are not given hold the training rows under other texts."""
    given: dict[str, list[Any]] = {"train": list(train)}
    for name in ("validation", "test"):
        given[name] = list(others.get(name) or ({**row, "text": f"{row['text']} {name}"} for row in train))
    return datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in given.items()})


def learner(folder: Path) -> Path:
    """Without dropout, and with larger initial weights than BERT's own: it learns ``told`` in a few steps."""
    return make_checkpoint("bert", folder, **NO_DROPOUT, initializer_range=0.1)


def told(count: int, kinds: Sequence[Sequence[str]]) -> list[tuple[str, Sequence[str]]]:
    """Short texts, each with one word of each of its kinds (keys of WORDS), and these kinds."""
    found = []
    for i in range(count):
        kind, turn = kinds[i % len(kinds)], i // len(kinds)
        found.append((" ".join(["the", *(WORDS[k][turn % 4] for k in kind), "film", str(i)]), kind))
    return found


def recipe(**fields: Any) -> SequenceClassificationRecipe:
    return SequenceClassificationRecipe(name="test", family="sequence_classification", **fields)


def build(
    model: Path,
    data: datasets.DatasetDict,
    folder: Path,
    *,
    task: Any = None,
    adapter: Any = "full/default",
    seed: int = 1,
    **settings: Any,
) -> tuple[Trainer, Ready]:
    """The Trainer of a run, before its first step."""
    plan = preparing.make_plan(str(model), task or recipe(), adapter, {**QUICK, **settings})
    ready = preparing.prepare(plan, data, seed)
    arguments = preparing.training_arguments(plan, ready, folder, seed)
    trainer = training.build_trainer(Trainer, plan, ready, arguments, folder)
    return trainer, ready


def logged(trainer: Any, name: str = "loss") -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def curve(folder: Path, name: str = "loss") -> list[float]:
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    return [entry[name] for entry in map(json.loads, lines) if name in entry]


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def equal_weights(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def short_run(
    base: Path,
    adapter: Any,
    folder: Path,
    labels: tuple[str, ...] = ("neg", "pos"),
    *,
    count: int = 16,
    resume: bool = False,
    **settings: Any,
) -> Any:
    """Two steps of a classifier on ``count`` rows, unless the settings say more."""
    return training.train(
        model=str(base),
        task=recipe(),
        adapter=adapter,
        output_dir=folder,
        resume=resume,
        data=splits(rows(count, 1, labels), validation=rows(8, 2, labels), test=rows(8, 3, labels)),
        settings={"max_steps": 2, "per_device_train_batch_size": 8, "warmup_steps": 0, **settings},
    )
