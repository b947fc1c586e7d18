"""Before the first answer: what a PPO run was asked to do, and all that it needs. Writes nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ptft_hf import adapters, checkpoints, data, models, recipes
from ptft_hf.adapters.earlier import check_earlier
from ptft_hf.errors import AdapterError, DataError, ModelError, RecipeError
from ptft_hf.recipes import AdapterRecipe, PeftRecipe
from ptft_hf.recipes.ppo import DEFAULT_ADAPTER, load_ppo
from ptft_hf.recipes.prompts import PPOConfig, PromptsRecipe
from ptft_hf.rlhf import reward_names, rewards, roles, rollouts, sharding
from ptft_hf.settings import bf16_is_faster
from ptft_hf.tasks.prompts import Prompt, Prompts


class Plan(NamedTuple):
    """What was asked, checked before any data or weights are read."""

    policy: str
    base: str
    """The checkpoint under the policy's adapter; the policy itself, if it is none."""
    given: Any
    """The folder of the policy's adapter, or a ``PeftConfig``."""
    task: PromptsRecipe
    adapter: AdapterRecipe
    config: PPOConfig
    reward: tuple[Any, ...]
    judge: Any
    seed: int

    @property
    def base_options(self) -> dict[str, Any]:
        """``from_pretrained``'s for the base."""
        return models.options_of(self.base, self.task.model_options)


class Ready(NamedTuple):
    """All that a run needs, loaded and checked."""

    roles: roles.Roles
    tokenizer: Any
    end_ids: frozenset[int]
    prompts: list[Prompt]
    held_out: list[Prompt]
    """Of the validation split: answered through training, for people to read."""
    reward: rewards.WeightedSum
    judge: rewards.WeightedSum | None
    facts: dict[str, Any]
    """What ``run.json`` says of the base."""
    fingerprints: dict[str, str]
    """Of the prompts."""
    notes: list[str]


def make_plan(
    policy: str | Path,
    reward: Any,
    task: Any,
    adapter: Any,
    judge: Any,
    seed: int,
    given: Mapping[str, Any] | Sequence[str],
) -> Plan:
    """Recipes and options with all overrides laid over them.

    Raises:
        RecipeError: Every fault of task, adapter and settings.
        AdapterError: The policy is an adapter that PPO cannot train further.
    """
    pairs = [f"{k}={json.dumps(v)}" for k, v in given.items()] if isinstance(given, Mapping) else list(given)
    given_rewards = tuple(reward_names.several(reward))
    if not given_rewards:
        raise RecipeError("reward: none was given")
    if not 0 <= seed < 2**32:
        raise RecipeError(f"seed: {seed} is not a number from 0 to 2**32 - 1")
    reference = str(Path(policy).resolve()) if Path(policy).is_dir() else str(policy)
    kind, start, base = recipes.saved_adapter_kind(reference), None, reference
    if kind is not None:
        if kind != "peft":
            raise AdapterError(f"{policy}: PPO cannot train {kind} adapters further; it takes those of PEFT")
        if adapter is not None:
            raise AdapterError(
                f"{policy}: is an adapter already, and is trained further; leave out the adapter recipe"
            )
        start, adapter, base = Path(reference), *of_adapter_folder(Path(reference))
    elif adapter is None:
        adapter = DEFAULT_ADAPTER
    elif not isinstance(adapter, str | Path | AdapterRecipe):
        start, adapter = adapter, adapters.recipe_of_config(adapter)
    the_task, the_adapter, config = load_ppo(task, adapter, pairs, further=kind is not None)
    make_schedule(config, torch.optim.SGD([torch.zeros(1)], lr=1.0), 1)  # it is refused before anything is loaded
    return Plan(reference, base, start, the_task, the_adapter, config, given_rewards, judge, seed)


def of_adapter_folder(folder: Path) -> tuple[AdapterRecipe, str]:
    """The recipe of an adapter that was saved, and its base."""
    if (folder / "run.json").is_file():
        run = checkpoints.read_json(folder / "run.json")
        return recipes.adapter_from_dict(run["adapter"]), str(run["model"]["reference"])
    with models.reading(str(folder)):
        import peft

        config = peft.PeftConfig.from_pretrained(str(folder))
    base = config.base_model_name_or_path
    if not base:
        raise ModelError(f"{folder / 'adapter_config.json'}: does not say which base it belongs to")
    return adapters.recipe_of_config(config), str(base)


def check_start(start: Any, recipe: AdapterRecipe, base: str, loaded: Any, options: Mapping[str, Any]) -> None:
    """Hold a base to the run whose adapter is trained further on it; of plain PEFT's, to the base that it names.

    Args:
        start: The folder of the adapter; anything else has nothing to be held to.
        recipe: The adapter's.
        base: Where the base was loaded from, with ``options``.
        loaded: It.

    Raises:
        AdapterError: The adapter was trained on another base.
    """
    if not isinstance(start, Path):
        return
    if not (start / "run.json").is_file():
        named = of_adapter_folder(start)[1]
        if not roles.same_place(named, base):
            raise AdapterError(f"{start}: was trained on {named}, not on {base}: give {named} as the model")
        return
    facts = checkpoints.read_json(start / "run.json")["model"]
    found = loaded.fingerprint
    if found != facts["fingerprint"]:  # which may be of another dtype
        as_trained = {**options, "dtype": facts["options"].get("dtype", facts["dtype"])}
        found = models.load_model(base, "AutoModelForCausalLM", config={}, **as_trained).fingerprint
    added = facts.get("added_tokens")  # the base was given their rows
    same = {"fingerprint": found, "added_tokens": added, "options": options}
    check_earlier(start, recipe, loaded.model.config, same)


def prepare(plan: Plan, source: Any = None, loader: Any = models) -> Ready:
    """Prompts, models and rewards, in this order, each checked before the next is loaded.

    ``loader`` has ``load_model``; another one than that of :mod:`ptft_hf.models` is for a forecast, and rewards are
    not loaded then.

    Raises:
        PtftError: A subclass says what is wrong.
    """
    source = plan.task.data if source is None else source
    if source is None:
        raise DataError(f"{plan.task.name}: names no data; add data: to the recipe, or pass data in Python")
    family = Prompts(plan.task)
    splits = family.load_splits(source, plan.seed)
    options = plan.base_options
    loaded = roles.load_base(plan.base, plan.adapter, uses_bf16(plan.config), loader, given=plan.given, **options)
    if loaded.new:
        raise ModelError(
            f"{plan.base}: no language model: {sorted(loaded.new)[:3]} are not in the checkpoint"
        )
    if loader is models:
        check_start(plan.given, plan.adapter, plan.base, loaded, options)
    tokenizer_from = plan.policy if (Path(plan.policy) / "tokenizer_config.json").is_file() else plan.base
    tokenizer = models.load_tokenizer(tokenizer_from, **models.options_of(tokenizer_from, options))
    notes = [*splits.notes]
    if plan.adapter.training and not isinstance(plan.given, Path):
        unused = ", ".join(f"training.{name}" for name in plan.adapter.training)
        notes.append(f"{plan.adapter.name}: PPO does not use {unused}, but its own: --set learning_rate=1e-4")
    if plan.config.kl_estimator == "k3":
        notes.append("kl_estimator=k3: in a reward it hardly pulls the policy back to the reference; k1 does")
    if note := models.ensure_padding(loaded.model, tokenizer):
        notes.append(note)
    rollouts.check_architecture(loaded.model, plan.base)
    longest = longest_prompt(plan.task, plan.config, loaded.model, tokenizer)
    prompts, held_out = (
        _noted(family.encode(split, tokenizer, longest), name, notes)
        for name, split in (("train", splits.train), ("validation", splits.validation))
    )
    facts = {
        "reference": plan.base,
        "policy": plan.policy,
        "max_length": longest,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "options": {k: v if isinstance(v, bool | int | float) else str(v) for k, v in options.items()},
        "quantization": plan.adapter.quantization,
        "fingerprint": loaded.fingerprint,
        "added_tokens": roles.added_tokens(plan.given),
    }
    ends = end_tokens(loaded.model, tokenizer, plan.config)
    on_cpu = sharding.settings() is not None or not torch.cuda.is_available()
    device = torch.device("cpu" if on_cpu else "cuda")
    torch.manual_seed(plan.seed)
    parts = build_roles(plan, loaded.model.to(device))
    reward, judge = _rewards(plan, parts) if loader is models else (rewards.WeightedSum([], []), None)
    prints = {name: data.fingerprint(getattr(splits, name)) for name in ("train", "validation")}
    return Ready(parts, tokenizer, ends, prompts, held_out, reward, judge, facts, prints, notes)


def build_roles(plan: Plan, base: Any) -> roles.Roles:
    """The parts of a run, as adapters of its base or as models of their own."""
    if not isinstance(plan.adapter, PeftRecipe):
        return roles.in_full(base, value_model=plan.config.value_model)
    scorers, judge = on_base(plan, plan.reward), on_base(plan, [plan.judge])
    options: dict[str, Any] = {"rewards": scorers, "judge": next(iter(judge), None)}
    return roles.on_one_base(base, plan.adapter, plan.given, value_model=plan.config.value_model, **options)


def on_base(plan: Plan, given: Sequence[Any]) -> list[Path]:
    """Folders of those rewards that are adapters on the policy's base; others are models of their own."""
    peft_type = plan.adapter.peft_type if isinstance(plan.adapter, PeftRecipe) else None
    specs = [reward_names.parse(str(one)) for one in given if isinstance(one, str | Path)]
    folders = [Path(spec.source) for spec in specs if not spec.end]
    return [folder for folder in folders if roles.is_reward_adapter(folder, plan.base, peft_type)]


def _rewards(plan: Plan, parts: roles.Roles) -> tuple[rewards.WeightedSum, rewards.WeightedSum | None]:
    size = plan.config.local_rollout_forward_batch_size
    reward = rewards.build(plan.reward, parts.scorers.get, size)
    judge = None if plan.judge is None else rewards.build([plan.judge], parts.scorers.get, size, "--judge")
    return reward, judge


def _noted(found: tuple[list[Prompt], list[str]], split: str, notes: list[str]) -> list[Prompt]:
    notes += [f"{split}: {note}" for note in found[1]]
    return found[0]


def longest_prompt(
    task: PromptsRecipe, config: PPOConfig, model: Any, tokenizer: Any, option: str = "response_length"
) -> int:
    """Tokens that a prompt may have, so that the answer, whose length is set by ``option``, still has positions.

    Raises:
        RecipeError: There are not enough positions.
    """
    wanted = task.model.get("max_length")
    total = models.longest_input(model, tokenizer, None)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or total
    room = positions - config.response_length
    if room < 1 or (wanted is not None and wanted > room):
        raise RecipeError(
            f"{option}: {config.response_length} leaves {max(room, 0)} of the model's {positions} "
            f"positions for prompts{'' if wanted is None else f', and model.max_length is {wanted}'}; lower one"
        )
    return int(wanted) if wanted is not None else min(total, room)


def end_tokens(model: Any, tokenizer: Any, config: PPOConfig) -> frozenset[int]:
    """What ends an answer: the tokenizer's end token, the model's own, and the one that was named.

    Raises:
        ModelError: There is none.
    """
    generation = getattr(model.generation_config, "eos_token_id", None)
    named = generation if isinstance(generation, list) else [generation]
    ids = {tokenizer.eos_token_id, config.stop_token_id, *named} - {None}
    if not ids:
        raise ModelError("neither the tokenizer nor the model has an end token; name one: stop_token_id")
    return frozenset(int(i) for i in ids if i is not None)


def uses_bf16(config: PPOConfig) -> bool:
    return bf16_is_faster() if config.bf16 is None else config.bf16


def learning_rates(plan: Plan) -> tuple[float, float]:
    """Of policy and critic."""
    rate = plan.config.learning_rate or (1e-4 if isinstance(plan.adapter, PeftRecipe) else 3e-6)
    return rate, plan.config.critic_learning_rate or rate


def make_schedule(config: PPOConfig, optimizer: torch.optim.Optimizer, updates: int) -> Any:
    """The schedule of the learning rate, by transformers.

    Raises:
        RecipeError: There is none of this name, or it asks for other options.
    """
    import transformers

    kind, options = config.lr_scheduler_type, config.lr_scheduler_kwargs
    try:
        return transformers.get_scheduler(kind, optimizer, config.warmup_steps, updates, options)
    except (ValueError, TypeError) as error:
        raise RecipeError(f"lr_scheduler_type: {kind!r}, lr_scheduler_kwargs: {options}: {error}") from error


def batch_sizes(config: PPOConfig, processes: int) -> tuple[int, int]:
    """Answers of an update and of an optimizer step, over all processes."""
    step = config.per_device_train_batch_size * config.gradient_accumulation_steps * processes
    return step * config.num_mini_batches, step


def number_of_updates(config: PPOConfig, prompts: int, processes: int) -> int:
    """Updates, the last of which may go beyond ``total_episodes``."""
    episodes = config.total_episodes or math.ceil(config.num_train_epochs * prompts)
    return math.ceil(episodes / batch_sizes(config, processes)[0])


def save_every(config: PPOConfig, updates: int) -> int:
    """Updates between checkpoints, of which the last is at the run's end; 0: none are saved."""
    return max(1, round(config.save_steps * updates)) if 0 < config.save_steps < 1 else int(config.save_steps)
