"""A language model's head where its logits are wanted, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ptft_hf.models.structure import plain_model

CHUNK = 2**24
"""Logits held at a time, 64 MB in float32."""


def lm_logits(model: Any, states: Tensor) -> Tensor:
    """Logits ``[..., V]`` in float32 of the head's inputs ``[..., H]``."""
    plain = plain_model(model)
    logits: Tensor = plain.get_output_embeddings()(states).float()
    config = plain.config.get_text_config()
    if scale := getattr(config, "logit_scale", None):  # Cohere
        logits = logits * scale
    if scale := getattr(config, "logits_scaling", None):  # Granite
        logits = logits / scale
    if cap := getattr(config, "final_logit_softcapping", None):  # Gemma 2
        logits = torch.tanh(logits / cap) * cap
    return logits


class LazyLogits:
    """Logits that have not been computed yet: the head's inputs, and the model whose head it is.

    Args:
        model: The language model.
        states: ``[..., H]``.
        dtype: Of autocast where the model ran; None without.
    """

    def __init__(self, model: Any, states: Tensor, dtype: torch.dtype | None = None) -> None:
        self.model, self.states, self.dtype = model, states, dtype

    def __getitem__(self, wanted: Any) -> LazyLogits:
        return LazyLogits(self.model, self.states[wanted], self.dtype)

    def computed(self, states: Tensor | None = None) -> Tensor:
        """The logits ``[..., V]`` of some states, or of all, in float32."""
        states = self.states if states is None else states
        with torch.autocast(states.device.type, self.dtype, enabled=self.dtype is not None):
            return lm_logits(self.model, states)

    def summed(self, loss: Callable[[Tensor, Tensor], Tensor], labels: Tensor) -> Tensor:
        """The sum of ``loss(logits [n, V], labels [n])`` over all ``N`` places, some at a time, and never more logits
        than :data:`CHUNK`. Gradients are computed along with the loss, so that nothing is computed twice (as in Liger
        Kernel's fused linear cross-entropy; Hsu et al. 2024).

        Args:
            loss: Sums over its places.
            labels: ``[N]``; the states must be ``[N, H]``.
        """
        head = plain_model(self.model).get_output_embeddings()
        size = max(1, CHUNK // head.weight.shape[0])

        def of_part(states: Tensor, part: Tensor) -> Tensor:
            return loss(self.computed(states), part)

        if len(labels) <= size:
            return of_part(self.states, labels)
        trained = [p for p in head.parameters() if p.requires_grad]
        total: Tensor = _Summed.apply(of_part, size, self.states, labels, *trained)  # type: ignore[no-untyped-call]
        return total


class _Summed(torch.autograd.Function):
    """A sum over parts, whose gradients are those of each part, taken while its logits are there."""

    @staticmethod
    def forward(
        ctx: Any, of_part: Callable[..., Tensor], size: int, states: Tensor, labels: Tensor, *trained: Tensor
    ) -> Tensor:
        wanted = any(ctx.needs_input_grad)
        sums, of_states = [], []
        of_trained = [torch.zeros_like(p) for p in trained]
        for some, part in zip(torch.split(states, size), torch.split(labels, size), strict=True):
            with torch.set_grad_enabled(wanted):
                some = some.detach().requires_grad_(wanted)
                loss = of_part(some, part)
            sums.append(loss.detach())
            if wanted:
                first, *rest = torch.autograd.grad(loss, [some, *trained])
                of_states.append(first)
                for sum_, gradient in zip(of_trained, rest, strict=True):
                    sum_ += gradient
        ctx.save_for_backward(*([torch.cat(of_states), *of_trained] if wanted else []))
        return torch.stack(sums).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (scale,) = gradients
        first, *rest = ctx.saved_tensors
        return None, None, first * scale, None, *(one * scale for one in rest)


@contextmanager
def states_kept(model: Any) -> Iterator[list[LazyLogits]]:
    """The head, when it is called next, sees the first position alone, and what it was to see is in the list."""
    kept: list[LazyLogits] = []
    called = False

    def keep(module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        nonlocal called
        if called:
            return inputs
        called = True
        device = inputs[0].device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        kept.append(LazyLogits(model, inputs[0], dtype))
        # Of a view that skips positions, products with a frozen matrix copy it once a row (torch 2.13, on a CPU).
        return (inputs[0][:, :1].contiguous(), *inputs[1:])

    handle = plain_model(model).get_output_embeddings().register_forward_pre_hook(keep)
    try:
        yield kept
    finally:
        handle.remove()
