"""Tokens that a checkpoint does not know, and the rows of its embeddings that they get."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ptft_hf.errors import ModelError


def add_tokens(model: Any, tokenizer: Any, tokens: Sequence[str]) -> dict[str, Any] | None:
    """Teach the tokenizer new tokens, which are found in texts as they are written, and give the model rows for them.

    Returns:
        What :func:`give_rows` needs to do the same to the base when it is loaded again; None without tokens.

    Raises:
        ModelError: The tokenizer knows some of them already.
    """
    import tokenizers

    if not tokens:
        return None
    vocabulary = tokenizer.get_vocab()
    if known := [token for token in tokens if token in vocabulary]:
        raise ModelError(f"add_tokens: the tokenizer knows {known} already; leave them out")
    before = len(tokenizer)
    # Not special ones: these are left out of decoded texts, and an encoder-decoder's are read as plain text here.
    tokenizer.add_tokens([tokenizers.AddedToken(token, normalized=False, special=False) for token in tokens])
    size = max(len(model.get_input_embeddings().weight), len(tokenizer))
    added = {"ids": tokenizer.convert_tokens_to_ids(list(tokens)), "known": before, "rows": size}
    give_rows(model, **added)
    return {"tokens": list(tokens), **added}


def give_rows(model: Any, *, ids: Sequence[int], known: int, rows: int, **_: Any) -> None:
    """Embeddings of new tokens: the mean of all others, so that they disturb least (Hewitt 2021, "Initializing New
    Word Embeddings"); upstream draws them at random about it.

    Args:
        model: The base; its configuration beside an adapter stays what it was (see :func:`base_config`).
        ids: Of the new tokens.
        known: Tokens that there were before.
        rows: Of the embeddings from now on.
    """
    if rows != len(model.get_input_embeddings().weight):
        model.base_vocabulary = model.config.get_text_config().vocab_size
        model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            for values in (getattr(module, "weight", None), getattr(module, "bias", None)):
                if values is not None:
                    values[list(ids)] = values[:known].float().mean(0).to(values)
    model.added_rows = tuple(ids)


def copy_rows(model: Any, source: str, target: str) -> None:
    """The rows of added tokens that one of PEFT's adapters holds, into another one of the same model."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(f".trainable_tokens_delta.{target}"):
                parameter.copy_(model.get_parameter(f"{name.removesuffix(target)}{source}"))


def added_rows(model: Any) -> tuple[int, ...]:
    """Rows of the embeddings that :func:`give_rows` gave to new tokens."""
    return getattr(model, "added_rows", ())


def base_config(model: Any) -> Any:
    """The configuration with which the base of an adapter is loaded: with its own number of rows."""
    import copy

    config = copy.deepcopy(model.config)
    before = getattr(model, "base_vocabulary", None)
    if before is not None:
        config.get_text_config().vocab_size = before
    return config


def train_rows(model: Any) -> None:
    """Train the rows of added tokens, and leave all others of the embeddings as they are.

    The others' gradients are zero; the Trainer applies no weight decay to such a parameter, so AdamW does not move
    them.
    """
    rows = added_rows(model)
    if not rows:
        return
    weight = model.get_input_embeddings().weight
    if weight.requires_grad:
        return
    mask = torch.zeros(len(weight), 1)
    mask[list(rows)] = 1
    weight.requires_grad_(True)
    weight.register_hook(lambda gradient: gradient * mask.to(gradient))
    weight.trained_rows = rows


def trains_rows_alone(parameter: Any) -> bool:
    """Whether :func:`train_rows` has been here."""
    return hasattr(parameter, "trained_rows")
