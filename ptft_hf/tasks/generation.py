"""Texts that a model writes: upstream's ``generate`` over prompts of like length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

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
    On a CPU many more than 32 rows at once are slower, since keys and values are copied at each step (measured with
    SmolLM2, 100 documents of 240 tokens: 90 s in batches of 32, 164 s with what 2 GiB of keys and values allow).

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
            written = model.generate(input_ids=ids.to(device), attention_mask=mask.to(device), **given)
            written = written[:, 1 if has_encoder else width :].tolist()
            found |= {int(row): _before_end(text, ends) for row, text in zip(rows, written, strict=True)}
            bar.update()
    return [found[row] for row in range(len(prompts))]


def _before_end(ids: list[int], ends: Sequence[int]) -> tuple[list[int], bool]:
    at = next((place for place, token in enumerate(ids) if token in ends), None)
    return (ids, False) if at is None else (ids[:at], True)
