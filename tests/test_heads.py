"""Heads that PEFT loses or cannot wrap, because it knows heads by name; here they are known by being new."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from ptft_hf import adapters, models
from ptft_hf.recipes import load_adapter

# PEFT asks a transformers model for an attribute that was renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

Checkpoint = Callable[[str], Path]
LOST = {
    "bart": ("classification_head",),
    "t5": ("classification_head",),
    "xlnet": ("sequence_summary", "logits_proj"),
    "xlm": ("sequence_summary",),
    "deberta": ("pooler", "classifier"),
    "deberta-v2": ("pooler", "classifier"),
    "modernbert": ("head", "classifier"),
}
"""Architectures whose sequence classifier PEFT saves in part or not at all, and all of the head."""
TOKEN_CLASSIFIERS = ("bert", "roberta", "albert", "electra", "mpnet", "llama", "qwen2", "xlm")
CLASSIFIER, TAGGER = "AutoModelForSequenceClassification", "AutoModelForTokenClassification"


def upstream(base: Path, kind: str = CLASSIFIER) -> Any:
    auto = getattr(transformers, kind)
    return auto.from_pretrained(base, num_labels=2, pad_token_id=0, dtype=torch.float32)


def ours(base: Path, kind: str = CLASSIFIER, task_type: str = "SEQ_CLS") -> Any:
    loaded = models.load_model(str(base), kind, config={"num_labels": 2, "pad_token_id": 0})
    method = adapters.build(load_adapter("lora/r16_all_linear"))
    return method.attach(loaded.model, loaded.head, task_type)


def plain_lora(model: Any, task_type: str = "SEQ_CLS") -> Any:
    return peft.get_peft_model(model, peft.LoraConfig(task_type=task_type, target_modules="all-linear"))


def pretend_to_train(model: Any) -> None:
    """Move every trainable weight."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(5, 40, (4, 12), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[:, -1] = 1, 2
    with torch.no_grad():
        output = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids))
    return output[0]  # type: ignore[no-any-return]


def after_reload(wrapped: Any, base: Path, folder: Path, kind: str = CLASSIFIER) -> torch.Tensor:
    """Saved, and loaded by plain PEFT into a base whose new weights are other random numbers."""
    wrapped.save_pretrained(folder)
    torch.manual_seed(99)
    return logits(peft.PeftModel.from_pretrained(upstream(base, kind), folder))


# ---- trap 6: a head is lost ----


@pytest.mark.parametrize("architecture", LOST)
def test_plain_peft_loses_the_head_and_says_nothing(
    architecture: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    base = checkpoint(architecture)
    wrapped = plain_lora(upstream(base))
    pretend_to_train(wrapped)
    before = logits(wrapped)
    difference = (after_reload(wrapped, base, tmp_path) - before).abs().max()
    assert difference > 0.1 * before.abs().max()


@pytest.mark.parametrize("architecture", LOST)
def test_a_head_that_was_new_is_trained_and_saved_whole(
    architecture: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    base = checkpoint(architecture)
    loaded = models.load_model(str(base), CLASSIFIER, config={"num_labels": 2})
    assert loaded.head == LOST[architecture]
    wrapped = ours(base)
    head = {n for n, p in wrapped.named_parameters() if ".modules_to_save." in n and p.requires_grad}
    assert {n.removeprefix("base_model.model.").replace(".modules_to_save.default", "") for n in head} == set(
        loaded.new
    )
    pretend_to_train(wrapped)
    assert torch.equal(after_reload(wrapped, base, tmp_path), logits(wrapped))


def test_a_head_below_the_classifier_is_found_where_the_checkpoint_has_none(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """A masked language model has no pooler; a classifier on it gets a new one, inside the trunk."""
    base = tmp_path / "masked"
    config = transformers.AutoConfig.from_pretrained(checkpoint("bert"))
    transformers.BertForMaskedLM(config).save_pretrained(base)
    loaded = models.load_model(str(base), CLASSIFIER, config={"num_labels": 2})
    assert loaded.head == ("bert.pooler", "classifier")
    plain = plain_lora(upstream(base))
    pretend_to_train(plain)
    assert not torch.equal(after_reload(plain, base, tmp_path / "plain"), logits(plain))
    wrapped = ours(base)
    pretend_to_train(wrapped)
    assert torch.equal(after_reload(wrapped, base, tmp_path / "ours"), logits(wrapped))


# ---- trap 7: all-linear on a head ----


@pytest.mark.parametrize("architecture", TOKEN_CLASSIFIERS)
def test_plain_peft_cannot_put_all_linear_on_token_classifiers(
    architecture: str, checkpoint: Checkpoint
) -> None:
    with pytest.raises(TypeError, match="modules_to_save cannot be applied"):
        plain_lora(upstream(checkpoint(architecture), TAGGER), "TOKEN_CLS")


def test_plain_peft_cannot_put_all_linear_on_distilbert(checkpoint: Checkpoint) -> None:
    with pytest.raises(TypeError, match="modules_to_save cannot be applied"):
        plain_lora(upstream(checkpoint("distilbert")))


@pytest.mark.parametrize(
    ("architecture", "kind", "task_type"),
    [("distilbert", CLASSIFIER, "SEQ_CLS"), *((name, TAGGER, "TOKEN_CLS") for name in TOKEN_CLASSIFIERS)],
)
def test_all_linear_leaves_the_head_alone(
    architecture: str, kind: str, task_type: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    base = checkpoint(architecture)
    wrapped = ours(base, kind, task_type)
    adapted = {name for name, module in wrapped.named_modules() if hasattr(module, "lora_A")}
    linear = {
        f"base_model.model.{name}"
        for name, module in models.trunk_of(upstream(base, kind)).named_modules(
            prefix=models.plain_model(wrapped).base_model_prefix
        )
        if isinstance(module, torch.nn.Linear)
    }
    assert adapted == linear
    config = wrapped.peft_config["default"]
    assert not set(config.target_modules) & {*config.modules_to_save}
    pretend_to_train(wrapped)
    assert torch.equal(after_reload(wrapped, base, tmp_path, kind), logits(wrapped))


def test_gpt2_s_transposed_layers_are_adapted_without_a_warning(checkpoint: Checkpoint) -> None:
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        plain_lora(upstream(checkpoint("gpt2")))
    wrapped = ours(checkpoint("gpt2"))
    assert wrapped.peft_config["default"].fan_in_fan_out is True
