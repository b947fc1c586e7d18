"""Keys and values while a text is written: upstream's cache, without a copy of all of them at each step."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from ptft_hf.models.structure import plain_model

STEPS = 64
"""Positions of room that are added at a time: with each all that is kept is copied once."""


class PreallocatedLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Upstream's layer concatenates the keys and values of each new token to all before it, which is most of what a
    step costs in large batches; here they are written into room that is left behind them."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)  # type: ignore[no-untyped-call]
        self.rooms: dict[str, torch.Tensor] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The new keys and values (``batch x heads x positions x size``) behind those before; all of them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        self.keys = self._joined("keys", self.keys, key_states)
        self.values = self._joined("values", self.values, value_states)
        return self.keys, self.values

    def _joined(self, name: str, before: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        start = before.shape[-2] if before.numel() else 0
        end = start + new.shape[-2]
        room = self.rooms.get(name)
        fits = room is not None and room.shape[:-2] == new.shape[:-2] and room.shape[-2] >= end
        # What was reordered or chosen from since does not lie in the room any more.
        if room is None or not fits or (start and before.data_ptr() != room.data_ptr()):
            room = self.rooms[name] = new.new_empty(*new.shape[:-2], end + STEPS, new.shape[-1])
            if start:
                room[..., :start, :] = before
        room[..., start:end, :] = new
        return room[..., :end, :]


def empty_cache(model: Any) -> DynamicCache | None:
    """A cache for one batch of a decoder; None where upstream has another kind (windows, states, two stacks)."""
    plain = plain_model(model)
    if plain.config.is_encoder_decoder or not plain._supports_default_dynamic_cache():
        return None
    cache = DynamicCache(config=plain.config.get_text_config(decoder=True))
    if not cache.layers or any(type(layer) is not DynamicLayer for layer in cache.layers):
        return None
    cache.layers = [PreallocatedLayer() for _ in cache.layers]
    return cache
