"""Full fine-tuning: every weight is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ptft_hf.adapters import Adapter
from ptft_hf.models import to_float32, unfreeze
from ptft_hf.recipes import FullRecipe


class Full(Adapter):
    """Every weight is trained. 5e-5 is the highest of the three rates that BERT's authors searched
    (Devlin et al. 2019, A.3)."""

    learning_rate = 5e-5

    def __init__(self, recipe: FullRecipe) -> None:
        self.recipe = recipe

    def attach(self, model: Any, head: Sequence[str], task_type: str) -> Any:
        """See :class:`ptft_hf.adapters.Adapter`. On a half-precision base the head alone is in float32."""
        for name in head:
            to_float32(model.get_submodule(name).parameters())
        return unfreeze(model)
