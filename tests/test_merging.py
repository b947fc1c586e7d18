"""A finished run written again: merged into its base, or saved elsewhere."""

# ruff: noqa: F811 - fixtures are imported, and then named as parameters

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

import ptft_hf
from ptft_hf import checkpoints, inference
from ptft_hf.errors import CheckpointError, DataError, OutputError
from tests.finished import Finished, full, logits_of, lora  # noqa: F401


def test_a_merged_model_is_the_adapter_within_rounding_and_loads_with_plain_transformers(
    lora: Finished, tmp_path: Path
):
    folder = tmp_path / "merged"
    merged, comparison = inference.merge(lora.folder, folder)
    assert comparison["examples"] == 16
    assert comparison["max_logit_difference"] < 1e-5
    assert comparison["label_changes"] == 0
    assert not hasattr(merged.model, "peft_config")
    assert merged.run["merge"] == comparison

    plain = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    inputs = merged.tokenizer(lora.texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = ptft_hf.load(lora.folder).model(**inputs).logits
        assert (plain(**inputs).logits - expected).abs().max() < 1e-5
    assert plain.config.id2label == {0: "neg", 1: "pos"}


def test_the_comparison_sees_another_model(lora: Finished):
    one, other = ptft_hf.load(lora.folder), ptft_hf.load(lora.folder)
    with torch.no_grad():
        for name, parameter in other.model.named_parameters():
            if "modules_to_save" in name:
                parameter.neg_()  # a head with its signs turned gives every text the other label
    assert inference.compare(one, one, lora.texts)["max_logit_difference"] == 0
    assert inference.compare(one, other, lora.texts)["label_changes"] == 16


def test_a_merge_that_changes_the_model_writes_nothing(
    lora: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    merge = inference.TrainedModel.merge

    def wrong(self: inference.TrainedModel, base: str) -> inference.TrainedModel:
        merged = merge(self, base)
        with torch.no_grad():
            merged.model.classifier.bias += 0.01
        return merged

    monkeypatch.setattr(inference.TrainedModel, "merge", wrong)
    with pytest.raises(CheckpointError, match=r"differ by 0\.01 in their logits; nothing was written"):
        inference.merge(lora.folder, tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def test_a_run_whose_data_is_gone_is_merged_on_sample_texts(
    lora: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    def gone(*_: object) -> None:
        raise DataError("dev.jsonl: no such file")

    monkeypatch.setattr(inference.TrainedModel, "_rows", gone)
    _, comparison = inference.merge(lora.folder, tmp_path / "merged")
    assert comparison["examples"] == 2
    assert "compared on two sample texts, without the run's own data: dev.jsonl" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["full", "lora"])
def test_a_saved_copy_is_a_finished_run_like_the_first(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
):
    run = request.getfixturevalue(name)
    model = ptft_hf.load(run.folder)
    folder = model.save(tmp_path / "deep" / "copy")
    assert checkpoints.damage(folder) == []
    again = ptft_hf.load(folder)
    assert torch.equal(logits_of(again, run.texts), logits_of(model, run.texts))
    assert again.evaluate() == model.evaluate()
    assert {"README.md", "run.json", "curves.png", "metrics.jsonl"} <= {p.name for p in folder.iterdir()}
    with pytest.raises(OutputError, match="exists and is not empty"):
        model.save(folder)
