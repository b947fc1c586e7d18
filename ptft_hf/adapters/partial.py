"""A chosen part of the weights is trained, the rest is frozen: the head, the top layers, the biases."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ptft_hf.adapters import Adapter
from ptft_hf.errors import AdapterError
from ptft_hf.models import depths, to_float32, train_rows
from ptft_hf.recipes import PartialRecipe


class Partial(Adapter):
    """The head is trained, and beside it ``top_layers``, all ``bias`` terms (BitFit, Ben Zaken et al. 2022),
    and whatever parameters the regular expressions in ``parameters`` match whole; and the embeddings of added tokens.
    What is trained is in float32."""

    learning_rate = 1e-3

    def __init__(self, recipe: PartialRecipe) -> None:
        self.recipe = recipe

    def attach(self, model: Any, head: Sequence[str], task_type: str) -> Any:
        """See :class:`ptft_hf.adapters.Adapter`.

        Raises:
            AdapterError: Fewer layers than ``top_layers``, no biases, an expression that matches nothing, or nothing
                to train: a language model has no new head.
        """
        recipe, depth = self.recipe, depths(model, head)
        top = max(depth.values()) + (not head)  # the depth of the head, or where it would be
        layers = len({d for d in depth.values() if 0 < d < top})
        problems = []
        if recipe.top_layers > layers:
            problems.append(f"top_layers: {recipe.top_layers} of this model's {layers} layers")
        patterns = {pattern: re.compile(pattern) for pattern in recipe.parameters}
        names = list(depth)
        problems += [
            f"parameters: {pattern!r} matches none of the model's names, such as {names[0]!r}"
            for pattern, regex in patterns.items()
            if not any(regex.fullmatch(name) for name in names)
        ]
        if recipe.bias and not any(_is_bias(name) for name in names if depth[name] < top):
            problems.append(f"bias: {type(model).__name__} has no bias terms below its head")
        if problems:
            raise AdapterError(*(f"{recipe.name}: {problem}" for problem in problems))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(
                depth[name] == top
                or (depth[name] > top - 1 - recipe.top_layers and depth[name] > 0)
                or (recipe.bias and _is_bias(name))
                or any(regex.fullmatch(name) for regex in patterns.values())
            )
        train_rows(model)
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise AdapterError(
                f"{recipe.name}: would train nothing, since all of {type(model).__name__} is pretrained: it has no "
                "new head; use partial/top_2_layers, or name parameters"
            )
        to_float32(parameter for parameter in model.parameters() if parameter.requires_grad)
        return model


def _is_bias(name: str) -> bool:
    return name.rpartition(".")[2].endswith("bias")
