"""Gradient checkpointing that keeps what would be dear to compute again."""

from __future__ import annotations

import functools
from typing import Any

import torch

NAMES = ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")
"""Of ``TrainingArguments``, in which ``selective`` may stand; the newest first."""
PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


def options(arguments: Any) -> dict[str, Any]:
    """The keyword arguments of gradient checkpointing in some ``TrainingArguments``."""
    return dict(next((given for name in NAMES if (given := getattr(arguments, name, None))), {}))


def is_on(arguments: Any) -> bool:
    return bool(getattr(arguments, "activation_checkpointing", False) or arguments.gradient_checkpointing)


def faults(arguments: Any) -> list[str]:
    """What is wrong with ``selective``, TRL's name for it, among the options."""
    given = options(arguments)
    if not given.get("selective"):
        return []
    found = [] if is_on(arguments) else ["has no effect without activation_checkpointing: true"]
    if given.get("use_reentrant"):
        found.append("needs use_reentrant: false, by which torch knows what is kept")
    return [f"training.{NAMES[0]}: selective {fault}" for fault in found]


def enable(model: Any, arguments: Any) -> None:
    """What upstream's Trainer does as it begins, and :func:`select`."""
    given = options(arguments)
    layers = {name: given.pop(name) for name in ("every_n_layers", "offload") if name in given}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=given or None, **layers)
    select(model)


def select(model: Any) -> None:
    """Let the layers of a model for which ``selective`` was given when its checkpointing was enabled keep, beside
    their inputs, what takes most operations for its size: outputs of attention, and of products whose inner dimension
    is at least twice their width, as the second of a feed-forward block. Gradients are the same, bit for bit. It
    may pay in long rows, to be measured: SmolLM2 with rows of 512 tokens on two threads had 1.03 times the tokens a
    second of plain checkpointing in one run and 0.92 in another, and 1.2 times its memory
    (``benchmarks/speed/instruction.py``).

    By torch's ``create_selective_checkpoint_contexts``. What an operation below torch's dispatcher computes is
    computed again.
    """
    from torch.utils.checkpoint import create_selective_checkpoint_contexts

    contexts = functools.partial(create_selective_checkpoint_contexts, _policy)
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if not isinstance(function, functools.partial) or "selective" not in function.keywords:
            continue
        given = {"use_reentrant": False, **function.keywords}
        if given.pop("selective"):
            given["context_fn"] = contexts
        module._gradient_checkpointing_func = functools.partial(function.func, *function.args, **given)


def _policy(context: Any, operation: Any, *inputs: Any, **_: Any) -> Any:
    from torch.utils.checkpoint import CheckpointPolicy

    keeps = "attention" in (name := operation.name()) or "attn" in name
    if operation in PRODUCTS:
        inner, width = inputs[-1].shape
        keeps = inner >= 2 * width
    return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE
