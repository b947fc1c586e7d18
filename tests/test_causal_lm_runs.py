"""Runs of causal language models: round trips, steps, models from nothing, the card, continuations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import ptft_hf
from ptft_hf.errors import AdapterError, RecipeError
from ptft_hf.recipes import CausalLMRecipe, TokenizerRecipe
from tests.corpus import corpus
from tests.runs import build, logged
from tests.test_masked_lm_runs import load_plainly
from tests.test_model_card import card_of, code_of, result_of
from tests.tiny import SIZES, make_checkpoint

# PEFT asks a transformers model for an attribute that was renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

MORE = {
    "phi": SIZES["qwen2"],
    "gpt_neox": SIZES["bert"],
    "stablelm": SIZES["qwen2"],
    "olmo": SIZES["qwen2"],
}
DECODERS = ["gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma", "opt", *MORE]
FAST = {("gpt2", "lora/r8_attention"), ("llama", "full/default")}
CELLS = [
    pytest.param(name, method, marks=() if (name, method) in FAST else pytest.mark.slow)
    for name in DECODERS
    for method in ("full/default", "lora/r8_attention", "lora/r16_all_linear")
]
SIZES_OF_LLAMA = {f"model.{name}": value for name, value in SIZES["llama"].items()}


def recipe(**fields: Any) -> CausalLMRecipe:
    return CausalLMRecipe(name="test", family="causal_lm", **fields)


def run(model: Any, method: Any, output: Path, fields: Any = None, data: Any = None, **settings: Any) -> Any:
    quick = {"max_steps": 2, "per_device_train_batch_size": 8, "learning_rate": 0.01, "warmup_steps": 0}
    return ptft_hf.train(
        model=str(model),
        task=recipe(**(fields or {})),
        adapter=method,
        output_dir=output,
        data=data or corpus(),
        settings={**quick, "model.max_length": 32, **settings},
    )


@pytest.mark.parametrize(("architecture", "method"), CELLS)
def test_what_is_saved_is_what_was_trained(
    architecture: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SIZES, architecture, SIZES.get(architecture) or MORE[architecture])
    base, output = make_checkpoint(architecture, tmp_path / "base"), tmp_path / "run"
    trained = run(base, method, output, {"separate_documents": True})
    assert trained.run["proof"]["max_difference"] == 0
    ids = torch.tensor([[1, 5, 6, 7, 8]])
    with torch.no_grad():
        expected = trained.model(ids)[0]
        assert torch.equal(ptft_hf.load(output).model(ids)[0], expected)
        assert torch.equal(load_plainly(output, base, "AutoModelForCausalLM")(ids)[0], expected)
    assert set(trained.run["metrics"]["test"]) == {"loss", "perplexity", "token_accuracy"}
    (answer,) = trained.predict(["the film was"])
    assert answer["text"] == "the film was"
    assert trained.tokenizer(answer["continuation"], add_special_tokens=False)["input_ids"]


def test_the_matrix_is_as_wide_as_promised() -> None:
    assert len(DECODERS) >= 8
    assert {cell.values for cell in CELLS if not cell.marks} == FAST


def test_one_step_is_the_same_however_the_batch_is_cut(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """With documents apart, blocks have unequal numbers of labels (trap 1); against one batch in plain PyTorch."""

    def step(size: int, accumulated: int) -> Any:
        return build(
            checkpoint("llama"),
            corpus(),
            tmp_path / f"{size}x{accumulated}",
            task=recipe(model={"max_length": 24}, separate_documents=True),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulated,
            train_sampling_strategy="sequential",
            eval_strategy="no",
            save_strategy="no",
            max_grad_norm=1e9,
            max_steps=1,
        )

    trainer, ready = step(16, 1)
    batch = ready.task.collator(ready.tokenizer)(ready.encoded["train"].select(range(16)).to_list())
    labels = batch.pop("labels")
    loss = F.cross_entropy(ready.model(**batch).logits.flatten(0, 1), labels.flatten())
    gradients = torch.autograd.grad(loss, [p for p in ready.model.parameters() if p.requires_grad])
    norm = torch.stack([g.norm() for g in gradients]).norm().item()
    trainer.train()
    for size, accumulated in ((16, 1), (4, 4)):
        cut, _ = step(size, accumulated)
        cut.train()
        assert logged(cut) == [pytest.approx(loss.item(), abs=1e-5)]
        assert logged(cut, "grad_norm") == [pytest.approx(norm, rel=1e-5)]


@pytest.fixture(scope="module")
def nothing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama of random weights with a tokenizer of its corpus, trained until it has learnt something."""
    root = tmp_path_factory.mktemp("nothing")
    run(
        "config:llama",
        "full/default",
        root / "run",
        {"tokenizer": TokenizerRecipe(vocab_size=320), "generation": {"max_new_tokens": 6}},
        corpus(train=16, paragraphs=12),
        max_steps=60,
        learning_rate=1e-2,
        bf16=False,
        eval_strategy="no",
        save_strategy="no",
        **SIZES_OF_LLAMA,
    )
    return root / "run"


def test_a_model_from_nothing_learns_and_continues_texts(nothing: Path, tmp_path: Path) -> None:
    model = ptft_hf.load(nothing)
    record = model.run
    assert model.model.config.vocab_size == len(model.tokenizer) <= 320
    assert model.tokenizer.pad_token_id != model.tokenizer.eos_token_id
    assert model.model.config.eos_token_id == model.tokenizer.eos_token_id
    assert record["metrics"]["test"]["perplexity"] < 20
    assert record["metrics"]["test"]["token_accuracy"] > record["report"]["test"]["chance"]["token_accuracy"] + 0.2
    (answer,) = model.predict(["this story"])
    assert answer["continuation"].startswith((" was", " is"))
    result = model.evaluate(corpus(train=16, paragraphs=12))
    assert result.pop("report") == record["report"]["test"]
    assert result == record["metrics"]["test"]
    _, cells = card_of(nothing)
    upstream, own = code_of(cells)
    text = "It was late in the evening when"
    assert f'model.predict(["{text}"])' in own
    assert result_of(upstream, "continuation", tmp_path) == model.predict([text])[0]["continuation"]
    assert "It continues texts." in (nothing / "README.md").read_text("utf-8")


def test_an_adapter_is_put_on_a_model_of_ones_own(nothing: Path, tmp_path: Path) -> None:
    trained = run(nothing, "lora/r16_all_linear", tmp_path / "run")
    assert trained.run["proof"]["max_difference"] == 0
    assert trained.run["model"]["head"] == []  # the head is pretrained: LoRA leaves it
    kept = load_plainly(nothing, nothing, "AutoModelForCausalLM").lm_head.weight
    assert torch.equal(trained.model.get_base_model().lm_head.weight, kept)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["prefix/tokens20", "bottleneck/pfeiffer", "ia3/default"])
def test_other_adapters_keep_documents_apart(adapter: str, nothing: Path, tmp_path: Path) -> None:
    settings = {"model.max_length": 20, "bf16": False}
    trained = run(nothing, adapter, tmp_path / "run", {"separate_documents": True}, **settings)
    assert trained.run["proof"]["max_difference"] == 0
    assert trained.predict(["the film"])[0]["continuation"]


def test_what_cannot_be_had_is_refused(nothing: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="its results for tokens would stand behind"):
        run(nothing, "prompt/tokens20", tmp_path / "run", **{"model.max_length": 20})
    with pytest.raises(RecipeError, match="wordpiece loses white space"):
        wordpiece = {"tokenizer": TokenizerRecipe(kind="wordpiece")}
        run("config:llama", "full/default", tmp_path / "run", wordpiece, **SIZES_OF_LLAMA)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("tied", [False, True])
def test_a_card_s_lines_give_added_tokens_rows_of_the_output_layer(tied: bool, tmp_path: Path) -> None:
    base = make_checkpoint("llama", tmp_path / "base", auto="AutoModelForCausalLM", tie_word_embeddings=tied)
    trained = run(base, "lora/r8_attention", tmp_path / "out", {"add_tokens": ["[E1]", "Aspirin"]})
    assert trained.model.get_base_model().config.tie_word_embeddings == tied
    names: dict[str, Any] = {}
    exec(code_of(card_of(tmp_path / "out")[1])[0], names)
    ids = trained.tokenizer("the Aspirin [E1] and", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(names["model"](ids).logits, trained.model(ids).logits)
