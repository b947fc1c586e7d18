"""What a run of PPO will take, before it is begun: memory and disk, counted on all of its parts without weights.

An update has four stages: prompts are read and answers written, by a cache of keys and values; each reward reads
them; reference and critic read them again; and each pass is learnt from. The largest answers that there can
be go through the run's own functions for all but the first, which is arithmetic (:mod:`ptft_hf.planning.counting`).
Of time there is no forecast, and of a reward that is a model of its own the weights are counted alone.
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
from ptft_hf.errors import PtftError
from ptft_hf.inspecting.checks import untouched_randomness
from ptft_hf.models.caching import STEPS
from ptft_hf.planning import baseline, machine, memory, not_counted, said, skeletons
from ptft_hf.planning.counting import GRADIENTS, OPTIMIZER, WEIGHTS, Counted, Counter, size_of
from ptft_hf.planning.forecasts import TOKENIZER_FILES, Forecast
from ptft_hf.planning.sums import FLOAT_BYTES, HALF_BYTES, key_value_size
from ptft_hf.rlhf import learning, reward_names, roles, rollouts
from ptft_hf.rlhf.experience import make_experience, read_answers
from ptft_hf.rlhf.preparing import (
    Plan,
    Ready,
    build_roles,
    make_plan,
    of_adapter_folder,
    on_base,
    prepare,
    save_every,
    uses_bf16,
)

if TYPE_CHECKING:
    from ptft_hf.rlhf.ppo import Run

REWARDS, PACKED = "rewards' weights", "packed weights"
"""Of rewards and judges that are models of their own; of :mod:`ptft_hf.models.packing`."""
CHANGES = (
    "value_model=policy_trunk, a smaller per_device_train_batch_size (with more gradient_accumulation_steps), "
    "gradient_checkpointing=true and a base in four bits take less"
)
"""Said where a run will not fit."""


class Sums(NamedTuple):
    """Bytes of a run's parts; each ``Counted`` includes the weights of the base and of all that is on it."""

    weights: int
    rewards: dict[str, int]
    """Of rewards and judge that are models of their own, by what they are written as; 0 of what is not at hand."""
    packed: int
    """Weights that are packed while answers are written and read."""
    written: int
    """Keys, values and logits while answers are written."""
    reading: Counted
    """Rewards on the base, reference and critic read an update's answers."""
    learning: Counted
    """The largest pass forwards and backwards."""
    gradients: int
    optimizer: int
    saved: int
    base: int
    """The policy as it is proven: loaded once more."""
    accumulated: bool
    """Whether gradients of earlier passes are there during a pass."""
    products: int
    """Half-precision products of matrices, each shape of each for itself."""


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
    memory: str | int | None = None,
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
        memory: Bytes that the process may hold, or a text such as ``16GiB``; by default what is free.

    Raises:
        PtftError: What is wrong with recipes, prompts or the base; rewards are looked at, and not loaded.
    """
    limit = machine.parse_size(memory) if isinstance(memory, str) else memory
    given = reward_names.several(reward)
    asked = make_plan(policy, given or [None], task, adapter, judge, seed, settings)
    if not given:
        asked = asked._replace(reward=())
    for item in _rewards(asked):
        if isinstance(item, str | Path) and _is_function(item):
            reward_names.import_function(reward_names.parse(str(item)).source, "--reward")
    counter = Counter()
    with tempfile.TemporaryDirectory() as folder, untouched_randomness():
        try:
            with counter, models.quiet():
                ready = prepare(asked, data, loader=skeletons)
                sums, run = _count(counter, asked, ready, Path(folder))
        except PtftError:
            raise
        except Exception as error:
            raise not_counted(f"{policy} with {asked.adapter.name}", error) from error
    return _forecast(sums, run, baseline(0), machine.available() if limit is None else limit)


def before_run(run: Run) -> Forecast | None:
    """The forecast of a run whose weights are loaded, made without them; None, and why is said, if it cannot be had.
    It never stops the run, draws no random number and touches nothing of the run's."""
    started = time.perf_counter()
    counter = Counter()
    try:
        with tempfile.TemporaryDirectory() as folder, untouched_randomness(), counter, models.quiet():
            parts = _bare_roles(run.plan, run.ready.tokenizer, run.device)
            sums, _ = _count(counter, run.plan, run.ready._replace(roles=parts), Path(folder))
        sums = sums._replace(products=machine.new_kernels(sums.products))
        found = _forecast(sums, run, baseline(sums.weights + sum(sums.rewards.values())), machine.available())
    except Exception as error:
        report.say(f"- no forecast of memory: {said(error)}", style="yellow")
        return None
    took = f"counted in {time.perf_counter() - started:.1f} s"
    return dataclasses.replace(found, notes=(*found.notes, took))


def _bare_roles(plan: Plan, tokenizer: Any, device: torch.device) -> roles.Roles:
    options = {"given": plan.given, **plan.base_options}
    loaded = roles.load_base(plan.base, plan.adapter, uses_bf16(plan.config), skeletons, **options)
    models.ensure_padding(loaded.model, tokenizer)
    return build_roles(plan, loaded.model.to(device))


def _count(counter: Counter, plan: Plan, ready: Ready, folder: Path) -> tuple[Sums, Run]:
    from ptft_hf.rlhf.ppo import Run

    counter.forget_kinds()
    weights = counter.live
    run = Run(plan, ready, folder)
    run.summed = lambda value: value  # type: ignore[method-assign]  # one process counts, without the others
    words = models.plain_model(run.roles.policy.model).get_output_embeddings()
    counter.vocabulary = words.weight.shape[0]
    trained = [p for part in run.trained.values() for p in part.values()]
    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
            lambda p: counter.call(GRADIENTS, p.grad)
        )
    made = _largest(run)
    with counter.counting() as counted:
        own = torch.arange(len(run.share(range(run.batch))))
        for role in run.roles.scorers.values():
            with torch.no_grad(), role.playing():
                for some in torch.split(own, run.config.local_rollout_forward_batch_size):
                    role.scores(made.take(some))
        zeros = torch.zeros(len(run.share(range(run.batch))), run.config.response_length, device=run.device)
        read = read_answers(run, made, rollouts.LogProbs(zeros, zeros))
        reading = counted()
    rows = torch.arange(min(run.batch, run.config.per_device_train_batch_size))
    with counter.counting() as counted:
        experience, _ = make_experience(run, made, [0.0] * run.batch, read)
        learning.backward(run, experience.take(rows), made.mask.sum(), experience.forward, last=True)
        learnt = counted()
    gradients = size_of(p.grad for p in trained if p.grad is not None)
    before = counter.kinds.get(OPTIMIZER, 0)
    with counter.counting(OPTIMIZER):
        run.optimizer.step()
    optimizer = counter.kinds.get(OPTIMIZER, 0) - before
    policy = run.roles.policy.model
    whole, beside = models.adapter_kind(policy) is None, roles.beside_the_policy(policy)
    half = torch.bfloat16 if run.bf16 else None
    packed = models.packed_bytes(policy, half) if run.device.type == "cpu" else 0
    sums = Sums(
        weights,
        _models(plan),
        packed,
        _written(run, made),
        reading,
        learnt,
        gradients,
        optimizer,
        size_of([*policy.parameters(), *run.roles.critic.model.parameters()]) if whole else size_of(trained),
        size_of(p for n, p in policy.named_parameters() if not any(f".{part}." in n for part in beside)),
        run.config.gradient_accumulation_steps > 1,
        _shapes(run) * len(reading.products | learnt.products),
    )
    return sums, run


def _steps(run: Run) -> int:
    return run.updates * run.config.num_ppo_epochs * run.config.num_mini_batches


def _shapes(run: Run) -> int:
    """Of passes: each is trimmed to its own longest prompt and answer."""
    lengths = len({len(prompt.ids) for prompt in run.ready.prompts}) + run.config.response_length
    return min(_steps(run) * run.config.gradient_accumulation_steps, lengths)


def _written(run: Run, made: rollouts.Rollouts) -> int:
    plain = models.plain_model(run.roles.policy.model)
    vocabulary: int = plain.get_output_embeddings().weight.shape[0]
    kept = key_value_size(plain.config, HALF_BYTES if run.bf16 else FLOAT_BYTES)
    together = min(len(run.share(range(run.batch))), run.config.local_rollout_forward_batch_size)
    # Logits, and in double precision what is sampled from: the chances, and their sums.
    return together * ((made.ids.shape[1] + STEPS) * kept + (FLOAT_BYTES + 3 * 8) * vocabulary)


def _largest(run: Run) -> rollouts.Rollouts:
    """An update's answers at their largest: to the longest prompts, and none of them ended early."""
    prompts = sorted((prompt.ids for prompt in run.ready.prompts), key=len, reverse=True)[: run.batch]
    prompts += prompts[:1] * (run.batch - len(prompts))
    answers = [[0] * run.config.response_length] * run.batch
    return rollouts.collate(prompts, answers, frozenset(), 0, run.device)


def _rewards(plan: Plan) -> list[Any]:
    """Rewards and judge, as they were given."""
    return [item for item in (*plan.reward, plan.judge) if item is not None]


def _is_function(given: Any) -> bool:
    return not isinstance(given, str | Path) or reward_names.names_function(reward_names.parse(str(given)).source)


def _models(plan: Plan) -> dict[str, int]:
    """See :attr:`Sums.rewards`."""
    shared, found = on_base(plan, _rewards(plan)), {}
    for text in (str(item) for item in _rewards(plan) if not _is_function(item)):
        place = Path(reward_names.parse(text).source)
        if place not in shared:
            is_adapter = (place / "adapter_config.json").is_file()
            shapes = skeletons.stored_shapes(of_adapter_folder(place)[1] if is_adapter else str(place), {})
            found[text] = FLOAT_BYTES * sum(int(torch.Size(shape).numel()) for shape in shapes.values())
    return found


def _notes(run: Run, others: Mapping[str, int]) -> list[str]:
    notes = ["of PPO there is no forecast of time"]
    if run.world > 1:
        notes.append("of one process that has all layers; what several exchange or share out is not counted")
    if not run.plan.reward:
        notes.append("no reward was named")
    if any(map(_is_function, _rewards(run.plan))):
        notes.append("what a reward in Python holds is not known")
    if others:
        notes.append("of rewards that are models of their own the weights are counted alone")
    missing = [text for text, size in others.items() if not size]
    return [*notes, *(f"{text}: its weights are not at hand, and not counted" for text in missing)]


def _forecast(sums: Sums, run: Run, before: int, limit: int | None) -> Forecast:
    config, updates = run.config, run.updates
    calibration = memory.calibration_of(run.device.type, run.bf16)
    shared = {memory.BASELINE: before, WEIGHTS: sums.weights, REWARDS: sum(sums.rewards.values())}
    products = min(machine.KEPT_KERNELS, sums.products)
    states = {**shared, OPTIMIZER: sums.optimizer, **calibration.terms(0, products)}

    def pass_of(counted: Counted, gradients: int) -> dict[str, int]:
        above = {kind: size for kind, size in counted.kinds.items() if kind not in (WEIGHTS, OPTIMIZER)}
        above[GRADIENTS] = max(above.get(GRADIENTS, 0), gradients)
        return {**states, **above, **calibration.terms(counted.holes, products)}

    found = {
        "loading": shared,
        "answers": {**states, PACKED: sums.packed, memory.TEXTS: sums.written},
        "reading": {**pass_of(sums.reading, 0), PACKED: sums.packed},
        "learning": pass_of(sums.learning, sums.gradients if sums.accumulated else 0),
    }
    found["proof"] = {**states, OPTIMIZER: 0, memory.LOADED: sums.base}
    disk = {"policy and critic": sums.saved + TOKENIZER_FILES}
    if every := save_every(config, updates):
        one, saves = sums.saved + sums.optimizer, -(-updates // every)
        disk |= {"checkpoints": one * min(saves, config.save_total_limit), "being written": one}
    rows = min(run.batch, config.per_device_train_batch_size)
    longest = max(len(prompt.ids) for prompt in run.ready.prompts) + config.response_length
    whole = {name: {term: size for term, size in terms.items() if size} for name, terms in found.items()}
    return Forecast(
        whole,
        memory.peak(whole),
        memory.peak(whole, proof=True),
        None,
        disk,
        _steps(run),
        (rows, longest),
        limit=limit,
        notes=tuple(_notes(run, sums.rewards)),
    )
