"""Supervised fine-tuning on instructions: :func:`train_sft`."""

from __future__ import annotations

from typing import Any

from ptft_hf import recipes
from ptft_hf.errors import RecipeError
from ptft_hf.inference import TrainedModel
from ptft_hf.rlhf.processes import run_as
from ptft_hf.training import train


def train_family(family: str, task: Any, **options: Any) -> TrainedModel:
    """:func:`ptft_hf.train` for one family of tasks.

    Raises:
        RecipeError: The task is of another family.
        PtftError: As :func:`ptft_hf.train`.
    """
    recipe = task if isinstance(task, recipes.TaskRecipe) else recipes.load_task(task)
    if recipe.family != family:
        raise RecipeError(f"{recipe.name}: is a recipe of the family {recipe.family}; {family} is needed here")
    return train(task=recipe, **options)


def train_sft(*, task: Any, **options: Any) -> TrainedModel:
    """Fine-tune a decoder on a recipe of the family ``instruction``; arguments and errors are those of
    :func:`ptft_hf.train`."""
    return train_family("instruction", task, **options)


def main() -> None:
    """``torchrun -m ptft_hf.rlhf.sft --task instruction/...`` is ``ptft train ...`` in several processes."""
    run_as("train")


if __name__ == "__main__":
    main()
