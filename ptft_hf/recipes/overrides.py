"""``--set key=value``: settings of one run, sorted by what they change."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ptft_hf.errors import RecipeError, did_you_mean
from ptft_hf.recipes.documents import Document, Origin, parse
from ptft_hf.recipes.families import ADAPTER_FAMILIES, TASK_FAMILIES
from ptft_hf.recipes.faults import FROM_PRETRAINED, training_faults
from ptft_hf.recipes.models import keys_of
from ptft_hf.recipes.upstream import peft_config_names, peft_types


class Overrides(NamedTuple):
    """What ``--set`` changes, by destination; nested as in the recipes."""

    training: dict[str, Any]
    """``TrainingArguments`` by name."""
    task: dict[str, Any]
    adapter: dict[str, Any]
    model: dict[str, Any]
    """The task recipe's ``model:``."""


def parse_set(sets: Sequence[str]) -> Overrides:
    """Sort ``key=value`` pairs by destination; values are YAML.

    A bare key is a ``TrainingArguments`` name; ``task.``, ``adapter.`` and ``model.`` lead to the recipes,
    whose own names are checked when they are loaded.

    Raises:
        RecipeError: With every pair that is malformed, unknown or given twice.
    """
    overrides, problems = read_sets(sets)
    if problems:
        raise RecipeError(*problems)
    return overrides


def read_sets(sets: Sequence[str]) -> tuple[Overrides, list[str]]:
    """As :func:`parse_set`, but what is wrong is returned and not raised."""
    overrides = Overrides({}, {}, {}, {})
    problems: list[str] = []
    for pair in sets:
        problem = _place(overrides, pair)
        if problem:
            problems.append(f"--set {pair}: {problem}")
    problems += [
        f"--set {name}: {reason}{_dotted(name)}" for name, reason in training_faults(overrides.training)
    ]
    return overrides, problems


def _dotted(name: str) -> str:
    """The end of a message about a bare name that a recipe has."""
    fields = {
        "task": frozenset[str]().union(*map(keys_of, TASK_FAMILIES.values())),
        "adapter": frozenset[str]().union(
            *map(keys_of, ADAPTER_FAMILIES.values()), *map(peft_config_names, peft_types())
        ),
        "model": frozenset(FROM_PRETRAINED),
    }
    places = [f"{place}.{name}" for place, names in fields.items() if name in names]
    return f"; a recipe's field is written with its place: {' or '.join(places)}" if places else ""


def _place(overrides: Overrides, pair: str) -> str | None:
    """Put one ``key=value`` where it belongs; what is wrong with it, or None."""
    key, equals, text = (part.strip() for part in pair.partition("="))
    first, *rest = key.split(".")
    if not equals or not all([first, *rest]):
        return "expected key=value"
    if not text:
        return "no value; for none, write null"
    if not rest:
        target, names = overrides.training, [first]
        if first in ("task", "adapter", "model", "training"):
            return (
                f"expected {first}.NAME=value" if first != "training" else "write the name alone: NAME=value"
            )
    elif first in ("task", "adapter", "model"):
        target, names = getattr(overrides, first), rest
    elif first == "training":
        return f"TrainingArguments names stand alone: {'.'.join(rest)}={text}"
    else:
        near = did_you_mean(first, ("task", "adapter", "model"))
        return f"unknown prefix {first!r}{near}; a dotted key starts with task., adapter. or model."
    document = Document({}, {(): Origin("", Path.cwd())})
    value = parse(text, document)
    if document.problems:
        return "; ".join(problem.removeprefix(": ") for problem in document.problems)
    for name in names[:-1]:
        target = target.setdefault(name, {})
        if not isinstance(target, dict):
            return f"{name!r} is given a value of its own by another --set"
    if names[-1] in target:
        return "given twice"
    target[names[-1]] = value
    return None
