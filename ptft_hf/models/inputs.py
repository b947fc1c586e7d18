"""Tokenizers, and what a model takes of their output: padding and length."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ptft_hf.errors import ModelError
from ptft_hf.models.images import load_image_processor
from ptft_hf.models.reading import from_pretrained

DEFAULT_MAX_LENGTH = 512
"""Tokens; attention costs grow with the square of the length, so a decoder's 100,000 is no sensible default."""


def load_tokenizer(reference: str, **options: Any) -> Any:
    """The tokenizer of a checkpoint.

    Raises:
        ModelError: There is none, or it cannot be read.
    """
    return from_pretrained("AutoTokenizer", reference, options)


def load_reader(reads: str, reference: str, **options: Any) -> Any:
    """What reads a family's inputs: a tokenizer for ``text``, an image processor for ``images``."""
    if reads == "images":
        return load_image_processor(reference, **options)
    return load_tokenizer(reference, **options)


def fit_inputs(
    reads: str, tokenizer: Any, model: Any, wanted: Mapping[str, Any], prompt: int = 0
) -> tuple[int, list[str]]:
    """Make tokenizer and model fit each other; returns the tokens after which an input is cut, and what
    is to be said.

    Args:
        reads: ``text``, or ``images``, which are as long as the model reads them.
        tokenizer: What :func:`load_reader` gave.
        model: With or without weights (on the meta device).
        wanted: The recipe's ``model:``, with or without ``max_length``.
        prompt: Positions that the adapter's own prompt takes.
    """
    if reads == "images":
        return 1, []
    note = ensure_padding(model, tokenizer)
    read_marks_as_text(model, tokenizer)
    return longest_input(model, tokenizer, wanted.get("max_length"), prompt), [note] if note else []


def too_long(split: str, cut: int, rows: int, max_length: int, what: str) -> str:
    """A sentence about inputs beyond ``max_length``, and what befalls them."""
    return f"{split}: {cut:,} of {rows:,} inputs are longer than {max_length} tokens and {what} (model.max_length)"


def ensure_padding(model: Any, tokenizer: Any) -> str | None:
    """Give model and tokenizer one padding token, and pad where it changes no result.

    Decoders pool the last token that is not padding; without a padding id they refuse batches, and on the
    left their positions would shift with the neighbours. A tokenizer without a padding token takes the end
    token: the model then pools the last token before it, in every batch alike. XLNet pools whatever stands
    last, and its positions are relative: it alone is padded on the left.

    Returns:
        What was changed, to be said aloud, or None.

    Raises:
        ModelError: The tokenizer has neither a padding nor an end token, or one that the model has no
            embedding for.
    """
    note = None
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ModelError("the tokenizer has neither a padding token nor an end token to pad with")
        tokenizer.pad_token = tokenizer.eos_token
        note = f"the tokenizer has no padding token: its end token {tokenizer.eos_token!r} is used"
    size = model.get_input_embeddings().weight.shape[0]
    if tokenizer.pad_token_id >= size:
        raise ModelError(
            f"the tokenizer's padding token {tokenizer.pad_token!r} is number {tokenizer.pad_token_id}, and the "
            f"model has embeddings for {size} tokens only; do the two belong together?"
        )
    side = "left" if _pools_last_position(model) else "right"
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = side  # else it is not saved
    model.config.pad_token_id = tokenizer.pad_token_id
    text_config = model.config.get_text_config()
    text_config.pad_token_id = tokenizer.pad_token_id
    return note


def read_marks_as_text(model: Any, tokenizer: Any) -> None:
    """Let an encoder-decoder's tokenizer read a ``</s>`` that stands in a text as text, and save that it does.

    BART's and T5's classifiers pool at the end tokens, and refuse a batch whose rows have unlike numbers of them.
    """
    if model.config.is_encoder_decoder:
        tokenizer.split_special_tokens = tokenizer.init_kwargs["split_special_tokens"] = True


def _pools_last_position(model: Any) -> bool:
    return hasattr(model, "sequence_summary") and getattr(model.config, "summary_type", None) == "last"


def longest_input(model: Any, tokenizer: Any, wanted: int | None, prompt: int = 0) -> int:
    """Tokens after which an input is cut: ``wanted``, or the least of 512 and what model and tokenizer take. The
    ``prompt`` of an adapter stands before the text and takes as many of the model's positions.

    Raises:
        ModelError: ``wanted`` is more than the model has positions for.
    """
    limit = _positions(model)
    limit = None if limit is None else limit - prompt
    if wanted is not None:
        if limit is not None and wanted > limit:
            taken = f", without the {prompt} of the adapter's prompt" if prompt else ""
            raise ModelError(
                f"model.max_length: {wanted} is more than the {limit} positions of this model{taken}"
            )
        return wanted
    return min(x for x in (DEFAULT_MAX_LENGTH, limit, tokenizer.model_max_length) if x)


def _positions(model: Any) -> int | None:
    """Positions that a table of embeddings or rotary angles was made for. Relative attention (T5, XLNet,
    DeBERTa v3) takes any length, whatever its configuration says."""
    config = model.config.get_text_config()
    declared = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    tables = [m for name, m in model.named_modules() if isinstance(m, nn.Embedding) and _is_position(name)]
    rotary = getattr(config, "rope_parameters", None) or getattr(config, "rope_theta", None)
    if not isinstance(declared, int) or declared < 1 or not (tables or rotary):
        return None
    # RoBERTa and its kin number positions from the table's padding_idx + 1 on, so the last ones are never reached.
    return declared - max((t.padding_idx + 1 for t in tables if t.padding_idx is not None), default=0)


def _is_position(name: str) -> bool:
    last = name.rpartition(".")[2]
    return "position" in last or last == "wpe"
