"""Texts that a model writes: upstream's ``generate`` over prompts of like length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ptft_hf import models, report
from ptft_hf.errors import RecipeError

DEFAULTS: dict[str, Any] = {"max_new_tokens": 128, "num_beams": 1, "do_sample": False}
"""Greedy, since the same model must write the same text twice; 128 tokens are about 90 English words."""
KEPT = ("bos_token_id", "decoder_start_token_id", "forced_bos_token_id")
"""What of a checkpoint's own generation settings stays; its sampling, penalties and lengths do not."""


def settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """``GenerationConfig`` fields: those given, over :data:`DEFAULTS`; None leaves one out.

    Raises:
        RecipeError: Upstream refuses them, or some without others.
    """
    import transformers

    wanted = {name: value for name, value in {**DEFAULTS, **given}.items() if value is not None}
    try:
        config: Any = transformers.GenerationConfig
        config(**wanted).validate(strict=True)
    except (ValueError, TypeError, AttributeError) as error:
        first = " ".join(str(error).split())
        raise RecipeError(f"generation: GenerationConfig refuses {wanted}: {first}") from error
    return wanted


def settle(model: Any, tokenizer: Any, end: int, fields: Mapping[str, Any]) -> list[int]:
    """Give a model its generation settings, which are saved with it, and return the tokens that end a text.

    Args:
        model: A transformers model, or one with an adapter.
        tokenizer: Its tokenizer.
        end: The token that it was trained to end with; the checkpoint's own end tokens end a text, too.
        fields: See :func:`settings`.
    """
    import transformers

    plain = models.plain_model(model)
    before = plain.generation_config
    own = before.eos_token_id
    own = own if isinstance(own, list) else [own]
    ends = sorted({end, *(i for i in (*own, tokenizer.eos_token_id) if i is not None)})
    kept = {name: getattr(before, name, None) for name in KEPT}
    config: Any = transformers.GenerationConfig
    plain.generation_config = config(
        **{name: value for name, value in kept.items() if value is not None},
        eos_token_id=ends if len(ends) > 1 else ends[0],
        pad_token_id=tokenizer.pad_token_id,
        **fields,
    )
    return ends


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    pad_token_id: int,
    ends: Sequence[int],
    has_encoder: bool,
    batch_size: int,
    progress: bool = False,
    **options: Any,
) -> list[tuple[list[int], bool]]:
    """What the model writes after each prompt, by the settings that :func:`settle` gave it and, before these, by
    ``options``, upstream's own.

    Prompts of like length run together; a decoder's are padded on the left, so that each goes on from its own end.
    Prompts are read by few rows and texts written by many, see :func:`_read`.

    Returns:
        For each prompt the token ids before the end token, and whether there was one: False is a text that was cut
        at ``max_new_tokens``.
    """
    model.eval()
    given = {"pad_token_id": pad_token_id, **options}
    device = next(model.parameters()).device
    order = np.argsort([-len(ids) for ids in prompts], kind="stable")
    starts = range(0, len(order), batch_size)
    found: dict[int, tuple[list[int], bool]] = {}
    bar = report.bar(len(starts), "Writing", "batch", stays=False, show=progress)
    with torch.inference_mode(), models.quiet(), bar:
        for start in starts:
            rows = order[start : start + batch_size]
            width = max(1, len(prompts[rows[0]]))
            ids = torch.full((len(rows), width), pad_token_id)
            mask = torch.zeros_like(ids)
            for line, row in enumerate(rows):
                count = len(prompts[row])
                place = slice(0, count) if has_encoder else slice(width - count, width)
                ids[line, place], mask[line, place] = torch.tensor(prompts[row], dtype=torch.long), 1
            ids, mask = ids.to(device), mask.to(device)
            written = model.generate(
                input_ids=ids, attention_mask=mask, past_key_values=_read(model, ids, mask, given), **given
            )
            written = written[:, 1 if has_encoder else width :].tolist()
            found |= {int(row): _before_end(text, ends) for row, text in zip(rows, written, strict=True)}
            bar.update()
    return [found[row] for row in range(len(prompts))]


READ_AT_ONCE = 8
"""Rows of prompts that are read at once on a CPU, whose caches more would overflow (SmolLM2, 64 prompts of 240
tokens: 28 s by 8, 36 s by 32, 56 s by 64). Texts are written faster the more of them there are."""


def _read(model: Any, ids: torch.Tensor, mask: torch.Tensor, options: Mapping[str, Any]) -> Any:
    """A cache with keys and values of all but the prompts' last tokens (on a CPU); None: upstream is to choose."""
    used = options.get("use_cache", models.plain_model(model).generation_config.use_cache)
    cache = None if used is False else models.empty_cache(model)
    if cache is None or ids.device.type != "cpu" or ids.shape[1] < 2:
        return cache
    # Greedily, so that no random number is drawn for what is thrown away.
    once = {**options, "max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True}
    parts = []
    for start in range(0, len(ids), READ_AT_ONCE):
        rows = slice(start, start + READ_AT_ONCE)
        width = max(2, int(mask[rows].sum(1).max()))
        read = model.generate(input_ids=ids[rows, -width:-1], attention_mask=mask[rows, -width:-1], **once)
        layers = read.past_key_values.layers
        before = (0, 0, ids.shape[1] - width, 0)  # padding on the left, which the mask hides
        parts.append([[F.pad(kept, before) for kept in (layer.keys, layer.values)] for layer in layers])
    for index, layers in enumerate(zip(*parts, strict=True)):
        keys, values = (torch.cat(same) for same in zip(*layers, strict=True))
        cache.update(keys, values, index)
    return cache


def _before_end(ids: list[int], ends: Sequence[int]) -> tuple[list[int], bool]:
    at = next((place for place, token in enumerate(ids) if token in ends), None)
    return (ids, False) if at is None else (ids[:at], True)
