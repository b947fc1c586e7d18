"""Faults of recipes beyond the types, in words; values may be of any type, so that all is found at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ptft_hf.errors import did_you_mean
from ptft_hf.recipes.documents import Key, shown
from ptft_hf.recipes.upstream import generation_names, training_argument_names

Fault = tuple[Key, str]
"""Where in a recipe something is wrong, and what."""

SET_BY_THE_RUN = {
    "output_dir": "the output folder is given by --output (in Python: output_dir=)",
    "resume_from_checkpoint": "a run is resumed by --resume (in Python: resume=True)",
    "do_train": "it changes nothing: a run always trains",
    "do_eval": "it changes nothing: a run always evaluates",
    "do_predict": "it changes nothing: use ptft predict",
}
"""``TrainingArguments`` that a recipe or ``--set`` may not give, and why."""

# fmt: off
FROM_PRETRAINED = (
    "attn_implementation", "cache_dir", "code_revision", "device_map", "dtype", "force_download", "gguf_file",
    "ignore_mismatched_sizes", "local_files_only", "low_cpu_mem_usage", "max_length", "proxies", "revision",
    "subfolder", "token", "torch_dtype", "trust_remote_code", "use_safetensors", "variant",
)
# fmt: on
"""What ``model:`` may hold besides fields of the model's own config."""

MEANINGLESS = {
    "regression": ("class_weights", "oversample", "calibrate", "tune_thresholds"),
    "multi_label_classification": ("oversample", "calibrate"),
    "single_label_classification": ("tune_thresholds",),
}
"""What a classification recipe may not ask for, by its problem type."""


XLORA = (
    "XLORA mixes adapters of other folders, which PEFT reads by itself, pickles and the Hub's among them, and which "
    "a run could not hold; use one of them"
)


def training_faults(training: object) -> Iterator[tuple[str, str]]:
    """Names that are no ``TrainingArguments``, or that the run itself sets; each with what is wrong."""
    for name in training if isinstance(training, dict) else ():
        if name in SET_BY_THE_RUN:
            yield name, f"cannot be set here: {SET_BY_THE_RUN[name]}"
        elif name not in training_argument_names():
            near = did_you_mean(name, training_argument_names())
            yield name, f"unknown TrainingArguments name {name!r}{near}"


def model_faults(model: object) -> Iterator[Fault]:
    """Near-misses of ``from_pretrained``'s arguments; other names may be fields of the model's config."""
    if not isinstance(model, dict):
        return
    for name in model:
        close = did_you_mean(name, FROM_PRETRAINED, cutoff=0.85)
        if name not in FROM_PRETRAINED and close:
            yield ("model", name), f"unknown name {name!r}{close}"
    if model.get("use_safetensors", True) is not True:
        yield (
            ("model", "use_safetensors"),
            "weights are read from safetensors alone, since other formats can run code: leave it out; where you "
            "trust the checkpoint, convert it with transformers (from_pretrained, then save_pretrained)",
        )
    length = model.get("max_length", 1)
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
        yield ("model", "max_length"), f"expected a whole number of at least 1, got {shown(length)}"


def token_faults(tokens: object) -> Iterator[Fault]:
    seen: list[object] = []
    for index, token in enumerate(tokens if isinstance(tokens, list) else ()):
        if isinstance(token, str) and (not token.strip() or token in seen):
            yield ("add_tokens", index), f"{token!r} is {'named twice' if token.strip() else 'no token'}"
        seen.append(token)


def column_faults(values: Mapping[str, Any], known: tuple[str, ...]) -> Iterator[Fault]:
    columns = values.get("columns")
    for name in columns if isinstance(columns, dict) else ():
        if name not in known:
            yield ("columns", name), f"unknown column {name!r}{did_you_mean(name, known) or list_of(known)}"


def repeated(names: object, where: str, why: str) -> Iterator[Fault]:
    """Two names of a map that stand for the same thing."""
    first: dict[str, str] = {}
    for name, value in names.items() if isinstance(names, dict) else ():
        if isinstance(value, str) and first.setdefault(value, name) != name:
            yield (where, name), f"{value!r} is named by {first[value]!r} already; {why}"


def weight_faults(values: Mapping[str, Any]) -> Iterator[Fault]:
    weights = values.get("class_weights")
    for label, weight in weights.items() if isinstance(weights, dict) else ():
        if isinstance(weight, int | float) and weight <= 0:
            yield ("class_weights", label), f"expected a number greater than 0, got {shown(weight)}"


def smoothing_faults(values: Mapping[str, Any]) -> Iterator[Fault]:
    training, focal = values.get("training"), values.get("loss") == "focal"
    if focal and isinstance(training, dict) and training.get("label_smoothing_factor"):
        yield ("training", "label_smoothing_factor"), "cannot be combined with loss: focal; leave one out"


def classification_faults(values: Mapping[str, Any]) -> Iterator[Fault]:
    """Settings of a classification recipe that have no meaning beside each other."""
    kind, focal = values.get("problem_type"), values.get("loss") == "focal"
    for name in MEANINGLESS.get(kind, ()) if isinstance(kind, str) else ():
        if values.get(name):
            yield (name,), f"{shown(values[name])} has no meaning for {kind}; leave it out"
    if focal and kind == "regression":
        yield ("loss",), "'focal' has no meaning for regression; leave it out"
    yield from smoothing_faults(values)


def loraplus_faults(values: Mapping[str, Any]) -> Iterator[Fault]:
    ratio = values.get("loraplus_lr_ratio")
    if ratio is not None and values.get("peft_type") != "LORA":
        yield ("loraplus_lr_ratio",), "is of LoRA alone: this method has no B matrices; leave it out"
    for name in ("layerwise_lr_decay", "head_learning_rate"):
        if ratio is not None and values.get(name) is not None:
            yield (name,), "cannot be combined with loraplus_lr_ratio, which sets the rates itself"


def generation_faults(generation: object, set_by_the_run: Mapping[str, str]) -> Iterator[Fault]:
    """Names that are no ``GenerationConfig``'s, or that the run itself sets, with the reasons why."""
    for name in generation if isinstance(generation, dict) else ():
        if name in set_by_the_run:
            yield ("generation", name), f"cannot be set here: {set_by_the_run[name]}"
        elif name not in generation_names():
            near = did_you_mean(name, generation_names())
            yield ("generation", name), f"unknown GenerationConfig name {name!r}{near}"


def list_of(names: tuple[str, ...] | frozenset[str]) -> str:
    """The end of an error message about an unknown name that is near none of these."""
    return f"; known: {', '.join(sorted(names))}"
