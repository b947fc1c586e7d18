"""What a recipe of ``tasks/preference`` may say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ptft_hf.recipes.faults import Fault, column_faults
from ptft_hf.recipes.models import TaskRecipe


class PreferenceRecipe(TaskRecipe):
    """Which of two answers people like better: a reward model."""

    @classmethod
    def faults(cls, values: Mapping[str, Any]) -> Iterator[Fault]:
        yield from super().faults(values)
        yield from column_faults(values, ("prompt", "chosen", "rejected", "margin", "tie"))
