"""Checkpoints and tokenizers: loaded from the Hub or disk, and what they are made of.

The rooms behind it, each importing only those before: ``reading`` (references, upstream's errors and noise),
``structure`` (trunk, head, layers), ``images`` (image processors), ``inputs`` (tokenizer, padding, length),
``quantizing``, ``loading``, ``attention``, ``skeleton`` (an architecture without its weights).
"""

from __future__ import annotations

from ptft_hf.models.attention import AttentionByLength
from ptft_hf.models.inputs import (
    DEFAULT_MAX_LENGTH,
    ensure_padding,
    load_reader,
    load_tokenizer,
    longest_input,
    read_inputs,
    read_marks_as_text,
    too_long,
)
from ptft_hf.models.loading import LoadedModel, as_dtype, fingerprint, head_config, load_model
from ptft_hf.models.quantizing import dequantize_into, in_dtype, quantized_layers
from ptft_hf.models.reading import quiet, reading, split_revision
from ptft_hf.models.structure import (
    adapter_kind,
    count_parameters,
    depths,
    head_modules,
    plain_model,
    stacks_of,
    to_float32,
    trunk_of,
)

__all__ = [
    "AttentionByLength",
    "DEFAULT_MAX_LENGTH",
    "LoadedModel",
    "adapter_kind",
    "as_dtype",
    "count_parameters",
    "depths",
    "dequantize_into",
    "ensure_padding",
    "fingerprint",
    "head_config",
    "head_modules",
    "in_dtype",
    "load_model",
    "load_reader",
    "load_tokenizer",
    "longest_input",
    "plain_model",
    "quantized_layers",
    "quiet",
    "read_inputs",
    "read_marks_as_text",
    "reading",
    "split_revision",
    "stacks_of",
    "to_float32",
    "too_long",
    "trunk_of",
]
