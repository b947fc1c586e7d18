"""Added tokens: their embeddings begin at the mean, are trained alone, saved small, and come back exactly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
import transformers

import ptft_hf
from ptft_hf import inference, models, training
from ptft_hf.errors import AdapterError, ModelError, RecipeError
from ptft_hf.recipes import load_task
from tests.conftest import rows
from tests.runs import QUICK, build, recipe, splits
from tests.tiny import make_tokenizer

# PEFT asks a transformers model for an attribute that was renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

Checkpoint = Callable[[str], Path]
TOKENS = ["[E1]", "Aspirin"]
SLOW = pytest.mark.slow


def marked(count: int, seed: int) -> list[dict[str, Any]]:
    """Texts with the new tokens; the first of them tells the label better than any word."""
    return [
        {**row, "text": f"{'[E1] Aspirin' if row['label'] == 'pos' else 'Aspirin'} {row['text']}"}
        for row in rows(count, seed)
    ]


DATA = splits(marked(16, 1), validation=marked(8, 2), test=marked(8, 3))


def run(base: Path, adapter: Any, folder: Path, **settings: Any) -> ptft_hf.TrainedModel:
    return training.train(
        model=str(base),
        task=recipe(add_tokens=TOKENS),
        adapter=adapter,
        output_dir=folder,
        data=DATA,
        settings={**QUICK, "learning_rate": 1e-2, **settings},
    )


# --- training ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "t5", pytest.param("gpt2", marks=SLOW), pytest.param("bart", marks=SLOW)])
def test_new_rows_begin_at_the_mean_of_all_others(name: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    base = transformers.AutoModel.from_pretrained(checkpoint(name)).get_input_embeddings().weight
    _, ready = build(
        checkpoint(name), DATA, tmp_path, task=recipe(add_tokens=TOKENS), adapter="lora/r8_attention"
    )
    new = [ready.tokenizer.convert_tokens_to_ids(token) for token in TOKENS]
    assert new == [len(base), len(base) + 1]
    weight = ready.model.get_base_model().get_input_embeddings().weight
    assert torch.equal(weight[: len(base)], base)
    for row in new:
        assert torch.equal(weight[row], base.mean(0))
    assert ready.tokenizer.tokenize("the Aspirin[E1] aspirin")[1:3] == ["Aspirin", "[E1]"]  # as written alone
    assert any(note.startswith("2 tokens added; ") for note in ready.notes)


@pytest.mark.parametrize("adapter", ["lora/r8_attention", "partial/head_only", "full/default"])
def test_only_the_new_rows_are_trained_where_the_trunk_is_frozen(
    adapter: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    base = transformers.AutoModel.from_pretrained(checkpoint("bert")).get_input_embeddings().weight
    model = run(checkpoint("bert"), adapter, tmp_path / "run", weight_decay=0.1)
    if adapter.startswith("lora"):
        model = model.merge()
    weight = model.model.get_input_embeddings().weight
    assert len(weight) == len(base) + 2
    assert torch.equal(weight[: len(base)], base) == (adapter != "full/default")
    for new in weight[len(base) :]:
        assert not torch.equal(new, base.mean(0))
    assert not torch.equal(weight[-1], weight[-2])


# --- saving and loading -----------------------------------------------------------------------------------


def test_the_adapter_is_small_comes_back_exactly_and_merges(checkpoint: Checkpoint, tmp_path: Path) -> None:
    trained = run(checkpoint("bert"), "lora/r8_attention", tmp_path / "run", bf16=True)
    assert trained.run["proof"]["max_difference"] == 0.0
    assert trained.run["model"]["added_tokens"]["tokens"] == TOKENS
    saved = safetensors.torch.load_file(tmp_path / "run/adapter_model.safetensors")
    embeddings = {name: value.shape for name, value in saved.items() if "embeddings" in name}
    assert list(embeddings.values()) == [(2, 32)]  # two tokens, and not the whole table
    texts = [row["text"] for row in marked(8, 3)]
    merged, comparison = inference.merge(tmp_path / "run", tmp_path / "merged")
    assert comparison["max_logit_difference"] < 1e-5
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    inputs = merged.tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = trained.model(**inputs).logits
        assert (plain(**inputs).logits - expected).abs().max() < 1e-5
    assert inputs["input_ids"].max() == plain.config.vocab_size - 1  # the new tokens are read


@pytest.mark.parametrize("adapter", ["lora/r8_attention", pytest.param("partial/head_only", marks=SLOW)])
def test_the_card_s_lines_load_the_new_rows(adapter: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    trained = run(checkpoint("bert"), adapter, tmp_path / "run")
    card = (tmp_path / "run" / "README.md").read_text("utf-8")
    code = card.split("```python\n")[1].split("```")[0]
    assert ("base.resize_token_embeddings" in code) == adapter.startswith("lora")
    names: dict[str, Any] = {}
    exec(code, names)
    inputs = trained.tokenizer([row["text"] for row in marked(4, 3)], padding=True, return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(names["model"](**inputs).logits, trained.model(**inputs).logits)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["lora/pissa", "lora/dora", "adalora/r12_to_8"])
def test_other_kinds_of_lora_keep_them_too(adapter: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    trained = run(checkpoint("bert"), adapter, tmp_path / "run")
    assert trained.run["proof"]["max_difference"] == 0.0
    _, comparison = inference.merge(tmp_path / "run", tmp_path / "merged")
    assert comparison["max_logit_difference"] < 1e-4


def test_plain_peft_loses_the_new_rows_or_saves_the_whole_table(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """The trap (UPSTREAM.md): the embeddings are in no adapter unless they all are."""

    def grown() -> Any:
        model = transformers.AutoModelForSequenceClassification.from_pretrained(checkpoint("bert"))
        torch.nn.init.ones_(model.classifier.weight)
        torch.nn.init.zeros_(model.classifier.bias)
        model.resize_token_embeddings(size + 2, mean_resizing=False)
        return model

    tokenizer = make_tokenizer("bert")
    size = len(tokenizer)
    tokenizer.add_tokens(TOKENS)
    model = peft.get_peft_model(grown(), peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    with torch.no_grad():
        model.get_input_embeddings().weight[size:] = 3.0  # as if it had been trained
    inputs = tokenizer("[E1] Aspirin", return_tensors="pt")
    expected = model.eval()(**inputs).logits
    table = size * 32
    for whole in (False, True):
        model.save_pretrained(tmp_path / str(whole), save_embedding_layers=whole)
        again = peft.PeftModel.from_pretrained(grown(), str(tmp_path / str(whole))).eval()
        assert torch.equal(again(**inputs).logits, expected) == whole
        saved = safetensors.torch.load_file(tmp_path / str(whole) / "adapter_model.safetensors")
        assert (sum(value.numel() for value in saved.values()) > table) == whole


def test_an_adapter_is_trained_further_with_the_same_tokens_alone(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    first = run(checkpoint("bert"), "lora/r8_attention", tmp_path / "first")
    again = run(checkpoint("bert"), tmp_path / "first", tmp_path / "again", max_steps=1, learning_rate=1e-9)
    name = next(n for n in dict(first.model.named_parameters()) if "trainable_tokens" in n)
    one, other = (model.model.get_parameter(name) for model in (first, again))
    assert torch.allclose(one, other, atol=1e-6)
    task = recipe(add_tokens=TOKENS[::-1])
    with pytest.raises(AdapterError, match=r"added tokens \['\[E1\]', 'Aspirin'\], and the task has \['Aspirin"):
        build(checkpoint("bert"), DATA, tmp_path / "other", task=task, adapter=str(tmp_path / "first"))


def test_a_run_is_resumed_with_its_new_rows(checkpoint: Checkpoint, tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "no", "save_total_limit": 5}
    trainer, _ = build(
        checkpoint("bert"), DATA, tmp_path, task=recipe(add_tokens=TOKENS), adapter="lora/r8_attention",
        max_steps=2, **settings,
    )  # fmt: skip
    trainer.train()
    other, _ = build(
        checkpoint("bert"), DATA, tmp_path, task=recipe(add_tokens=TOKENS), adapter="lora/r8_attention",
        max_steps=2, **settings,
    )  # fmt: skip
    other.train(resume_from_checkpoint=str(tmp_path / "checkpoints/checkpoint-1"))
    for name, value in trainer.model.named_parameters():
        assert torch.equal(value, other.model.get_parameter(name)), name


# --- refusals ---------------------------------------------------------------------------------------------


def test_tokens_that_are_known_are_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"the tokenizer knows \['good'\] already"):
        build(checkpoint("bert"), DATA, tmp_path, task=recipe(add_tokens=["[E1]", "good"]))


@pytest.mark.parametrize("adapter", ["bottleneck/pfeiffer", "ia3/default", "prefix/tokens20"])
def test_methods_that_cannot_keep_new_rows_are_refused(
    adapter: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match="embeddings of added tokens"):
        build(checkpoint("bert"), DATA, tmp_path, task=recipe(add_tokens=TOKENS), adapter=adapter)


@pytest.mark.parametrize(("tokens", "message"), [(["a", "a"], "'a' is named twice"), ([" "], "' ' is no token")])
def test_a_recipe_s_tokens_are_checked(tokens: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_task("sequence_classification/sst2", {"add_tokens": tokens})


def test_the_mean_is_of_the_rows_that_the_tokenizer_knew(checkpoint: Checkpoint) -> None:
    """A table with spare rows takes new tokens without growing."""
    model = transformers.AutoModel.from_pretrained(checkpoint("bert"))
    tokenizer = make_tokenizer("bert")
    size = len(tokenizer)
    model.resize_token_embeddings(size + 8, mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[size:] = 1000.0
    models.add_tokens(model, tokenizer, ["[E1]"])
    weight = model.get_input_embeddings().weight
    assert len(weight) == size + 8
    assert torch.equal(weight[size], weight[:size].mean(0))
