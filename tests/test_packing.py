"""Packed layers against ``nn.Linear``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ptft_hf import models
from ptft_hf.models import packing
from ptft_hf.tasks import generation
from tests.test_decoding import END, Tokenizer

pytestmark = pytest.mark.skipif(torch.float32 not in packing._types(), reason="torch has no oneDNN here")
needs_bf16 = pytest.mark.skipif(torch.bfloat16 not in packing._types(), reason="a processor without bfloat16")
SHAPES = [(8, 1, 256), (3, 5, 256), (256,), (1, 256), (0, 256)]


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(256, 512), nn.Linear(256, 300, bias=False)
        self.small = nn.Linear(256, 8)


def packed(layer: nn.Module) -> bool:
    return isinstance(vars(layer).get("forward"), packing._Packed)


@pytest.fixture
def layers() -> Layers:
    return Layers()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_results_are_those_of_the_layer_but_for_rounding(layers: Layers, shape: tuple[int, ...]) -> None:
    inputs = torch.randn(shape)
    with torch.no_grad():
        expected = [layer(inputs) for layer in (layers.first, layers.second)]
        with models.packed_linears(layers):
            assert packed(layers.first) and packed(layers.second) and not packed(layers.small)
            for layer, wanted in zip((layers.first, layers.second), expected, strict=True):
                found = layer(inputs)
                assert found.shape == wanted.shape
                torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        for layer, wanted in zip((layers.first, layers.second), expected, strict=True):
            assert "forward" not in vars(layer)
            assert torch.equal(layer(inputs), wanted)


def test_inputs_may_lie_in_any_order(layers: Layers) -> None:
    with torch.no_grad(), models.packed_linears(layers):
        for inputs in (torch.randn(5, 3, 256).transpose(0, 1), torch.randn(2, 7, 300)[..., :256]):
            expected = inputs.double() @ layers.first.weight.double().T + layers.first.bias.double()
            torch.testing.assert_close(layers.first(inputs).double(), expected, rtol=1e-5, atol=1e-5)


def test_with_gradients_layers_are_as_they_were(layers: Layers) -> None:
    inputs = torch.randn(4, 256)
    layers.first(inputs).sum().backward()
    expected, layers.first.weight.grad = layers.first.weight.grad, None
    with models.packed_linears(layers):
        found = layers.first(inputs)
        found.sum().backward()
    assert torch.equal(found, layers.first(inputs)) and found.grad_fn is not None
    assert torch.equal(layers.first.weight.grad, expected)


@needs_bf16
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("weights", "given"), [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "float32")]
)
def test_in_bfloat16_results_are_exact(layers: Layers, weights: str, given: str, shape: tuple[int, ...]) -> None:
    layers.to(getattr(torch, weights))
    inputs = torch.randn(shape).to(getattr(torch, given))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=given == "float32"):
        expected = [layers.first(inputs), layers.second(inputs)]
        size = models.packed_bytes(layers, torch.bfloat16)
        assert size == 2 * (layers.first.weight.numel() + layers.second.weight.numel())
        with models.packed_linears(layers):
            assert packed(layers.first) and packed(layers.second)
            assert all(map(torch.equal, expected, [layers.first(inputs), layers.second(inputs)]))
            assert models.packed_bytes(layers, torch.bfloat16) == 0  # nothing is packed twice


@needs_bf16
def test_where_autocast_came_later_layers_are_as_they_were(layers: Layers) -> None:
    inputs = torch.randn(4, 256)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = layers.first(inputs)
    with torch.no_grad(), models.packed_linears(layers), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layers.first(inputs), half)


def test_only_so_much_is_packed(layers: Layers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "PACKED_BYTES", layers.first.weight.nbytes)
    with models.packed_linears(layers):
        assert packed(layers.first) and not packed(layers.second)
    assert models.packed_bytes(layers) == layers.first.weight.nbytes


def test_other_layers_and_what_somebody_else_put_in_stay(layers: Layers) -> None:
    def own(inputs: Any) -> str:
        return "own"

    layers.first.forward = own  # type: ignore[assignment]
    layers.second.to(torch.float16)
    with pytest.raises(ZeroDivisionError), models.packed_linears(layers):
        assert layers.first(None) == "own" and not packed(layers.second)
        raise ZeroDivisionError
    assert layers.first(None) == "own"


def test_texts_are_written_with_packed_layers_and_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    generation.settle(model, Tokenizer, END, {"max_new_tokens": 12})
    given = {"pad_token_id": 0, "ends": [END], "has_encoder": False, "batch_size": 4}
    calls: list[int] = []
    run = packing._Packed.__call__

    def counted(self: Any, inputs: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return run(self, inputs)

    monkeypatch.setattr(packing._Packed, "__call__", counted)
    prompts = [[5, 9, 11], [7, 8], [40, 41, 42, 43, 44], [6]]
    found = generation.generate(model, prompts, **given)
    # 11 of 15 products of a step: those for keys and values are too small
    assert len(calls) >= 11 * 8
    monkeypatch.setattr(packing, "_types", lambda: ())
    assert generation.generate(model, prompts, **given) == found
