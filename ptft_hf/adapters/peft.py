"""Every method of the PEFT library, with the head saved by what was new and not by its name."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ptft_hf.adapters import Adapter
from ptft_hf.adapters.peft_models import changes_base, load, make, without_casts, without_false_alarms
from ptft_hf.adapters.peft_training import AdaLoraSchedule, ChangedBase, cut_ranks, drop_prompt_network
from ptft_hf.errors import AdapterError
from ptft_hf.models import added_rows, plain_model, quiet, to_float32, trunk_of
from ptft_hf.recipes import PeftRecipe

# Of a bare PeftConfig, as in the catalogue's recipes: starting points, not tuned. What is missing takes LoRA's.
LEARNING_RATES = {
    "LORA": 1e-3,
    "ADALORA": 8e-4,
    "IA3": 3e-3,
    "VERA": 4e-3,
    "OFT": 5e-4,
    "LN_TUNING": 1e-3,
    "PREFIX_TUNING": 1e-2,
    "PROMPT_TUNING": 1e-3,
    "P_TUNING": 1e-3,
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
QUERY_VALUE_METHODS = ("LORA", "ADALORA", "VERA", "OFT")
"""Methods that adapt query and value in their papers."""


class Peft(Adapter):
    """LoRA (Hu et al. 2021) and every other ``peft_type``."""

    def __init__(self, recipe: PeftRecipe, config: Any = None) -> None:
        """See :func:`ptft_hf.adapters.build`; ``config`` is its ``given``."""
        self.recipe = recipe
        self.given = config
        self.learning_rate = LEARNING_RATES.get(recipe.peft_type, LEARNING_RATES["LORA"])
        self.changed: Any = None

    def attach(self, model: Any, head: Sequence[str], task_type: str) -> Any:
        """See :class:`ptft_hf.adapters.Adapter`.

        Raises:
            AdapterError: PEFT refuses the configuration on this architecture, or would train or save
                other weights than the adapter and the head.
        """
        pretrained = {id(p) for p in model.parameters()}
        try:
            if isinstance(self.given, Path):
                wrapped = load(model, self.given, is_trainable=True)
            else:
                config = self._config(model, head, task_type)
                self._check_words(model, config)
                changed = ChangedBase(model) if changes_base(config) else None
                with without_false_alarms():
                    wrapped = make(model, config)
                if changed is not None:
                    changed.look_at(wrapped)
                self.changed = changed
        except (ValueError, TypeError, KeyError, RuntimeError, NotImplementedError) as error:
            raise AdapterError(
                f"{self.recipe.name}: PEFT cannot put {self.recipe.peft_type} on {type(model).__name__}: {error}"
            ) from error
        to_float32(p for p in wrapped.parameters() if p.requires_grad)
        self._check(wrapped, head, pretrained)
        if wrapped.peft_config["default"].is_prompt_learning:
            self._check_padding(wrapped)
        return wrapped

    def own_modules(self) -> tuple[type, ...]:
        """See :class:`ptft_hf.adapters.Adapter`."""
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        from ptft_hf.adapters.prefix import Prefix

        return (BaseTunerLayer, AuxiliaryTrainingWrapper, Prefix)

    def while_training(self, model: Any, autocast: bool) -> AbstractContextManager[Any]:
        """Under autocast without PEFT's own casts to float32 and back, which change no bit."""
        return without_casts(model) if autocast else nullcontext()

    def optimizer(self, model: Any, kind: Any, options: Mapping[str, Any], weight_decay: float) -> Any:
        """PEFT's of LoRA+ (Hayou et al. 2024), whose groups are those of the paper."""
        if self.recipe.loraplus_lr_ratio is None:
            return None
        from peft.optimizers import create_loraplus_optimizer

        ratio = self.recipe.loraplus_lr_ratio
        return create_loraplus_optimizer(
            model, kind, **options, loraplus_lr_ratio=ratio, loraplus_weight_decay=weight_decay
        )

    def callbacks(self, model: Any) -> list[Any]:
        """See :class:`ptft_hf.adapters.Adapter`."""
        return [AdaLoraSchedule(self.recipe.config)] if self.recipe.peft_type == "ADALORA" else []

    def finish(self, model: Any) -> Any:
        """See :class:`ptft_hf.adapters.Adapter`."""
        if self.changed is not None:
            self.changed.undo(model)
        if self.recipe.peft_type == "ADALORA":
            cut_ranks(model)
        if self.recipe.peft_type == "P_TUNING":
            drop_prompt_network(model)
        if self.recipe.peft_type == "PREFIX_TUNING":
            model.drop_network()
        return model

    def _config(self, model: Any, head: Sequence[str], task_type: str) -> Any:
        import peft

        if self.given is not None:
            config = self._overridden(self.given)
        else:
            kind = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(self.recipe.peft_type)]
            # AdaLoRA's number of steps is not known yet; its schedule sets it.
            later = {"total_step": 2**31} if self.recipe.peft_type == "ADALORA" else {}
            try:
                config = kind(**later | self.recipe.config)
            except (ValueError, TypeError) as error:
                raise AdapterError(
                    f"{self.recipe.name}: {kind.__name__} refuses its fields: {error}"
                ) from error
        config.task_type = config.task_type or task_type
        if hasattr(config, "modules_to_save"):
            config.modules_to_save = sorted({*(config.modules_to_save or ()), *head})
        if hasattr(config, "target_modules"):
            config.target_modules = self._targets(config.target_modules, model, head, config.peft_type.value)
        self._add_rows(config, model)
        if hasattr(config, "fan_in_fan_out") and _is_conv1d(model):
            config.fan_in_fan_out = True  # PEFT would do so, with a warning
        return config

    def _add_rows(self, config: Any, model: Any) -> None:
        """Let PEFT train and save the embeddings of added tokens, and no other rows.

        Raises:
            AdapterError: It cannot beside this method.
        """
        rows = added_rows(model)
        if not rows:
            return
        if not hasattr(config, "trainable_token_indices"):
            raise AdapterError(
                f"{self.recipe.name}: {self.recipe.peft_type} cannot train the embeddings of added tokens "
                "(add_tokens); use a LoRA, partial or full recipe"
            )
        if config.trainable_token_indices is None:
            embeddings = model.get_input_embeddings()
            name = next(name for name, module in model.named_modules() if module is embeddings)
            config.trainable_token_indices = {name: list(rows)}

    def _overridden(self, given: Any) -> Any:
        """A copy of a ``PeftConfig``, with what ``adapter.*`` settings changed in the recipe made of it."""
        from ptft_hf.adapters import recipe_of_config

        before, after = recipe_of_config(given).config, self.recipe.config
        changed = {name: value for name, value in after.items() if before.get(name, given) != value}
        return dataclasses.replace(copy.deepcopy(given), **changed) if changed else copy.deepcopy(given)

    def _targets(self, wanted: Any, model: Any, head: Sequence[str], peft_type: str) -> Any:
        """``all-linear`` spelled out without the head (of a network of convolutions alone: these, each a linear map
        of patches); query and value where PEFT has no default."""
        linear = _linear_modules(model, head)
        if wanted == "all-linear":
            return linear or _convolutions(model, head)
        if wanted is not None:
            return wanted
        if peft_type == "LN_TUNING":  # every norm of the trunk, whatever the architecture calls it
            return [name for name, m in trunk_modules(model, head) if type(m).__name__.endswith("Norm")]
        if peft_type not in QUERY_VALUE_METHODS or _peft_has_default(peft_type, model.config.model_type):
            return None
        found = [name for name in linear if name.rpartition(".")[2] in QUERY_VALUE]
        if not found:
            names = sorted({name.rpartition(".")[2] for name in linear})
            instead = f"name target_modules among {names}, or use" if names else "it has convolutions alone: use"
            raise AdapterError(
                f"{self.recipe.name}: {type(model).__name__} has no linear query and value projections to "
                f"adapt; {instead} all-linear (lora/r16_all_linear)"
            )
        return found

    def _check(self, wrapped: Any, head: Sequence[str], pretrained: set[int]) -> None:
        """Trained is the adapter and the head, and nothing of the trunk; the head is trained whole."""
        for name in head:
            kept = getattr(plain_model(wrapped).get_submodule(name), "modules_to_save", {})
            covered = [p for module in kept.values() for p in module.parameters()] if kept else []
            if not covered or not all(p.requires_grad for p in covered):
                raise AdapterError(
                    f"{self.recipe.name}: PEFT would not train and save the head {name!r} of this model with "
                    f"{self.recipe.peft_type}; use a LoRA or partial recipe"
                )
        if getattr(plain_model(wrapped).config, "tf_padding", False) and any(
            isinstance(m, self.own_modules()) and isinstance(getattr(m, "base_layer", None), nn.Conv2d)
            for m in wrapped.modules()
        ):
            raise AdapterError(
                f"{self.recipe.name}: {type(plain_model(wrapped)).__name__} pads as TensorFlow does, by sizes that "
                "it reads off its convolutions and that PEFT's do not have; use a full or partial recipe"
            )
        strays = [
            name
            for name, p in wrapped.named_parameters()
            if p.requires_grad
            and id(p) in pretrained
            and ".modules_to_save." not in name
            and "bias" not in name
        ]
        if strays and self.recipe.peft_type != "LN_TUNING":
            raise AdapterError(
                f"{self.recipe.name}: pretrained weights would be trained and not saved: {strays}"
            )

    def _check_words(self, model: Any, config: Any) -> None:
        """Prompts and prefixes are positions before a text's.

        Raises:
            AdapterError: The model reads none.
        """
        if config.is_prompt_learning and model.main_input_name != "input_ids":
            raise AdapterError(
                f"{self.recipe.name}: {config.peft_type.value} stands before the tokens of a text, and "
                f"{type(model).__name__} reads {model.main_input_name}; use a LoRA or partial recipe"
            )

    def _check_padding(self, wrapped: Any) -> None:
        """A text's logits must not depend on its neighbours. Classifiers of decoders pool the last token that is
        not padding, and behind a prompt they get embeddings, in which they cannot see it.

        Raises:
            AdapterError: They do, or the model cannot be run with a prompt.
        """
        config = plain_model(wrapped).config.get_text_config()
        end = 1 if config.eos_token_id is None else config.eos_token_id
        ids = torch.tensor([[3, 3, 3, end if isinstance(end, int) else end[0]]])
        more = torch.full((1, 3), 0 if config.pad_token_id is None else config.pad_token_id)
        name = f"{self.recipe.name}: {self.recipe.peft_type} on {type(plain_model(wrapped)).__name__}"
        writes = plain_model(wrapped).can_generate() and plain_model(wrapped).config.is_encoder_decoder
        decoders = {"decoder_input_ids": ids} if writes else {}
        try:
            with torch.no_grad(), quiet():
                alone, padded = (
                    wrapped.eval()(input_ids=ids, attention_mask=mask, **decoders)["logits"]
                    for ids, mask in (
                        (ids, torch.ones_like(ids)),
                        (torch.cat([ids, more], 1), torch.tensor([[1] * 4 + [0] * 3])),
                    )
                )
        except (ValueError, TypeError, KeyError, RuntimeError, NotImplementedError, IndexError) as error:
            raise AdapterError(f"{name} cannot be run: {error}; use prefix/tokens20 or LoRA") from error
        if alone.dim() == 3 and alone.shape[1] != ids.shape[1]:
            raise AdapterError(
                f"{name}: its results for tokens would stand behind {alone.shape[1] - ids.shape[1]} of the prompt's; "
                "use prefix/tokens20 or LoRA"
            )
        rounding = 1e-5 if plain_model(wrapped).dtype == torch.float32 else 1e-2
        if alone.shape == padded.shape and not torch.allclose(alone, padded, atol=rounding):
            raise AdapterError(
                f"{name}: a text's result would depend on the length of its neighbours in the batch, since this "
                "model cannot tell padding behind a prompt; use prefix/tokens20 or LoRA"
            )


def _linear_modules(model: Any, head: Sequence[str]) -> list[str]:
    from transformers.pytorch_utils import Conv1D

    output = model.get_output_embeddings()
    return [
        name
        for name, module in trunk_modules(model, head)
        if isinstance(module, (nn.Linear, Conv1D)) and module is not output
    ]


def _convolutions(model: Any, head: Sequence[str]) -> list[str]:
    """Of the trunk, those that mix all channels: PEFT has no update for groups."""
    return [n for n, m in trunk_modules(model, head) if isinstance(m, nn.Conv2d) and m.groups == 1]


def trunk_modules(model: Any, head: Sequence[str]) -> list[tuple[str, nn.Module]]:
    """All modules but those of the head, by name."""
    inside = tuple(f"{name}." for name in head)
    return [(name, m) for name, m in model.named_modules() if not f"{name}.".startswith(inside)]


def _is_conv1d(model: Any) -> bool:
    """Whether the trunk has transposed linear layers (GPT-2) and no others."""
    linear = [m for m in trunk_of(model).modules() if type(m).__name__ in ("Conv1D", "Linear")]
    return bool(linear) and all(type(m).__name__ == "Conv1D" for m in linear)


def _peft_has_default(peft_type: str, model_type: str) -> bool:
    from peft.utils import constants

    return model_type in getattr(constants, f"TRANSFORMERS_MODELS_TO_{peft_type}_TARGET_MODULES_MAPPING", ())
