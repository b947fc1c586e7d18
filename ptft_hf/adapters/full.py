"""Full fine-tuning: every weight is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ptft_hf.recipes import FullRecipe


class Full:
    """Every weight is trained. 5e-5 is the middle of what BERT's authors searched (Devlin et al. 2019, A.3)."""

    learning_rate = 5e-5
    is_peft = False

    def __init__(self, recipe: FullRecipe) -> None:
        self.recipe = recipe

    def attach(self, model: Any, head: Sequence[str], task_type: str) -> Any:
        return model.requires_grad_(True)
