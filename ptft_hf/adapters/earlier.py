"""An adapter that is trained further keeps its base, its labels and its own settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ptft_hf.errors import AdapterError
from ptft_hf.models import head_config
from ptft_hf.recipes import AdapterRecipe, PeftRecipe, saved_adapter_kind

HOW_IT_IS_TRAINED = frozenset(AdapterRecipe.model_fields) - {"family"} | {"loraplus_lr_ratio"}
"""What may change: the rest of a recipe is the adapter itself."""
NOT_KEPT = ("ADALORA", "P_TUNING")
"""Methods of PEFT of which a finished run holds what is needed for use, and not what served its training."""


def check_earlier(earlier: Any, recipe: AdapterRecipe, config: Any, facts: Mapping[str, Any]) -> None:
    """Hold a recipe and a model to the run whose adapter is trained further.

    Args:
        earlier: The folder of a run; anything else has nothing to be held to.
        recipe: The recipe of the new run.
        config: The new model's configuration.
        facts: What the new run's ``run.json`` will say of its model.

    Raises:
        AdapterError: With everything that differs from the earlier run.
    """
    if not isinstance(earlier, Path) or saved_adapter_kind(earlier) == "adapterhub":
        return
    run = json.loads((earlier / "run.json").read_text("utf-8"))
    before, after, base = _itself(run["adapter"]), _itself(recipe.model_dump(mode="json")), run["model"]
    problems = [
        f"adapter.{name}: cannot be changed when {earlier} is trained further; it is {before.get(name)!r}"
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name)
    ]
    if isinstance(recipe, PeftRecipe) and recipe.peft_type in NOT_KEPT:
        problems.append(
            f"{earlier}: {recipe.peft_type} cannot be trained further: what served its training alone (the "
            "ranks that were cut, the prompt's network) was not kept"
        )
    head = head_config(earlier, facts["options"])
    if (head.problem_type, head.id2label) != (config.problem_type, config.id2label):
        problems.append(
            f"{earlier}: was trained for {_labels(head)}, and the data is for {_labels(config)}; train a new "
            "adapter, or name the labels as they were"
        )
    elif base["fingerprint"] != facts["fingerprint"]:
        problems.append(
            f"{earlier}: was trained on another base ({base['reference']}, in {base['dtype']}): the weights "
            "of this one have another fingerprint"
        )
    tokens = [(one.get("added_tokens") or {}).get("tokens", []) for one in (base, facts)]
    if tokens[0] != tokens[1]:
        problems.append(
            f"{earlier}: was trained with the added tokens {tokens[0]}, and the task has {tokens[1]} (add_tokens); "
            "the adapter holds their embeddings, so give the same"
        )
    if problems:
        raise AdapterError(*problems)


def _itself(recipe: dict[str, Any]) -> dict[str, Any]:
    fields = {name: value for name, value in recipe.items() if name not in HOW_IT_IS_TRAINED}
    return {**fields, **fields.pop("config", {})}


def _labels(config: Any) -> str:
    return f"{config.problem_type} of {list(config.id2label.values())}"
