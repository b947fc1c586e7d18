"""Methods: which weights of a model are trained, and how they are saved.

A family is one folder of recipes in ``adapters/``; the table below says which file here carries it out.
Adapters know nothing of tasks; the two meet in :mod:`ptft_hf.training`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from ptft_hf.errors import RecipeError
from ptft_hf.recipes import AdapterRecipe, FullRecipe, PartialRecipe, PeftRecipe


class Adapter(Protocol):
    """What :func:`ptft_hf.train` asks of a method."""

    learning_rate: float
    """Peak rate of AdamW, unless a recipe or the user names one."""
    is_peft: bool
    """Whether the result is a PEFT adapter beside a base, and not a whole model."""

    def attach(self, model: Any, head: Sequence[str], task_type: str) -> Any:
        """Choose what is trained, and return the model to be trained.

        Args:
            model: The pretrained model with its task head.
            head: Names of the modules above the trunk; they are trained and saved by every method.
            task_type: PEFT's name of the task family, such as ``SEQ_CLS``.

        Raises:
            AdapterError: The method cannot be had on this architecture.
        """


def build(recipe: AdapterRecipe, given: Any = None) -> Adapter:
    """The method of a recipe.

    Args:
        recipe: What to build.
        given: For PEFT recipes: a ``peft.PeftConfig`` that stands in for the recipe's fields, or the folder of
            an earlier run whose adapter is trained further.

    Raises:
        RecipeError: No such family.
    """
    from ptft_hf.adapters.full import Full
    from ptft_hf.adapters.partial import Partial
    from ptft_hf.adapters.peft import Peft

    if isinstance(recipe, PeftRecipe):
        return Peft(recipe, given)
    if isinstance(recipe, FullRecipe):
        return Full(recipe)
    if isinstance(recipe, PartialRecipe):
        return Partial(recipe)
    raise RecipeError(f"{recipe.name}: family: nothing carries out {recipe.family!r}")


def recipe_of_config(config: Any) -> PeftRecipe:
    """A recipe that stands for a ``peft.PeftConfig`` object, so that the run can say what it did.

    Raises:
        RecipeError: ``config`` is no such object.
    """
    method = getattr(getattr(config, "peft_type", None), "value", None)
    if method is None or not hasattr(config, "to_dict"):
        raise RecipeError(
            f"adapter: {config!r} is neither a recipe's name or file, nor an AdapterRecipe, nor a peft.PeftConfig"
        )
    default = type(config)().to_dict()
    fields = {
        name: sorted(value) if isinstance(value, set) else value
        for name, value in config.to_dict().items()
        if name not in ("peft_type", "task_type", "auto_mapping", "peft_version")
        and value != default.get(name)
    }
    return PeftRecipe(name=type(config).__name__, family=method.lower(), peft_type=method, config=fields)
