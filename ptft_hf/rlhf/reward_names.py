"""How a reward is written: ``[WEIGHT*]SOURCE[#LABEL]``.

``SOURCE`` is a folder or checkpoint of a sequence classifier, the folder of a run of the family ``preference``, or
``package.module:function``; ``LABEL`` says which label's probability counts, where there are several. Over a
classifier's ``LABEL`` stands ``logit`` where its logit is to count instead: ``runs/sentiment#pos:logit``; and
``answer`` where it is to read the answer alone, not behind its prompt: ``runs/sentiment#pos:answer``, or both. What a
prompt says no policy can change, and a classifier that reads it, too, scores short answers as much by their prompts.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ptft_hf.errors import RecipeError
from ptft_hf.recipes.models import IMPORT_PATH

Function = Callable[[list[str], list[str]], Sequence[float]]
OPTIONS = ("logit", "answer")


class Spec(NamedTuple):
    """A reward as it is written, taken apart."""

    source: str
    label: str | None
    weight: float = 1.0
    logit: bool = False
    answer: bool = False

    @property
    def end(self) -> str:
        """What stands behind the source: empty, or label and options."""
        end = (self.label or "") + "".join(f":{name}" for name in OPTIONS if getattr(self, name))
        return f"#{end}" if end else ""


def parse(text: str) -> Spec:
    """Take ``[WEIGHT*]SOURCE[#LABEL[:logit][:answer]]`` apart.

    Raises:
        RecipeError: The weight is no number, nothing is left, or an option is unknown.
    """
    weight, rest = 1.0, text.strip()
    if "*" in rest:
        before, _, rest = rest.partition("*")
        try:
            weight = float(before)
        except ValueError as error:
            raise RecipeError(f"--reward {text}: {before!r} before the * is no number") from error
    source, _, label = rest.partition("#")
    label, *options = label.split(":")
    if not source or not set(options) <= set(OPTIONS) or not math.isfinite(weight):
        raise RecipeError(f"--reward {text}: expected [WEIGHT*]SOURCE[#LABEL[:logit][:answer]]")
    return Spec(source.strip(), label or None, weight, "logit" in options, "answer" in options)


def several(given: Any) -> list[Any]:
    """Rewards, of which one may stand alone."""
    return list(given) if isinstance(given, list | tuple) else [given]


def sources(given: Iterable[Any]) -> list[str]:
    """Folders, checkpoints and functions of the rewards that are given as texts; of others nothing.

    Raises:
        RecipeError: As :func:`parse`.
    """
    return [parse(str(one)).source for one in given if isinstance(one, str | Path)]


def names_function(source: str) -> bool:
    """Whether a reward's source is a function's place in a module."""
    return not Path(source).exists() and IMPORT_PATH.fullmatch(source) is not None


def import_function(reference: str, prefix: str) -> Function:
    """``package.module:function``; the working folder is looked in, too.

    Raises:
        RecipeError: It cannot be imported, or is no function.
    """
    module, _, name = reference.partition(":")
    here = str(Path.cwd())
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        function: Function = getattr(importlib.import_module(module), name)
    except Exception as error:  # it is the user's own code that runs
        raise RecipeError(f"{prefix} {reference}: cannot be imported: {type(error).__name__}: {error}") from error
    finally:
        if added:
            sys.path.remove(here)
    if not callable(function):
        raise RecipeError(f"{prefix} {reference}: is no function but {type(function).__name__}")
    return function
