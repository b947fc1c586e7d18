"""Methods: which weights of a model are trained, and how they are saved.

A family is one folder of recipes in ``adapters/``; the table below says which file here carries it out.
Adapters know nothing of tasks; the two meet in :mod:`ptft_hf.training`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, Protocol

from ptft_hf.errors import RecipeError
from ptft_hf.recipes import (
    AdapterRecipe,
    BottleneckRecipe,
    FullRecipe,
    PartialRecipe,
    PeftRecipe,
    peft_config_names,
)
from ptft_hf.recipes.models import PEFT_SET_BY_THE_RUN


class Adapter(Protocol):
    """What :func:`ptft_hf.train` asks of a method."""

    learning_rate: float
    """Peak rate of AdamW, unless a recipe or the user names one."""

    def attach(self, model: Any, head: Sequence[str], task_type: str) -> Any:
        """Choose what is trained, and return the model to be trained.

        Args:
            model: The pretrained model with its task head.
            head: Names of the modules above the trunk; they are trained and saved by every method.
            task_type: PEFT's name of the task family, such as ``SEQ_CLS``.

        Raises:
            AdapterError: The method cannot be had on this architecture.
        """

    def callbacks(self, model: Any) -> list[Any]:
        """``TrainerCallback`` objects that the method needs, such as AdaLoRA's schedule; mostly none."""
        return []

    def finish(self, model: Any) -> Any:
        """The trained model as it is used and saved from now on: what served training alone is gone."""
        return model


def virtual_tokens(recipe: AdapterRecipe) -> int:
    """Positions that a method's prompt takes from the text's. A prefix has none: it stands in the attention."""
    if not isinstance(recipe, PeftRecipe) or recipe.peft_type == "PREFIX_TUNING":
        return 0
    return int(recipe.config.get("num_virtual_tokens") or 0)


def build(recipe: AdapterRecipe, given: Any = None) -> Adapter:
    """The method of a recipe.

    Args:
        recipe: What to build.
        given: For PEFT recipes a ``peft.PeftConfig`` that stands in for the recipe's fields; for PEFT and
            bottleneck recipes the folder of an earlier run (or of AdapterHub's library) whose adapter is trained
            further.

    Raises:
        RecipeError: No such family.
    """
    from ptft_hf.adapters.bottleneck import Bottleneck
    from ptft_hf.adapters.full import Full
    from ptft_hf.adapters.partial import Partial
    from ptft_hf.adapters.peft import Peft

    if isinstance(recipe, PeftRecipe):
        return Peft(recipe, given)
    if isinstance(recipe, BottleneckRecipe):
        return Bottleneck(recipe, given)
    if isinstance(recipe, FullRecipe):
        return Full(recipe)
    if isinstance(recipe, PartialRecipe):
        return Partial(recipe)
    raise RecipeError(f"{recipe.name}: family: nothing carries out {recipe.family!r}")


def recipe_of_config(config: Any) -> PeftRecipe:
    """A recipe that stands for a ``peft.PeftConfig`` object, so that the run can say what it did.

    It holds the fields that differ from their defaults, without those that follow from the model and the task.

    Raises:
        RecipeError: ``config`` is no such object.
    """
    method = getattr(getattr(config, "peft_type", None), "value", None)
    if method is None or not dataclasses.is_dataclass(config):
        raise RecipeError(
            f"adapter: {config!r} is neither a recipe's name or file, nor an AdapterRecipe, nor a peft.PeftConfig"
        )
    names = peft_config_names(method) - PEFT_SET_BY_THE_RUN - {"peft_type"}
    fields = {
        field.name: _plain(getattr(config, field.name))
        for field in dataclasses.fields(config)
        if field.name in names and getattr(config, field.name) != _default(field)
    }
    return PeftRecipe(name=type(config).__name__, family=method.lower(), peft_type=method, config=fields)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _plain(value: Any) -> Any:
    """A value as JSON has it: sets and tuples as lists, enums by value, dataclasses as maps."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (set, frozenset)):
        value = sorted(value)
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value
