"""Bases in four or eight bits (bitsandbytes), on CUDA or CPU, made such that learning and saving stay right."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ptft_hf.errors import ModelError

LAYERS = ("Linear4bit", "Linear8bitLt")


def quantization_config(quantization: Mapping[str, Any], model: Any, head: Sequence[str]) -> Any:
    """``BitsAndBytesConfig`` with what must stay as it is: the head, which is trained, and the output embeddings.

    Raises:
        ModelError: bitsandbytes is not installed, or upstream refuses the fields.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError("quantization: needs the package bitsandbytes: pip install 'ptft-hf[quant]'")
    import transformers

    kind: Any = transformers.BitsAndBytesConfig
    output = model.get_output_embeddings()
    kept = {*head, *(name for name, m in model.named_modules() if m is output and m is not None)}
    kept |= set(quantization.get("llm_int8_skip_modules") or ())
    try:
        return kind(**{**quantization, "llm_int8_skip_modules": sorted(kept)})
    except (ValueError, TypeError, AttributeError) as error:
        raise ModelError(f"quantization: BitsAndBytesConfig refuses its fields: {error}") from error


def keep_learning(model: nn.Module) -> None:
    """Keep 4-bit weights in the layout that has a backward pass.

    On a CPU with AVX512-BF16, bitsandbytes repacks them in the first forward pass without gradients, for a kernel
    that has none: afterwards LoRA's matrices get no gradient, and what is saved differs (bitsandbytes 0.50).
    """
    for module in quantized_layers(model).values():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    # It says at every product of matrices that it casts its inputs.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def quantized_layers(model: nn.Module) -> dict[str, Any]:
    """Modules in four or eight bits, by name; PEFT's wrappers around them bear the same class names."""
    linear = ((name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear))
    return {name: m for name, m in linear if type(m).__name__ in LAYERS}


def in_dtype(model: Any, dtype: torch.dtype) -> Any:
    """``model.to(dtype)``, which transformers refuses for quantized models; their integers stay what they are."""
    if not quantized_layers(model):
        return model.to(dtype)
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    return model


def dequantize_into(quantized: nn.Module, model: nn.Module) -> None:
    """Give ``model``, the same in full precision, the values that the quantized weights stand for."""
    from bitsandbytes.functional import dequantize_4bit

    for name, module in quantized_layers(quantized).items():
        weight, held = model.get_submodule(name).weight, module.weight
        if held.dtype == torch.int8:  # rows of integers, 127 being the row's largest value
            largest = module.state.SCB if module.state.SCB is not None else held.SCB
            values = (held.data.float() * largest.float().view(-1, 1) / 127).to(weight)
        else:
            values = dequantize_4bit(held.data, held.quant_state).to(weight)
        # GPT-2's Conv1D is transposed, and was turned for bitsandbytes' Linear.
        weight.data = values.T.contiguous() if values.shape != weight.shape else values
