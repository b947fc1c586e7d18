"""Answers sampled from a causal language model, and their log-probabilities.

``N`` is a number of prompts, ``B`` of rows in a batch, ``P`` of prompt positions (padded on the left), ``T`` of
answer positions (padded on the right), ``H`` the hidden size, ``V`` the vocabulary. The language-model head is
computed where an answer's token is predicted and nowhere else, so that no ``[B, P + T, V]`` is ever held.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ptft_hf.errors import ModelError
from ptft_hf.models import packed_linears, plain_model, trunk_of
from ptft_hf.models.decoding import decode
from ptft_hf.models.lm_heads import CHUNK, lm_logits
from ptft_hf.rlhf.ppo_math import entropy_from_logits


class Rollouts(NamedTuple):
    """Prompts with their sampled answers."""

    ids: Tensor
    """``[B, P + T]``: prompts padded on the left, answers on the right."""
    attention: Tensor
    """``[B, P + T]``: 1 at tokens, 0 at padding."""
    mask: Tensor
    """``[B, T]``: 1 at an answer's tokens, its end token included."""
    ended: Tensor
    """``[B]``, bool: whether the answer ends with an end token; else it was cut off."""

    @property
    def answers(self) -> Tensor:
        """Ids of the answers, ``[B, T]``."""
        return self.ids[:, -self.mask.shape[1] :]

    def take(self, rows: Tensor) -> Rollouts:
        """Some rows, without the columns that are padding in all of them; ``T`` shrinks to their longest answer."""
        ids, attention, mask, ended = (value[rows] for value in self)
        prompt = ids.shape[1] - mask.shape[1]
        longest = int(mask.sum(1).max())
        first = int(attention[:, :prompt].long().argmax(1).min())
        columns = slice(first, prompt + longest)
        return Rollouts(ids[:, columns], attention[:, columns], mask[:, :longest], ended)


def collate(
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    end_ids: frozenset[int],
    pad_id: int,
    device: Any = "cpu",
) -> Rollouts:
    """Rollouts of prompts ``N`` and answers ``N``; the padding id is never looked at again, so any will do."""
    before, after = max(map(len, prompts)), max(map(len, answers))
    ids = torch.full((len(prompts), before + after), pad_id, dtype=torch.long)
    attention = torch.zeros_like(ids)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        columns = slice(before - len(prompt), before + len(answer))
        ids[row, columns] = torch.tensor([*prompt, *answer])
        attention[row, columns] = 1
    ended = torch.tensor([answer[-1] in end_ids for answer in answers])
    return Rollouts(*(value.to(device) for value in (ids, attention, attention[:, before:], ended)))


# ---- sampling ----


def sample(logits: Tensor, uniforms: Tensor, temperature: float) -> Tensor:
    """One token a row, ``[B]``, from ``[B, V]`` logits: the one in which ``uniforms`` (``[B]``, in [0, 1)) falls.

    A number drawn for a row and a step decides alone, so that neither neighbours nor the order of rows matter.
    """
    below = torch.softmax(logits.double() / temperature, -1).cumsum(-1)
    place = (uniforms.double() * below[:, -1])[:, None]
    return torch.searchsorted(below, place, right=True).squeeze(1).clamp(max=logits.shape[1] - 1)


class LogProbs(NamedTuple):
    """Of the answers' tokens, in nats, each ``[B, T]`` and 0 at padding; float32."""

    logprobs: Tensor
    entropy: Tensor
    """Of the distribution that the token was drawn from; without gradient."""


class Sampled(NamedTuple):
    """Answers to ``N`` prompts, in their order."""

    answers: list[list[int]]
    """Ids, 1 to ``T`` each; the end token is kept."""
    drawn: LogProbs
    """``[N, T]``, as the logits had them from which the tokens were drawn."""


@torch.no_grad()
def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    uniforms: Tensor,
    *,
    end_ids: frozenset[int],
    pad_id: int,
    temperature: float,
    batch_size: int,
    anyone: Callable[[bool], bool] | None = None,
) -> Sampled:
    """Sample an answer to each prompt, with the KV cache; prompts of like length run together.

    Args:
        model: A causal LM in evaluation mode.
        prompts: Token ids of ``N`` prompts, each at least one.
        uniforms: ``[N, T]`` numbers in [0, 1), one for each token; ``T`` is the longest answer.
        end_ids: Tokens that end an answer; a batch stops when all of its rows have ended.
        pad_id: What stands before shorter prompts.
        temperature: Of the distribution that is sampled from; log-probabilities are those at this temperature.
        batch_size: Rows that run together.
        anyone: See :func:`ptft_hf.models.decoding.decode`.
    """
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    answers: list[list[int]] = [[] for _ in prompts]
    device, longest = next(model.parameters()).device, uniforms.shape[1]
    drawn = LogProbs(*(torch.zeros(uniforms.shape, device=device) for _ in LogProbs._fields))
    with packed_linears(model):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            places, numbers = torch.tensor(rows, device=device), uniforms[rows].to(device)

            def choose(
                logits: Tensor, which: Tensor, step: int, places: Tensor = places, numbers: Tensor = numbers
            ) -> Tensor:
                tokens = sample(logits, numbers[which, step], temperature)
                for values, found in zip(drawn, _of_tokens(logits.float() / temperature, tokens), strict=True):
                    values[places[which], step] = found
                return tokens

            some = [prompts[i] for i in rows]
            options: Any = {"pad_id": pad_id, "max_new_tokens": longest, "anyone": anyone}
            sampled = decode(model, some, choose, ends=end_ids, **options)
            for row, tokens in zip(rows, sampled, strict=True):
                answers[row] = tokens
                for values in drawn:
                    values[row, len(tokens) :] = 0  # drawn before the row left
    return Sampled(answers, drawn)


def answer_text(tokenizer: Any, prompt: Sequence[int], answer: Sequence[int]) -> str:
    """An answer's text. It is what the prompt's text goes on with: decoded alone, some tokenizers would drop the
    space that it begins with."""
    before, whole = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt, [*prompt, *answer]))
    alone = tokenizer.decode(answer, skip_special_tokens=True)
    return str(whole[len(before) :] if whole.startswith(before) else alone)


# ---- log-probabilities ----


def run_trunk(model: Any, ids: Tensor, attention: Tensor, **options: Any) -> Any:
    """The model below its head on ``[B, L]`` new ids, with positions that do not count padding.

    ``attention`` covers the ids, and those in the cache (``past_key_values``) before them.
    """
    trunk = trunk_of(plain_model(model))
    if "position_ids" in inspect.signature(trunk.forward).parameters:
        positions = (attention.long().cumsum(1) - 1).clamp(min=0)
        options["position_ids"] = positions[:, -ids.shape[1] :]
    return trunk(input_ids=ids, attention_mask=attention, **options)


def hidden_states(model: Any, rollouts: Rollouts) -> Tensor:
    """What the model's head sees at every position: ``[B, P + T, H]``."""
    outputs = run_trunk(model, rollouts.ids, rollouts.attention, use_cache=False)
    states: Tensor = outputs.last_hidden_state
    return states


def before_tokens(states: Tensor, mask: Tensor) -> Tensor:
    """Of ``[B, P + T, H]`` those from which the answers' tokens are predicted, in their order: ``[tokens, H]``."""
    return states[:, -mask.shape[1] - 1 : -1][mask.bool()]


def as_rows(values: Tensor, mask: Tensor) -> Tensor:
    """One value for each answer token, ``[tokens]``, as ``[B, T]`` with 0 at padding."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(
        mask.bool(), values
    )


def answer_logprobs(
    model: Any, states: Tensor, rollouts: Rollouts, temperature: float, chunk: int = CHUNK
) -> LogProbs:
    """Log-probabilities of the answers' tokens, given :func:`hidden_states`.

    Args:
        model: The causal LM whose head is used.
        states: ``[B, P + T, H]``.
        rollouts: Where the answers are.
        temperature: As in :func:`generate`.
        chunk: Logits held at a time, computed once more in the backward pass; the result does not depend on it.
    """
    states, targets = before_tokens(states, rollouts.mask), rollouts.answers[rollouts.mask.bool()]
    size = max(1, chunk // plain_model(model).get_output_embeddings().weight.shape[0])
    parts = list(zip(torch.split(states, size), torch.split(targets, size), strict=True))
    again = len(parts) > 1 and torch.is_grad_enabled() and states.requires_grad
    found = []
    for some_states, some_targets in parts:
        arguments = (model, some_states, some_targets, temperature)
        found.append(
            checkpoint(_logprobs, *arguments, use_reentrant=False) if again else _logprobs(*arguments)
        )
    logprobs, entropy = (torch.cat(each) for each in zip(*found, strict=True))
    return LogProbs(as_rows(logprobs, rollouts.mask), as_rows(entropy, rollouts.mask))


def _logprobs(model: Any, states: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    return _of_tokens(lm_logits(model, states) / temperature, targets)


def _of_tokens(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    chosen = logits.gather(1, targets[:, None]).squeeze(1)
    return chosen - torch.logsumexp(logits, 1), entropy_from_logits(logits.detach())


@torch.no_grad()
def check_architecture(model: Any, reference: str) -> None:
    """Refuse a model of which :func:`lm_logits` or left padding would give something else than the model itself.

    Raises:
        ModelError: Its logits differ, or it cannot be run so.
    """
    plain = plain_model(model)
    device = next(plain.parameters()).device
    ids = torch.tensor([[5, 7, 6, 9]], device=device)
    padded = torch.tensor([[0, 0, 0, 5, 7, 6, 9]], device=device)
    attention = torch.tensor([[0, 0, 0, 1, 1, 1, 1]], device=device)
    name = f"{reference}: {type(plain).__name__}"
    try:
        expected = plain(input_ids=ids, use_cache=False).logits.float()
        found = lm_logits(model, run_trunk(model, padded, attention, use_cache=False).last_hidden_state)[
            :, 3:
        ]
    except (TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise ModelError(f"{name} cannot be run as PPO's rollouts need it: {error}") from error
    rounding = 1e-4 if plain.dtype == torch.float32 else 5e-2
    if not torch.allclose(found, expected, rtol=rounding, atol=rounding * expected.abs().max().item()):
        raise ModelError(
            f"{name} computes its logits otherwise than from its last hidden states, or not alike under padding on "
            "the left; PPO cannot train it"
        )
