"""Task families: what a kind of task needs from its data, its model and its metrics.

A family is one file here and one folder of recipes in ``tasks/``. Tasks know nothing of adapters; the two
meet in :mod:`ptft_hf.training`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from ptft_hf import data
from ptft_hf.errors import RecipeError
from ptft_hf.recipes import Cleaning, TaskRecipe
from ptft_hf.recipes.prompts import NO_ANSWERS

FAMILIES = {
    "image_classification": "ptft_hf.tasks.image_classification:ImageClassification",
    "sequence_classification": "ptft_hf.tasks.sequence_classification:SequenceClassification",
    "token_classification": "ptft_hf.tasks.token_classification:TokenClassification",
    "masked_lm": "ptft_hf.tasks.masked_lm:MaskedLM",
    "causal_lm": "ptft_hf.tasks.causal_lm:CausalLM",
    "instruction": "ptft_hf.tasks.instruction:Instruction",
    "summarization": "ptft_hf.tasks.summarization:Summarization",
    "preference": "ptft_hf.tasks.preference:Preference",
}


class Usage(NamedTuple):
    """What the model card shows of a family."""

    code: str
    """Python lines that go on from ``model`` and ``tokenizer`` with upstream's libraries alone."""
    inputs: list[Any]
    """Examples of what ``predict`` takes."""
    answers: str
    """What the model does, before its list of labels: "predicts a label among"."""
    without_labels: str = "predicts a number"
    """What it does if it has no labels."""
    reader: str = "AutoTokenizer"
    """The transformers auto class of what reads the inputs."""
    samples: Sequence[Any] = ()
    """Inputs that can be predicted anywhere, where ``inputs`` are files that nobody else has."""


class Task(Protocol):
    """What :func:`ptft_hf.train` asks of a task family.

    ``N`` is a number of encoded rows, ``C`` of labels. *Outputs* are what the model says, *targets* what it is
    compared with; of what kind they are is the family's own affair. Outputs are a sequence with one element
    for each encoded row, in their order (``[N, C]`` logits of classifiers), so that each of several processes
    may take its share of the rows. What a family may say beside this to the label inspector stands in
    :class:`ptft_hf.tasks.marks.Inspected`.
    """

    recipe: TaskRecipe
    labels: list[str]
    """What the model tells apart; empty where it is not labels that are learnt."""
    auto_class: str
    """Name of the transformers auto class with this family's head."""
    peft_task_type: str
    """PEFT's name for the family, for example ``SEQ_CLS``."""
    required: Sequence[str]
    optional: Sequence[str]
    text_columns: Sequence[str]
    value_columns: Sequence[str]
    """Those among ``optional`` that hold numbers or booleans, and keep their type."""
    label_column: str | None
    """None where a text is its own label."""
    otherwise: Sequence[Sequence[str]]
    """Columns of other layouts, the label last; empty if there is but one."""
    best_metric: str
    """The validation metric by which a checkpoint is chosen, unless the recipe names another."""
    smooths_labels: bool
    """Whether :meth:`loss` heeds ``label_smoothing``; where it does not, the setting is refused."""
    reads: str
    """``text``, by a tokenizer, or ``images``, by an image processor in its place."""
    unit: str
    """Of an input's ``length``, in words."""
    group_column: str | None
    """Rows that have the same value in it stay together where a split is cut from train."""
    cleaning: Cleaning | None
    """Steps by which the texts of all splits are cleaned first."""
    begins_from_nothing: bool
    """Whether the family can train random weights; others build on what they know."""
    loss_from_states: bool
    """Whether :meth:`loss` takes a language model's logits as :class:`ptft_hf.models.lm_heads.LazyLogits`, of which
    it asks for those where labels are."""
    long_inputs: str
    """What befalls inputs longer than ``max_length``, in words: "were truncated"."""
    sequences: int
    """How many sequences the model reads for an encoded row; in a batch those of the first row come first. Labels
    have one entry a row."""

    def look_at(self, splits: Any) -> list[str]:
        """Learn labels and their counts from the splits; return what is to be said aloud."""

    def look_at_checkpoint(self, config: Any, tokenizer: Any) -> list[str]:
        """See :class:`TaskDefaults`."""

    def reader_from_nothing(self, reference: str, config: Any, rows: Any) -> tuple[Any, list[str]]:
        """See :class:`TaskDefaults`."""

    def check_model(self, model: Any, tokenizer: Any, max_length: int) -> None:
        """See :class:`TaskDefaults`."""

    def config(self) -> dict[str, Any]:
        """Configuration of the model's head."""

    def encode(self, rows: Any, tokenizer: Any, max_length: int) -> tuple[Any, int]:
        """Token ids, labels and ``length`` of every row; and how many rows are longer than ``max_length``."""

    def between_epochs(self, encoded: Any) -> Any:
        """See :class:`TaskDefaults`."""

    def collator(self, tokenizer: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Makes a padded batch of encoded rows."""

    def sampling_weights(self, encoded: Any) -> list[float] | None:
        """Chance of each of the ``N`` rows to be drawn, or None to see each once an epoch."""

    def loss_weight(self, labels: Any) -> Any:
        """What the summed loss is divided by, for these labels: a scalar tensor."""

    def loss(self, logits: Any, labels: Any, label_smoothing: float = 0.0) -> Any:
        """The *summed* loss over the labels: a scalar tensor."""

    def outputs(
        self, model: Any, encoded: Any, tokenizer: Any, batch_size: int, progress: bool = False
    ) -> Any:
        """What the model says on each of the ``N`` rows, in their order."""

    def targets(self, encoded: Any) -> Any:
        """What outputs are compared with: labels, references; None where the rows have none."""

    def mean_loss(self, outputs: Any, encoded: Any) -> float:
        """The loss on these rows, without label smoothing: :meth:`loss` over :meth:`loss_weight`."""

    def metrics(self, outputs: Any, targets: Any) -> dict[str, float]:
        """Scalar metrics."""

    def report(self, outputs: Any, targets: Any) -> dict[str, Any]:
        """Details beside the metrics, such as figures for each class."""

    def outcomes(self, outputs: Any, targets: Any) -> list[float]:
        """A score for each of the ``N`` examples, for the comparison of two models on the same ones: 1.0 for right
        and 0.0 for wrong; where there is more to tell, any number, higher is better."""

    def rows_to_look_back_on(self, encoded: Any) -> Any:
        """See :class:`TaskDefaults`."""

    def look_back(self, outputs: Any, targets: Any) -> list[str]:
        """See :class:`TaskDefaults`."""

    def after_training(self, outputs: Any, targets: Any) -> list[str]:
        """Choose what is chosen on the validation set after training (thresholds, temperature)."""

    def input_row(self, value: Any, columns: Sequence[str]) -> dict[str, Any]:
        """An input of ``predict`` as a row for :meth:`encode`; ``columns`` are those of the training rows.

        Raises:
            DataError: It is none.
        """

    def predictions(self, outputs: Any, targets: Any = None) -> list[dict[str, Any]]:
        """What a user gets for each input."""

    def same(self, one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
        """Whether two predictions give the same answer, scores aside."""

    def unknown_labels(self, rows: Any) -> list[str]:
        """Labels of these rows that are none of the model's."""

    def usage(self, columns: Sequence[str], max_length: int) -> Usage:
        """What the model card shows; ``columns`` are those of the training rows."""

    def state(self) -> dict[str, Any]:
        """JSON values from which :meth:`restore` rebuilds the task without data."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state`."""


class TaskDefaults:
    """What most families leave as it is; a family has these from here, or its own."""

    reads = "text"
    unit = "tokens"
    group_column: str | None = None
    cleaning: Cleaning | None = None
    begins_from_nothing = False
    loss_from_states = False
    value_columns: Sequence[str] = ()
    sequences = 1

    def look_at_checkpoint(self, config: Any, tokenizer: Any) -> list[str]:
        """Learn, before the weights are read, which ``auto_class`` a checkpoint is for and how it is spoken to;
        return what is to be said aloud.

        Raises:
            ModelError: The checkpoint is for no such task.
        """
        return []

    def reader_from_nothing(self, reference: str, config: Any, rows: Any) -> tuple[Any, list[str]]:
        """The tokenizer (or image processor) of a model with random weights, and what is to be said of it; asked of
        families that ``begins_from_nothing`` alone.

        Args:
            reference: The model's, ``config:...``.
            config: Its configuration.
            rows: The training rows.

        Raises:
            PtftError: It cannot be had.
        """
        raise NotImplementedError

    def check_model(self, model: Any, tokenizer: Any, max_length: int) -> None:
        """Refuse, before training, a model with its adapter that cannot learn the task.

        Raises:
            PtftError: It cannot.
        """

    def between_epochs(self, encoded: Any) -> Any:
        """The encoded validation rows as they are evaluated while training: the same rows, of which an expensive
        family may do less."""
        return encoded

    def rows_to_look_back_on(self, encoded: Any) -> Any:
        """Those of the encoded training rows of which :meth:`look_back` wants the trained model's outputs; None for
        families that want none."""
        return None

    def look_back(self, outputs: Any, targets: Any) -> list[str]:
        """Fix what is fixed on training rows after training (a centre); return what is to be said aloud."""
        return []


def build(recipe: TaskRecipe) -> Task:
    """The task family of a recipe: one of :data:`FAMILIES`, or ``module:Class`` of the user's own.

    Raises:
        RecipeError: No such family, or prompts, which have none.
    """
    if recipe.family == "prompts":
        raise RecipeError(f"{recipe.name}: family: {NO_ANSWERS}")
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


def faults_of_nothing(task: Task, model: str) -> list[str]:
    """Why the family cannot begin from random weights, if it cannot."""
    if task.begins_from_nothing:
        return []
    return [
        f"model: {model}: random weights know nothing that {task.recipe.name} could build on; train them on a corpus "
        "(family masked_lm or causal_lm) first, and take the folder of that run"
    ]


def load_splits(task: Task, source: Any, recipe: TaskRecipe, seed: int) -> data.Splits:
    """The family's columns of a source's splits, checked for leakage; see :func:`ptft_hf.data.load_splits`."""
    splits = data.load_splits(
        source, columns=recipe.columns, seed=seed, group_column=task.group_column, **_columns(task)
    )
    if task.cleaning is not None:
        splits = data.clean_splits(splits, task.cleaning)
    label = task.label_column
    if label is not None and label not in splits.train.column_names:
        label = next((names[-1] for names in task.otherwise if names[-1] in splits.train.column_names), label)
    return data.check_leakage(splits, task.text_columns, label, recipe.leakage)


def load_split(task: Task, source: Any, recipe: TaskRecipe, split: str) -> tuple[Any, list[str]]:
    """The family's columns of one split; see :func:`ptft_hf.data.load_split`."""
    rows, notes = data.load_split(source, split, columns=recipe.columns, **_columns(task))
    if task.cleaning is not None:
        rows, more = data.clean(split, rows, task.cleaning)
        notes = [*notes, *more]
    return rows, notes


def _columns(task: Task) -> dict[str, Any]:
    return {
        "required": task.required,
        "optional": task.optional,
        "label_column": task.label_column,
        "otherwise": task.otherwise,
        "values": task.value_columns,
    }
