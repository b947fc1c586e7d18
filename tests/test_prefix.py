"""Prefix tuning: the paper's formula, in every attention of each architecture, proven and with checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import ptft_hf
from ptft_hf import models, recipes
from ptft_hf.adapters.prefix import Prefix, attend
from ptft_hf.errors import AdapterError, CheckpointError
from tests.conftest import rows
from tests.runs import build, splits
from tests.test_peft_methods import attached, logits, run
from tests.tiny import make_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
Checkpoint = Callable[[str], Path]
SAMPLE = ("bert", "distilbert", "gpt2", "bart", "t5", "modernbert")
OTHERS = ("roberta", "electra", "albert", "llama", "mistral", "qwen2", "qwen3", "gemma", "opt", "xlm-roberta")
EACH = [*SAMPLE, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
IDS = torch.tensor([[1, 9, 10, 11, 2], [1, 12, 13, 14, 2]])


def prefixes(model: Any) -> dict[str, Prefix]:
    return {name: m for name, m in model.named_modules() if isinstance(m, Prefix)}


def test_attention_with_a_prefix_is_the_paper_s() -> None:
    torch.manual_seed(0)
    module = torch.nn.Module()
    module.prefix = Prefix(heads=2, size=4, tokens=3)
    query, key, value = torch.randn(3, 1, 2, 5, 4)
    mask = torch.tensor([1, 1, 1, 1, 0]).bool().expand(1, 1, 5, 5)
    result, _ = attend(module, query, key, value, mask, scaling=0.5)
    for head in range(2):
        p_k, p_v = module.prefix()[0, head], module.prefix()[1, head]
        keys = torch.cat([p_k, key[0, head, :4]])
        values = torch.cat([p_v, value[0, head, :4]])
        expected = torch.softmax(0.5 * query[0, head] @ keys.T, -1) @ values
        assert torch.allclose(result[0, :, head], expected, atol=1e-6)


@pytest.mark.parametrize("name", EACH)
def test_a_prefix_trains_reloads_and_predicts(name: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    trained = run(checkpoint(name), "prefix/tokens20", tmp_path / "run")
    assert trained.run["proof"] == {"max_difference": 0.0, "examples": 8}
    assert torch.equal(logits(ptft_hf.load(tmp_path / "run")), logits(trained))
    assert {p["label"] for p in trained.predict(["a good film"])} <= {"neg", "pos"}


def test_a_reparameterised_prefix_is_saved_without_its_network(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    small = {"adapter.encoder_hidden_size": 8}
    trained = run(checkpoint("bert"), "prefix/reparameterised", tmp_path / "run", **small)
    assert trained.run["proof"]["max_difference"] == 0.0
    assert all(prefix.network == [None] for prefix in prefixes(trained.model).values())
    assert "load" in (tmp_path / "run" / "README.md").read_text("utf-8")
    again = run(checkpoint("bert"), str(tmp_path / "run"), tmp_path / "on", learning_rate=1e-30, **small)
    assert torch.allclose(logits(again), logits(trained), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "count"), [("bart", 2 + 2 * 2), ("t5", 2 + 2 * 2), ("bert", 3), ("albert", 1)]
)
def test_every_attention_has_one_and_each_gets_a_gradient(
    name: str, count: int, checkpoint: Checkpoint
) -> None:
    """Encoder, decoder, and the decoder's attention to the encoder; ALBERT's layers are one."""
    model = attached(checkpoint(name), "prefix/tokens20").train()
    assert len(prefixes(model)) == count
    model(input_ids=IDS)[0][:, 0].sum().backward()
    assert all(prefix.values.grad.any() for prefix in prefixes(model).values())


@pytest.mark.parametrize(
    ("name", "error", "text"),
    [
        ("distilbert", ValueError, "Please specify `token_dim`"),
        ("albert", ValueError, "Model does not support past key values"),
        ("modernbert", ValueError, "Model does not support past key values"),
        ("bart", AttributeError, "no attribute 'cls_layer_name'"),
    ],
)
def test_peft_puts_no_prefix_on_these(
    name: str, error: type[Exception], text: str, checkpoint: Checkpoint
) -> None:
    base = models.load_model(
        str(checkpoint(name)), "AutoModelForSequenceClassification", config={"num_labels": 2}
    ).model
    config = peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4)
    with pytest.raises(error, match=text):
        peft.get_peft_model(base, config)(input_ids=IDS, attention_mask=torch.ones_like(IDS))


def test_a_prefix_is_told_apart_and_peft_refuses_it(checkpoint: Checkpoint, tmp_path: Path) -> None:
    trained = run(checkpoint("bert"), "prefix/tokens20", tmp_path / "run")
    assert models.adapter_kind(trained.model) == recipes.saved_adapter_kind(tmp_path / "run") == "prefix"
    with pytest.raises(KeyError, match="peft_type"):
        peft.PeftModel.from_pretrained(models.plain_model(trained.model), tmp_path / "run")
    with pytest.raises(
        CheckpointError, match="PREFIX_TUNING cannot be merged on this model: keys and values"
    ):
        trained.merge()
    assert "Plain `peft` puts no prefixes" in (tmp_path / "run" / "README.md").read_text("utf-8")


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_gradient_checkpointing_changes_no_gradient(
    name: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    data = splits(rows(8, 1), validation=rows(8, 2), test=rows(8, 3))
    # T5's attention takes its dropout from the mode that checkpointing needs.
    base = make_checkpoint(name, tmp_path / "base", **({"dropout_rate": 0.0} if name == "t5" else {}))
    gradients = []
    for on in (False, True):
        _, ready = build(base, data, tmp_path / str(on), adapter="prefix/tokens20")
        model = ready.model
        if on:
            plain = models.plain_model(model)
            newer = getattr(plain, "activation_checkpointing_enable", None)
            (newer or plain.gradient_checkpointing_enable)()
        for module in model.modules():
            module.training = bool(getattr(module, "gradient_checkpointing", False))
        model(input_ids=IDS, use_cache=False)[0][:, 0].sum().backward()
        gradients.append([p.values.grad.clone() for p in prefixes(model).values()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))
    assert all(g.any() for g in gradients[1])


@pytest.mark.parametrize("name", ["deberta-v2", "xlnet"])
def test_an_architecture_with_an_attention_of_its_own_is_refused(
    name: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match="prefix tuning: "):
        run(checkpoint(name), "prefix/tokens20", tmp_path / "run")
    assert not (tmp_path / "run").exists()
