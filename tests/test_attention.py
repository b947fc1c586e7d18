"""Attention by the length of a batch: eager where it is the faster one on a CPU, sdpa for the longest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification
from transformers.models.bert.modeling_bert import BertEncoder

from ptft_hf.models import AttentionByLength
from tests.conftest import rows
from tests.runs import bert_without_dropout, curve, short_run
from tests.tiny import make_checkpoint


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    return bert_without_dropout(tmp_path / "bert")


def used(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str]]:
    """Grows with each pass through an encoder: tokens of the batch, and the attention it was given."""
    passes: list[tuple[int, str]] = []
    forward = BertEncoder.forward

    def watched(self: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        passes.append((hidden_states.shape[1], self.config._attn_implementation))
        return forward(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(BertEncoder, "forward", watched)
    return passes


def test_short_batches_are_eager_and_the_longest_are_not(bert: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(bert)
    attention = AttentionByLength(model, [10] * 96 + [40] * 4)
    found = []
    for tokens in (10, 40, 10, 11):
        with torch.no_grad():
            model(input_ids=torch.ones(2, tokens, dtype=torch.long))
        found.append(model.config._attn_implementation)
    assert found == ["eager", "sdpa", "eager", "sdpa"]
    assert str(attention) == "sdpa attention (eager up to 10 tokens)"
    model(input_ids=torch.ones(2, 10, dtype=torch.long))
    attention.restore()
    assert model.config._attn_implementation == "sdpa"
    model(input_ids=torch.ones(2, 10, dtype=torch.long))
    assert model.config._attn_implementation == "sdpa"


def test_rows_longer_than_was_measured_are_long(bert: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(bert)
    assert AttentionByLength(model, [500] * 100).short == 128


def test_with_dropout_all_are_short_that_were_measured(tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(make_checkpoint("bert", tmp_path / "bert"))
    lengths = [10] * 96 + [40] * 4
    assert AttentionByLength(model, lengths, drops=True).short == 128
    assert AttentionByLength(model, lengths, drops=False).short == 10
    model.config.attention_probs_dropout_prob = 0.0
    assert AttentionByLength(model, lengths, drops=True).short == 10


def test_a_model_without_sdpa_stays_as_it_is(bert: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(bert, attn_implementation="eager")
    attention = AttentionByLength(model, [10] * 100)
    model(input_ids=torch.ones(2, 40, dtype=torch.long))
    assert (attention.short, str(attention)) == (0, "eager attention")
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("adapter", ["full/default", "lora/r8_attention"])
def test_a_run_takes_both_learns_the_same_and_saves_what_the_model_had(
    adapter: str, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = used(monkeypatch)
    settings = {"max_steps": 8, "logging_steps": 1, "bf16": False, "learning_rate": 1e-3, "count": 64}
    mixed = short_run(bert, adapter, tmp_path / "mixed", **settings)
    seen = set(passes)
    longest = max(tokens for tokens, _ in seen)
    assert {name for _, name in seen} == {"eager", "sdpa"}
    assert (longest, "sdpa") in seen
    passes.clear()
    alone = short_run(bert, adapter, tmp_path / "alone", **{"model.attn_implementation": "sdpa"}, **settings)
    assert {name for _, name in passes} == {"sdpa"}
    assert curve(tmp_path / "mixed") == pytest.approx(curve(tmp_path / "alone"), rel=1e-5)
    texts = [row["text"] for row in rows(8, 5)]
    for one, other in zip(mixed.predict(texts), alone.predict(texts), strict=True):
        assert one["scores"] == pytest.approx(other["scores"], rel=1e-4)
    assert mixed.model.config._attn_implementation == "sdpa"
