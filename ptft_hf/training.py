"""One run, from recipes to a proven folder: :func:`train` is the story, the other modules its details."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import resource
import shutil
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ptft_hf import adapters, checkpoints, data, inference, models, recipes, report, settings, tasks
from ptft_hf.errors import DataError, ModelError, OutputError, RecipeError
from ptft_hf.inference import TrainedModel

SETTINGS = "settings.json"
OWN_FILES = (SETTINGS, "run.json", "checkpoints")
PROBE_ROWS = 16
"""Rows on which the saved and the trained model are compared: the longest, which exercise most positions."""


class Plan(NamedTuple):
    """What a run was asked to do, checked before any data or weights are read."""

    model: str
    task: recipes.TaskRecipe
    adapter: recipes.AdapterRecipe
    config: Any
    given: dict[str, Any]


class Ready(NamedTuple):
    """Everything a run needs, loaded and checked, before anything is written."""

    task: tasks.Task
    splits: data.Splits
    encoded: dict[str, Any]
    model: Any
    tokenizer: Any
    head: tuple[str, ...]
    facts: dict[str, Any]
    notes: list[str]


def train(
    *,
    model: str,
    task: str | Path | recipes.TaskRecipe,
    adapter: Any,
    output_dir: str | Path,
    data: Any = None,
    seed: int = 42,
    settings: Mapping[str, Any] | Sequence[str] = (),
    resume: bool = False,
    overwrite: bool = False,
) -> TrainedModel:
    """Fine-tune a checkpoint, choose the best step on validation, test once, save, and prove the save.

    Args:
        model: Hub id, ``name@revision``, or folder of the pretrained checkpoint.
        task: Catalogue name or YAML file of a task recipe, or the recipe itself.
        adapter: Catalogue name or YAML file of an adapter recipe, the recipe itself, any ``peft.PeftConfig``,
            or the folder of an earlier PEFT run, whose adapter and head are trained further.
        output_dir: The folder that becomes the final model.
        data: Used instead of the recipe's ``data``: a ``DatasetDict``, a file, a folder or a hub id.
        seed: Of the head's initial weights, the order of rows, dropout, and any split that is made.
        settings: ``key=value`` strings as after ``--set``, or a mapping: ``TrainingArguments`` names, and
            ``task.*``, ``adapter.*``, ``model.*`` for recipe fields.
        resume: Go on from the newest intact checkpoint in ``output_dir``.
        overwrite: Replace a run that is in ``output_dir``.

    Returns:
        The model as it was loaded back from ``output_dir``: provably the one that was trained.

    Raises:
        PtftError: A subclass says what is wrong; before training starts, nothing has been written.
    """
    plan = make_plan(model, task, adapter, settings)
    folder = Path(output_dir)
    finished = check_output(folder, resume, overwrite)
    if finished:
        report.say(f"{folder} holds the finished run already; nothing to resume")
        return inference.load(folder)
    ready = prepare(plan, data, seed)
    arguments = training_arguments(plan, ready, folder, seed)
    return run(plan, ready, arguments, folder, resume=resume, overwrite=overwrite)


# ---- what was asked ----


def make_plan(model: str, task: Any, adapter: Any, given: Mapping[str, Any] | Sequence[str]) -> Plan:
    """Recipes with all overrides laid over them.

    Raises:
        RecipeError: Every fault of task, adapter and settings.
    """
    pairs = [f"{k}={json.dumps(v)}" for k, v in given.items()] if isinstance(given, Mapping) else list(given)
    config, earlier = None, None
    if isinstance(adapter, str | Path) and (Path(adapter) / "adapter_config.json").is_file():
        earlier = Path(adapter)
        adapter = recipes.adapter_from_dict(checkpoints.read_json(earlier / "run.json")["adapter"])
    elif not isinstance(adapter, str | Path | recipes.AdapterRecipe):
        config, adapter = adapter, adapters.recipe_of_config(adapter)
    the_task, the_adapter, overrides = recipes.load_run(task, adapter, pairs)
    return Plan(
        str(model),
        the_task,
        the_adapter,
        earlier or config,
        recipes.resolve_training({}, the_task.training, the_adapter.training, overrides.training),
    )


def check_output(folder: Path, resume: bool, overwrite: bool) -> bool:
    """Whether the folder holds a finished run that is to be resumed, so that nothing is left to do.

    Raises:
        OutputError: The folder holds something else than may be written over.
    """
    if resume and overwrite:
        raise OutputError("resume and overwrite exclude each other: go on with the run, or replace it?")
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: a file of this name exists; choose another output folder")
    names = sorted(p.name for p in folder.iterdir()) if folder.exists() else []
    if not names:
        return False
    if not any(name in names for name in OWN_FILES):
        raise OutputError(
            f"{folder}: holds other files ({', '.join(names[:5])}); choose an empty or a new folder"
        )
    if not resume and not overwrite:
        raise OutputError(
            f"{folder}: holds another run; resume it (--resume), replace it (--overwrite), or choose "
            "another folder"
        )
    return resume and "run.json" in names


# ---- what is needed ----


def prepare(plan: Plan, source: Any, seed: int) -> Ready:
    """Data, model and method, in this order, each checked before the next is loaded. Writes nothing."""
    import transformers

    recipe = plan.task
    settings.check_recipe_types(plan.given, plan.adapter)
    source = recipe.data if source is None else source
    if source is None:
        raise DataError(f"{recipe.name}: names no data; add data: to the recipe, or pass data in Python")
    task = tasks.build(recipe)
    splits = data.load_splits(
        source,
        columns=recipe.columns,
        required=task.required,
        optional=task.optional,
        seed=seed,
        label_column=task.label_column,
    )
    splits = data.check_leakage(splits, task.text_columns, task.label_column, recipe.leakage)
    notes = [*splits.notes, *task.look_at(splits)]

    transformers.set_seed(seed)
    options = {name: value for name, value in recipe.model.items() if name != "max_length"}
    loaded = models.load_model(plan.model, task.auto_class, config=task.config(), **options)
    tokenizer = models.load_tokenizer(plan.model, **options)
    notes += [note for note in (models.ensure_padding(loaded.model, tokenizer),) if note]
    max_length = models.longest_input(loaded.model, tokenizer, recipe.model.get("max_length"))
    method = adapters.build(plan.adapter, plan.config)
    source_id, revision = models.split_revision(recipes.locate(plan.model))
    facts = {
        "reference": plan.model,
        "source": source_id,
        "auto_class": task.auto_class,
        "max_length": max_length,
        "dtype": str(models.as_dtype(options.get("dtype", "float32"))).removeprefix("torch."),
        "options": {
            **({"revision": revision} if revision else {}),
            **{k: v if isinstance(v, (bool, int, float)) else str(v) for k, v in options.items()},
        },
        "fingerprint": loaded.fingerprint,
        "new_parameters": sorted(loaded.new),
        "head": list(loaded.head),
    }
    attached = method.attach(loaded.model, loaded.head, task.peft_task_type)

    encoded = {}
    for name in ("train", "validation", "test"):
        encoded[name], cut = task.encode(getattr(splits, name), tokenizer, max_length)
        if cut:
            notes.append(
                f"{name}: {cut:,} of {len(encoded[name]):,} inputs are longer than {max_length} tokens "
                "and were truncated (model.max_length)"
            )
    return Ready(task, splits, encoded, attached, tokenizer, loaded.head, facts, notes)


def training_arguments(plan: Plan, ready: Ready, folder: Path, seed: int) -> Any:
    """Upstream's ``TrainingArguments`` from recipes, command line and defaults."""
    method = adapters.build(plan.adapter, plan.config)
    chosen = settings.complete(plan.given, method.learning_rate, ready.task.best_metric)
    if ready.facts["dtype"] in ("bfloat16", "float16") and not (chosen.get("bf16") or chosen.get("fp16")):
        raise RecipeError(
            f"model.dtype: a {ready.facts['dtype']} base under a float32 head needs autocast: set "
            "bf16=true, or load the base in float32"
        )
    if plan.adapter.gradual_unfreezing and chosen["num_train_epochs"] < 2:
        raise RecipeError("gradual_unfreezing: needs at least 2 epochs, to have something to unfreeze")
    arguments = settings.training_arguments(chosen, folder / "checkpoints", seed)
    if plan.adapter.gradual_unfreezing and arguments.world_size > 1:
        raise RecipeError(
            "gradual_unfreezing: DistributedDataParallel cannot change what is trained; use one process"
        )
    return arguments


# ---- the run ----


def run(
    plan: Plan, ready: Ready, arguments: Any, folder: Path, *, resume: bool, overwrite: bool
) -> TrainedModel:
    """Train, test once, save, prove, publish."""
    from ptft_hf.trainer import Trainer

    is_main = arguments.process_index == 0
    written = identity(plan, ready, arguments)
    start = find_start(folder, written, is_main) if resume else None
    attention = choose_attention(ready)
    trainer = build_trainer(Trainer, plan, ready, arguments, folder)
    if is_main:
        describe(plan, ready, arguments, trainer)
        begin(folder, written, overwrite and not resume)
    trainer.accelerator.wait_for_everyone()
    with models.quiet():
        trainer.train(resume_from_checkpoint=str(start) if start else None)
    if is_main:
        finish(plan, ready, trainer, folder, attention)
    trainer.accelerator.wait_for_everyone()
    return inference.load(folder)


def build_trainer(kind: Any, plan: Plan, ready: Ready, arguments: Any, folder: Path) -> Any:
    """The Trainer with its callbacks.

    Raises:
        RecipeError: A setting would silently do nothing.
    """
    import transformers

    from ptft_hf.trainer import GradualUnfreezing, MetricsLog, Progress

    if arguments.activation_checkpointing:
        # A frozen embedding gives inputs without gradients, and then no layer below the first one gets any.
        ready.model.enable_input_require_grads()
    callbacks: list[Any] = [Progress(ready.task.best_metric), MetricsLog(folder / "metrics.jsonl")]
    if plan.task.early_stopping_patience is not None:
        if not arguments.load_best_model_at_end:
            raise RecipeError("early_stopping_patience: needs evaluation and saving (load_best_model_at_end)")
        callbacks.append(transformers.EarlyStoppingCallback(plan.task.early_stopping_patience))
    if plan.adapter.gradual_unfreezing:
        trained = {name for name, p in ready.model.named_parameters() if p.requires_grad}
        callbacks.append(
            GradualUnfreezing(
                models.depths(ready.model, ready.head), trained, int(arguments.num_train_epochs)
            )
        )
    with models.quiet():
        trainer = kind(
            task=ready.task,
            recipe=plan.adapter,
            head=ready.head,
            model=ready.model,
            args=arguments,
            train_dataset=ready.encoded["train"],
            eval_dataset=sorted_by_length(ready.encoded["validation"]),
            data_collator=ready.task.collator(ready.tokenizer),
            processing_class=ready.tokenizer,
            callbacks=callbacks,
        )
    trainer.remove_callback(transformers.PrinterCallback)
    if arguments.fsdp and not trainer.is_fsdp_enabled:
        raise RecipeError(
            "training.fsdp: would silently do nothing here (it needs accelerators and several "
            "processes); leave it out"
        )
    return trainer


def sorted_by_length(encoded: Any) -> Any:
    """Longest first: batches of like length, and memory runs out at once or never."""
    return encoded.select(sorted(range(len(encoded)), key=lambda i: -encoded["length"][i]))


def choose_attention(ready: Ready) -> str:
    """On a CPU eager attention is the faster one for short inputs (measured up to 128 tokens); elsewhere, and
    where the user chose, nothing changes. Returns the implementation to be restored after training."""
    chosen = str(ready.model.config._attn_implementation)
    lengths = sorted(ready.encoded["train"]["length"])
    short = lengths[int(0.95 * (len(lengths) - 1))] <= 128
    on_cpu = not torch.cuda.is_available()
    if chosen == "sdpa" and short and on_cpu and "attn_implementation" not in ready.facts["options"]:
        plain_model(ready.model).set_attn_implementation("eager")
    return chosen


def plain_model(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "peft_config") else model


def describe(plan: Plan, ready: Ready, arguments: Any, trainer: Any) -> None:
    """Said before the first step: rows, labels, trained parameters by module, the longest batch, examples."""
    trainable, total = models.count_parameters(ready.model)
    groups: Counter[str] = Counter()
    for name, parameter in ready.model.named_parameters():
        if parameter.requires_grad:
            groups[module_kind(name)] += parameter.numel()
    batch = arguments.train_batch_size * arguments.world_size * arguments.gradient_accumulation_steps
    longest = max(ready.encoded["train"]["length"])
    steps = len(trainer.get_train_dataloader()) // arguments.gradient_accumulation_steps
    precision = (
        "bf16 autocast" if arguments.bf16 else "fp16 autocast" if arguments.fp16 else ready.facts["dtype"]
    )
    report.before_training(
        ready.notes,
        {
            "model": f"{plan.model} ({type(plain_model(ready.model)).__name__})",
            "method": f"{plan.adapter.name}: {trainable:,} of {total:,} parameters ({trainable / total:.2%})",
            "rows": ", ".join(f"{name} {len(rows):,}" for name, rows in ready.encoded.items()),
            "batch": f"{batch} rows, the longest {min(batch, len(ready.encoded['train']))} x {longest} tokens",
            "steps": f"{steps * arguments.num_train_epochs:.0f} in {arguments.num_train_epochs:g} epochs, "
            f"learning rate {arguments.learning_rate:g}, {precision}, "
            f"{plain_model(ready.model).config._attn_implementation} attention",
        },
        dict(groups.most_common(12)),
        examples(ready, 3),
    )


def module_kind(name: str) -> str:
    """A parameter's module without layer numbers, so that the layers are summed."""
    parts = name.removeprefix("base_model.model.").split(".")[:-1]
    kept = [
        p for p in parts if not p.isdigit() and p not in ("default", "modules_to_save", "original_module")
    ]
    return ".".join(kept[-3:])


def examples(ready: Ready, count: int) -> list[str]:
    """The first training rows as the model sees them: decoded tokens and label."""
    shown = []
    for row, encoded in zip(
        ready.splits.train.select(range(min(count, len(ready.splits.train)))),
        ready.encoded["train"],
        strict=False,
    ):
        text = " ".join(ready.tokenizer.decode(encoded["input_ids"]).split())
        shown.append(f"{row[ready.task.label_column]!r} <- {text[:160]}{' ...' if len(text) > 160 else ''}")
    return shown


# ---- beginning and resuming ----


def identity(plan: Plan, ready: Ready, arguments: Any) -> dict[str, Any]:
    """What a resumed run must have in common with the run that was stopped."""
    changing = {"output_dir", "logging_dir", "run_name"}
    resolved = {k: v for k, v in json.loads(arguments.to_json_string()).items() if k not in changing}
    return {
        "model": ready.facts,
        "task": plan.task.model_dump(mode="json"),
        "adapter": plan.adapter.model_dump(mode="json"),
        "training": resolved,
        "seed": arguments.seed,
        "processes": arguments.world_size,
        "data": {
            name: data.fingerprint(getattr(ready.splits, name)) for name in ("train", "validation", "test")
        },
    }


def find_start(folder: Path, now: Mapping[str, Any], is_main: bool) -> Path | None:
    """The checkpoint to go on from.

    Raises:
        OutputError: The stopped run had other settings, data or weights.
    """
    if not (folder / SETTINGS).is_file():
        report.say(f"{folder} has no run to resume: starting from the beginning")
        return None
    before = checkpoints.read_json(folder / SETTINGS)
    changes = [
        f"{path}: {old!r} when the run began, {new!r} now"
        for path, old, new in differences(before, json.loads(json.dumps(now)))
    ]
    if changes:
        raise OutputError(
            *(f"{folder} cannot be resumed with other settings: {change}" for change in changes[:20])
        )
    start, skipped = checkpoints.newest_intact(folder / "checkpoints")
    if is_main:
        for line in skipped:
            report.say(line, style="yellow")
        report.say(
            f"resuming from {start.name}"
            if start
            else f"{folder} has no intact checkpoint: starting from the beginning"
        )
    return start


def differences(before: Any, now: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """Leaves in which two JSON values differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            d
            for key in sorted(before.keys() | now.keys())
            for d in differences(before.get(key), now.get(key), f"{path}.{key}" if path else key)
        ]
    return [] if before == now else [(path, before, now)]


def begin(folder: Path, written: Mapping[str, Any], replace: bool) -> None:
    """Make the output folder, or clear it of the run that is to be replaced."""
    if replace and folder.exists():
        checkpoints.remove(folder)
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    checkpoints.discard_unfinished(folder / "checkpoints")
    checkpoints.discard_unfinished(folder)
    checkpoints.write_text(folder / SETTINGS, json.dumps(written, indent=1))


# ---- the end ----


def finish(plan: Plan, ready: Ready, trainer: Any, folder: Path, attention: str) -> None:
    """Evaluate in float32, save beside the final place, prove, and only then move into it."""
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    plain_model(model).set_attn_implementation(attention)
    peak = peak_memory_mb()
    model.float().eval()
    collate = ready.task.collator(ready.tokenizer)
    probe = probe_batch(ready, collate)
    checked = checkpoints.logits_on(model, probe)
    if not all(torch.isfinite(batch).all() for batch in checked):
        raise ModelError("training diverged: the model's logits are not numbers; lower learning_rate")
    metrics, details = final_metrics(ready, model, collate)

    staging = folder / checkpoints.STAGING
    shutil.rmtree(staging, ignore_errors=True)
    checkpoints.save_model(model, ready.tokenizer, staging)
    record = make_record(plan, ready, trainer, folder, metrics, details, peak)
    proof = checkpoints.prove(
        model, lambda: inference.load_weights(staging, record, None, ready.task, verify=True).float(), probe
    )
    record["proof"] = proof
    record["training"]["bytes_on_disk"] = sum(p.stat().st_size for p in staging.iterdir())
    (staging / "README.md").write_text(
        report.model_card(record, hasattr(model, "peft_config")), encoding="utf-8"
    )
    report.curves(
        folder / "metrics.jsonl",
        staging / "curves.png",
        trainer.args.metric_for_best_model or ready.task.best_metric,
    )
    (staging / "run.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    checkpoints.publish_into(staging, folder, last="run.json")
    report.after_training(record)


def probe_batch(ready: Ready, collate: Any) -> checkpoints.Probe:
    longest = sorted_by_length(ready.encoded["validation"]).select(
        range(min(PROBE_ROWS, len(ready.encoded["validation"])))
    )
    return [collate(longest.to_list())]


def final_metrics(ready: Ready, model: Any, collate: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The chosen model on validation, what is chosen there (thresholds), and then, once, on test."""
    import numpy as np

    metrics, details = {}, {}
    for name in ("validation", "test"):
        encoded = ready.encoded[name]
        logits = inference.logits_of(model, encoded, collate, inference.BATCH_SIZE, progress=True)
        labels = np.array(encoded["labels"])
        if name == "validation":
            for note in ready.task.after_training(logits, labels):
                ready.notes.append(note)
                report.say(f"- {note}")
        metrics[name] = ready.task.metrics(logits, labels)
        details[name] = ready.task.report(logits, labels)
    return metrics, details


def make_record(
    plan: Plan,
    ready: Ready,
    trainer: Any,
    folder: Path,
    metrics: Mapping[str, Any],
    details: Mapping[str, Any],
    peak: float,
) -> dict[str, Any]:
    """The content of ``run.json``."""
    trainable, total = models.count_parameters(ready.model)
    state = trainer.state
    written = checkpoints.read_json(folder / SETTINGS)
    text_columns = [c for c in ready.task.text_columns if c in ready.splits.train.column_names]
    return {
        "ptft_hf": importlib.metadata.version("ptft-hf"),
        "output_dir": str(folder),
        "model": written["model"],
        "task": written["task"],
        "adapter": written["adapter"],
        "seed": written["seed"],
        "settings": written["training"],
        "labels": list(getattr(ready.task, "labels", [])),
        "task_state": ready.task.state(),
        "data": {
            "columns": text_columns,
            **{
                name: {"rows": len(getattr(ready.splits, name)), "fingerprint": written["data"][name]}
                for name in ("train", "validation", "test")
            },
        },
        "parameters": {"trainable": trainable, "total": total},
        "training": {
            **training_figures(trainer),
            "best_step": state.best_global_step or state.global_step,
            "steps": state.global_step,
            "peak_memory_mb": peak,
        },
        "metrics": dict(metrics),
        "report": dict(details),
        "notes": ready.notes,
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "numpy")
        },
        "hardware": {
            "machine": platform.machine(),
            "system": platform.platform(),
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
            "processes": written["processes"],
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        },
    }


def training_figures(trainer: Any) -> dict[str, float]:
    """Seconds from the first batch to the end of the last step, evaluation and saving left out; of a resumed
    run, of the part after the resume."""
    seconds = trainer.clock.seconds()
    rows = trainer.clock.steps * trainer.get_total_train_batch_size(trainer.args)
    rows = min(rows, round(len(trainer.train_dataset) * trainer.args.num_train_epochs)) if rows else 0
    return {"seconds": seconds, "rows_per_second": rows / seconds if seconds else 0.0}


def peak_memory_mb() -> float:
    """Most memory this process has held so far: on the device if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
