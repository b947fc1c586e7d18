"""Layers that answer from what is kept: each row is known by what the model reads of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

Batch = Mapping[str, Any]
Key = tuple[bytes, ...]


class NotExact(Exception):
    """Why the activations cannot be kept; said aloud, never raised to a user."""


class _Reached(Exception):
    """Ends a forward pass at the last frozen layer: what lies above need not be computed."""


class Rows:
    """Hidden states of many rows, without padding, in one tensor ``[1 + tokens, H]`` whose first line is zero."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.values: torch.Tensor | None = None
        self.places: dict[Key, np.ndarray] = {}
        self.used = 1

    def put(self, keys: Sequence[Key], mask: torch.Tensor, hidden: torch.Tensor) -> None:
        """Keep what is not kept already of a batch's hidden states ``[B, T, H]``."""
        if self.values is None:
            self.values = torch.zeros(1 + self.tokens, hidden.shape[-1], dtype=hidden.dtype)
        for key, real, states in zip(keys, mask, hidden.cpu(), strict=True):
            if key not in self.places:
                place = np.arange(self.used, self.used + int(real.sum()))
                self.values[place] = states[real]
                self.places[key] = place
                self.used += len(place)

    def get(self, keys: Sequence[Key], mask: torch.Tensor) -> torch.Tensor | None:
        """Hidden states ``[B, T, H]``, zero where there is padding; None if a row of the batch is not kept."""
        places = [self.places[key] for key in keys if key in self.places]
        if self.values is None or len(places) < len(keys):
            return None
        lines = np.zeros(mask.shape, dtype=np.int64)
        lines[mask.numpy()] = np.concatenate(places)
        return self.values[torch.from_numpy(lines)]


class FrozenLayers:
    """The layers of one stack, the lowest of which answer from what is kept.

    Args:
        model: The model that is trained.
        layers: All layers of its only stack, bottom first.
    """

    def __init__(self, model: nn.Module, layers: Sequence[nn.Module]) -> None:
        self.model, self.layers = model, layers
        self.frozen = 0
        """How many of the layers lie below everything that is trained."""
        self.embeddings: nn.Module | None = None
        """What computes the lowest layer's input, if that is one module."""
        self.kept: dict[bool, Rows] = {}
        self.answer: torch.Tensor | None = None
        self.filling = False
        self.beside: tuple[None, ...] | None = None
        """What the layers return beside the hidden state; None if that is all, and not in a tuple."""

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, a forward pass over rows that are kept skips the frozen layers."""
        hooks = [
            self.model.register_forward_pre_hook(self._look_up, with_kwargs=True),
            self.model.register_forward_hook(self._forget),
        ]
        skipped = self.layers[: self.frozen]
        last = skipped[-1]
        skipped = [*skipped, *([self.embeddings] if self.embeddings is not None else [])]
        own = [vars(layer).get("forward") for layer in skipped]
        for layer in skipped:
            layer.forward = self._instead_of(layer, layer is last)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for layer, before in zip(skipped, own, strict=True):
                del layer.forward  # the instance's; the class's is seen again
                if before is not None:
                    layer.forward = before

    def _look_up(self, model: nn.Module, args: Any, inputs: dict[str, Any]) -> None:
        self.answer = None
        kept = self.kept.get(model.training)
        if kept is not None and not self.filling:
            answer = kept.get(keys_of(inputs), real_of(inputs).cpu())
            device = inputs["attention_mask"].device
            self.answer = None if answer is None else answer.to(device, non_blocking=True)

    def _forget(self, *_: Any) -> None:
        self.answer = None

    def _instead_of(self, module: nn.Module, last: bool) -> Callable[..., Any]:
        compute = module.forward

        def answer(*args: Any, **kwargs: Any) -> Any:
            if self.answer is not None:
                if self.beside is None or module is self.embeddings:
                    return self.answer
                return (self.answer, *self.beside)
            result = compute(*args, **kwargs)
            if last and self.filling:
                raise _Reached(result)
            return result

        return answer

    def compute(self, batch: Batch) -> torch.Tensor:
        """Hidden states ``[B, T, H]`` above the last frozen layer, as the model computes them."""
        self.filling = True
        try:
            with torch.no_grad():
                self.model(**{name: value for name, value in batch.items() if name != "labels"})
        except _Reached as reached:
            found = reached.args[0]
            return found[0] if isinstance(found, tuple) else found  # type: ignore[no-any-return]
        finally:
            self.filling = False
        raise NotExact("the last frozen layer is not always run")


def keys_of(batch: Batch) -> list[Key]:
    """What the model reads of each row, without padding: the bytes of its inputs."""
    real = real_of(batch).cpu().numpy()
    columns = [batch[name].cpu().numpy() for name in sorted(batch) if name != "labels"]
    return [
        tuple((c[i][mask] if c.shape == real.shape else c[i]).tobytes() for c in columns)
        for i, mask in enumerate(real)
    ]


def real_of(batch: Batch) -> torch.Tensor:
    """``[B, T]``: true where a token is no padding."""
    return batch["attention_mask"].bool()  # type: ignore[no-any-return]
