"""One run, from recipes to a proven folder: :func:`train` is the story, the other modules its details."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from ptft_hf import card, checkpoints, forward, inference, models, planning, recipes, records, report
from ptft_hf.allocator import give_back_freed_memory, let_go
from ptft_hf.building import build_trainer, choose_attention, sorted_by_length
from ptft_hf.errors import ModelError, OutputError
from ptft_hf.forward import BATCH_SIZE
from ptft_hf.inference import TrainedModel
from ptft_hf.planning import showing
from ptft_hf.preparing import Plan, Ready, describe, make_plan, prepare, training_arguments

OWN_FILES = (records.SETTINGS, "run.json", "checkpoints")
PROBE_ROWS = 16
"""Rows on which the saved and the trained model are compared: the longest, which exercise most positions."""


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
        model: Hub id, ``name@revision``, or folder of the pretrained checkpoint; or ``config:`` and a model type,
            folder or hub id, whose configuration alone is taken: random weights, for language models and images.
        task: Catalogue name or YAML file of a task recipe, or the recipe itself.
        adapter: Catalogue name or YAML file of an adapter recipe, the recipe itself, any ``peft.PeftConfig``,
            or the folder of an earlier run with PEFT or bottleneck adapters (or of an adapter that AdapterHub's
            library saved), which is trained further with its head.
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
    if overwrite:
        check_sources(folder, (model, adapter))
    if finished:
        report.say(f"{folder} holds the finished run already; nothing to resume")
        trusted = bool(plan.task.model.get("trust_remote_code"))
        return inference.load(folder, trust_remote_code=trusted)
    if data is not None:  # the recipe's own is not what the run is about
        plan = plan._replace(task=plan.task.model_copy(update={"data": None}))
    ready = prepare(plan, data, seed)
    arguments = training_arguments(plan, ready, folder, seed)
    return run(plan, ready, arguments, folder, resume=resume, overwrite=overwrite)


def check_output(folder: Path, resume: bool, overwrite: bool) -> bool:
    """Whether the folder holds a finished run that is to be resumed, so that nothing is left to do.

    Raises:
        OutputError: The folder holds something else than may be written over.
    """
    if resume and overwrite:
        raise OutputError("resume and overwrite exclude each other: go on with the run, or replace it?")
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder}: a file of this name exists; choose another output folder")
    above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not above.is_dir():
        raise OutputError(f"{folder}: {above} is a file; choose another output folder")
    if not os.access(above, os.W_OK):
        raise OutputError(f"{folder}: {above} cannot be written to; choose another output folder")
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


def check_sources(folder: Path, sources: Sequence[Any]) -> None:
    """Refuse to replace a run by one that starts from it.

    Raises:
        OutputError: A source of the new run is the folder that it would replace, or in it.
    """
    for source in sources:
        path = Path(source).resolve() if isinstance(source, str | Path) else None
        if path is not None and path.exists() and path.is_relative_to(folder.resolve()):
            raise OutputError(
                f"{folder}: holds what the run starts from, {source}, which --overwrite would delete; choose another "
                "output folder"
            )


# ---- the run ----


def run(
    plan: Plan,
    ready: Ready,
    arguments: Any,
    folder: Path,
    *,
    resume: bool,
    overwrite: bool,
    evaluated: Sequence[str] = ("validation", "test"),
    callbacks: Sequence[Any] = (),
) -> TrainedModel:
    """Train, test once, save, prove, publish.

    ``evaluated`` are the splits that the final model is scored on: without test where the run is one of several
    tries, of which validation chooses; ``callbacks`` join the run's own.
    """
    from ptft_hf.trainer import Trainer

    is_main = arguments.process_index == 0
    forecast = planning.before_run(plan, ready, arguments) if is_main else None
    written = records.identity(plan, ready, arguments)
    start = records.find_start(folder, written, is_main) if resume else None
    arguments.eval_on_start = arguments.eval_on_start and start is None
    attention = choose_attention(plan, ready, arguments)
    trainer = build_trainer(Trainer, plan, ready, arguments, folder)
    for callback in callbacks:
        trainer.add_callback(callback)
    if is_main:
        describe(plan, ready, arguments, trainer, attention)
        if forecast is not None:
            showing.before_training(forecast)
        records.begin(folder, written, start, overwrite and not resume)
    trainer.accelerator.wait_for_everyone()
    with models.quiet():
        trainer.train(resume_from_checkpoint=str(start) if start else None)
    if attention is not None:
        attention.restore()
    finish(plan, ready, trainer, folder, evaluated, forecast)
    trainer.accelerator.wait_for_everyone()
    return inference.load(folder, trust_remote_code=True)  # as the recipe had it


# ---- the end ----


def finish(
    plan: Plan,
    ready: Ready,
    trainer: Any,
    folder: Path,
    evaluated: Sequence[str],
    forecast: planning.Forecast | None = None,
) -> None:
    """Evaluate in float32, all processes together; then the first one saves beside the final place, proves, and only
    then moves into it."""
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    peak, parameters = records.peak_memory_mb(), models.count_parameters(model)
    if not trainer.is_deepspeed_enabled:
        let_go(trainer.optimizer)
    model = models.in_dtype(ready.method.finish(model), torch.float32).eval()
    collate = ready.task.collator(ready.tokenizer)
    probe = probe_batch(ready, collate)
    if not checkpoints.are_finite(checkpoints.logits_on(model, probe)):
        raise ModelError("training diverged: the model's logits are not numbers; lower learning_rate")
    metrics, details = final_metrics(ready, model, evaluated)
    if not trainer.is_world_process_zero():
        return

    staging = folder / checkpoints.STAGING
    shutil.rmtree(staging, ignore_errors=True)
    with models.quiet():
        checkpoints.save_model(model, ready.tokenizer, staging)
    record = records.make_record(plan, ready, trainer, folder, metrics, details, peak, parameters)
    give_back_freed_memory()
    proof = checkpoints.prove(
        model, lambda: inference.load_weights(staging, record, None, ready.task, verify=True), probe
    )
    record["proof"] = proof
    record["forecast"] = None if forecast is None else forecast.to_dict()
    record["training"]["peak_memory_mb_with_proof"] = records.peak_memory_mb()
    record["training"]["bytes_on_disk"] = sum(p.stat().st_size for p in staging.iterdir())
    (staging / "README.md").write_text(card.model_card(record, models.adapter_kind(model)), encoding="utf-8")
    report.curves(
        folder / "metrics.jsonl",
        staging / "curves.png",
        trainer.args.metric_for_best_model or ready.task.best_metric,
    )
    (staging / "run.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    checkpoints.publish_into(staging, folder, last="run.json")
    report.after_training(record)


def probe_batch(ready: Ready, collate: Any) -> checkpoints.Probe:
    """The longest validation rows: 16, or so many that a language model's logits take no more than half a GB."""
    rows = sorted_by_length(ready.encoded["validation"])
    count = forward.fitting(ready.model, PROBE_ROWS, rows[0]["length"])
    return [collate(rows.select(range(min(count, len(rows)))).to_list())]


def final_metrics(
    ready: Ready, model: Any, evaluated: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The chosen model on training rows, if the family fixes something there; on validation, what is chosen there
    (thresholds); and then, once, on test."""

    def say(notes: Sequence[str]) -> None:
        ready.notes.extend(notes)
        for note in notes if PartialState().is_main_process else ():
            report.say(f"- {note}")

    def answers(encoded: Any) -> tuple[Any, Any]:
        outputs = forward.shared_outputs(ready.task, model, encoded, ready.tokenizer, BATCH_SIZE, progress=True)
        return outputs, ready.task.targets(encoded)

    seen = ready.task.rows_to_look_back_on(ready.encoded["train"])
    if seen is not None:
        say(ready.task.look_back(*answers(seen)))
    metrics, details = {}, {}
    for name in evaluated:
        outputs, targets = answers(ready.encoded[name])
        if name == "validation":
            say(ready.task.after_training(outputs, targets))
        metrics[name] = ready.task.metrics(outputs, targets)
        details[name] = ready.task.report(outputs, targets)
    return metrics, details
