"""Every method of the PEFT library, with the head saved by what was new and not by its name."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ptft_hf.adapters.earlier import check_earlier
from ptft_hf.errors import AdapterError
from ptft_hf.models import to_float32, trunk_of
from ptft_hf.recipes import PeftRecipe

# Starting points, not tuned; what is missing here takes LoRA's.
LEARNING_RATES = {
    "LORA": 1e-3,
    "ADALORA": 1e-3,
    "IA3": 5e-3,
    "VERA": 5e-3,
    "OFT": 1e-3,
    "LN_TUNING": 1e-3,
    "PREFIX_TUNING": 1e-2,
    "PROMPT_TUNING": 3e-2,
    "P_TUNING": 1e-2,
}
# Names of query and value projections, for architectures of which PEFT has no default.
QUERY_VALUE = (
    "query",
    "value",
    "q_proj",
    "v_proj",
    "q_lin",
    "v_lin",
    "query_proj",
    "value_proj",
    "Wqkv",
    "query_key_value",
    "c_attn",
    "q",
    "v",
    "wq",
    "wv",
)


class Peft:
    """LoRA (Hu et al. 2021) and every other ``peft_type``."""

    def __init__(self, recipe: PeftRecipe, config: Any = None) -> None:
        """See :func:`ptft_hf.adapters.build`; ``config`` is its ``given``."""
        self.recipe = recipe
        self.given = config
        self.learning_rate = LEARNING_RATES.get(recipe.peft_type, LEARNING_RATES["LORA"])

    def attach(self, model: Any, head: Sequence[str], task_type: str) -> Any:
        """See :class:`ptft_hf.adapters.Adapter`.

        Raises:
            AdapterError: PEFT refuses the configuration on this architecture, or would train or save
                other weights than the adapter and the head.
        """
        import peft

        if isinstance(self.given, Path):
            check_earlier(self.given, self.recipe, model)
        pretrained = {id(p) for p in model.parameters()}
        try:
            if isinstance(self.given, Path):
                wrapped = peft.PeftModel.from_pretrained(model, str(self.given), is_trainable=True)
            else:
                wrapped = peft.get_peft_model(model, self._config(model, head, task_type))
        except (ValueError, TypeError, KeyError, RuntimeError, NotImplementedError) as error:
            raise AdapterError(
                f"{self.recipe.name}: PEFT cannot put {self.recipe.peft_type} on {type(model).__name__}: {error}"
            ) from error
        to_float32(p for p in wrapped.parameters() if p.requires_grad)
        self._check(wrapped, head, pretrained)
        return wrapped

    def _config(self, model: Any, head: Sequence[str], task_type: str) -> Any:
        import peft

        if self.given is not None:
            config = self._overridden(self.given)
        else:
            kind = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(self.recipe.peft_type)]
            try:
                config = kind(**self.recipe.config)
            except (ValueError, TypeError) as error:
                raise AdapterError(
                    f"{self.recipe.name}: {kind.__name__} refuses its fields: {error}"
                ) from error
        config.task_type = config.task_type or task_type
        if hasattr(config, "modules_to_save"):
            config.modules_to_save = sorted({*(config.modules_to_save or ()), *head})
        if hasattr(config, "target_modules"):
            config.target_modules = self._targets(config.target_modules, model, head, config.peft_type.value)
        if hasattr(config, "fan_in_fan_out") and _is_conv1d(model):
            config.fan_in_fan_out = True  # PEFT would do so, with a warning
        return config

    def _overridden(self, given: Any) -> Any:
        """A copy of a ``PeftConfig``, with what ``adapter.*`` settings changed in the recipe made of it."""
        from ptft_hf.adapters import recipe_of_config

        before, after = recipe_of_config(given).config, self.recipe.config
        changed = {name: value for name, value in after.items() if before.get(name, given) != value}
        return dataclasses.replace(copy.deepcopy(given), **changed) if changed else copy.deepcopy(given)

    def _targets(self, wanted: Any, model: Any, head: Sequence[str], peft_type: str) -> Any:
        """``all-linear`` spelled out without the head; query and value where PEFT has no default."""
        linear = _linear_modules(model, head)
        if wanted == "all-linear":
            return linear
        if wanted is not None:
            return wanted
        if peft_type not in ("LORA", "ADALORA") or _peft_has_default(model.config.model_type):
            return None
        found = [name for name in linear if name.rpartition(".")[2] in QUERY_VALUE]
        if not found:
            names = sorted({name.rpartition(".")[2] for name in linear})
            raise AdapterError(
                f"{self.recipe.name}: {type(model).__name__} has no linear query and value projections to "
                f"adapt; name target_modules among {names}, or use all-linear"
            )
        return found

    def _check(self, wrapped: Any, head: Sequence[str], pretrained: set[int]) -> None:
        """Trained is the adapter and the head, and nothing of the trunk; the head is trained whole."""
        saved = [f"base_model.model.{name}.modules_to_save." for name in head]
        for name, prefix in zip(head, saved, strict=True):
            covered = [p for n, p in wrapped.named_parameters() if n.startswith(prefix)]
            if not covered or not all(p.requires_grad for p in covered):
                raise AdapterError(
                    f"{self.recipe.name}: PEFT would not train and save the head {name!r} of this model with "
                    f"{self.recipe.peft_type}; use a LoRA or partial recipe"
                )
        strays = [
            name
            for name, p in wrapped.named_parameters()
            if p.requires_grad
            and id(p) in pretrained
            and not any(name.startswith(s) for s in saved)
            and "modules_to_save" not in name
            and "bias" not in name
        ]
        if strays and self.recipe.peft_type != "LN_TUNING":
            raise AdapterError(
                f"{self.recipe.name}: pretrained weights would be trained and not saved: {strays}"
            )


def _linear_modules(model: Any, head: Sequence[str]) -> list[str]:
    from transformers.pytorch_utils import Conv1D

    output = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
        and module is not output
        and not any(name == h or name.startswith(f"{h}.") for h in head)
    ]


def _is_conv1d(model: Any) -> bool:
    """Whether the trunk has transposed linear layers (GPT-2) and no others."""
    linear = [m for m in trunk_of(model).modules() if type(m).__name__ in ("Conv1D", "Linear")]
    return bool(linear) and all(type(m).__name__ == "Conv1D" for m in linear)


def _peft_has_default(model_type: str) -> bool:
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

    return model_type in DEFAULTS
