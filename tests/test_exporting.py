"""Runs exported as plain models: compared before they count, with all that belongs to them, or not at all."""

# ruff: noqa: F811 - fixtures are imported, and then named as parameters

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from typer.testing import CliRunner

import ptft_hf
from ptft_hf import checkpoints, cli, exporting, inference, onnx_models
from ptft_hf.errors import CheckpointError, DataError, ModelError, OutputError
from tests.conftest import rows
from tests.finished import Finished, full, lora  # noqa: F401
from tests.runs import short_run

# PEFT asks a transformers model for an attribute that was renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
MISSING = [name for name in onnx_models.PACKAGES if importlib.util.find_spec(name) is None]
needs_onnx = pytest.mark.skipif(bool(MISSING), reason=f"an extra (onnx) is not installed: {', '.join(MISSING)}")
SLOW = pytest.mark.slow
Checkpoint = Callable[[str], Path]


def files_of(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def in_transformers(folder: Path, texts: list[str]) -> torch.Tensor:
    """Logits by plain transformers."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return model(**tokenizer(texts, padding=True, return_tensors="pt")).logits


def in_onnxruntime(folder: Path, texts: list[str]) -> np.ndarray:
    """Logits by onnxruntime and the tokenizer alone, as the card's lines run it."""
    import onnxruntime

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"))
    inputs = tokenizer(texts, padding=True, return_tensors="np")
    (logits,) = session.run(None, {value.name: inputs[value.name] for value in session.get_inputs()})
    return logits


# ---- safetensors ----


@pytest.mark.parametrize("name", ["full", "lora"])
def test_a_plain_model_with_all_that_belongs_to_it(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    run = request.getfixturevalue(name)
    found = exporting.export(run.folder, tmp_path / "deep" / "exported")
    folder = tmp_path / "deep" / "exported"
    trained = ptft_hf.load(run.folder)
    with torch.no_grad():
        inputs = trained.tokenizer(run.texts, padding=True, return_tensors="pt")
        expected = trained.model(**inputs).logits
    difference = (in_transformers(folder, run.texts) - expected).abs().max()
    assert difference == 0 if name == "full" else difference < 1e-5
    assert found["max_logit_difference"] < 1e-5
    validation = trained.run["metrics"]["validation"]["macro_f1"]
    assert found["metric"] == {"name": "macro_f1", "run": validation, "exported": validation}
    assert {"model.safetensors", "config.json", "tokenizer.json", "run.json", "README.md"} <= files_of(folder)
    assert checkpoints.damage(folder) == []
    assert ptft_hf.load(folder).predict(run.texts)[0]["label"] == trained.predict(run.texts)[0]["label"]
    assert str(folder) in (folder / "README.md").read_text("utf-8")
    assert files_of(folder.parent) == {"exported"}  # nothing half-written beside it


def test_the_chat_template_and_generation_settings_come_along(
    lora: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = inference.load

    def with_template(*args: Any, **kwargs: Any) -> Any:
        loaded = load(*args, **kwargs)
        loaded.tokenizer.chat_template = "{{ messages }}"
        return loaded

    monkeypatch.setattr(inference, "load", with_template)
    exporting.export(lora.folder, tmp_path / "exported")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    assert tokenizer.chat_template == "{{ messages }}"


def test_a_model_that_has_changed_is_not_exported(
    lora: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge = inference.TrainedModel.merge

    def wrong(self: inference.TrainedModel, base: str) -> inference.TrainedModel:
        merged = merge(self, base)
        with torch.no_grad():
            merged.model.classifier.bias += 0.01
        return merged

    monkeypatch.setattr(inference.TrainedModel, "merge", wrong)
    with pytest.raises(CheckpointError, match=r"another one: its logits differ by 0\.01"):
        exporting.export(lora.folder, tmp_path / "exported")
    assert not list(tmp_path.iterdir())


def test_without_the_run_s_data_two_texts_are_compared_and_that_is_said(
    lora: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def gone(*_: object) -> None:
        raise DataError("dev.jsonl: no such file")

    monkeypatch.setattr(inference.TrainedModel, "_rows", gone)
    found = exporting.export(lora.folder, tmp_path / "exported")
    assert (found["examples"], found["metric"]) == (2, None)
    assert "on no metric, without the run's own data: dev.jsonl" in capfd.readouterr().err


def test_a_method_that_cannot_be_merged_is_refused_by_name(checkpoint: Checkpoint, tmp_path: Path) -> None:
    short_run(checkpoint("bert"), "prefix/tokens20", tmp_path / "run", bf16=False)
    with pytest.raises(CheckpointError, match="PREFIX_TUNING cannot be merged"):
        exporting.export(tmp_path / "run", tmp_path / "exported")
    assert files_of(tmp_path) == {"run"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:_check_is_size will be removed:FutureWarning")
@pytest.mark.parametrize("base", ["full_precision", "dequantized"])
def test_a_quantized_base_is_exported_unquantized(
    base: str, checkpoint: Checkpoint, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is an extra (quant)")
    trained = short_run(checkpoint("bert"), "lora/qlora_nf4", tmp_path / "run", bf16=False)
    found = exporting.export(tmp_path / "run", tmp_path / "exported", base=base)
    assert found["max_logit_difference"] < 1e-5  # of the adapter on the same base
    assert f"exported on its {base} base: against the quantized model" in capfd.readouterr().err
    texts = [row["text"] for row in rows(8, 3)]
    merged = trained.merge(base)
    with torch.no_grad():
        inputs = trained.tokenizer(texts, padding=True, return_tensors="pt")
        assert torch.equal(in_transformers(tmp_path / "exported", texts), merged.model(**inputs).logits)


def test_formats_and_folders_are_checked_first(lora: Finished, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="to: 'gguf' is none of safetensors, onnx"):
        exporting.export(lora.folder, tmp_path / "exported", to="gguf")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="exists and is not empty"):
        exporting.export(lora.folder, tmp_path)
    with pytest.raises(ModelError, match="base: 'rounded' is neither full_precision nor dequantized"):
        exporting.export(lora.folder, tmp_path / "exported", base="rounded")


# ---- onnx ----


def test_without_the_extra_the_error_says_what_to_install(
    lora: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    absent = ("onnx", "onnxscript")
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n in absent else find(n, *a))
    with pytest.raises(ModelError, match=r"onnx: needs the packages onnx.* pip install 'ptft-hf\[onnx\]'"):
        exporting.export(lora.folder, tmp_path / "exported", to="onnx")


@needs_onnx
@pytest.mark.parametrize("name", ["lora", pytest.param("full", marks=SLOW)])
def test_onnx_with_any_number_of_rows_and_tokens(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    run = request.getfixturevalue(name)
    folder = tmp_path / "exported"
    found = exporting.export(run.folder, folder, to="onnx")
    trained = ptft_hf.load(run.folder)
    for texts in (run.texts[:1], run.texts, ["good", "a bad film " * 15]):
        inputs = trained.tokenizer(texts, padding=True, return_tensors="pt")
        with torch.no_grad():
            expected = trained.model(**inputs).logits.numpy()
        np.testing.assert_allclose(in_onnxruntime(folder, texts), expected, atol=1e-5)
    assert found["examples"] == 16
    assert found["metric"]["run"] == found["metric"]["exported"]
    assert {"model.onnx", "config.json", "tokenizer.json", "README.md", "export.json"} <= files_of(folder)
    assert not any(file.endswith(".safetensors") for file in files_of(folder))
    assert json.loads((folder / "export.json").read_text("utf-8"))["compared"] == found
    assert checkpoints.damage(folder) == []
    names: dict[str, Any] = {}
    exec((folder / "README.md").read_text("utf-8").split("```python\n")[1].split("```")[0], names)
    assert names["logits"].shape == (1, 2)


@needs_onnx
def test_an_onnx_model_that_differs_leaves_nothing(
    lora: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = onnx_models.write

    def wrong(model: Any, *args: Any) -> None:
        with torch.no_grad():
            model.classifier.weight *= 2
        write(model, *args)

    monkeypatch.setattr(onnx_models, "write", wrong)
    with pytest.raises(CheckpointError, match="another one: its logits differ"):
        exporting.export(lora.folder, tmp_path / "exported", to="onnx")
    assert not list(tmp_path.iterdir())


ARCHITECTURES = ["distilbert", "roberta", "electra", "deberta-v2", "modernbert", "gpt2", "llama", "albert"]


@needs_onnx
@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_under_onnx(name: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    short_run(checkpoint(name), "lora/r16_all_linear", tmp_path / "run", bf16=False)
    found = exporting.export(tmp_path / "run", tmp_path / "exported", to="onnx")
    assert found["max_logit_difference"] < 1e-4


@needs_onnx
@pytest.mark.slow
def test_a_tagger_under_onnx(checkpoint: Checkpoint, tmp_path: Path) -> None:
    import datasets

    from ptft_hf import training
    from ptft_hf.recipes import TokenClassificationRecipe

    tagged = [
        {"tokens": (w := row["text"].split()), "tags": ["B-x" if i % 4 == 1 else "O" for i in range(len(w))]}
        for row in rows(24, 1)
    ]
    parts = {"train": tagged[:12], "validation": tagged[12:18], "test": tagged[18:]}
    training.train(
        model=str(checkpoint("bert")),
        task=TokenClassificationRecipe(name="tags", family="token_classification"),
        adapter="partial/top_2_layers",
        output_dir=tmp_path / "run",
        data=datasets.DatasetDict({name: datasets.Dataset.from_list(some) for name, some in parts.items()}),
        settings={"max_steps": 4, "bf16": False},
    )
    found = exporting.export(tmp_path / "run", tmp_path / "exported", to="onnx")
    assert found["max_logit_difference"] < 1e-4 and found["metric"] is None  # data given in Python is not kept


# ---- the command line ----


def test_export_prints_the_gap(lora: Finished, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.app, ["export", str(lora.folder), "--output", str(tmp_path / "exported")])
    assert result.exit_code == 0, result.exception
    said = " ".join(result.stderr.split())
    assert "exported against run on 17 examples: logits differ by at most" in said
    assert "on 16 validation examples: macro_f1" in said and "a gap of 0" in said


def test_merge_takes_the_base(lora: Finished, tmp_path: Path) -> None:
    for base, code in (("dequantized", 0), ("rounded", 1)):
        flags = ["merge", str(lora.folder), "--output", str(tmp_path / base), "--base", base]
        assert CliRunner().invoke(cli.app, flags).exit_code == code
    assert files_of(tmp_path) == {"dequantized"}
