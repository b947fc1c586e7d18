"""Linear layers on a CPU whose weights lie as oneDNN likes to read them, while nothing is trained."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALLEST = 2**16
"""Weights of a layer that is worth it; the two of a LoRA of rank 16 are not."""
PACKED_BYTES = 2 * 2**30
"""What packed weights may take beside the others; of a model that is larger, so much is packed."""


@contextmanager
def packed_linears(model: nn.Module) -> Iterator[None]:
    """Have ``nn.Linear`` layers in float32 or bfloat16 computed by oneDNN from weights that are packed once.

    Otherwise the weights are put in order anew at each call, which is most of its time where rows are few, as while a
    text is written (on an AMD EPYC, 8 rows of SmolLM2's layers: in float32, where ``nn.Linear`` asks MKL, 2.3 to 3.7
    times as fast, in bfloat16 1.5 to 1.9 times). Results differ by rounding alone, in bfloat16 not at all. The
    operators are those that ``torch.compile`` uses for frozen weights; without them, with gradients, where autocast
    wants another type, and elsewhere than on a CPU layers stay as they are. Weights must not change in the context.
    """
    chosen = [layer for layer in _worth_it(model) if _available() and layer.weight.device.type == "cpu"]
    try:
        for layer in chosen:
            layer.forward = _Packed(layer)  # type: ignore[assignment, method-assign]
        yield
    finally:
        for layer in chosen:
            vars(layer).pop("forward", None)


def packed_bytes(model: nn.Module) -> int:
    """What :func:`packed_linears` takes if the model is on a CPU."""
    return sum(layer.weight.nbytes for layer in _worth_it(model)) if _available() else 0


def _worth_it(model: nn.Module) -> Iterator[nn.Linear]:
    room, types = PACKED_BYTES, _types()
    for layer in model.modules():
        if type(layer) is nn.Linear and "forward" not in vars(layer):  # it may be somebody else's already
            size = layer.weight.nbytes
            if layer.weight.dtype in types and layer.weight.numel() >= SMALLEST and size <= room:
                room -= size
                yield layer


class _Packed:
    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer
        self.weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())

    def __call__(self, inputs: Tensor) -> Tensor:
        layer, dtype = self.layer, self.layer.weight.dtype
        wanted = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else inputs.dtype
        if torch.is_grad_enabled() or wanted != dtype:
            return F.linear(inputs, layer.weight, layer.bias)
        bias = None if layer.bias is None else layer.bias.to(dtype)
        found: Tensor = torch.ops.mkldnn._linear_pointwise(inputs.to(dtype), self.weight, bias, "none", [], "")
        return found


def _types() -> tuple[torch.dtype, ...]:
    half = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return (torch.float32, torch.bfloat16) if half is not None and half() else (torch.float32,)


def _available() -> bool:
    names = ("_reorder_linear_weight", "_linear_pointwise")
    here = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return bool(here) and all(hasattr(torch.ops.mkldnn, name) for name in names)
