"""Two policies on the same held-out prompts: how often a judge prefers the first one, and how far it went."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ptft_hf import checkpoints, metrics, models, records, report, training
from ptft_hf.comparing.statistics import mean_interval
from ptft_hf.errors import DataError
from ptft_hf.recipes.ppo import load_ppo
from ptft_hf.recipes.prompts import PPOConfig, PromptsRecipe
from ptft_hf.rlhf import rewards, rollouts
from ptft_hf.rlhf.decoders import load_decoder
from ptft_hf.rlhf.preparing import end_tokens, longest_prompt, uses_bf16
from ptft_hf.rlhf.rewards import Answered
from ptft_hf.rlhf.rollouts import Rollouts
from ptft_hf.tasks.prompts import Prompt, Prompts

SAMPLES = 20
"""Prompts whose answers ``run.json`` shows."""


class Policy(NamedTuple):
    """A causal LM that answers, with what it needs."""

    model: Any
    tokenizer: Any
    ends: frozenset[int]
    longest: int
    """Tokens that a prompt may have."""


def evaluate_policy(
    *,
    policy: str | Path,
    against: str | Path,
    task: Any,
    judge: Any,
    output_dir: str | Path | None = None,
    prompts: int | None = 200,
    data: Any = None,
    seed: int = 42,
    settings: Mapping[str, Any] | Sequence[str] = (),
    overwrite: bool = False,
) -> dict[str, Any]:
    """Let both answer held-out prompts, with the same random numbers, and a judge compare the answers.

    Args:
        policy: The folder of a PPO run or of any other PEFT adapter on a causal LM, or a checkpoint.
        against: What it is compared with: the supervised model that it started from.
        task: Catalogue name or YAML file of a recipe of the family ``prompts``, or the recipe; its ``test`` split is
            answered.
        judge: A reward (:mod:`ptft_hf.rlhf.rewards`) that the policy was not trained for.
        output_dir: A folder for ``run.json``; None writes nothing.
        prompts: How many are answered at most, the first ones; None all. With 200 a win rate of 1/2 has an interval
            of 7 points to either side.
        data: Used instead of the recipe's ``data``.
        seed: Of the answers, and any split that is made.
        settings: Options of :class:`ptft_hf.recipes.prompts.PPOConfig` (``response_length``, ``temperature``, ...),
            and ``task.*`` and ``model.*``.
        overwrite: Replace what is in ``output_dir``.

    Returns:
        The content of ``run.json``: under ``metrics`` ``win_rate`` (equal scores count 1/2) with its 95 % interval
        (Wilson), the mean difference of the judge's scores with its 95 % interval (t), ``kl`` (nats an answer of
        ``policy``, estimated on its own answers), and of each the mean score and length in tokens.

    Raises:
        PtftError: A subclass says what is wrong.
    """
    pairs = [f"{k}={json.dumps(v)}" for k, v in settings.items()] if isinstance(settings, Mapping) else list(settings)
    recipe, _, config = load_ppo(task, "full/default", pairs)
    folder = None if output_dir is None else Path(output_dir)
    if folder is not None:
        training.check_output(folder, False, overwrite)
    source = recipe.data if data is None else data
    if source is None:
        raise DataError(f"{recipe.name}: names no data; add data: to the recipe, or pass data in Python")
    splits = Prompts(recipe).load_splits(source, seed)
    started = time.perf_counter()
    one, asked, notes = _side(str(policy), recipe, config, splits.test, prompts, seed)
    gc.collect()
    other, _, _ = _side(str(against), recipe, config, splits.test, prompts, seed, one.made)
    kl = (one.logprobs - other.logprobs).sum(1)
    build = rewards.build([judge], lambda _: None, config.local_rollout_forward_batch_size, "--judge")
    texts, sources = [p.text for p in asked], [p.source for p in asked]
    scores = [np.array(build(Answered(texts, side.texts, side.made, sources))) for side in (one, other)]
    record = {
        "ptft_hf": importlib.metadata.version("ptft-hf"),
        "stage": "evaluation",
        "policy": str(policy),
        "against": str(against),
        "task": recipe.model_dump(mode="json"),
        "settings": config.model_dump(mode="json"),
        "judge": build.name,
        "seed": seed,
        "prompts": len(asked),
        "notes": [*splits.notes, *notes],
        "metrics": figures(scores[0], scores[1], kl, one.made, other.made),
        "seconds": time.perf_counter() - started,
        "samples": [
            {
                "prompt": prompt.text,
                "reference": prompt.reference,
                "policy": {"answer": one.texts[i], "score": float(scores[0][i])},
                "against": {"answer": other.texts[i], "score": float(scores[1][i])},
            }
            for i, prompt in enumerate(asked[:SAMPLES])
        ],
        "versions": records.versions(),
    }
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        checkpoints.write_text(folder / "run.json", json.dumps(record, indent=1))
    report.say(summary(record))
    return record


def figures(
    first: np.ndarray, second: np.ndarray, kl: torch.Tensor, one: Rollouts, other: Rollouts
) -> dict[str, Any]:
    """See :func:`evaluate_policy`; scores ``[N]``, KL ``[N]`` nats."""
    count = len(first)
    wins = float(((first > second) + (first == second) / 2).mean())
    low, high = metrics.wilson_interval(wins, count)
    difference = mean_interval(first - second) if count > 1 else None
    return {
        "win_rate": wins,
        "win_rate_interval": [low, high],
        "score_difference": float((first - second).mean()),
        "score_difference_interval": None if difference is None else [difference.low, difference.high],
        "kl": kl.mean().item(),
        "policy": {"score": float(first.mean()), "length": one.mask.sum(1).float().mean().item()},
        "against": {"score": float(second.mean()), "length": other.mask.sum(1).float().mean().item()},
    }


def summary(record: Mapping[str, Any]) -> str:
    """A sentence or two for people."""
    found = record["metrics"]
    low, high = found["win_rate_interval"]
    verdict = "is preferred" if low > 0.5 else "is not preferred" if high < 0.5 else "cannot be told from the other"
    return (
        f"win rate {found['win_rate']:.3f} ({low:.3f} to {high:.3f}) on {record['prompts']:,} held-out prompts, by "
        f"{record['judge']}: the policy {verdict}; mean score from {found['against']['score']:.3f} to "
        f"{found['policy']['score']:.3f}, KL {found['kl']:.2f} nats an answer, length from "
        f"{found['against']['length']:.1f} to {found['policy']['length']:.1f} tokens"
    )


class Side(NamedTuple):
    """One policy's answers."""

    texts: list[str]
    made: Rollouts
    logprobs: torch.Tensor
    """``[N, T]`` of these answers, or of others that were asked for; 0 at padding."""


def _side(
    reference: str,
    recipe: PromptsRecipe,
    config: PPOConfig,
    rows: Any,
    count: int | None,
    seed: int,
    weighed: Rollouts | None = None,
) -> tuple[Side, list[Prompt], list[str]]:
    """Answers to the first prompts and their log-probabilities, or those of ``weighed``; and what is to be said of
    the prompts. The policy is in memory no longer than that."""
    policy = load_policy(reference, recipe, config)
    model, size = policy.model, config.local_rollout_forward_batch_size
    prompts, notes = Prompts(recipe).encode(rows, policy.tokenizer, policy.longest)
    prompts = prompts[:count]
    draws = torch.rand(len(prompts), config.response_length, generator=torch.Generator().manual_seed(seed))
    ids, pad = [prompt.ids for prompt in prompts], policy.tokenizer.pad_token_id
    answers: list[list[int]] = []
    starts, device = range(0, len(ids), size), next(model.parameters()).device
    bar = report.bar(len(starts), f"Answers of {Path(reference).name}", "batch", stays=False, show=True)
    with torch.no_grad(), models.quiet(), bar, models.packed_linears(model):
        for start in starts:
            answers += rollouts.generate(
                model,
                ids[start : start + size],
                draws[start : start + size],
                end_ids=policy.ends,
                pad_id=pad,
                temperature=config.temperature,
                batch_size=size,
            ).answers
            bar.update()
        made = rollouts.collate(ids, answers, policy.ends, pad, device)
        weighed = made if weighed is None else weighed
        logprobs = torch.zeros(weighed.mask.shape, device=device)
        for some in torch.split(torch.arange(len(logprobs)), size):
            batch = weighed.take(some)
            states = rollouts.hidden_states(model, batch)
            found = rollouts.answer_logprobs(model, states, batch, config.temperature).logprobs
            logprobs[some, : found.shape[1]] = found
    texts = [rollouts.answer_text(policy.tokenizer, i, answer) for i, answer in zip(ids, answers, strict=True)]
    return Side(texts, made, logprobs), prompts, notes


def load_policy(reference: str, recipe: PromptsRecipe, config: PPOConfig) -> Policy:
    """A checkpoint, the folder of a run, or a PEFT adapter, in the precision of PPO's rollouts.

    Raises:
        ModelError: It cannot be loaded, or cannot be run as rollouts need it.
    """
    options = recipe.model_options
    model, tokenizer = load_decoder(reference, "bfloat16" if uses_bf16(config) else "float32", options)
    rollouts.check_architecture(model, reference)
    plain = models.plain_model(model)
    longest = longest_prompt(recipe, config, plain, tokenizer)
    return Policy(model, tokenizer, end_tokens(plain, tokenizer, config), longest)
