"""Fields of recipes that a run knows nothing of: refused where they are set, since they would silently do nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ptft_hf.recipes.documents import shown
from ptft_hf.recipes.models import AdapterRecipe, PeftRecipe, TaskRecipe

ADAPTER = ("head_learning_rate", "gradual_unfreezing", "frozen_cache_gb")
"""Of adapters, outside ``ptft train``'s own trainer: language models have no new head that would be trained first."""
TASK = ("max_truncated", "add_tokens", "early_stopping_patience")
"""Of tasks, outside ``ptft train``'s own trainer."""


def dropouts(recipe: AdapterRecipe, but: Iterable[str] = ()) -> list[str]:
    """Names of a PEFT method's dropouts, ``but`` for some, and the trunk's."""
    config = recipe.config if isinstance(recipe, PeftRecipe) else {}
    return ["trunk_dropout", *(name for name in config if name.endswith("dropout") and name not in but)]


def idle_faults(
    recipe: TaskRecipe | AdapterRecipe,
    names: Iterable[str],
    given: Mapping[str, Any],
    why: str,
    further: bool = False,
) -> list[str]:
    """Faults of fields that are not as by default.

    Args:
        recipe: The recipe, with what ``--set`` says in it.
        names: The fields that have no effect, of the recipe or of a PEFT method's config.
        given: What ``--set`` says of the recipe.
        why: ``has no effect with ...``, and what to do.
        further: The recipe is that of an earlier run, which is trained further: of this run ``--set`` alone speaks.
    """
    kind, fields = "task" if isinstance(recipe, TaskRecipe) else "adapter", type(recipe).model_fields
    config = recipe.config if isinstance(recipe, PeftRecipe) else {}
    problems = []
    for name in names:
        value, default = config.get(name) or None, None
        if name in fields:
            value, default = getattr(recipe, name), fields[name].get_default(call_default_factory=True)
        if value != default and (name in given or not further):
            place = f"--set {kind}.{name}" if name in given else f"{recipe.name}: {name}"
            problems.append(f"{place}: {shown(value)} {why}")
    return problems
