"""Which of upstream's attention implementations a batch is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ptft_hf.models.structure import plain_model

SHORT = 128
"""Tokens up to which eager attention was the faster one on a CPU (MiniLM; with and without dropout)."""
DROPOUT = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop", "attn_dropout")
"""What configurations call the chance that an attention weight is dropped."""


class AttentionByLength:
    """Eager attention for short batches, and for long ones sdpa, which is what the model has of itself.

    On a CPU eager attention is the faster one for short inputs; but it holds a matrix of tokens x tokens for every
    head until the backward pass, and the longest batches make the peak of memory. (With dropout sdpa holds as much.)
    Nothing is changed for a model without sdpa. Undone by :meth:`restore`.

    Args:
        model: The model, an adapter on it included.
        lengths: Tokens of each training row. Batches longer than 95 % of the rows are long, and those beyond 128.
        drops: Whether training drops attention weights, if the configuration says so: then only those beyond 128
            are long.
    """

    def __init__(self, model: Any, lengths: Sequence[int], *, drops: bool = False) -> None:
        self.model = plain_model(model)
        self.own = str(self.model.config._attn_implementation)
        reads_text = self.own == "sdpa" and self.model.main_input_name == "input_ids"
        drops = drops and any(getattr(self.model.config, name, None) for name in DROPOUT)
        usual = SHORT if drops else min(sorted(lengths)[int(0.95 * (len(lengths) - 1))], SHORT)
        self.short = usual if reads_text else 0
        self.hook = self.model.register_forward_pre_hook(self._choose, with_kwargs=True) if self.short else None

    def restore(self) -> None:
        """What the model had, and is saved with."""
        if self.hook is not None:
            self.hook.remove()
            self._set(self.own)

    def _choose(self, model: nn.Module, arguments: Sequence[Any], named: Mapping[str, Any]) -> None:
        inputs = named.get("input_ids")
        inputs = named.get("inputs_embeds") if inputs is None else inputs
        short = inputs is not None and inputs.shape[1] <= self.short
        self._set("eager" if short else self.own)

    def _set(self, implementation: str) -> None:
        if self.model.config._attn_implementation != implementation:
            self.model.set_attn_implementation(implementation)

    def __str__(self) -> str:
        return f"{self.own} attention" + (f" (eager up to {self.short} tokens)" if self.short else "")
