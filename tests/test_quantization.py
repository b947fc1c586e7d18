"""Four and eight bits: learning goes on after an evaluation, the head is whole, saves and merges are right."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ptft_hf
from ptft_hf import inference, models, preparing, recipes
from ptft_hf.errors import ModelError, RecipeError
from ptft_hf.recipes import load_adapter
from tests.conftest import rows
from tests.runs import build, recipe, short_run, splits
from tests.tiny import make_checkpoint

pytest.importorskip("bitsandbytes", reason="bitsandbytes is an extra (quant)")
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:_check_is_size will be removed:FutureWarning"),
]
Checkpoint = Callable[[str], Path]
METHODS = ("lora/qlora_nf4", "lora/qlora_int8")
FAST = {"max_steps": 4, "learning_rate": 0.01, "bf16": False}


def data() -> Any:
    return splits(rows(24, 1), validation=rows(8, 2), test=rows(8, 3))


def run(base: Path, method: str, folder: Path, **settings: Any) -> Any:
    return short_run(base, method, folder, count=24, **{**FAST, **settings})


def loaded(base: Path, method: str) -> Any:
    return models.load_model(
        str(base),
        "AutoModelForSequenceClassification",
        config={"num_labels": 2, "pad_token_id": 0},
        quantization=load_adapter(method).quantization,
    )


IDS = torch.tensor([[5, 6, 7, 8, 2], [9, 10, 11, 12, 2]])


# ---- loading ----


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2", "llama", "t5"])
def test_the_trunk_is_quantized_and_the_head_is_not(method: str, name: str, checkpoint: Checkpoint) -> None:
    result = loaded(checkpoint(name), method)
    layers = models.quantized_layers(result.model)
    assert layers
    assert not any(inside.startswith(head) for inside in layers for head in result.head)
    for head in result.head:
        assert all(p.dtype == torch.float32 for p in result.model.get_submodule(head).parameters())


def test_the_fingerprint_is_the_base_s_and_the_head_is_the_seed_s(checkpoint: Checkpoint) -> None:
    torch.manual_seed(3)
    plain = models.load_model(
        str(checkpoint("bert")), "AutoModelForSequenceClassification", config={"num_labels": 2}
    )
    torch.manual_seed(3)
    result = loaded(checkpoint("bert"), "lora/qlora_nf4")
    assert result.fingerprint == plain.fingerprint
    assert torch.equal(result.model.classifier.weight, plain.model.classifier.weight)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_learning_goes_on_after_an_evaluation(name: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Every LoRA matrix has a gradient after a forward pass in evaluation mode."""
    _, ready = build(checkpoint(name), data(), tmp_path, adapter="lora/qlora_nf4", bf16=False)
    model = ready.model
    with torch.no_grad():
        for part, parameter in model.named_parameters():
            if "lora_B" in part:  # zero at the start, where A gets no gradient
                parameter.normal_(std=0.02)
        weights = {n: m.weight.data.clone() for n, m in models.quantized_layers(model).items()}
        model.eval()(input_ids=IDS)
    model.train()(input_ids=IDS).logits.sum().backward()
    matrices = {n: p for n, p in model.named_parameters() if "lora_" in n}
    assert len(matrices) >= 2 * len(weights)
    assert [n for n, p in matrices.items() if p.grad is None or not p.grad.any()] == []
    assert all(torch.equal(m.weight.data, weights[n]) for n, m in models.quantized_layers(model).items())


def test_bitsandbytes_alone_repacks_for_a_kernel_without_backward(tmp_path: Path) -> None:
    from bitsandbytes.functional import has_avx512bf16
    from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

    if not has_avx512bf16():
        pytest.skip("this CPU has no AVX512-BF16 instructions")
    fields = load_adapter("lora/qlora_nf4").quantization or {}
    model = AutoModelForSequenceClassification.from_pretrained(
        make_checkpoint("bert", tmp_path / "bert", hidden_size=128, intermediate_size=128),
        quantization_config=BitsAndBytesConfig(**fields, llm_int8_skip_modules=["classifier"]),
    ).eval()
    layer = model.bert.encoder.layer[0].attention.self.query
    before = layer.weight.data.clone()
    with torch.no_grad():
        model(input_ids=IDS)
    after = layer.weight.data
    assert after.shape != before.shape or not torch.equal(after, before)


# ---- runs ----


def test_a_policy_is_merged_and_its_card_loads_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from ptft_hf.rlhf.decoders import load_decoder
    from ptft_hf.rlhf.merging import merge_policy
    from tests.test_by_trl import run as run_trl
    from tests.test_instruction import checkpoint as chat
    from tests.test_model_card import card_of, code_of

    folder = tmp_path / "dpo"
    run_trl("dpo", chat(tmp_path / "base"), folder, "lora/qlora_nf4")
    policy, shown = load_decoder(str(folder), "float32", {})[0], dict[str, Any]()
    assert models.quantized_layers(policy)
    exec(code_of(card_of(folder)[1])[0], shown)
    with torch.no_grad():
        logits = policy(input_ids=IDS).logits
        assert torch.equal(shown["model"](input_ids=IDS).logits, logits)
        away = {}
        for base in ("full_precision", "dequantized"):
            assert merge_policy(folder, tmp_path / base, base=base)["max_logit_difference"] < 1e-5
            assert f"merged on its {base} base: against the quantized model" in capfd.readouterr().err
            merged = load_decoder(str(tmp_path / base), "float32", {})[0]
            assert not models.quantized_layers(merged)
            away[base] = (merged(input_ids=IDS).logits - logits).abs().max().item()
    assert away["dequantized"] < away["full_precision"] / 3


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["bert", pytest.param("llama", marks=pytest.mark.slow)])
def test_a_run_is_proven_and_merged(
    method: str, name: str, checkpoint: Checkpoint, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trained = run(checkpoint(name), method, tmp_path / "run")
    assert trained.run["proof"] == {"max_difference": 0.0, "examples": 8}
    texts = [row["text"] for row in rows(8, 3)]
    again = ptft_hf.load(tmp_path / "run")
    assert models.quantized_layers(again.model)
    assert again.predict(texts) == trained.predict(texts)
    saved = json.loads((tmp_path / "run" / "adapter_config.json").read_text("utf-8"))
    assert all("classifier" not in n and "score" not in n for n in saved["target_modules"])

    merged, comparison = inference.merge(tmp_path / "run", tmp_path / "merged")
    assert not models.quantized_layers(merged.model)
    assert comparison["max_logit_difference"] < 1e-5  # of the adapter on the same base
    distances = {n: found["max_logit_difference"] for n, found in comparison["from_quantized"].items()}
    assert 0 < distances["dequantized"] < distances["full_precision"]
    assert "on its full_precision base: logits differ by at most" in capfd.readouterr().err
    other, _ = inference.merge(tmp_path / "run", tmp_path / "other", base="dequantized")
    # Of other texts: as far away, roughly, and nowhere near exact or lost.
    distance = inference.compare(again, other, texts)["max_logit_difference"]
    assert 0.2 < distance / distances["dequantized"] < 5


def test_the_loss_falls_before_and_after_an_evaluation(checkpoint: Checkpoint, tmp_path: Path) -> None:
    from tests.runs import curve

    run(
        checkpoint("llama"), "lora/qlora_nf4", tmp_path / "run",
        max_steps=60, eval_strategy="steps", eval_steps=30, save_steps=30, logging_steps=15, learning_rate=0.003,
    )  # fmt: skip
    losses = curve(tmp_path / "run")
    assert losses[3] < losses[2] < losses[1] < losses[0]


def test_the_card_s_lines_give_the_same_logits(checkpoint: Checkpoint, tmp_path: Path) -> None:
    run(checkpoint("bert"), "lora/qlora_nf4", tmp_path / "run")
    card = (tmp_path / "run" / "README.md").read_text("utf-8")
    code = card.split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(code, names)
    trained = ptft_hf.load(tmp_path / "run")
    inputs = trained.tokenizer("A sentence to classify.", return_tensors="pt")
    with torch.no_grad():
        expected = trained.model(**inputs).logits
    assert torch.equal(names["logits"], expected)


# ---- refusals ----


@pytest.mark.parametrize("method", ["full/default", "partial/head_only"])
def test_what_trains_the_checkpoint_s_weights_is_refused(method: str) -> None:
    with pytest.raises(RecipeError, match="quantized weights cannot be trained; use a LoRA recipe"):
        load_adapter(method, {"quantization": {"load_in_4bit": True}})


def test_a_quantization_says_how_many_bits() -> None:
    with pytest.raises(RecipeError, match="needs one of load_in_4bit and load_in_8bit"):
        load_adapter("lora/r8_attention", {"quantization": {"bnb_4bit_quant_type": "nf4"}})


def test_without_bitsandbytes_the_extra_is_named(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(recipes, "importable", lambda package: package != "bitsandbytes")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "bitsandbytes" else find(n, *a)
    )
    with pytest.raises(RecipeError, match=r"lora/qlora_nf4: quantization: .*pip install 'ptft-hf\[quant\]'"):
        preparing.make_plan(str(checkpoint("bert")), recipe(), "lora/qlora_nf4", {})
    with pytest.raises(ModelError, match=r"pip install 'ptft-hf\[quant\]'"):
        loaded(checkpoint("bert"), "lora/qlora_nf4")


def test_a_gguf_file_is_not_quantized_anew() -> None:
    given = {"load_in_4bit": True}
    with pytest.raises(ModelError, match=r"a GGUF file \(m.gguf\) is unpacked while it is read"):
        models.load_model("x", "AutoModelForCausalLM", config={}, quantization=given, gguf_file="m.gguf")


def test_pissa_on_a_quantized_base_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(ptft_hf.errors.AdapterError, match="PEFT cannot put LORA on"):
        run(checkpoint("bert"), "lora/qlora_nf4", tmp_path / "run", **{"adapter.init_lora_weights": "pissa"})
    assert not (tmp_path / "run").exists()
