"""Algorithms that TRL's trainers carry out, and all settings of such a run, checked before torch is imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from ptft_hf.errors import RecipeError, did_you_mean
from ptft_hf.recipes import load_run, resolve_training
from ptft_hf.recipes.documents import Document, Origin, parse, shown
from ptft_hf.recipes.idle import ADAPTER, TASK, dropouts, idle_faults
from ptft_hf.recipes.models import AdapterRecipe, FullRecipe, PeftRecipe, TaskRecipe
from ptft_hf.recipes.overrides import Overrides
from ptft_hf.recipes.ppo import NOT_SHARED, config_of
from ptft_hf.recipes.prompts import PromptsRecipe
from ptft_hf.recipes.upstream import class_fields, training_argument_names


class Algorithm(NamedTuple):
    """One of TRL's trainers."""

    family: str
    """Of the tasks that it learns from."""
    trainer: str
    config: str
    module: str
    """Where the config is defined in TRL."""
    rewards: bool
    """Whether it is given rewards."""


ALGORITHMS = {
    "dpo": Algorithm("preference", "DPOTrainer", "DPOConfig", "trainer.dpo_config", False),
    "kto": Algorithm("preference", "KTOTrainer", "KTOConfig", "trainer.kto_config", False),
    "grpo": Algorithm("prompts", "GRPOTrainer", "GRPOConfig", "trainer.grpo_config", True),
    "rloo": Algorithm("prompts", "RLOOTrainer", "RLOOConfig", "trainer.rloo_config", True),
}
"""Rafailov et al. 2023; Ethayarajh et al. 2024; Shao et al. 2024; Ahmadian et al. 2024."""
PREFIX = "algorithm."
SAMPLING = {"response_length": "max_completion_length", "temperature": "temperature"}
"""What of a recipe's ``ppo`` holds for TRL's algorithms, too, and its name there."""
METHODS = {method: NOT_SHARED[method] for method in ("ADALORA", "PREFIX_TUNING")}
"""Of PEFT, that TRL's trainers cannot train, and why."""
NOT_TURNED_OFF = ("module_dropout", "rank_dropout")
"""Of PEFT's, by TRL's ``disable_dropout``, which knows ``nn.Dropout`` alone."""


class Settings(NamedTuple):
    """Everything that a run by TRL was given."""

    algorithm: Algorithm
    task: TaskRecipe
    adapter: AdapterRecipe
    training: dict[str, Any]
    """``TrainingArguments`` by name, of recipes and ``--set``."""
    options: dict[str, Any]
    """The algorithm's own (``beta``, ``num_generations``), by TRL's names, of the task's ``ppo`` and ``--set``."""


def load_algorithm(
    name: str,
    task: str | Path | TaskRecipe,
    adapter: str | Path | AdapterRecipe,
    sets: Sequence[str] = (),
    *,
    further: bool = False,
) -> Settings:
    """Load and check all settings of a run by TRL.

    Args:
        name: A key of :data:`ALGORITHMS`.
        task: A catalogue name, a file, or a recipe, of the algorithm's family.
        adapter: The same of an adapter: a method of PEFT, or ``full``.
        sets: As after ``--set``; ``algorithm.NAME=value`` is a field of TRL's config.
        further: The adapter's recipe is that of an earlier run, which is trained further.

    Raises:
        RecipeError: With every fault of all of them.
    """
    if name not in ALGORITHMS:
        near = did_you_mean(name, ALGORITHMS) or f"; there are {', '.join(ALGORITHMS)}"
        raise RecipeError(f"algorithm: there is no {name!r}{near}")
    algorithm = ALGORITHMS[name]
    own = [pair for pair in sets if pair.startswith(PREFIX)]
    options, problems = _options(algorithm, own)
    try:
        others = [pair for pair in sets if pair not in own]
        the_task, the_adapter, overrides = load_run(task, adapter, others, of_prompts=True)
    except RecipeError as error:
        raise RecipeError(*error.problems, *problems) from error
    if the_task.family != algorithm.family:
        problems.append(f"{the_task.name}: {name} learns from {algorithm.family}, and this is {the_task.family}")
    if not isinstance(the_adapter, PeftRecipe | FullRecipe):
        problems.append(f"{the_adapter.name}: TRL trains with a method of PEFT or in full, not {the_adapter.family}")
    elif reason := METHODS.get(getattr(the_adapter, "peft_type", "")):
        problems.append(f"{the_adapter.name}: TRL's trainers do not train {the_adapter.family}: {reason}; use LoRA")
    training = resolve_training({}, the_task.training, the_adapter.training, overrides.training)
    problems += _idle(name, the_task, the_adapter, overrides, options, training, further)
    if isinstance(the_task, PromptsRecipe):
        config, faults = config_of(the_task.ppo, the_task.name, {})
        problems += faults
        options = {SAMPLING[key]: getattr(config, key, None) for key in SAMPLING if key in the_task.ppo} | options
    if problems:
        raise RecipeError(*problems)
    return Settings(algorithm, the_task, the_adapter, training, options)


def _idle(
    name: str,
    task: TaskRecipe,
    adapter: AdapterRecipe,
    overrides: Overrides,
    options: Mapping[str, Any],
    training: Mapping[str, Any],
    further: bool,
) -> list[str]:
    """Faults of what would have no effect. Of a recipe's ``ppo`` that is what ``--set`` names alone."""
    no_effect = f"has no effect with --algorithm {name}"
    why = f"{no_effect}; leave it out"
    problems = idle_faults(task, TASK, overrides.task, why)
    problems += idle_faults(adapter, ADAPTER, overrides.adapter, why, further)
    if not ALGORITHMS[name].rewards and options.get("disable_dropout", True):
        off = f"{no_effect}, where dropout is off; leave it out, or --set algorithm.disable_dropout=false"
        problems += idle_faults(adapter, dropouts(adapter, NOT_TURNED_OFF), overrides.adapter, off, further)
    if smoothing := training.get("label_smoothing_factor"):
        problems.append(f"training.label_smoothing_factor: {shown(smoothing)} {why}")
    of_ppo = overrides.task.get("ppo", {})
    return problems + [
        f"--set task.ppo.{key}: {shown(of_ppo[key])} {why}"
        for key in of_ppo
        if key not in SAMPLING
    ]


@cache
def option_names(algorithm: Algorithm) -> frozenset[str]:
    """The fields that TRL's config has beside those of ``TrainingArguments``."""
    return class_fields("trl", algorithm.module, algorithm.config) - training_argument_names()


def _options(algorithm: Algorithm, pairs: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    options: dict[str, Any] = {}
    problems = []
    for pair in pairs:
        key, equals, text = (part.strip() for part in pair.partition("="))
        name = key.removeprefix(PREFIX)
        document = Document({}, {(): Origin("", Path.cwd())})
        if not equals or not text:
            problems.append(f"--set {pair}: expected key=value")
        elif name not in option_names(algorithm):
            near = did_you_mean(name, option_names(algorithm))
            problems.append(f"--set {pair}: {algorithm.config} has no {name!r} of its own{near}")
        else:
            options[name] = parse(text, document)
            problems += [f"--set {pair}: {problem.removeprefix(': ')}" for problem in document.problems]
    return options, problems


def said(settings: Settings) -> Mapping[str, Any]:
    """As JSON."""
    return {
        "task": settings.task.model_dump(mode="json"),
        "adapter": settings.adapter.model_dump(mode="json"),
        "training": settings.training,
        "options": settings.options,
    }
