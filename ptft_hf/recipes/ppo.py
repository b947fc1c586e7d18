"""All settings of a PPO run, loaded and checked together, before torch is imported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ptft_hf.errors import RecipeError, did_you_mean
from ptft_hf.recipes import load_run, saved_adapter_kind
from ptft_hf.recipes.documents import Document, Origin, parse
from ptft_hf.recipes.explaining import explain
from ptft_hf.recipes.idle import ADAPTER, TASK, dropouts, idle_faults
from ptft_hf.recipes.models import AdapterRecipe, FullRecipe, PeftRecipe
from ptft_hf.recipes.prompts import PPOConfig, PromptsRecipe
from ptft_hf.recipes.upstream import peft_config_names

DEFAULT_ADAPTER = "lora/r16_all_linear"
"""Of a policy that is a checkpoint."""
RATES = ("loraplus_lr_ratio", "layerwise_lr_decay")
"""Policy and critic have a rate each."""
IDLE = "has no effect with PPO; leave it out"
NOT_SHARED = {
    "ADALORA": "its ranks are cut by a schedule of its own",
    "PREFIX_TUNING": "a prefix is no adapter in the layers",
    "CARTRIDGE": "a prefix is no adapter in the layers",
    "ADAPTION_PROMPT": "it is no adapter in the layers",
}
"""Of PEFT, that cannot be there several times on one base, and why; prompts cannot, either."""


def check_ppo(policy: str, task: str, adapter: str | None, sets: Sequence[str]) -> None:
    """Every fault of a run's recipes and settings, as far as they can be told before anything heavy is imported.

    Raises:
        RecipeError: With all of them.
    """
    if adapter is not None or saved_adapter_kind(policy) is None:
        load_ppo(task, adapter or DEFAULT_ADAPTER, sets)


def load_ppo(
    task: str | Path | PromptsRecipe,
    adapter: str | Path | AdapterRecipe,
    sets: Sequence[str] = (),
    *,
    further: bool = False,
) -> tuple[PromptsRecipe, AdapterRecipe, PPOConfig]:
    """Load and check all settings of a PPO run.

    Args:
        task: A catalogue name, a file, or a recipe of the family ``prompts``.
        adapter: A catalogue name, a file, or a recipe: a method of PEFT, or ``full``.
        sets: ``key=value``: a bare name is an option of :class:`PPOConfig`; ``task.*``, ``adapter.*``, ``model.*``
            are fields of the recipes.
        further: The adapter's recipe is that of an earlier run, which is trained further.

    Raises:
        RecipeError: With every fault of all of them.
    """
    dotted = [pair for pair in sets if "." in pair.partition("=")[0]]
    given, problems = _options([pair for pair in sets if pair not in dotted])
    try:
        the_task, the_adapter, overrides = load_run(task, adapter, dotted, of_prompts=True)
    except RecipeError as error:
        raise RecipeError(*error.problems, *problems, *config_of(given, "", given)[1]) from error
    if not isinstance(the_task, PromptsRecipe):
        problems.append(
            f"{the_task.name}: PPO needs prompts, a recipe of the family prompts, not {the_task.family}"
        )
    if not isinstance(the_adapter, PeftRecipe | FullRecipe):
        problems.append(
            f"{the_adapter.name}: PPO trains with a method of PEFT or in full, not with {the_adapter.family}"
        )
    if isinstance(the_adapter, PeftRecipe):
        problems += _method_faults(the_adapter, further)
    names = (*RATES, *ADAPTER, *dropouts(the_adapter))
    problems += idle_faults(the_adapter, names, overrides.adapter, IDLE, further)
    problems += idle_faults(the_task, TASK, overrides.task, IDLE)
    if "training" in overrides.adapter:
        problems.append("--set adapter.training: has no effect with PPO, whose own options stand alone: NAME=value")
    if not isinstance(the_task, PromptsRecipe):
        raise RecipeError(*problems)
    config, faults = config_of({**the_task.ppo, **given}, the_task.name, given)
    if problems or faults or config is None:
        raise RecipeError(*problems, *faults)
    return the_task, the_adapter, config


def _method_faults(recipe: PeftRecipe, further: bool) -> Iterator[str]:
    """Why a method of PEFT cannot be trained by PPO, all parts of which share one base."""
    reason = NOT_SHARED.get(recipe.peft_type)
    if reason is None and "num_virtual_tokens" in peft_config_names(recipe.peft_type):
        reason = "a prompt takes positions from the text's"
    if reason is not None:
        what = f"{recipe.peft_type} cannot play several parts on one base"
        yield f"{recipe.name}: {what}: {reason}; use a LoRA recipe"
    begun = recipe.config.get("init_lora_weights")
    if isinstance(begun, str) and begun != "gaussian" and not further:  # a saved adapter is begun
        what = "changes the base, which all parts of PPO share"
        yield f"{recipe.name}: init_lora_weights: {begun!r} {what}; leave it out"
    if (bias := recipe.config.get("bias", "none")) != "none":
        what = "trains weights of the base, which all parts of PPO share"
        yield f"{recipe.name}: bias: {bias!r} {what}; leave it out"


def _options(pairs: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Options by name, and what is wrong with the pairs."""
    options: dict[str, Any] = {}
    problems = []
    for pair in pairs:
        name, equals, text = (part.strip() for part in pair.partition("="))
        document = Document({}, {(): Origin("", Path.cwd())})
        if not equals or not name or not text:
            problems.append(f"--set {pair}: expected key=value")
        elif name not in PPOConfig.model_fields:
            problems.append(
                f"--set {pair}: unknown option of PPO {name!r}{did_you_mean(name, PPOConfig.model_fields)}"
            )
        elif name in options:
            problems.append(f"--set {pair}: given twice")
        else:
            options[name] = parse(text, document)
            problems += [f"--set {pair}: {problem.removeprefix(': ')}" for problem in document.problems]
    return options, problems


def config_of(
    values: Mapping[str, Any], task: str, given: Mapping[str, Any]
) -> tuple[PPOConfig | None, list[str]]:
    """Options of the task's recipe, under those of ``given`` by ``--set``; or None, and what is wrong with them."""
    try:
        return PPOConfig.model_validate(dict(values)), []
    except ValidationError as error:
        faults = explain(error, PPOConfig, dict(values))
    places = {name: "--set " if name in given else f"{task}: ppo." for name in values}
    return None, [
        f"{places.get(str(key[0]), '') if key else ''}{'.'.join(map(str, key))}: {m}" for key, m in faults
    ]
