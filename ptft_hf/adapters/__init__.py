"""Methods: which weights of a model are trained, and how they are saved.

A family is one folder of recipes in ``adapters/``; the table below says which file here carries it out.
Adapters know nothing of tasks; the two meet in :mod:`ptft_hf.training`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

from ptft_hf.errors import RecipeError
from ptft_hf.recipes import (
    AdapterRecipe,
    BottleneckRecipe,
    FullRecipe,
    PartialRecipe,
    PeftRecipe,
    peft_config_names,
    saved_adapter_kind,
)
from ptft_hf.recipes.faults import XLORA
from ptft_hf.recipes.models import PEFT_SET_BY_THE_RUN


class Adapter(Protocol):
    """What :func:`ptft_hf.train` asks of a method."""

    recipe: AdapterRecipe
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

    def own_modules(self) -> tuple[type, ...]:
        """Types of the modules that the method puts into the trunk: where the trunk has no dropout, they have."""
        return ()

    def while_training(self, model: Any, autocast: bool) -> AbstractContextManager[Any]:
        """What holds from the first step to the last."""
        return nullcontext()

    def optimizer(self, model: Any, kind: Any, options: Mapping[str, Any], weight_decay: float) -> Any:
        """An optimizer of ``kind`` with ``options`` (``lr`` among them) in groups of the method's own, such as
        LoRA+'s; mostly None, for upstream's."""
        return None

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


def load(model: Any, folder: Path) -> Any:
    """The adapter of a finished run, for use, on its freshly loaded base.

    Raises:
        CheckpointError: The folder is damaged, or of another architecture.
    """
    if saved_adapter_kind(folder) == "bottleneck":
        from ptft_hf.adapters import bottleneck

        return bottleneck.load(model, folder)
    from ptft_hf.adapters import peft_models

    return peft_models.load(model, folder)


def unload(model: Any) -> Any:
    """The plain ``transformers`` model that an adapter was put on, as it was before: its weights are the base's and
    its head is the one that it was given, untrained. ``model`` is used up."""
    if getattr(model, "adapter_kind", None) == "bottleneck":
        return model.unload()
    from ptft_hf.adapters import peft_models

    return peft_models.unload(model)


def recipe_of_config(config: Any) -> PeftRecipe:
    """A recipe that stands for a ``peft.PeftConfig`` object, so that the run can say what it did.

    It holds the fields that differ from their defaults, without those that follow from the model and the task.

    Raises:
        RecipeError: ``config`` is no such object, or names further adapters.
    """
    method = getattr(getattr(config, "peft_type", None), "value", None)
    if method is None or not dataclasses.is_dataclass(config):
        raise RecipeError(
            f"adapter: {config!r} is neither a recipe's name or file, nor an AdapterRecipe, nor a peft.PeftConfig"
        )
    if method == "XLORA":
        raise RecipeError(f"adapter: {XLORA}")
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
