"""Texts that a decoder writes token by token, a batch at a time.

As upstream's ``generate`` does it, except that on a CPU what all prompts begin with is read once and prompts are read
by few rows, and that everywhere rows leave the batch when their texts have ended.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ptft_hf.errors import ModelError
from ptft_hf.models.caching import empty_cache
from ptft_hf.models.structure import plain_model, takes_positions

READ_AT_ONCE = 8
"""Rows of prompts that are read at once on a CPU, whose caches more would overflow (SmolLM2, 64 prompts of 240
tokens: 28 s by 8, 36 s by 32, 56 s by 64). Texts are written faster the more of them there are."""
WRITTEN_AT_ONCE, CACHE_BYTES = 128, 3 * 2**30
"""Rows that write at once on a CPU, and what their keys and values may take. Weights are read once for all of them
(SmolLM2: 5.3 ms a row and step by 32, 3.2 ms by 100)."""
LEAVE = 8
"""Rows leave once one in so many has ended: what is kept of the others must be copied then."""

Choose = Callable[[Tensor, Tensor, int], Tensor]
"""The next tokens ``[B]``, given logits ``[B, V]``, the numbers ``[B]`` of the prompts, and that of the step."""


class _Read(NamedTuple):
    """Prompts that have been read."""

    logits: Tensor
    """``[B, V]``: of the token after each prompt."""
    attention: Tensor
    """``[B, positions]``: which of those in the cache are tokens of the row."""
    cache: Any


@torch.no_grad()
def decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    choose: Choose,
    *,
    ends: Collection[int],
    pad_id: int,
    max_new_tokens: int,
    anyone: Callable[[bool], bool] | None = None,
) -> list[list[int]]:
    """What the model writes after each of the ``B`` prompts, which run as one batch.

    Args:
        model: A causal LM in evaluation mode, or an adapter model of one.
        prompts: Token ids, at least one each.
        choose: See :data:`Choose`.
        ends: Tokens that end a text.
        pad_id: What stands where a row has no token.
        max_new_tokens: At least 1.
        anyone: Where processes must run the same passes (their layers are sharded), tells whether any of them still
            writes, given whether this one does. Rows do not leave then.

    Returns:
        1 to ``max_new_tokens`` ids of each text; the end token is kept.

    Raises:
        ModelError: An adapter's prompt takes positions of its own.
    """
    if takes_positions(model):
        kind = model.active_peft_config.peft_type.value
        raise ModelError(f"{kind}: its prompt takes positions from the text's, which sampling here does not know of")
    device = next(model.parameters()).device
    model, own = _Positioned(model), empty_cache(model)
    read = _read if anyone is None else _read_rows
    logits, attention, cache = read(model, prompts, pad_id, device, own)
    written = torch.full((len(prompts), max_new_tokens), pad_id, device=device)
    rows = torch.arange(len(prompts), device=device)
    going = torch.ones_like(rows, dtype=torch.bool)
    stops = torch.tensor(sorted(ends), device=device)
    for step in range(max_new_tokens):
        tokens = choose(logits, rows, step)
        written[rows, step] = tokens
        going = going & ~torch.isin(tokens, stops)
        count = int(going.sum())
        if not (count > 0 if anyone is None else anyone(count > 0)) or step + 1 == max_new_tokens:
            break
        if own is not None and anyone is None and (len(rows) - count) * LEAVE >= len(rows):
            cache.batch_select_indices(going)
            rows, tokens, attention, going = (values[going] for values in (rows, tokens, attention, going))
        attention = F.pad(attention, (0, 1), value=1)
        logits = model(tokens[:, None], attention, cache).logits[:, -1]
    return [_through_end(ids, ends) for ids in written[:, : step + 1].tolist()]


@torch.no_grad()
def position_bytes(model: Any) -> int | None:
    """What is kept of one position of a row that :func:`decode` writes; None where upstream has a cache of another
    kind, which may keep less than all."""
    cache = empty_cache(model)
    if cache is None:
        return None
    token = torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device)
    _Positioned(model)(token, torch.ones_like(token), cache)
    return sum(keys.nbytes + values.nbytes for keys, values in _kept(cache))


def rows_at_once(at_least: int, row_bytes: int) -> int:
    """How many rows :func:`decode` had best be given on a CPU, if so much is kept of each."""
    return max(at_least, min(WRITTEN_AT_ONCE, CACHE_BYTES // row_bytes))


def _through_end(ids: list[int], ends: Collection[int]) -> list[int]:
    return ids[: next((place for place, token in enumerate(ids) if token in ends), len(ids)) + 1]


class _Positioned:
    """A model whose positions do not count padding, and of whose logits the last alone are computed."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.names = inspect.signature(plain_model(model).forward).parameters.keys()

    def __call__(self, ids: Tensor, attention: Tensor, cache: Any) -> Any:
        """``ids`` are new; ``attention`` covers those in the cache before them, too."""
        options: dict[str, Any] = {}
        if "position_ids" in self.names:
            positions = (attention.cumsum(1) - 1).clamp(min=0)
            options["position_ids"] = positions[:, -ids.shape[1] :]
        if "logits_to_keep" in self.names:
            options["logits_to_keep"] = 1
        return self.model(input_ids=ids, attention_mask=attention, past_key_values=cache, use_cache=True, **options)


def _read(model: _Positioned, prompts: Sequence[Sequence[int]], pad_id: int, device: Any, cache: Any) -> _Read:
    """The prompts in ``cache``, an empty one; None: upstream's."""
    if cache is None or device.type != "cpu" or len(prompts) == 1:
        return _read_rows(model, prompts, pad_id, device, cache)
    # Between what is shared and the rest there is padding: only positions that are given do not count it.
    shared = _shared(prompts) if "position_ids" in model.names else 0
    start: list[tuple[Tensor, Tensor]] = []
    if shared:
        start = _kept(_read_rows(model, [prompts[0][:shared]], pad_id, device, empty_cache(model.model)).cache)
    parts: list[_Read] = []
    for first in range(0, len(prompts), READ_AT_ONCE):
        some = [ids[shared:] for ids in prompts[first : first + READ_AT_ONCE]]
        own = empty_cache(model.model)
        assert own is not None
        for index, (keys, values) in enumerate(start):
            own.update(keys.expand(len(some), -1, -1, -1), values.expand(len(some), -1, -1, -1), index)
        parts.append(_read_rows(model, some, pad_id, device, own, shared))
    width = max(part.attention.shape[1] for part in parts)
    for index in range(len(cache.layers)):
        layers = [part.cache.layers[index] for part in parts]
        keys, values = (
            torch.cat([F.pad(kept, (0, 0, width - kept.shape[2], 0)) for kept in same])
            for same in ([layer.keys for layer in layers], [layer.values for layer in layers])
        )
        cache.update(keys, values, index)
        for part in parts:  # so that nothing is held twice
            part.cache.layers[index] = None
    attention = [F.pad(part.attention, (width - part.attention.shape[1], 0)) for part in parts]
    return _Read(torch.cat([part.logits for part in parts]), torch.cat(attention), cache)


def _read_rows(
    model: _Positioned, rows: Sequence[Sequence[int]], pad_id: int, device: Any, cache: Any, before: int = 0
) -> _Read:
    """Rows, padded on the left, after ``before`` positions that are in the cache."""
    ids, attention = padded(rows, pad_id, device)
    attention = F.pad(attention, (before, 0), value=1)
    found = model(ids, attention, cache)
    return _Read(found.logits[:, -1], attention, found.past_key_values)


def padded(rows: Sequence[Sequence[int]], pad_id: int, device: Any, left: bool = True) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, each ``[rows, the longest]``, with the padding on one side."""
    width = max(1, *map(len, rows))
    ids = torch.full((len(rows), width), pad_id)
    mask = torch.zeros_like(ids)
    for line, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[line, place], mask[line, place] = torch.tensor(row, dtype=torch.long), 1
    return ids.to(device), mask.to(device)


def _kept(cache: Any) -> list[tuple[Tensor, Tensor]]:
    return [(layer.keys, layer.values) for layer in cache.layers]


def _shared(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all begin with; each prompt goes on with at least one."""
    first, last = min(map(list, prompts)), max(map(list, prompts))
    most = min(map(len, prompts)) - 1
    return next((i for i in range(most) if first[i] != last[i]), most)
