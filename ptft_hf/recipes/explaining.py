"""The faults that pydantic finds in a recipe, in the words of this project."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from ptft_hf.errors import did_you_mean
from ptft_hf.recipes.corpora import Cleaning, TokenizerRecipe
from ptft_hf.recipes.documents import Key, shown
from ptft_hf.recipes.faults import Fault, list_of
from ptft_hf.recipes.models import DataSource, _Strict, keys_of
from ptft_hf.recipes.pipeline_stages import EvaluationStage, FeedbackStage, PPOStage, Stage

_EXPECTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "dict_type": "a map",
    "model_type": "a map",
    "list_type": "a list",
    "literal_error": "{expected}",
    "greater_than": "a number greater than {gt:g}",
    "less_than": "a number less than {lt:g}",
    "greater_than_equal": "a number of at least {ge:g}",
    "less_than_equal": "a number of at most {le:g}",
}
"""What pydantic's kinds of errors say was expected."""
_INNER: dict[str, type[BaseModel]] = {
    "data": DataSource,
    "cleaning": Cleaning,
    "tokenizer": TokenizerRecipe,
    "sft": Stage,
    "feedback": FeedbackStage,
    "reward": Stage,
    "ppo": PPOStage,
    "evaluation": EvaluationStage,
}
"""Keys that hold a map with keys of its own."""


def explain(error: ValidationError, recipe: type[_Strict], values: Mapping[str, Any]) -> list[Fault]:
    """Every fault of a recipe's values, in the words of this project.

    Args:
        error: What ``recipe.model_validate(values)`` raised.
        recipe: The model.
        values: The values as read, still of any type.
    """
    faults: list[Fault] = []
    expected: dict[Key, tuple[list[str], Any]] = {}
    for item in error.errors(include_url=False):
        key, kind, context = _real_key(item["loc"], values), item["type"], item.get("ctx", {})
        if kind == "recipe_faults":
            faults += [((*key, *inner), message) for inner, message in context["faults"]]
        elif kind == "extra_forbidden":
            inner = _INNER.get(str(key[0])) if len(key) > 1 else None
            names = keys_of(inner) if inner else keys_of(recipe) | {"include"}
            name = str(key[-1])
            faults.append((key, f"unknown key {name!r}{did_you_mean(name, names) or list_of(names)}"))
        elif kind == "missing":
            faults.append(((*key, item["loc"][-1]), "is missing"))
        else:
            phrase = _EXPECTED[kind].format(**context) if kind in _EXPECTED else item["msg"]
            expected.setdefault(key, ([], item["input"]))[0].append(phrase)
    for key, (phrases, value) in expected.items():
        if any(other[: len(key)] == key and other != key for other in expected):
            continue  # a member of a union that fits better is at fault deeper down
        choices = re.findall(r"'([^']*)'", " ".join(phrases))
        near = did_you_mean(value, choices) if isinstance(value, str) else ""
        faults.append((key, f"expected {' or '.join(dict.fromkeys(phrases))}, got {shown(value)}{near}"))
    if not any(
        item["type"] == "recipe_faults" and not item["loc"] for item in error.errors(include_url=False)
    ):
        faults += recipe.faults(values)  # pydantic has not come to these, since a type was wrong
    return list(dict.fromkeys(faults))


def _real_key(location: tuple[int | str, ...], values: Any) -> Key:
    """A location of pydantic's without the names that it gives to the members of a union."""
    key: Key = ()
    for part in location:
        inside = (
            range(len(values)) if isinstance(values, list) else values if isinstance(values, dict) else ()
        )
        if part in inside:
            key, values = (*key, part), values[part]
    return key
