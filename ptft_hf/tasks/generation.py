"""Texts that a model writes, over prompts of like length."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch

from ptft_hf import models, report
from ptft_hf.errors import RecipeError
from ptft_hf.models.decoding import decode, padded, position_bytes, rows_at_once

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
    A decoder that always takes the likeliest token writes by :func:`ptft_hf.models.decoding.decode`, on a CPU with
    more rows at once than ``batch_size`` where their cache is small; everything else is upstream's ``generate``.

    Returns:
        For each prompt the token ids before the end token, and whether there was one: False is a text that was cut
        at ``max_new_tokens``.
    """
    model.eval()
    given = {"pad_token_id": pad_token_id, **options}
    longest = None if has_encoder or not all(prompts) else _greedy_tokens(model, given)
    order = np.argsort([-len(ids) for ids in prompts], kind="stable")
    on_cpu = next(model.parameters()).device.type == "cpu"
    if longest is not None and on_cpu and len(prompts) > batch_size and (kept := position_bytes(model)) is not None:
        batch_size = rows_at_once(batch_size, kept * (len(prompts[order[0]]) + longest))
    # PEFT drops the positions of a batch whose prompts have others before them, so that padding would count.
    padding_counts = models.takes_positions(model) and not has_encoder
    alike = [list(rows) for _, rows in groupby(order.tolist(), lambda row: padding_counts and len(prompts[row]))]
    batches = [rows[i : i + batch_size] for rows in alike for i in range(0, len(rows), batch_size)]
    found: dict[int, tuple[list[int], bool]] = {}
    bar = report.bar(len(batches), "Writing", "batch", stays=False, show=progress)
    with torch.inference_mode(), models.quiet(), bar, models.packed_linears(model):
        for rows in batches:
            some = [prompts[row] for row in rows]
            if longest is None:
                written = _by_upstream(model, some, has_encoder, given)
            else:
                written = decode(model, some, _likeliest, ends=ends, pad_id=pad_token_id, max_new_tokens=longest)
            found |= {row: _before_end(text, ends) for row, text in zip(rows, written, strict=True)}
            bar.update()
    return [found[row] for row in range(len(prompts))]


def _likeliest(logits: torch.Tensor, rows: torch.Tensor, step: int) -> torch.Tensor:
    return logits.argmax(-1)


PLAIN = {"max_new_tokens", "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "use_cache"}
"""Settings under which the likeliest token is always the next one."""


def _greedy_tokens(model: Any, options: Mapping[str, Any]) -> int | None:
    """How many tokens :func:`ptft_hf.models.decoding.decode` may write; None: it is not what is asked for."""
    if models.takes_positions(model):  # upstream accounts for them
        return None
    config = copy.deepcopy(models.plain_model(model).generation_config)
    config.update(**options)
    fields = {name: value for name, value in config.to_diff_dict().items() if value is not None}
    fields.pop("transformers_version", None)
    plain = not fields.pop("do_sample", False) and fields.pop("num_beams", 1) == 1
    if not plain or fields.keys() - PLAIN or fields.get("use_cache") is False:
        return None
    return fields.get("max_new_tokens")


def _by_upstream(
    model: Any, prompts: Sequence[Sequence[int]], has_encoder: bool, options: Mapping[str, Any]
) -> list[list[int]]:
    ids, mask = padded(prompts, options["pad_token_id"], next(model.parameters()).device, left=not has_encoder)
    used = options.get("use_cache", models.plain_model(model).generation_config.use_cache)
    written = model.generate(
        input_ids=ids,
        attention_mask=mask,
        past_key_values=None if used is False else models.empty_cache(model),
        **options,
    )
    texts: list[list[int]] = written[:, 1 if has_encoder else ids.shape[1] :].tolist()
    return texts


def _before_end(ids: list[int], ends: Sequence[int]) -> tuple[list[int], bool]:
    at = next((place for place, token in enumerate(ids) if token in ends), None)
    return (ids, False) if at is None else (ids[:at], True)
