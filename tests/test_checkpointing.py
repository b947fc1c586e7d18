"""Gradient checkpointing that keeps some outputs: equal gradients for less work; its forecast; what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from ptft_hf import settings
from ptft_hf.errors import RecipeError
from ptft_hf.models import checkpointing
from tests.test_bottleneck_runs import bert_without_dropout, run

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning",
)
SELECTIVE = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"selective": True}}


def arguments(**given: Any) -> Any:
    return settings.training_arguments({"use_cpu": True, **given}, Path("unused"), 1)


def test_selective_checkpointing_gives_equal_gradients_for_less_work(checkpoint: Callable[[str], Path]) -> None:
    def work(given: dict[str, Any] | None) -> tuple[int, list[torch.Tensor]]:
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint("llama"), attn_implementation="sdpa")
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
        model.train().enable_input_require_grads()
        if given is not None:
            checkpointing.enable(model, arguments(**given))
        ids = torch.arange(48).view(2, 24) + 5
        with FlopCounterMode(display=False) as counter:
            model(input_ids=ids, labels=ids).loss.backward()
        return counter.get_total_flops(), [p.grad for p in model.parameters() if p.grad is not None]

    none, plain, selective = work(None), work({"activation_checkpointing": True}), work(SELECTIVE)
    assert none[0] < selective[0] < plain[0]
    assert len(plain[1]) == len(none[1]) > 0
    assert all(map(torch.equal, plain[1], selective[1]))


def test_every_other_layer_may_be_left_out(checkpoint: Callable[[str], Path]) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint("llama"))
    given = {"selective": True, "every_n_layers": 2}
    checkpointing.enable(model, arguments(activation_checkpointing=True, activation_checkpointing_kwargs=given))
    layers = [layer for layer in model.model.layers if layer.gradient_checkpointing]
    assert 0 < len(layers) < len(model.model.layers)
    assert all("context_fn" in layer._gradient_checkpointing_func.keywords for layer in layers)


ADAPTERS = ["full/default", "lora/dora", "ia3/default", "bottleneck/pfeiffer", "prefix/tokens20"]


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_run_learns_the_same_and_its_forecast_lies_between(adapter: str, tmp_path: Path) -> None:
    model, found = bert_without_dropout(tmp_path / "bert"), {}
    for name, given in (("none", {}), ("plain", {"activation_checkpointing": True}), ("selective", SELECTIVE)):
        run(model, adapter, tmp_path / name, max_steps=2, num_train_epochs=1, bf16=False, **given)
        record = json.loads((tmp_path / name / "run.json").read_text("utf-8"))
        weights = next((tmp_path / name).glob("*model.safetensors"))
        found[name] = (load_file(weights), record["forecast"]["stages_mb"]["training"]["activations"])
        assert record["settings"].get(checkpointing.NAMES[0]) == given.get(checkpointing.NAMES[0])
    plain, selective = (found[name][0] for name in ("plain", "selective"))
    assert all(torch.equal(plain[name], selective[name]) for name in plain)
    assert found["plain"][1] <= found["selective"][1] <= found["none"][1]
    assert found["plain"][1] < found["none"][1]


def test_what_selective_needs_is_said() -> None:
    kwargs = {"selective": True, "use_reentrant": True}
    with pytest.raises(RecipeError, match=r"no effect without activation_checkpointing: true.*(?s:.)*use_reentrant"):
        arguments(activation_checkpointing_kwargs=kwargs)
    arguments(activation_checkpointing_kwargs={"selective": False})
