"""Task families: what a kind of task needs from its data, its model and its metrics.

A family is one file here and one folder of recipes in ``tasks/``. Tasks know nothing of adapters; the two
meet in :mod:`ptft_hf.training`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from ptft_hf.errors import RecipeError
from ptft_hf.recipes import TaskRecipe

FAMILIES = {"sequence_classification": "ptft_hf.tasks.sequence_classification:SequenceClassification"}


class Task(Protocol):
    """What :func:`ptft_hf.train` asks of a task family.

    ``N`` is a number of examples, ``C`` of labels.
    """

    recipe: TaskRecipe
    auto_class: str
    """Name of the transformers auto class with this family's head."""
    peft_task_type: str
    """PEFT's name for the family, for example ``SEQ_CLS``."""
    required: Sequence[str]
    optional: Sequence[str]
    text_columns: Sequence[str]
    label_column: str
    best_metric: str
    """The validation metric by which a checkpoint is chosen, unless the recipe names another."""
    smooths_labels: bool
    """Whether :meth:`loss` heeds ``label_smoothing``; where it does not, the setting is refused."""

    def look_at(self, splits: Any) -> list[str]:
        """Learn labels and their counts from the splits; return what is to be said aloud."""

    def config(self) -> dict[str, Any]:
        """Configuration of the model's head."""

    def encode(self, rows: Any, tokenizer: Any, max_length: int) -> tuple[Any, int]:
        """Token ids, labels and ``length`` of every row; and how many were truncated."""

    def collator(self, tokenizer: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Makes a padded batch of encoded rows."""

    def sampling_weights(self, encoded: Any) -> list[float] | None:
        """Chance of each of the ``N`` rows to be drawn, or None to see each once an epoch."""

    def loss_weight(self, labels: Any) -> Any:
        """What the summed loss is divided by, for these labels: a scalar tensor."""

    def loss(self, logits: Any, labels: Any, label_smoothing: float = 0.0) -> Any:
        """The *summed* loss over the labels: a scalar tensor."""

    def metrics(self, logits: Any, labels: Any) -> dict[str, float]:
        """Scalar metrics of ``N`` examples."""

    def report(self, logits: Any, labels: Any) -> dict[str, Any]:
        """Details beside the metrics, such as figures for each class."""

    def outcomes(self, logits: Any, labels: Any) -> list[float]:
        """A score for each of the ``N`` examples, for the comparison of two models on the same ones: 1.0 for right
        and 0.0 for wrong; where there is more to tell, any number, higher is better."""

    def after_training(self, logits: Any, labels: Any) -> list[str]:
        """Choose what is chosen on the validation set after training (thresholds, temperature)."""

    def predictions(self, logits: Any) -> list[dict[str, Any]]:
        """What a user gets for each example."""

    def state(self) -> dict[str, Any]:
        """JSON values from which :meth:`restore` rebuilds the task without data."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state`."""


def build(recipe: TaskRecipe) -> Task:
    """The task family of a recipe: one of :data:`FAMILIES`, or ``module:Class`` of the user's own.

    Raises:
        RecipeError: No such family.
    """
    reference = FAMILIES.get(recipe.family, recipe.family)
    module, colon, name = reference.partition(":")
    if not colon:
        raise RecipeError(f"{recipe.name}: family: {recipe.family!r} is none of {sorted(FAMILIES)}")
    try:
        family = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise RecipeError(f"{recipe.name}: family: {recipe.family!r} cannot be imported: {error}") from error
    task: Task = family(recipe)
    return task
