"""What a recipe may say: one strict, frozen pydantic model a family, and its faults in words."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from ptft_hf.errors import did_you_mean
from ptft_hf.recipes.faults import (
    XLORA,
    Fault,
    classification_faults,
    column_faults,
    loraplus_faults,
    model_faults,
    repeated,
    smoothing_faults,
    token_faults,
    training_faults,
    weight_faults,
)
from ptft_hf.recipes.upstream import (
    peft_config_names,
    peft_types,
    quantization_names,
)

ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]


IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
"""``package.module:name``"""


PEFT_SET_BY_THE_RUN = frozenset(
    {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type"}
)
"""``PeftConfig`` fields that follow from the model and the task, so that a recipe may not give them."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @classmethod
    def faults(cls, values: Mapping[str, Any]) -> Iterator[Fault]:
        """What is wrong beyond the types; the values may be of any type, so that all is found at once."""
        yield from ()

    @model_validator(mode="after")
    def _no_faults(self) -> _Strict:
        found = list(self.faults(dict(self)))
        if found:
            text = "; ".join(f"{'.'.join(map(str, key))}: {message}" for key, message in found)
            raise PydanticCustomError("recipe_faults", "{text}", {"text": text, "faults": found})
        return self


class DataSource(_Strict):
    """Where labelled rows come from; the names are those of ``datasets.load_dataset``.

    Raises:
        pydantic.ValidationError: If it names no data, or a value is of the wrong type.
    """

    path: str | None = None
    """A hub id, a builder (``json``, ``csv``, ``parquet``, ...) or a ``save_to_disk`` folder."""
    name: str | None = None
    """The configuration of a hub data set (``sst2`` of ``nyu-mll/glue``)."""
    data_files: dict[str, str | list[str]] | str | list[str] | None = None
    """Files of each split. ``package:NAME/inner/path`` is a file of an installed package (see ``locate``)."""
    data_dir: str | None = None
    revision: str | None = None
    splits: dict[Literal["train", "validation", "test"], str] = {}
    """Our split: the source's name for it; empty if the source uses our names."""
    converter: str | None = None
    """``pkg.module:function``, which takes an iterable of one split's raw rows and yields flat rows."""

    @classmethod
    def faults(cls, values: Mapping[str, Any]) -> Iterator[Fault]:
        if not values.get("path") and not values.get("data_files"):
            yield (), "names no data: give path (what datasets.load_dataset takes) or data_files"
        converter = values.get("converter")
        if isinstance(converter, str) and not IMPORT_PATH.fullmatch(converter):
            yield ("converter",), f"expected 'package.module:function', got {converter!r}"
        yield from repeated(values.get("splits"), "splits", "a split cannot be two")


class Recipe(_Strict):
    """What both kinds of recipes have."""

    name: str
    """The catalogue's name (``lora/r8_attention``) or the file's path."""
    family: str
    """Which code carries the recipe out; a folder of the catalogue, or a user's ``pkg.module:Class``."""
    description: str | None = None
    training: dict[str, Any] = {}
    """``TrainingArguments`` by name."""

    @classmethod
    def faults(cls, values: Mapping[str, Any]) -> Iterator[Fault]:
        for name, reason in training_faults(values.get("training")):
            yield ("training", name), reason


class TaskRecipe(Recipe):
    """What to learn, from which data.

    Raises:
        pydantic.ValidationError: If a name is unknown or a value of the wrong type.
    """

    data: DataSource | None = None
    """None if the data is passed in Python or on the command line."""
    columns: dict[str, str] = {}
    """The family's name for a column: the data's name for it."""
    leakage: Literal["warn", "drop", "error"] = "warn"
    """What to do about rows that stand in two splits. ``warn``, since dropping changes a published split."""
    model: dict[str, Any] = {}
    """Arguments of ``from_pretrained``, and ``max_length`` in tokens (longer texts are cut, and counted)."""
    max_truncated: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Refuse a run in which a larger share of the training inputs loses its end; 1 only counts them, since cutting
    long texts is usual."""
    add_tokens: list[str] = []
    """Tokens that the checkpoint's tokenizer does not know, found in texts as they are written here; their
    embeddings are trained."""

    early_stopping_patience: Annotated[int, Field(ge=1)] | None = None
    """Stop after this many evaluations without a better validation metric; None trains to the end."""

    @property
    def model_options(self) -> dict[str, Any]:
        """What of ``model`` is ``from_pretrained``'s."""
        return {name: value for name, value in self.model.items() if name != "max_length"}

    @classmethod
    def faults(cls, values: Mapping[str, Any]) -> Iterator[Fault]:
        yield from super().faults(values)
        if isinstance(values.get("data"), dict):  # a DataSource has checked itself
            for key, message in DataSource.faults(values["data"]):
                yield ("data", *key), message
        yield from repeated(values.get("columns"), "columns", "each needs a column of its own")
        yield from model_faults(values.get("model"))
        yield from token_faults(values.get("add_tokens"))


class ClassificationRecipe(TaskRecipe):
    """What classifiers of texts and of images share."""

    problem_type: ProblemType | None = None
    """As in transformers' configs; None is inferred from the labels."""
    class_weights: Literal["balanced"] | dict[str, float] | None = None
    """Weights of the loss by label; ``balanced``: rows / (labels x rows of the label), as in scikit-learn."""
    loss: Literal["cross_entropy", "focal"] = "cross_entropy"
    """``focal`` (Lin et al. 2017) weighs easy rows down."""
    focal_gamma: Annotated[float, Field(ge=0)] = 2.0
    """How much it weighs them down; 2 is the paper's choice, 0 is cross entropy."""
    oversample: bool = False
    """Draw every label equally often in training."""
    tune_thresholds: bool = False
    """Multi-label: a threshold per label, chosen on validation, instead of 0.5."""
    calibrate: bool = False
    """Fit a temperature (Guo et al. 2017) to the logits on validation."""

    @classmethod
    def faults(cls, values: Mapping[str, Any]) -> Iterator[Fault]:
        yield from super().faults(values)
        yield from weight_faults(values)
        yield from classification_faults(values)


class SequenceClassificationRecipe(ClassificationRecipe):
    """One label, several labels or a number for a text or a pair of texts."""

    @classmethod
    def faults(cls, values: Mapping[str, Any]) -> Iterator[Fault]:
        yield from super().faults(values)
        yield from column_faults(values, ("text", "text_pair", "label"))


class ImageClassificationRecipe(ClassificationRecipe):
    """One label, several labels or a number for an image."""

    @classmethod
    def faults(cls, values: Mapping[str, Any]) -> Iterator[Fault]:
        yield from super().faults(values)
        yield from column_faults(values, ("image", "label"))
        if isinstance(values.get("model"), dict) and "max_length" in values["model"]:
            yield ("model", "max_length"), "an image has no tokens; leave it out"


class TokenClassificationRecipe(TaskRecipe):
    """Named entities: a type and a place for each, in words or in running text."""

    class_weights: Literal["balanced"] | dict[str, float] | None = None
    """Weights of the loss by type, and of ``O``; ``balanced``: words / (types and O x words of the type)."""
    loss: Literal["cross_entropy", "focal"] = "cross_entropy"
    """``focal`` (Lin et al. 2017) weighs easy words down."""
    focal_gamma: Annotated[float, Field(ge=0)] = 2.0
    """How much it weighs them down; 2 is the paper's choice, 0 is cross entropy."""
    label_all_subwords: bool = False
    """Train every sub-word of a word, instead of the first alone (as Devlin et al. 2019 do)."""
    stride: Annotated[int, Field(ge=0)] | None = None
    """Tokens that neighbouring windows of a long input share; None is a quarter of a window."""
    tag_names: list[str] = []
    """What tags that are bare integers stand for, from 0 on."""

    @classmethod
    def faults(cls, values: Mapping[str, Any]) -> Iterator[Fault]:
        yield from super().faults(values)
        yield from column_faults(values, ("tokens", "tags", "text", "spans"))
        yield from weight_faults(values)
        yield from smoothing_faults(values)


class CustomTaskRecipe(TaskRecipe):
    """A recipe of a user's own family, ``family: pkg.module:Class``."""

    options: dict[str, Any] = {}
    """What the class makes of it is its own affair."""


class AdapterRecipe(Recipe):
    """Which weights to train, and how fast.

    Raises:
        pydantic.ValidationError: If a name is unknown or a value of the wrong type.
    """

    trains_weights: ClassVar[bool] = False
    """Whether the method trains weights of the checkpoint itself."""

    quantization: dict[str, Any] | None = None
    """``transformers.BitsAndBytesConfig`` by name; None loads the base model as it is."""
    layerwise_lr_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    """Factor on the learning rate from each layer to the one below (Howard & Ruder 2018); None is 1."""
    head_learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Learning rate of the newly initialised weights; None is that of all others."""
    gradual_unfreezing: bool = False
    """Train the head first, then one layer more at a time from the top (Howard & Ruder 2018)."""
    trunk_dropout: bool = False
    """Keep dropout in the frozen part of the trunk. Off: frozen weights cannot co-adapt, and drawing
    dropout's random numbers is a fifth of a CPU step."""
    frozen_cache_gb: Annotated[float, Field(ge=0)] = 2.0
    """Memory for the activations of layers below which nothing is trained, so that they are computed once and not
    in every epoch; 0 computes them anew. They are used where that is exact, and need all of it or none."""

    @classmethod
    def faults(cls, values: Mapping[str, Any]) -> Iterator[Fault]:
        yield from super().faults(values)
        quantization = values.get("quantization")
        for name in quantization if isinstance(quantization, dict) else ():
            if name not in quantization_names():
                near = did_you_mean(name, quantization_names())
                yield ("quantization", name), f"unknown BitsAndBytesConfig name {name!r}{near}"
        if isinstance(quantization, dict) and quantization.keys() <= quantization_names():
            chosen = [name for name in ("load_in_4bit", "load_in_8bit") if quantization.get(name)]
            if len(chosen) != 1:
                yield ("quantization",), "needs one of load_in_4bit and load_in_8bit"
            if cls.trains_weights:
                yield (
                    ("quantization",),
                    "cannot be had here: quantized weights cannot be trained; use a LoRA recipe (lora/qlora_nf4)",
                )


class FullRecipe(AdapterRecipe):
    """Every weight is trained."""

    trains_weights = True


class PartialRecipe(AdapterRecipe):
    """The head is trained, and what is named here."""

    trains_weights = True

    top_layers: Annotated[int, Field(ge=0)] = 0
    """How many of the topmost layers."""
    bias: bool = False
    """Every bias (BitFit, Ben Zaken et al. 2022)."""
    parameters: list[str] = []
    """Regular expressions; a parameter whose whole name one of them matches."""

    @classmethod
    def faults(cls, values: Mapping[str, Any]) -> Iterator[Fault]:
        yield from super().faults(values)
        patterns = values.get("parameters")
        for index, pattern in enumerate(patterns if isinstance(patterns, list) else ()):
            try:
                re.compile(pattern if isinstance(pattern, str) else "")
            except re.error as error:
                yield ("parameters", index), f"{pattern!r} is not a regular expression: {error}"


class PeftRecipe(AdapterRecipe):
    """A method of PEFT. In YAML the fields of its config stand flat, beside ``training:``."""

    peft_type: str
    """As ``peft.PeftType`` spells it (``LORA``); implied by the folder of a catalogue recipe."""
    config: dict[str, Any] = {}
    """The method's ``PeftConfig`` by name."""
    loraplus_lr_ratio: Annotated[float, Field(ge=1)] | None = None
    """LoRA+ (Hayou et al. 2024): the rate of the B matrices, and of biases and norms, over that of A."""

    @classmethod
    def faults(cls, values: Mapping[str, Any]) -> Iterator[Fault]:
        yield from super().faults(values)
        method, config = values.get("peft_type"), values.get("config")
        yield from loraplus_faults(values)
        if not isinstance(method, str):
            return
        if method not in peft_types():
            yield ("peft_type",), f"unknown PEFT method {method!r}{did_you_mean(method, peft_types())}"
            return
        if method == "XLORA":
            yield ("family",), XLORA
        names = peft_config_names(method)
        for name in config if isinstance(config, dict) else ():
            if name not in names:
                near = did_you_mean(name, names | keys_of(cls))
                yield ("config", name), f"unknown {method} name {name!r}{near}"


class CustomAdapterRecipe(AdapterRecipe):
    """A recipe of a user's own family, ``family: pkg.module:Class``."""

    options: dict[str, Any] = {}
    """What the class makes of it is its own affair."""


def keys_of(recipe: type[BaseModel]) -> frozenset[str]:
    """The top-level keys that a YAML file of this kind may hold (a PEFT method's own fields aside)."""
    inner = {"name", "config"} if issubclass(recipe, Recipe) else set()
    return frozenset(recipe.model_fields) - inner


