"""From recipes and flags to ``TrainingArguments``: defaults, types, and what would silently do nothing."""

from __future__ import annotations

import re
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError

from ptft_hf.errors import RecipeError
from ptft_hf.models import checkpointing
from ptft_hf.recipes import PeftRecipe

LOWER_IS_BETTER = ("loss", "perplexity", "mse", "mae", "rmse")
"""Metrics that are errors."""

# Reasons: three epochs are the middle of what BERT's authors searched (Devlin et al. 2019, A.3), warm-up over the
# first 6 % is RoBERTa's (Liu et al. 2019, table 10);
# batches of rows of like length waste no work on padding; evaluation is no faster in larger batches (measured on a
# CPU); the best epoch on validation is kept.
DEFAULTS: dict[str, Any] = {
    "num_train_epochs": 3.0,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 32,
    "warmup_steps": 0.06,
    "weight_decay": 0.01,
    "train_sampling_strategy": "group_by_length",
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 1,
    "load_best_model_at_end": True,
    "logging_steps": 0.02,
    "report_to": "none",
}
POSITIVE = (
    "learning_rate",
    "num_train_epochs",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
)
REFUSED = {
    "output_dir": "use --output",
    "seed": "use --seed",
    "data_seed": "use --seed",
    "resume_from_checkpoint": "use --resume",
    "push_to_hub": "use `ptft push` when the run is done",
    "do_train": "it does nothing here",
    "do_eval": "use eval_strategy",
    "do_predict": "it does nothing here",
    "remove_unused_columns": "only the columns a model takes are passed on here",
    "label_names": "the task family knows them",
    "auto_find_batch_size": "it would change the run's batch size",
    "save_only_model": "such a checkpoint cannot be resumed",
    "length_column_name": "it is `length` here",
    "include_for_metrics": "it does nothing here",
    "batch_eval_metrics": "it does nothing here",
    "eval_accumulation_steps": "each batch's logits leave the device at once here",
    "eval_do_concat_batches": "it does nothing here",
    "eval_use_gather_object": "it does nothing here",
    "prediction_loss_only": "metrics are always computed here",
    "bf16_full_eval": "evaluation has training's precision, and float32 at the end",
    "fp16_full_eval": "evaluation has training's precision, and float32 at the end",
    "average_tokens_across_devices": "losses are always averaged over all devices here",
    "disable_tqdm": "the progress bar is our own; redirect stderr to be rid of it",
}


def bf16_is_faster() -> bool:
    """Whether this machine has bfloat16 matrix instructions (AVX512-BF16 or AMX; any recent CUDA device)."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in checks)


def complete(given: Mapping[str, Any], learning_rate: float, best_metric: str) -> dict[str, Any]:
    """Fill in the defaults that depend on other settings, on the method and on the machine.

    Args:
        given: What recipes and command line say, already merged.
        learning_rate: The method's own.
        best_metric: The task family's own.
    """
    settings = {**DEFAULTS, "learning_rate": learning_rate, **given}
    # Evaluating and saving go together, so that the best checkpoint exists.
    for one, other in (("eval", "save"), ("save", "eval")):
        for suffix in ("strategy", "steps"):
            if f"{one}_{suffix}" in given and f"{other}_{suffix}" not in given:
                settings[f"{other}_{suffix}"] = given[f"{one}_{suffix}"]
                if suffix == "steps" and f"{other}_strategy" not in given:
                    settings[f"{one}_strategy"] = settings[f"{other}_strategy"] = "steps"
    if (
        "no" in (settings["eval_strategy"], settings["save_strategy"])
        and "load_best_model_at_end" not in given
    ):
        settings["load_best_model_at_end"] = False
    if settings["load_best_model_at_end"]:
        metric = settings.setdefault("metric_for_best_model", best_metric)
        lower = str(metric).removeprefix("eval_") in LOWER_IS_BETTER
        settings.setdefault("greater_is_better", not lower)
    if "bf16" not in given and not given.get("fp16"):
        settings["bf16"] = bf16_is_faster()
    if not torch.cuda.is_available():
        settings.setdefault("use_cpu", not torch.backends.mps.is_available())
        settings.setdefault("dataloader_pin_memory", False)
    return settings


def training_arguments(settings: Mapping[str, Any], output_dir: Path, seed: int) -> Any:
    """``transformers.TrainingArguments``, after every value's type has been checked.

    Raises:
        RecipeError: Wrong types, values out of range, or settings that upstream refuses; all at once.
    """
    import transformers

    checked, problems = check_types(transformers.TrainingArguments, settings, "training")
    problems += [
        f"training.{name}: {settings[name]!r} has no effect here: {why}"
        for name, why in REFUSED.items()
        if name in settings
    ]
    problems += [
        f"training.{name}: {checked[name]!r} must be above 0"
        for name in POSITIVE
        if name in checked and not checked[name] > 0
    ]
    if (
        checked.get("load_best_model_at_end")
        and checked.get("eval_strategy") == "steps"
        and (checked.get("eval_steps") != checked.get("save_steps"))
    ):
        problems.append(
            "training.save_steps: must equal eval_steps when load_best_model_at_end is on, or the "
            f"best step may not be saved; they are {checked.get('save_steps')} and "
            f"{checked.get('eval_steps')}"
        )
    if problems:
        raise RecipeError(*problems)
    try:
        arguments = transformers.TrainingArguments(
            output_dir=str(output_dir),
            seed=seed,
            remove_unused_columns=False,
            label_names=["labels"],
            disable_tqdm=True,
            **checked,
        )
    except (ValueError, TypeError, ImportError) as error:
        wrong = [
            f"{name}={value!r}" for name, value in checked.items() if _refusal(name, value) == str(error)
        ]
        raise RecipeError(
            f"training: TrainingArguments refuses {', '.join(wrong) or 'these settings'}: {error}"
        ) from error
    if faults := checkpointing.faults(arguments):
        raise RecipeError(*faults)
    arguments._n_gpu = min(1, arguments.n_gpu)  # several devices: torchrun, not DataParallel
    return arguments


def _refusal(name: str, value: Any) -> str | None:
    """What ``TrainingArguments`` says to this setting alone."""
    import transformers

    try:
        transformers.TrainingArguments(**{name: value})
    except (ValueError, TypeError, ImportError) as error:
        return str(error)
    return None


def check_types(kind: type, values: Mapping[str, Any], where: str) -> tuple[dict[str, Any], list[str]]:
    """Values as the annotations of a dataclass want them (``3`` as ``3.0``), and what does not fit."""
    hints = typing.get_type_hints(kind)
    if "fsdp" in hints:  # True is what upstream's help recommends; its annotation lacks it
        hints["fsdp"] = bool | hints["fsdp"]
    checked, problems = {}, []
    for name, value in values.items():
        if name not in hints:
            problems.append(f"{where}.{name}: {kind.__name__} has no such name")
            continue
        try:
            config = ConfigDict(arbitrary_types_allowed=True)
            checked[name] = TypeAdapter(hints[name], config=config).validate_python(value)
        except ValidationError as error:
            message = error.errors()[0]["msg"].lower().removeprefix("input should be ")
            problems.append(f"{where}.{name}: {value!r} is not right: it should be {message}")
        except Exception:  # an annotation pydantic cannot check is upstream's to check
            checked[name] = value
    return checked, problems


def check_recipe_types(training: Mapping[str, Any], adapter: Any) -> None:
    """Types of ``TrainingArguments`` and of a PEFT recipe's fields, before any data is touched.

    Raises:
        RecipeError: Every value that does not fit.
    """
    import transformers

    _, problems = check_types(transformers.TrainingArguments, training, "training")
    if isinstance(adapter, PeftRecipe) and adapter.config:
        import peft

        kind = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(adapter.peft_type)]
        checked = {name: value for name, value in adapter.config.items() if not _is_pissa(name, value)}
        problems += check_types(kind, checked, f"{adapter.name}")[1]
    if problems:
        raise RecipeError(*problems)


def _is_pissa(name: str, value: Any) -> bool:
    """``pissa_niter_16``: PiSSA by so many iterations of a fast SVD, which upstream's annotation lacks."""
    return name == "init_lora_weights" and bool(re.fullmatch(r"pissa_niter_[1-9]\d*", str(value)))
