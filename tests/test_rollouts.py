"""Sampling and log-probabilities against the naive computation: one row at a time, all logits, no cache."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from ptft_hf.errors import ModelError
from ptft_hf.models import quiet
from ptft_hf.rlhf import rollouts
from ptft_hf.rlhf.rollouts import Rollouts
from tests.tiny import make_checkpoint

PROMPTS = [[5, 9, 11], [7], [30, 31, 32, 33, 34, 35], [40, 41], [8, 8, 8]]
END = frozenset({2})


def load(folder: Path, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    with quiet():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    head = model.get_output_embeddings().weight
    with torch.no_grad():  # distributions that are not flat; and end tokens that come soon
        head.copy_(torch.randn_like(head) * 0.4)
        head[2] *= 4
    return model


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest, checkpoint: Callable[[str], Path]) -> Any:
    return load(checkpoint(request.param))


def uniforms(seed: int = 3, length: int = 12) -> Tensor:
    return torch.rand(len(PROMPTS), length, generator=torch.Generator().manual_seed(seed))


def answers_of(model: Any, batch_size: int = 2, prompts: Any = PROMPTS, draws: Any = None) -> list[list[int]]:
    options: Any = {"end_ids": END, "pad_id": 0, "temperature": 0.9, "batch_size": batch_size}
    return rollouts.generate(model, prompts, uniforms() if draws is None else draws, **options).answers


def naive_answer(model: Any, prompt: list[int], draws: Tensor) -> list[int]:
    """Without cache, padding or batches: the token in whose share of [0, 1) the number falls."""
    ids = list(prompt)
    for draw in draws:
        with torch.no_grad():
            chances = torch.softmax(model(torch.tensor([ids])).logits[0, -1].double() / 0.9, -1)
        ids.append(int((chances.cumsum(0) <= draw).sum()))
        if ids[-1] in END:
            break
    return ids[len(prompt) :]


def naive_logprobs(model: Any, prompt: list[int], answer: list[int]) -> tuple[Tensor, Tensor]:
    logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1] / 0.9
    every = torch.log_softmax(logits, -1)
    return every[range(len(answer)), answer], -(every.exp() * every).sum(-1)


def made(answers: list[list[int]]) -> Rollouts:
    return rollouts.collate(PROMPTS, answers, END, pad_id=0)


# ---- sampling ----


def test_answers_are_those_of_the_naive_loop_whatever_the_batches(model: Any) -> None:
    expected = [naive_answer(model, p, u) for p, u in zip(PROMPTS, uniforms(), strict=True)]
    assert len({len(answer) for answer in expected}) > 1  # some end early, some are cut off
    assert {answer[-1] in END for answer in expected} == {True, False}
    for size in (1, 2, 5):
        assert answers_of(model, size) == expected
    turned = answers_of(model, 3, PROMPTS[::-1], uniforms().flip(0))
    assert turned[::-1] == expected


def test_sampling_follows_the_distribution_and_never_takes_what_cannot_be() -> None:
    logits = torch.tensor([0.0, -torch.inf, 1.0, 2.0, -torch.inf]).expand(20_000, 5)
    draws = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    tokens = rollouts.sample(logits, draws, temperature=0.5)
    shares = torch.bincount(tokens, minlength=5) / 20_000
    torch.testing.assert_close(shares, torch.softmax(logits[0] / 0.5, -1), atol=0.01, rtol=0)
    ends = rollouts.sample(logits[:2], torch.tensor([0.0, 1 - 2**-24]), 1.0)
    assert ends.tolist() == [0, 3]


def test_a_batch_stops_when_all_have_ended(model: Any) -> None:
    calls: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda _, __, kwargs: calls.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        answers = answers_of(model, batch_size=5)
    finally:
        hook.remove()
    longest = max(map(len, answers))
    assert calls == [6, *[1] * (longest - 1)]  # the prompts once, then one token at a time
    calls.clear()
    short = [i for i, answer in enumerate(answers) if len(answer) < 12]
    hook = model.register_forward_pre_hook(
        lambda _, __, kwargs: calls.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        answers_of(model, 5, [PROMPTS[i] for i in short], uniforms()[short])
    finally:
        hook.remove()
    assert len(calls) == max(len(answers[i]) for i in short) < 12


def test_prompts_of_like_length_run_together(model: Any) -> None:
    widths: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda _, __, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        answers_of(model, batch_size=1)
    finally:
        hook.remove()
    assert [width for width in widths if width > 1] == [6, 3, 3, 2]  # and a prompt of one token


# ---- log-probabilities ----


@pytest.mark.parametrize("batch_size", [1, 5, 20])
def test_what_answers_were_drawn_with_is_what_is_read_of_them(batch_size: int, model: Any) -> None:
    many = PROMPTS * 4  # of twenty, some have ended and not left yet
    draws = torch.rand(len(many), 12, generator=torch.Generator().manual_seed(3))
    options: Any = {"end_ids": END, "pad_id": 0, "temperature": 0.9, "batch_size": batch_size}
    answers, drawn = rollouts.generate(model, many, draws, **options)
    batch = rollouts.collate(many, answers, END, pad_id=0)
    length = batch.mask.shape[1]
    assert len(set(map(len, answers))) > 1
    with torch.no_grad():
        read = rollouts.answer_logprobs(model, rollouts.hidden_states(model, batch), batch, 0.9)
    for found, expected in zip(drawn, read, strict=True):
        torch.testing.assert_close(found[:, :length], expected, atol=2e-6, rtol=1e-5)
        assert not found[:, length:].any() and not found[:, :length][batch.mask == 0].any()


def test_one_that_has_written_goes_on_while_another_process_writes(model: Any) -> None:
    options: Any = {"end_ids": END, "pad_id": 0, "temperature": 0.9, "batch_size": 5}
    expected = rollouts.generate(model, PROMPTS, uniforms(), **options)
    short = [i for i, answer in enumerate(expected.answers) if len(answer) < 12]
    told: list[bool] = []

    def anyone(here: bool) -> bool:
        told.append(here)
        return True

    some = [PROMPTS[i] for i in short]
    answers, drawn = rollouts.generate(model, some, uniforms()[short], anyone=anyone, **options)
    assert answers == [expected.answers[i] for i in short]
    longest = max(map(len, answers))
    assert told == [True] * (longest - 1) + [False] * (12 - longest + 1) and longest < 12
    torch.testing.assert_close(drawn.logprobs, expected.drawn.logprobs[short], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("chunk", [1, 500, 2**24])
def test_logprobs_are_the_naive_ones_with_gradients(model: Any, chunk: int) -> None:
    answers = answers_of(model)
    batch = made(answers)
    head = model.get_output_embeddings().weight
    found = rollouts.answer_logprobs(model, rollouts.hidden_states(model, batch), batch, 0.9, chunk)
    naive = [naive_logprobs(model, p, a) for p, a in zip(PROMPTS, answers, strict=True)]
    for row, (logprobs, entropy) in enumerate(naive):
        torch.testing.assert_close(found.logprobs[row, : len(logprobs)], logprobs, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(found.entropy[row, : len(entropy)], entropy.detach(), atol=2e-6, rtol=1e-5)
        assert not found.logprobs[row, len(logprobs) :].any()
    assert not found.entropy.requires_grad
    model.zero_grad()
    found.logprobs.sum().backward()
    gradient = head.grad.clone()
    model.zero_grad()
    exact = copy.deepcopy(model).double()  # two that are rounded would differ by twice as much
    sum(naive_logprobs(exact, *pair)[0].sum() for pair in zip(PROMPTS, answers, strict=True)).backward()
    expected = exact.get_output_embeddings().weight.grad.float()
    torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-4)


def test_no_logits_are_held_for_prompts_or_padding(model: Any) -> None:
    answers = answers_of(model)
    batch, seen = made(answers), []
    head = model.get_output_embeddings()
    hook = head.register_forward_hook(lambda _, inputs, output: seen.append(tuple(output.shape)))
    try:
        states = rollouts.hidden_states(model, batch)
        rollouts.answer_logprobs(model, states, batch, 0.9)
        rollouts.answer_logprobs(model, states, batch, 0.9, chunk=3 * head.weight.shape[0])
    finally:
        hook.remove()
    tokens, words = sum(map(len, answers)), head.weight.shape[0]
    assert seen[0] == (tokens, words)
    assert seen[1:] and all(shape[0] <= 3 for shape in seen[1:])
    assert sum(shape[0] for shape in seen[1:]) == tokens


def test_rows_are_taken_without_columns_of_padding(model: Any) -> None:
    answers = answers_of(model)
    batch = made(answers)
    rows = torch.tensor([3, 1])
    some = batch.take(rows)
    assert some.mask.sum(1).tolist() == [len(answers[3]), len(answers[1])]
    assert some.ids.shape[1] == 2 + max(len(answers[3]), len(answers[1]))
    assert some.ended.tolist() == [answers[3][-1] in END, answers[1][-1] in END]
    whole = rollouts.answer_logprobs(model, rollouts.hidden_states(model, batch), batch, 0.9).logprobs
    part = rollouts.answer_logprobs(model, rollouts.hidden_states(model, some), some, 0.9).logprobs
    torch.testing.assert_close(part, whole[rows][:, : part.shape[1]], atol=2e-6, rtol=1e-5)


def test_the_padding_id_may_be_the_end_token(model: Any) -> None:
    answers = answers_of(model)
    one, other = (rollouts.collate(PROMPTS, answers, END, pad) for pad in (0, 2))
    assert torch.equal(one.mask, other.mask)
    found = [rollouts.answer_logprobs(model, rollouts.hidden_states(model, b), b, 0.9) for b in (one, other)]
    assert torch.equal(found[0].logprobs, found[1].logprobs)


# ---- architectures ----


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "qwen2", "gemma", "opt"])
def test_architectures_whose_logits_come_from_their_hidden_states(
    name: str, checkpoint: Callable[[str], Path]
) -> None:
    model = load(checkpoint(name))
    rollouts.check_architecture(model, name)


def test_an_architecture_that_computes_its_logits_otherwise_is_refused(tmp_path: Path) -> None:
    model = load(make_checkpoint("llama", tmp_path))
    model.lm_head.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 2,))
    rollouts.check_architecture(model, "mine")  # the head is a module: what it does is seen
    model.base_model.register_forward_hook(
        lambda _, inputs, output: setattr(output, "last_hidden_state", output.last_hidden_state * 2)
    )
    rollouts.check_architecture(model, "mine")
    forward = model.forward
    model.forward = lambda *a, **k: _doubled(forward(*a, **k))
    with pytest.raises(ModelError, match="mine: LlamaForCausalLM computes its logits otherwise"):
        rollouts.check_architecture(model, "mine")


def _doubled(outputs: Any) -> Any:
    outputs.logits = outputs.logits * 2
    return outputs


def test_soft_caps_and_scales_are_the_models_own() -> None:
    sizes: Any = dict(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
                      num_key_value_heads=2, head_dim=16)  # fmt: skip
    with quiet():
        for kind, options in (
            ("gemma2", {"final_logit_softcapping": 0.5, "pad_token_id": 0}),
            ("cohere", {"logit_scale": 0.1, "pad_token_id": 0}),
            ("granite", {"logits_scaling": 7.0, "pad_token_id": 0}),
        ):
            config = transformers.AutoConfig.for_model(kind, **sizes, **options)
            torch.manual_seed(0)
            rollouts.check_architecture(transformers.AutoModelForCausalLM.from_config(config).eval(), kind)
