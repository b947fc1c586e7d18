"""Checkpoints and tokenizers: loaded from the Hub or disk, and what they are made of.

The rooms behind it, each importing only those before: ``reading`` (references, upstream's errors and noise),
``structure`` (trunk, head, layers), ``images`` (image processors), ``inputs`` (tokenizer, padding, length),
``vocabulary`` (added tokens), ``quantizing``, ``loading``, ``attention``, ``caching`` (while a text is written),
``lm_heads`` (logits where they are wanted), ``checkpointing`` (of gradients), ``packing`` (linear layers where
nothing is trained), ``nothing`` (random weights, and a tokenizer of the corpus), ``skeleton`` (an architecture
without its weights).
"""

from __future__ import annotations

from ptft_hf.models.attention import AttentionByLength
from ptft_hf.models.caching import empty_cache
from ptft_hf.models.images import default_processor
from ptft_hf.models.inputs import (
    DEFAULT_MAX_LENGTH,
    ensure_padding,
    fit_inputs,
    load_reader,
    load_tokenizer,
    longest_input,
    read_marks_as_text,
    too_long,
)
from ptft_hf.models.loading import LoadedModel, as_dtype, fingerprint, head_config, load_model
from ptft_hf.models.nothing import (
    config_of,
    made_from_config,
    random_model,
    takes_token_types,
    tokenizer_fingerprint,
    tokenizer_of,
)
from ptft_hf.models.packing import packed_bytes, packed_linears
from ptft_hf.models.quantizing import dequantize_into, in_dtype, quantized_layers
from ptft_hf.models.reading import (
    auto_of,
    check_adapter_weights,
    from_pretrained,
    located,
    options_of,
    quiet,
    reading,
    split_revision,
)
from ptft_hf.models.structure import (
    adapter_kind,
    count_parameters,
    depths,
    head_modules,
    plain_model,
    stacks_of,
    takes_positions,
    to_float32,
    trunk_of,
    unfreeze,
)
from ptft_hf.models.vocabulary import (
    add_tokens,
    added_rows,
    base_config,
    copy_rows,
    give_rows,
    train_rows,
    trains_rows_alone,
)

__all__ = [
    "AttentionByLength",
    "DEFAULT_MAX_LENGTH",
    "LoadedModel",
    "adapter_kind",
    "add_tokens",
    "added_rows",
    "as_dtype",
    "auto_of",
    "base_config",
    "check_adapter_weights",
    "config_of",
    "copy_rows",
    "count_parameters",
    "default_processor",
    "depths",
    "dequantize_into",
    "empty_cache",
    "ensure_padding",
    "fingerprint",
    "fit_inputs",
    "from_pretrained",
    "give_rows",
    "head_config",
    "head_modules",
    "in_dtype",
    "load_model",
    "load_reader",
    "load_tokenizer",
    "located",
    "longest_input",
    "made_from_config",
    "options_of",
    "packed_bytes",
    "packed_linears",
    "plain_model",
    "quantized_layers",
    "quiet",
    "random_model",
    "read_marks_as_text",
    "reading",
    "split_revision",
    "stacks_of",
    "takes_token_types",
    "tokenizer_fingerprint",
    "tokenizer_of",
    "to_float32",
    "too_long",
    "train_rows",
    "trains_rows_alone",
    "takes_positions",
    "trunk_of",
    "unfreeze",
]
