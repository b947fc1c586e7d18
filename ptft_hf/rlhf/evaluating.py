"""Two policies on the same held-out prompts: how often a judge prefers the first one, and how far it went."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ptft_hf import checkpoints, metrics, models, records, report, training
from ptft_hf.comparing.statistics import mean_interval
from ptft_hf.errors import DataError, PtftError, RecipeError
from ptft_hf.recipes.ppo import load_ppo
from ptft_hf.recipes.prompts import PPOConfig, PromptsRecipe
from ptft_hf.rlhf import rewards, rollouts
from ptft_hf.rlhf.decoders import check_decoder, load_decoder
from ptft_hf.rlhf.preparing import end_tokens, longest_prompt, uses_bf16
from ptft_hf.rlhf.processes import run_as
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
        against: What it is compared with: the supervised model that it started from. Each side reads the prompts
            with its own tokenizer, and those that are too long for either are left out.
        task: Catalogue name or YAML file of a recipe of the family ``prompts``, or the recipe; its ``test`` split is
            answered.
        judge: A reward (:mod:`ptft_hf.rlhf.rewards`) that the policy was not trained for.
        output_dir: A folder for ``run.json``; None writes nothing.
        prompts: How many are answered at most, the first that the policy can take; None all. With 200 a win rate of
            1/2 has an interval of 7 points to either side.
        data: Used instead of the recipe's ``data``.
        seed: Of the answers, and any split that is made.
        settings: Options of :class:`ptft_hf.recipes.prompts.PPOConfig` (``response_length``, ``temperature``, ...),
            and ``task.*`` and ``model.*``.
        overwrite: Replace what is in ``output_dir``.

    Returns:
        The content of ``run.json``: under ``metrics`` ``win_rate`` (equal scores count 1/2) with its 95 % interval
        (Wilson), the mean difference of the judge's scores with its 95 % interval (t), ``kl`` (nats an answer of
        ``policy``, estimated on its own answers; None where ``against`` reads them as other tokens), and of each the
        mean score and length in tokens.

    Raises:
        PtftError: A subclass says what is wrong.
    """
    pairs = [f"{k}={json.dumps(v)}" for k, v in settings.items()] if isinstance(settings, Mapping) else list(settings)
    recipe, _, config = load_ppo(task, "full/default", pairs)
    if prompts is not None and prompts < 1:
        raise RecipeError(f"prompts: {prompts} is not at least 1; None answers all")
    folder = None if output_dir is None else Path(output_dir)
    if folder is not None:
        training.check_output(folder, False, overwrite)
    source = recipe.data if data is None else data
    if source is None:
        raise DataError(f"{recipe.name}: names no data; add data: to the recipe, or pass data in Python")
    splits = Prompts(recipe).load_splits(source, seed)
    _check_before_answers([str(policy), str(against)], judge, recipe)
    started = time.perf_counter()
    one = _side(str(policy), recipe, config, splits.test, prompts, seed)
    gc.collect()
    other = _side(str(against), recipe, config, splits.test, prompts, seed, one)
    one = one.take(other.places)
    asked = one.prompts
    kl = None if other.logprobs is None else (one.logprobs - other.logprobs).sum(1)
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
        "notes": [*splits.notes, *one.notes, *other.notes],
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


def _check_before_answers(policies: Sequence[str], judge: Any, recipe: PromptsRecipe) -> None:
    """Have either policy, and the judge, refused before the first one writes for minutes.

    Raises:
        PtftError: What is wrong with one of them; a :class:`RecipeError` with all that is, if it is more.
    """
    checks = [partial(check_decoder, reference, recipe.model_options) for reference in dict.fromkeys(policies)]
    checks += [partial(rewards.check_named, str(judge), "--judge")] if isinstance(judge, str | Path) else []
    refused: list[PtftError] = []
    for check in checks:
        try:
            check()
        except PtftError as error:
            refused.append(error)
    if len(refused) > 1:
        raise RecipeError(*(problem for error in refused for problem in error.problems))
    if refused:
        raise refused[0]


def figures(
    first: np.ndarray, second: np.ndarray, kl: torch.Tensor | None, one: Rollouts, other: Rollouts
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
        "kl": None if kl is None else kl.mean().item(),
        "policy": {"score": float(first.mean()), "length": one.mask.sum(1).float().mean().item()},
        "against": {"score": float(second.mean()), "length": other.mask.sum(1).float().mean().item()},
    }


def summary(record: Mapping[str, Any]) -> str:
    """A sentence or two for people."""
    found = record["metrics"]
    low, high = found["win_rate_interval"]
    kl = "" if found["kl"] is None else f"KL {found['kl']:.2f} nats an answer, "
    verdict = "is preferred" if low > 0.5 else "is not preferred" if high < 0.5 else "cannot be told from the other"
    return (
        f"win rate {found['win_rate']:.3f} ({low:.3f} to {high:.3f}) on {record['prompts']:,} held-out prompts, by "
        f"{record['judge']}: the policy {verdict}; mean score from {found['against']['score']:.3f} to "
        f"{found['policy']['score']:.3f}, {kl}length from "
        f"{found['against']['length']:.1f} to {found['policy']['length']:.1f} tokens"
    )


class Side(NamedTuple):
    """One policy's answers."""

    prompts: list[Prompt]
    places: list[int]
    """Which of the first side's prompts these are."""
    texts: list[str]
    made: Rollouts
    logprobs: Any
    """``[N, T]`` of the first side's answers, 0 at padding; None where they are other tokens for this one."""
    tokenizer: Any
    notes: list[str]

    def take(self, places: list[int]) -> Side:
        """Some of them."""
        made = self.made.take(torch.tensor(places))
        prompts, texts = [self.prompts[i] for i in places], [self.texts[i] for i in places]
        logprobs = self.logprobs[places, : made.mask.shape[1]]
        return self._replace(prompts=prompts, places=places, texts=texts, made=made, logprobs=logprobs)


def _side(
    reference: str,
    recipe: PromptsRecipe,
    config: PPOConfig,
    rows: Any,
    count: int | None,
    seed: int,
    first: Side | None = None,
) -> Side:
    """Answers to the first prompts, or to those of the ``first`` side that are not too long for this one, and the
    log-probabilities of the first side's. The policy is in memory no longer than that."""
    policy = load_policy(reference, recipe, config)
    model, size = policy.model, config.local_rollout_forward_batch_size
    found, notes = Prompts(recipe).encode(rows, policy.tokenizer, policy.longest)
    asked, fitting = found[:count] if first is None else first.prompts, {prompt.row: prompt for prompt in found}
    places = [place for place, prompt in enumerate(asked) if prompt.row in fitting]
    prompts = [fitting[asked[place].row] for place in places]
    same = [asked[place] for place in places]
    if first is not None:
        notes = _check_shared(same, prompts, len(asked), reference, policy.longest)
    draws = torch.rand(len(asked), config.response_length, generator=torch.Generator().manual_seed(seed))[places]
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
        weighed = made if first is None else first.take(places).made
        alike = [p.ids for p in same] == ids and (first is None or _same_tokens(first.tokenizer, policy, weighed))
        if not alike:
            notes.append(f"no KL: {reference} reads prompts or answers as other tokens than the policy")
        logprobs: Any = torch.zeros(weighed.mask.shape, device=device) if alike else None
        for some in torch.split(torch.arange(len(ids)), size) if alike else ():
            batch = weighed.take(some)
            states = rollouts.hidden_states(model, batch)
            of_batch = rollouts.answer_logprobs(model, states, batch, config.temperature).logprobs
            logprobs[some, : of_batch.shape[1]] = of_batch
    texts = [rollouts.answer_text(policy.tokenizer, i, answer) for i, answer in zip(ids, answers, strict=True)]
    return Side(prompts, places, texts, made, logprobs, policy.tokenizer, notes)


def _check_shared(one: list[Prompt], other: list[Prompt], asked: int, reference: str, longest: int) -> list[str]:
    """What is to be said of prompts that only one side can take.

    Raises:
        DataError: None is left.
        RecipeError: ``prompt_tokens`` cuts other texts for the other side.
    """
    if not other:
        raise DataError(f"{reference}: each of the {asked:,} prompts is longer than {longest} tokens for it")
    for first, second in zip(one, other, strict=True):
        if first.source != second.source:
            raise RecipeError(
                f"task.prompt_tokens: cuts prompts elsewhere for {reference}, whose tokenizer is another one "
                f"({first.text[-40:]!r}, {second.text[-40:]!r}): leave it out, or give prompts that are cut"
            )
    if len(other) == asked:
        return []
    left = asked - len(other)
    return [f"{left:,} of {asked:,} prompts are longer than {longest} tokens for {reference} and are left out"]


def _same_tokens(tokenizer: Any, policy: Policy, made: Rollouts) -> bool:
    """Whether another tokenizer's ids mean the same to a policy."""
    ids = set(made.ids[made.attention.bool()].tolist())
    first, second = ({i: token for token, i in one.get_vocab().items()} for one in (tokenizer, policy.tokenizer))
    rows = models.plain_model(policy.model).get_input_embeddings().weight.shape[0]
    return all(i < rows and first.get(i) == second.get(i) for i in ids)


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


def main() -> None:
    """``python -m ptft_hf.rlhf.evaluating DIR --against ...`` is ``ptft evaluate DIR --against ...``."""
    run_as("evaluate")


if __name__ == "__main__":
    main()
