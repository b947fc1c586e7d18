"""An adapter that is trained further keeps its base, its labels and its own settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ptft_hf.errors import AdapterError
from ptft_hf.models import fingerprint, head_config
from ptft_hf.recipes import AdapterRecipe

HOW_IT_IS_TRAINED = frozenset(AdapterRecipe.model_fields) - {"family"}
"""What may change: the rest of a recipe is the adapter itself."""


def check_earlier(folder: Path, recipe: AdapterRecipe, model: Any) -> None:
    """Hold a recipe and a model to the run whose adapter is trained further.

    Raises:
        AdapterError: With everything that differs from the earlier run.
    """
    run = json.loads((folder / "run.json").read_text("utf-8"))
    before, after, facts = _itself(run["adapter"]), _itself(recipe.model_dump(mode="json")), run["model"]
    problems = [
        f"adapter.{name}: cannot be changed when {folder} is trained further; it is {before.get(name)!r}"
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name)
    ]
    earlier, now = head_config(folder), model.config
    if (earlier.problem_type, earlier.id2label) != (now.problem_type, now.id2label):
        problems.append(
            f"{folder}: was trained for {_labels(earlier)}, and the data is for {_labels(now)}; train a new "
            "adapter, or name the labels as they were"
        )
    elif fingerprint(model, frozenset(facts["new_parameters"])) != facts["fingerprint"]:
        problems.append(
            f"{folder}: was trained on another base ({facts['reference']}, in {facts['dtype']}): the weights "
            "of this one have another fingerprint"
        )
    if problems:
        raise AdapterError(*problems)


def _itself(recipe: dict[str, Any]) -> dict[str, Any]:
    fields = {name: value for name, value in recipe.items() if name not in HOW_IT_IS_TRAINED}
    return {**fields, **fields.pop("config", {})}


def _labels(config: Any) -> str:
    return f"{config.problem_type} of {list(config.id2label.values())}"
