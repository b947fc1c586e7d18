"""Logits that are computed where labels are, some at a time: equal losses and gradients, and less of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ptft_hf.models import lm_heads
from ptft_hf.models.lm_heads import states_kept
from ptft_hf.tasks import figures, losses
from tests.tiny import SIZES, make_checkpoint

CONFIGS = {
    "llama": {},
    "gpt2": {},
    "bert": {},
    "bart": {},
    "t5": {},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 3.0},
    "gemma2": {"final_logit_softcapping": 2.0, "head_dim": 16},
}


def language_model(name: str) -> tuple[Any, dict[str, torch.Tensor]]:
    import transformers

    sizes = SIZES.get(name, SIZES["llama"])
    config = transformers.AutoConfig.for_model(name, **sizes, **CONFIGS[name], vocab_size=61, pad_token_id=0)
    kind = "AutoModelForSeq2SeqLM" if config.is_encoder_decoder else "AutoModelForCausalLM"
    auto: Any = getattr(transformers, "AutoModelForMaskedLM" if name == "bert" else kind)
    torch.manual_seed(0)
    model = auto.from_config(config).eval()
    batch = {"input_ids": torch.randint(1, 61, (3, 11))}
    if config.is_encoder_decoder:
        batch["decoder_input_ids"] = torch.randint(1, 61, (3, 11))
    return model, batch


def gradients(model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"focal_gamma": 2.0}], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_losses_and_gradients_are_those_of_all_logits_at_once(
    name: str, options: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = language_model(name)
    assert figures.can_be_lazy(model, batch)
    labels = torch.randint(0, 61, (3, 11))
    labels[0, :7], labels[2] = -100, -100
    kept = labels != -100
    usual = losses.cross_entropy(model(**batch).logits[kept], labels[kept], None, **options)
    expected = gradients(model, usual)
    monkeypatch.setattr(lm_heads, "CHUNK", 61 * 4)  # 15 labels in four parts
    with states_kept(model) as states:
        assert model(**batch).logits.shape[:2] == (3, 1)
    lazy = losses.cross_entropy(states[0][kept], labels[kept], None, **options)
    found = gradients(model, lazy * 2)
    torch.testing.assert_close(lazy, usual, rtol=1e-6, atol=0)
    assert found.keys() == expected.keys()
    for parameter, gradient in expected.items():
        torch.testing.assert_close(found[parameter] / 2, gradient, rtol=1e-4, atol=1e-6)


def test_no_more_logits_are_held_than_a_part_has(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = language_model("llama")
    monkeypatch.setattr(lm_heads, "CHUNK", 61 * 4)
    seen = []
    with states_kept(model) as states:
        model(**batch)
    model.get_output_embeddings().register_forward_hook(lambda *args: seen.append(args[2].shape[0]))
    labels = torch.ones(33, dtype=torch.long)
    losses.cross_entropy(states[0][torch.ones(3, 11, dtype=torch.bool)], labels, None).backward()
    assert seen == [4] * 8 + [1]


def test_scores_copy_a_part_of_the_logits_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = torch.randn(3, 11, 61), torch.randint(0, 61, (3, 11))
    labels[0, :7], labels[2] = -100, -100
    monkeypatch.setattr(figures, "CHUNK", 61 * 4)  # 15 labels in four parts
    usual, seen = torch.nn.functional.cross_entropy, list[int]()

    def watched(some: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(len(some))
        return usual(some, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", watched)
    found = figures.scores(logits, labels)
    assert seen == [4, 4, 4, 3]
    for row, (told, wanted) in enumerate(zip(logits, labels, strict=True)):
        kept = wanted != -100
        loss = usual(told[kept], wanted[kept], reduction="sum").item()
        right = (told.argmax(-1) == wanted).sum().item()
        assert found[row].tolist() == pytest.approx([loss, kept.sum().item(), right], rel=1e-6)


def test_a_frozen_head_in_bfloat16_is_not_copied_for_each_row() -> None:
    """torch makes a batched product of a view that skips positions, and oneDNN copies the matrix for each of a batch:
    250 MB and half a second a step for eight rows of a RoBERTa with 512 states."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.shape[-1:] == (61,):
                seen.append(func.overloadpacket)
            return result

    model, batch = language_model("llama")
    model.to(torch.bfloat16).requires_grad_(False)
    seen: list[Any] = []
    with Products(), states_kept(model):
        model(**batch)
    assert torch.ops.aten.mm in seen and torch.ops.aten.bmm not in seen


def test_a_head_of_its_own_kind_is_not_trusted() -> None:
    model, batch = language_model("bart")
    assert figures.can_be_lazy(model, batch)
    model.final_logits_bias += 1.0  # which stands behind the head
    assert not figures.can_be_lazy(model, batch)


def test_under_autocast_the_head_runs_as_the_rest_does() -> None:
    model, batch = language_model("bert")
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(**batch).logits.float()
        with states_kept(model) as states:
            model(**batch)
    assert torch.equal(states[0].computed(), expected)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_run_uses_it_and_learns_the_same(bf16: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ptft_hf.trainer import Trainer
    from tests.runs import weights
    from tests.test_causal_lm_runs import run

    base = make_checkpoint("llama", tmp_path / "base")
    found: list[bool] = []
    original = Trainer.can_be_lazy
    monkeypatch.setattr(Trainer, "can_be_lazy", lambda self: found.append(original(self)) or found[-1])
    lazy = run(base, "full/default", tmp_path / "lazy", bf16=bf16)
    assert found and all(found)  # by the forecast, too
    monkeypatch.setattr(Trainer, "can_be_lazy", lambda self: False)
    usual = run(base, "full/default", tmp_path / "usual", bf16=bf16)
    for name, value in weights(usual.model).items():
        torch.testing.assert_close(weights(lazy.model)[name], value, rtol=1e-4, atol=2e-2 if bf16 else 1e-5)
