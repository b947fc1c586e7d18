"""What a run of PPO will take, before it is begun: memory and disk, counted on all of its parts without weights.

An update has four stages: prompts are read and answers written, by a cache of keys and values; each reward reads
them; reference, critic and policy read them again; and each pass is learnt from. The largest answers that there can
be go through the run's own functions for the last two (:mod:`ptft_hf.planning.counting`); the first is arithmetic.
Of time there is no forecast.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ptft_hf import models, report
from ptft_hf.errors import ModelError, PtftError
from ptft_hf.inspecting.checks import untouched_randomness
from ptft_hf.models.caching import STEPS
from ptft_hf.planning import machine, memory, skeletons
from ptft_hf.planning.counting import GRADIENTS, OPTIMIZER, WEIGHTS, Counted, Counter, size_of
from ptft_hf.planning.forecasts import TOKENIZER_FILES, Forecast
from ptft_hf.planning.sums import FLOAT_BYTES, HALF_BYTES, key_value_size
from ptft_hf.rlhf import learning, rewards, roles, rollouts
from ptft_hf.rlhf.experience import make_experience
from ptft_hf.rlhf.preparing import (
    Plan,
    Ready,
    build_roles,
    make_plan,
    of_adapter_folder,
    prepare,
    reward_on_base,
    uses_bf16,
)

if TYPE_CHECKING:
    from ptft_hf.rlhf.ppo import Run

REWARDS = "rewards' weights"
"""Of rewards and judges that are models of their own."""


class Sums(NamedTuple):
    """Bytes of a run's parts; each ``Counted`` includes the weights of the base and of all that is on it."""

    weights: int
    rewards: int
    written: int
    """Keys, values, logits and packed weights while answers are written."""
    reading: Counted
    """Rewards on the base, reference and critic read an update's answers, and the policy its first pass."""
    learning: Counted
    """The largest pass, forwards and backwards."""
    gradients: int
    optimizer: int
    saved: int
    base: int
    """The policy as it is proven: loaded once more."""
    accumulated: bool
    """Whether gradients of earlier passes are there during a pass."""


def plan_ppo(
    *,
    policy: str | Path,
    task: Any,
    reward: Any = (),
    adapter: Any = None,
    judge: Any = None,
    data: Any = None,
    seed: int = 42,
    settings: Mapping[str, Any] | Sequence[str] = (),
    limit: int | None = None,
) -> Forecast:
    """Forecast what :func:`ptft_hf.rlhf.ppo.train_ppo` will take with these arguments. No weights of the base are
    loaded, and nothing is written.

    Args:
        policy: As in :func:`ptft_hf.rlhf.ppo.train_ppo`, like the next seven.
        task: Recipe of prompts.
        reward: What is rewarded. Of a function it is not known what it holds.
        adapter: Of a policy that is a checkpoint.
        judge: Another reward.
        data: Used instead of the recipe's ``data``.
        seed: Of splits that are made.
        settings: As after ``--set``.
        limit: Bytes that the process may hold; by default what is free.

    Raises:
        PtftError: What would stop the run before its first update.
    """
    given = reward if isinstance(reward, list | tuple) else (reward,)
    asked = make_plan(policy, given or (_nothing,), task, adapter, judge, seed, settings)
    counter = Counter()
    with tempfile.TemporaryDirectory() as folder, untouched_randomness():
        try:
            with counter, models.quiet():
                ready = prepare(asked, data, loader=skeletons)
                sums, run = _count(counter, asked, ready, Path(folder))
        except PtftError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise ModelError(
                f"{policy} with {asked.adapter.name}: cannot be run without its weights, so that there is no "
                f"forecast ({type(error).__name__}: {reason})"
            ) from error
    on_cpu = run.device.type == "cpu"
    baseline = machine.resident() if on_cpu else 0
    return _forecast(sums, run, baseline, machine.available() if limit is None else limit)


def before_run(run: Run) -> Forecast | None:
    """The forecast of a run whose weights are loaded, made without them; None, and why is said, if it cannot be had.
    It never stops the run, draws no random number and touches nothing of the run's."""
    started = time.perf_counter()
    counter = Counter()
    try:
        held = machine.resident()
        with tempfile.TemporaryDirectory() as folder, untouched_randomness(), counter, models.quiet():
            parts = _bare_roles(run.plan, run.ready.tokenizer)
            sums, _ = _count(counter, run.plan, run.ready._replace(roles=parts), Path(folder))
        baseline = max(0, held - sums.weights - sums.rewards) if run.device.type == "cpu" else 0
        found = _forecast(sums, run, baseline, machine.available())
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        report.say(f"- no forecast of memory: {type(error).__name__}: {reason}", style="yellow")
        return None
    took = f"counted in {time.perf_counter() - started:.1f} s"
    return dataclasses.replace(found, notes=(*found.notes, took))


def _nothing(prompts: list[str], answers: list[str]) -> list[float]:
    return [0.0] * len(answers)


def _bare_roles(plan: Plan, tokenizer: Any) -> roles.Roles:
    options = {name: value for name, value in plan.task.model.items() if name != "max_length"}
    loaded = roles.load_base(plan.base, plan.adapter, uses_bf16(plan.config), skeletons, **options)
    models.ensure_padding(loaded.model, tokenizer)
    return build_roles(plan, loaded.model)


def _count(counter: Counter, plan: Plan, ready: Ready, folder: Path) -> tuple[Sums, Run]:
    from ptft_hf.rlhf.ppo import Run

    counter.forget_kinds()
    weights = counter.live
    run = Run(plan, ready, folder)
    words = models.plain_model(run.roles.policy.model).get_output_embeddings()
    counter.vocabulary = words.weight.shape[0]
    trained = [p for part in run.trained.values() for p in part.values()]
    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
            lambda p: counter.call(GRADIENTS, p.grad)
        )
    made = _largest(run)
    with counter.counting() as counted:
        if run.roles.reward is not None:
            with torch.no_grad(), run.roles.reward.playing():
                run.roles.reward.scores(made)
        experience, _ = make_experience(run, made, [0.0] * run.batch)
        reading = counted()
    rows = torch.arange(min(run.batch, run.config.per_device_train_batch_size))
    first, experience = experience.forward, experience._replace(forward=None)
    with counter.counting() as counted:
        learning.backward(run, experience.take(rows), made.mask.sum(), first)
        learnt = counted()
    del first, experience
    gradients = size_of(p.grad for p in trained if p.grad is not None)
    before = counter.kinds.get(OPTIMIZER, 0)
    with counter.counting(OPTIMIZER):
        run.optimizer.step()
    optimizer = counter.kinds.get(OPTIMIZER, 0) - before
    policy = run.roles.policy.model
    whole = models.adapter_kind(policy) is None
    sums = Sums(
        weights,
        sum(_held(item, plan) for item in (*plan.reward, plan.judge)),
        _written(run, made),
        reading,
        learnt,
        gradients,
        optimizer,
        size_of(policy.parameters()) + size_of(run.trained["critic"].values()) if whole else size_of(trained),
        size_of(p for n, p in policy.named_parameters() if roles.REFERENCE not in n and roles.CRITIC not in n),
        run.config.gradient_accumulation_steps > 1,
    )
    return sums, run


def _written(run: Run, made: rollouts.Rollouts) -> int:
    policy = run.roles.policy.model
    plain = models.plain_model(policy)
    vocabulary: int = plain.get_output_embeddings().weight.shape[0]
    kept = key_value_size(plain.config, HALF_BYTES if run.bf16 else FLOAT_BYTES)
    together = min(len(run.share(range(run.batch))), run.config.local_rollout_forward_batch_size)
    # Logits, and in double precision what is sampled from: the chances, and their sums.
    found = together * ((made.ids.shape[1] + STEPS) * kept + (FLOAT_BYTES + 3 * 8) * vocabulary)
    return found + (models.packed_bytes(policy) if run.device.type == "cpu" else 0)


def _largest(run: Run) -> rollouts.Rollouts:
    """An update's answers at their largest: to the longest prompts, and none of them ended early."""
    prompts = sorted((prompt.ids for prompt in run.ready.prompts), key=len, reverse=True)[: run.batch]
    prompts += prompts[:1] * (run.batch - len(prompts))
    answers = [[0] * run.config.response_length] * run.batch
    return rollouts.collate(prompts, answers, frozenset(), 0)


def _held(given: Any, plan: Plan) -> int:
    """Bytes of the weights of a reward that is a model of its own; 0 of what is not at hand."""
    if not isinstance(given, str | Path):
        return 0
    place = Path(rewards.parse(str(given)).source)
    if place == reward_on_base(plan):
        return 0
    source = of_adapter_folder(place)[1] if (place / "adapter_config.json").is_file() else str(place)
    try:
        shapes = skeletons.stored_shapes(source, {})
    except Exception:  # a function's name
        return 0
    return FLOAT_BYTES * sum(int(torch.Size(shape).numel()) for shape in shapes.values())


def _forecast(sums: Sums, run: Run, baseline: int, limit: int | None) -> Forecast:
    calibration = memory.CPU if run.device.type == "cpu" else memory.CUDA
    shared = {memory.BASELINE: baseline, WEIGHTS: sums.weights, REWARDS: sums.rewards}
    states = {**shared, OPTIMIZER: sums.optimizer, memory.LIBRARIES: round(calibration.libraries)}

    def pass_of(counted: Counted, gradients: int) -> dict[str, int]:
        above = {kind: size for kind, size in counted.kinds.items() if kind not in (WEIGHTS, OPTIMIZER)}
        above[GRADIENTS] = max(above.get(GRADIENTS, 0), gradients)
        return {**states, **above, memory.ALLOCATOR: round(calibration.allocator * sum(above.values()))}

    found = {
        "loading": shared,
        "answers": {**states, memory.TEXTS: sums.written},
        "reading": pass_of(sums.reading, 0),
        "learning": pass_of(sums.learning, sums.gradients if sums.accumulated else 0),
    }
    kept = max(sum(terms.values()) for terms in found.values())
    found["proof"] = {memory.KEPT: kept, memory.LOADED: sums.base}
    config, steps = run.config, run.updates
    disk = {"policy and critic": sums.saved + TOKENIZER_FILES}
    if config.save_steps:
        one = sums.saved + sums.optimizer
        every = max(1, round(config.save_steps * steps)) if config.save_steps < 1 else int(config.save_steps)
        disk |= {"checkpoints": one * min(max(1, steps // every), config.save_total_limit), "being written": one}
    rows = min(run.batch, config.per_device_train_batch_size)
    longest = max(len(prompt.ids) for prompt in run.ready.prompts) + config.response_length
    notes = ["of PPO there is no forecast of time"]
    if run.world > 1:
        notes.append("of one process; what several exchange is not counted")
    if any(callable(item) for item in run.plan.reward):
        notes.append("what a reward in Python holds is not known")
    whole = {name: {term: size for term, size in terms.items() if size} for name, terms in found.items()}
    return Forecast(
        whole,
        memory.peak(whole),
        memory.peak(whole, proof=True),
        None,
        disk,
        steps,
        (rows, longest),
        limit=limit,
        notes=tuple(notes),
    )
