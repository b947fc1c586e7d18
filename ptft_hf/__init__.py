"""ptft_hf: fine-tune Hugging Face checkpoints, in full or with PEFT, and prove what was saved.

The names below are imported when they are first used, so that ``import ptft_hf`` costs milliseconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ptft_hf.errors import (
        AdapterError,
        CheckpointError,
        DataError,
        ModelError,
        OutputError,
        PtftError,
        RecipeError,
        RoundTripError,
    )
    from ptft_hf.inference import TrainedModel, evaluate, load
    from ptft_hf.planning import plan
    from ptft_hf.recipes import AdapterRecipe, TaskRecipe, load_adapter, load_task
    from ptft_hf.training import train

_HOME = {
    "train": "training",
    "plan": "planning",
    "evaluate": "inference",
    "load": "inference",
    "TrainedModel": "inference",
    "load_task": "recipes",
    "load_adapter": "recipes",
    "TaskRecipe": "recipes",
    "AdapterRecipe": "recipes",
    "PtftError": "errors",
    "RecipeError": "errors",
    "DataError": "errors",
    "ModelError": "errors",
    "AdapterError": "errors",
    "CheckpointError": "errors",
    "RoundTripError": "errors",
    "OutputError": "errors",
}
__all__ = [
    "train",
    "plan",
    "evaluate",
    "load",
    "TrainedModel",
    "load_task",
    "load_adapter",
    "TaskRecipe",
    "AdapterRecipe",
    "PtftError",
    "RecipeError",
    "DataError",
    "ModelError",
    "AdapterError",
    "CheckpointError",
    "RoundTripError",
    "OutputError",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ptft_hf' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"ptft_hf.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
