"""PEFT's models: made, loaded, merged and taken out again, where upstream needs help with it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from ptft_hf.models import check_adapter_weights, plain_model, unfreeze
from ptft_hf.recipes import saved_adapter_kind


def load(model: Any, folder: Path, *, is_trainable: bool = False) -> Any:
    """A ``PeftModel`` from a folder, on its base model.

    Args:
        model: The base with its head, whose labels are those of the adapter.
        folder: Where ``adapter_config.json`` is.
        is_trainable: To be trained further; else for use.

    Raises:
        AdapterError: It names further adapters.
        ModelError: The weights are no safetensors.
    """
    import peft

    if saved_adapter_kind(folder) == "prefix":
        from ptft_hf.adapters import prefix

        return prefix.load(model, folder, is_trainable=is_trainable)
    check_adapter_weights(folder)
    if is_trainable and (config := peft.PeftConfig.from_pretrained(str(folder))).is_prompt_learning:
        return _prompt_to_train(model, config, folder)
    with without_false_alarms():
        wrapped = peft.PeftModel.from_pretrained(model, str(folder), is_trainable=is_trainable)
    if wrapped.peft_config["default"].peft_type.value == "ADALORA" and not is_trainable:
        # Without it a forward pass with labels fails, since PEFT looks up the penalty's weight by it.
        wrapped.base_model.trainable_adapter_name = "default"
    return wrapped


def _prompt_to_train(model: Any, config: Any, folder: Path) -> Any:
    """A saved prompt on its base; PEFT loads prompts for use alone, so it is given to a fresh one."""
    import peft
    from peft.utils.save_and_load import load_peft_weights

    config.inference_mode = False
    if getattr(config, "prompt_tuning_init", None):
        config.prompt_tuning_init = "RANDOM"  # what it began from does not matter any more
    wrapped = peft.get_peft_model(model, config)
    peft.set_peft_model_state_dict(wrapped, load_peft_weights(str(folder), device="cpu"))
    return wrapped


def make(model: Any, config: Any) -> Any:
    """A fresh adapter on a model: PEFT's, but for prefixes."""
    import peft

    if config.peft_type.value != "PREFIX_TUNING":
        return peft.get_peft_model(model, config)
    from ptft_hf.adapters import prefix

    return prefix.put(model, config)


def merge(wrapped: Any) -> Any:
    """The plain model with the update in its weights and the trained head; ``wrapped`` is used up.

    Raises:
        AttributeError, ValueError, NotImplementedError: The method cannot be merged.
    """
    _put_heads(wrapped, lambda head: head.modules_to_save["default"])
    return wrapped.merge_and_unload()


def unload(wrapped: Any) -> Any:
    """The plain model as it was before the adapter, its head too; ``wrapped`` is used up."""
    _put_heads(wrapped, lambda head: head.original_module)
    base = wrapped.unload() if hasattr(wrapped, "unload") else plain_model(wrapped)  # a prompt is not inside
    return unfreeze(base)


def _put_heads(wrapped: Any, choose: Callable[[Any], nn.Module]) -> None:
    """Plain heads instead of those that PEFT keeps twice. It cannot unload one of several layers (RoBERTa's) beside
    IA3, OFT, VeRA and others."""
    from peft.utils.other import ModulesToSaveWrapper

    base = plain_model(wrapped)
    for name, module in list(base.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            base.set_submodule(name, choose(module))


@contextmanager
def without_casts(model: Any) -> Iterator[None]:
    """As ``peft.helpers.disable_input_dtype_casting``, which fails on layers that know no such casts (VeRA's, tuned
    norms, trained tokens; PEFT 0.21)."""
    layers = [module for module in model.modules() if getattr(module, "cast_input_dtype_enabled", False)]
    for layer in layers:
        layer.cast_input_dtype_enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.cast_input_dtype_enabled = True


@contextmanager
def without_false_alarms() -> Iterator[None]:
    """PEFT warns of every norm that it wraps as named, and of AdaLoRA's own rank pattern."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Unsupported layer type")
        warnings.filterwarnings("ignore", "The following rank_pattern keys did not match")
        yield


def changes_base(config: Any) -> bool:
    """Whether a LoRA's initialisation takes its first update out of the base's weights."""
    begun = getattr(config, "init_lora_weights", None)
    return isinstance(begun, str) and begun != "gaussian"
