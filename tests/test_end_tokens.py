"""A text may hold an end token, written out; classifiers of encoder-decoders pool at end tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

import ptft_hf
from tests.conftest import rows, write_rows

TEXTS = ["a </s> in the text", "a good film"]
Checkpoint = Callable[[str], Path]


@pytest.mark.parametrize("architecture", ["bart", "t5"])
def test_upstream_refuses_a_batch_with_an_end_token_in_a_text(
    architecture: str, checkpoint: Checkpoint
) -> None:
    folder = checkpoint(architecture)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    with pytest.raises(ValueError, match="same number of <eos> tokens"):
        model(**tokenizer(TEXTS, return_tensors="pt", padding=True))


@pytest.mark.parametrize("architecture", ["bart", "t5"])
def test_here_it_is_text_in_training_in_prediction_and_in_plain_transformers_code(
    architecture: str, checkpoint: Checkpoint, task_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "train.jsonl"
    write_rows(path, [*rows(46, 1), *({"text": text, "label": "pos"} for text in TEXTS)])
    trained = ptft_hf.train(
        model=str(checkpoint(architecture)),
        task=task_file,
        adapter="full/default",
        output_dir=tmp_path / "run",
        settings={"num_train_epochs": 1},
    )
    scores = [answer["scores"]["pos"] for answer in trained.predict(TEXTS)]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "run")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")
    with torch.no_grad():
        logits = model(**tokenizer(TEXTS, return_tensors="pt", padding=True)).logits
    assert scores == pytest.approx(logits.softmax(-1)[:, 1].tolist(), abs=1e-6)
