"""Linear layers on a CPU whose weights lie as oneDNN likes to read them, while nothing is trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALLEST = 2**16
"""Weights of a layer that is worth it; a LoRA's two are not, up to a hidden size of thousands."""
PACKED_BYTES = 2 * 2**30
"""What packed weights may take beside the others; of a model that is larger, so much is packed."""


@contextmanager
def packed_linears(model: nn.Module, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Have ``nn.Linear`` layers computed by oneDNN from weights that are packed once, in float32 or bfloat16.

    Otherwise the weights are put in order anew at each call, which is most of its time where rows are few, as while a
    text is written (8 rows of SmolLM2's layers: in float32, where ``nn.Linear`` asks MKL, 1.6 to 3.3
    times as fast, in bfloat16 1.1 to 1.9 times; ``benchmarks/speed/packing.py``), and under autocast converted anew.
    Results differ by rounding alone, in bfloat16 not at all. The operators are those that ``torch.compile`` uses for
    frozen weights; without them, with gradients, and elsewhere than on a CPU layers stay as they are. Weights may
    not change in the context.

    Args:
        model: Its layers are computed so inside the context.
        dtype: That of the autocast in which they will be called; by default of the one that is on, if one is.
    """
    dtype = torch.get_autocast_dtype("cpu") if dtype is None and torch.is_autocast_enabled("cpu") else dtype
    chosen = [layer for layer in _worth_it(model, dtype) if layer.weight.device.type == "cpu"]
    try:
        for layer in chosen:
            layer.forward = _Packed(layer, dtype or layer.weight.dtype)  # type: ignore[assignment, method-assign]
        yield
    finally:
        for layer in chosen:
            vars(layer).pop("forward", None)


def packed_bytes(model: nn.Module, dtype: torch.dtype | None = None) -> int:
    """What :func:`packed_linears` takes if the model is on a CPU; ``dtype`` is autocast's, None without it."""
    return sum(_size(layer, dtype) for layer in _worth_it(model, dtype))


def _worth_it(model: nn.Module, dtype: torch.dtype | None) -> Iterator[nn.Linear]:
    room, types = PACKED_BYTES, _types()
    for layer in model.modules():
        # Of a sharded layer the weight is a DTensor, a part.
        if type(layer) is not nn.Linear or type(layer.weight) is not nn.Parameter or layer.weight.numel() < SMALLEST:
            continue
        there, size = vars(layer).get("forward"), _size(layer, dtype)
        if isinstance(there, _Packed):
            room -= size
        elif there is None and (dtype or layer.weight.dtype) in types and size <= room:
            room -= size
            yield layer


def _size(layer: nn.Linear, dtype: torch.dtype | None) -> int:
    return layer.weight.numel() * (dtype or layer.weight.dtype).itemsize


class _Packed:
    def __init__(self, layer: nn.Linear, dtype: torch.dtype) -> None:
        self.layer, self.dtype = layer, dtype
        self.weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach().to(dtype))
        self.bias = None if layer.bias is None else layer.bias.detach().to(dtype)

    def __call__(self, inputs: Tensor) -> Tensor:
        wanted = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else inputs.dtype
        if torch.is_grad_enabled() or wanted != self.dtype:
            return F.linear(inputs, self.layer.weight, self.layer.bias)
        given = (inputs.to(self.dtype), self.weight, self.bias)
        found: Tensor = torch.ops.mkldnn._linear_pointwise(*given, "none", [], "")
        return found


def _types() -> tuple[torch.dtype, ...]:
    """In which layers can be packed on this machine."""
    here = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    names = ("_reorder_linear_weight", "_linear_pointwise")
    if not here or not all(hasattr(torch.ops.mkldnn, name) for name in names):
        return ()
    half = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return (torch.float32, torch.bfloat16) if half is not None and half() else (torch.float32,)
