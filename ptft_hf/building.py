"""The Trainer of a run, its batches and its attention, before the first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ptft_hf import models
from ptft_hf.errors import RecipeError
from ptft_hf.models import checkpointing
from ptft_hf.preparing import Plan, Ready
from ptft_hf.rounding import RoundedLengths


def build_trainer(kind: Any, plan: Plan, ready: Ready, arguments: Any, folder: Path) -> Any:
    """The Trainer with its callbacks.

    Raises:
        RecipeError: A setting would silently do nothing.
    """
    import transformers

    from ptft_hf.callbacks import GradualUnfreezing, MetricsLog, Progress, SelectiveCheckpointing

    if checkpointing.is_on(arguments):
        # Only the newest transformers do so themselves.
        # A frozen embedding gives inputs without gradients, and then no layer below the first one gets any.
        ready.model.enable_input_require_grads()
    callbacks: list[Any] = [Progress(ready.task.best_metric), MetricsLog(folder / "metrics.jsonl")]
    callbacks += ready.method.callbacks(ready.model)
    if "selective" in checkpointing.options(arguments):
        callbacks.append(SelectiveCheckpointing())
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
            method=ready.method,
            head=ready.head,
            model=ready.model,
            args=arguments,
            train_dataset=ready.encoded["train"],
            eval_dataset=sorted_by_length(ready.task.between_epochs(ready.encoded["validation"])),
            data_collator=training_collator(ready, arguments),
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


def training_collator(ready: Ready, arguments: Any) -> Any:
    """The family's; on a CPU with batches of few lengths."""
    collate = ready.task.collator(ready.tokenizer)
    if arguments.device.type != "cpu" or ready.task.reads != "text":
        return collate
    return RoundedLengths(collate, ready.tokenizer, max(ready.encoded["train"]["length"][:]))


def sorted_by_length(encoded: Any) -> Any:
    """Longest first: batches of like length, and memory runs out at once or never."""
    lengths = encoded["length"][:]
    return encoded.select(sorted(range(len(lengths)), key=lambda i: -lengths[i]))


def choose_attention(plan: Plan, ready: Ready, arguments: Any) -> models.AttentionByLength | None:
    """By length on a CPU, unless the user chose one for all."""
    if arguments.device.type != "cpu" or arguments.torch_compile or "attn_implementation" in ready.facts["options"]:
        return None
    drops = plan.adapter.trains_weights or plan.adapter.trunk_dropout
    return models.AttentionByLength(ready.model, ready.encoded["train"]["length"][:], drops=drops)
