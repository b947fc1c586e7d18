"""Writing in batches, against one text at a time without cache or padding, and against upstream's ``generate``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from ptft_hf.errors import ModelError
from ptft_hf.models import decoding
from ptft_hf.tasks import generation
from tests import test_rollouts

PROMPTS = [[5, 9, 11, *rest] for rest in ([7, 8], [30, 31, 32, 33], [40], [8, 8, 8, 8, 8], [41, 6], [7, 8, 9])]
END = 2


def load(folder: Path) -> Any:
    model = test_rollouts.load(folder, seed=1)
    with torch.no_grad():  # else attention is all but even, and it matters little where a token stands
        for parameter in model.base_model.parameters():
            parameter.mul_(10 if parameter.dim() > 1 else 1)
    generation.settle(model, Tokenizer, END, {"max_new_tokens": 12})
    return model


class Tokenizer:
    eos_token_id, pad_token_id = END, 0


def alone(model: Any, prompt: list[int], count: int = 12) -> list[int]:
    ids = list(prompt)
    while len(ids) < len(prompt) + count and END not in ids[len(prompt) :]:
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def likeliest(logits: torch.Tensor, rows: torch.Tensor, step: int) -> torch.Tensor:
    return logits.argmax(-1)


def decoded(model: Any, prompts: list[list[int]] = PROMPTS, count: int = 12) -> list[list[int]]:
    return decoding.decode(model, prompts, likeliest, ends=[END], pad_id=0, max_new_tokens=count)


@contextmanager
def shapes(model: Any) -> Iterator[list[tuple[int, int]]]:
    """Rows and positions of all that the model reads."""
    seen: list[tuple[int, int]] = []
    hook = model.register_forward_pre_hook(
        lambda _, __, options: seen.append(tuple(options["input_ids"].shape)), with_kwargs=True
    )
    try:
        yield seen
    finally:
        hook.remove()


@pytest.mark.parametrize("at_once", [1, 2, 8])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2", "gemma", "opt", "mistral"])
def test_a_batch_writes_what_each_prompt_would_alone(
    architecture: str, at_once: int, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "READ_AT_ONCE", at_once)
    model = load(checkpoint(architecture))
    assert decoded(model) == [alone(model, prompt) for prompt in PROMPTS]


def test_the_common_beginning_is_read_once_and_ended_rows_leave(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "READ_AT_ONCE", 4)
    model = load(checkpoint("llama"))
    lengths = sorted(len(alone(model, prompt)) for prompt in PROMPTS)
    assert lengths[0] < lengths[-1]  # some end before others
    with shapes(model) as seen:
        decoded(model)
    assert seen[:3] == [(1, 3), (4, 5), (2, 3)]
    written = [sum(length > step for length in lengths) for step in range(1, lengths[-1])]
    assert seen[3:] == [(rows, 1) for rows in written]
    monkeypatch.setattr(decoding, "LEAVE", 1)  # not before all have ended
    with shapes(model) as seen:
        decoded(model)
    assert seen[3:] == [(6, 1)] * (lengths[-1] - 1)


def test_a_prompt_that_begins_another_and_equal_prompts(checkpoint: Callable[[str], Path]) -> None:
    model = load(checkpoint("llama"))
    for prompts in ([[5, 9], [5, 9, 11]], [[5, 9]] * 3, [[5], [5]], [[5, 9, 11]]):
        assert decoded(model, prompts) == [alone(model, prompt) for prompt in prompts]


def test_the_number_of_the_prompt_and_the_step_are_told(checkpoint: Callable[[str], Path]) -> None:
    told = torch.randint(3, 50, (len(PROMPTS), 6), generator=torch.Generator().manual_seed(0))
    told[[0, 3], [2, 1]] = END
    found = decoding.decode(
        load(checkpoint("llama")),
        PROMPTS,
        lambda logits, rows, step: told[rows, step],
        ends=[END],
        pad_id=0,
        max_new_tokens=6,
    )
    expected = [row[: row.index(END) + 1] if END in row else row for row in told.tolist()]
    assert found == expected


def test_on_a_cpu_more_rows_write_at_once_where_what_is_kept_of_them_is_small(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(checkpoint("llama"))
    options: dict[str, Any] = {"pad_token_id": 0, "ends": [END], "has_encoder": False, "batch_size": 2}
    monkeypatch.setattr(decoding, "LEAVE", 0)  # rows stay when they have ended
    for room, most in ((2**31, 6), (0, 2)):
        monkeypatch.setattr(decoding, "CACHE_BYTES", room)
        with shapes(model) as seen:
            generation.generate(model, PROMPTS, **options)
        assert max(rows for rows, width in seen if width == 1) == most
    # 2 layers x 2 heads of keys and values x 16 x 4 bytes a position
    one = 2 * 2 * model.config.num_key_value_heads * model.config.head_dim * 4
    assert decoding.position_bytes(model) == one
    for room, rows in ((40 * one - 1, 3), (40 * one, 4), (10**9, decoding.WRITTEN_AT_ONCE)):
        monkeypatch.setattr(decoding, "CACHE_BYTES", room)
        assert decoding.rows_at_once(1, 10 * one) == rows


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
def test_a_prompt_with_positions_of_its_own_is_upstreams_to_write_and_refused_elsewhere(
    checkpoint: Callable[[str], Path],
) -> None:
    model = peft.get_peft_model(
        load(checkpoint("llama")), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    ).eval()
    with pytest.raises(ModelError, match="PROMPT_TUNING: its prompt takes positions"):
        decoded(model)
    options: dict[str, Any] = {"pad_token_id": 0, "ends": [END], "has_encoder": False}
    prompts = [*PROMPTS, [6, 5, 4, 3, 8]]  # as long as another
    one, all_ = (generation.generate(model, prompts, batch_size=size, **options) for size in (1, 7))
    assert one == all_


@pytest.mark.parametrize(
    ("fields", "ours"),
    [
        ({}, True),
        ({"do_sample": False, "num_beams": 1}, True),
        ({"repetition_penalty": 1.5}, False),
        ({"no_repeat_ngram_size": 1}, False),
        ({"num_beams": 2}, False),
        ({"use_cache": False}, False),
        ({"min_new_tokens": 3}, False),
    ],
)
def test_what_is_not_plainly_greedy_is_upstreams(
    fields: dict[str, Any], ours: bool, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(checkpoint("llama"))
    generation.settle(model, Tokenizer, END, {"max_new_tokens": 8, **fields})
    calls: list[int] = []

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return decoding.decode(*arguments, **options)

    monkeypatch.setattr(generation, "decode", counted)
    found = generation.generate(model, PROMPTS, pad_token_id=0, ends=[END], has_encoder=False, batch_size=6)
    assert bool(calls) is ours
    for prompt, (ids, ended) in zip(PROMPTS, found, strict=True):
        told = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)))
        written = told[0, len(prompt) :].tolist()
        assert ids == (written[: written.index(END)] if END in written else written)
        assert ended is (END in written)
