"""What is being trained, whole: in checkpoints beside what a method saves for use, to resume from and to go back to.

PEFT saves p-tuning without its network and AdaLoRA with its ranks cut, so that neither can be trained further from
there, and upstream's Trainer loads no adapters but PEFT's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ptft_hf.errors import CheckpointError

STATE = "trained.safetensors"
AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")


def save_state(model: Any, names: frozenset[str], folder: Path) -> None:
    """Write the trained parameters as they are, and AdaLoRA's running averages and ranks.

    Args:
        model: A model with an adapter.
        names: Of its parameters that are trained.
        folder: A checkpoint.
    """
    state = {name: p.detach() for name, p in model.named_parameters() if name in names}
    kept, allocator = None, _rank_allocator(model)
    if allocator is not None:
        for kind in AVERAGES:
            state |= {f"{kind}:{name}": value for name, value in getattr(allocator, kind).items()}
        kept = {"rank_pattern": json.dumps(model.peft_config["default"].rank_pattern)}
    save_file({name: value.cpu().contiguous().clone() for name, value in state.items()}, folder / STATE, kept)


def load_state(model: Any, folder: Path) -> None:
    """The inverse of :func:`save_state`, in place.

    Raises:
        CheckpointError: The checkpoint is of another model.
    """
    state, parameters = load_file(folder / STATE), dict(model.named_parameters())
    averages = {name: state.pop(name) for name in [name for name in state if ":" in name]}
    wrong = [n for n, v in state.items() if n not in parameters or parameters[n].shape != v.shape]
    if wrong:
        raise CheckpointError(
            f"{folder / STATE}: not the weights of this model; not in it, or of another shape, are {wrong[:10]}"
        )
    with torch.no_grad():
        for name, value in state.items():
            parameters[name].copy_(value)
    allocator = _rank_allocator(model)
    if allocator is None:
        return
    for kind in AVERAGES:
        start = f"{kind}:"
        values = {n.removeprefix(start): v for n, v in averages.items() if n.startswith(start)}
        setattr(allocator, kind, {n: v.to(model.device) for n, v in values.items()})
    with safe_open(folder / STATE, "pt") as file:
        model.peft_config["default"].rank_pattern = json.loads((file.metadata() or {})["rank_pattern"])


def _rank_allocator(model: Any) -> Any:
    return getattr(model.base_model, "rankallocator", None)
