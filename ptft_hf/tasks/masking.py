"""BERT's masking: which tokens are hidden, and what stands in their place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ptft_hf.tasks.marks import IGNORED

MASKED, RANDOM = 0.8, 0.1
"""Shares of the chosen tokens that are replaced by the mask token, and by a random one; the others stay (Devlin et
al. 2019, 3.1)."""


def chosen(words: np.ndarray, fraction: float, whole_word: bool, rng: np.random.Generator) -> np.ndarray:
    """Positions to be predicted: ``fraction`` of the tokens, rounded, and at least one, as in BERT's own code.

    Args:
        words: ``[T]`` the word of each token; -1 is never chosen.
        fraction: Of the tokens that can be chosen.
        whole_word: Words in random order, each with all its tokens, are taken as long as they fit into that number;
            the shortest, if none fits.
        rng: Decides which.

    Returns:
        The positions, in ascending order.
    """
    places = np.flatnonzero(words >= 0)
    if not len(places):
        return places
    count = max(1, round(fraction * len(places)))
    if not whole_word:
        return np.sort(rng.permutation(places)[:count])
    _, numbers, sizes = np.unique(words[places], return_inverse=True, return_counts=True)
    order, left, taken = rng.permutation(len(sizes)), count, list[int]()
    for word in order:
        if sizes[word] <= left:
            taken.append(int(word))
            left -= int(sizes[word])
    taken = taken or [int(order[sizes[order].argmin()])]
    return places[np.isin(numbers, taken)]


def hidden(
    ids: np.ndarray, positions: np.ndarray, mask_id: int, others: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and labels ``[T]`` of a text of which these positions are predicted.

    Args:
        ids: ``[T]``.
        positions: As from :func:`chosen`.
        mask_id: The mask token.
        others: Tokens that may stand for another at random: all but the special ones.
        rng: Decides what becomes of each.
    """
    inputs, labels = ids.copy(), np.full_like(ids, IGNORED)
    labels[positions] = ids[positions]
    fate = rng.random(len(positions))
    inputs[positions[fate < MASKED]] = mask_id
    at = positions[(fate >= MASKED) & (fate < MASKED + RANDOM)]
    inputs[at] = rng.choice(others, len(at))
    return inputs, labels


class Masking:
    """A collator that hides tokens: in training anew in each epoch, else always the same of a row.

    What is hidden depends on the run's seed, the epoch and the row's number alone, and so not on batches, workers,
    processes, or where a run was resumed.

    Args:
        tokenizer: Pads, and has a mask token.
        fraction: As in :func:`chosen`.
        whole_word: As in :func:`chosen`.
    """

    def __init__(self, tokenizer: Any, fraction: float, whole_word: bool) -> None:
        self.tokenizer, self.fraction, self.whole_word = tokenizer, fraction, whole_word
        self.names = list(tokenizer.model_input_names)
        special = sorted(set(tokenizer.all_special_ids))
        self.others = np.setdiff1d(np.arange(len(tokenizer)), special)
        # Shared, so that workers that outlive an epoch see the next one.
        self.draw = torch.tensor([0, -1, -1])
        self.draw.share_memory_()  # type: ignore[no-untyped-call]

    def begin_epoch(self, seed: int, epoch: int) -> None:
        """From now on the tokens of this epoch of training are hidden."""
        self.draw.copy_(torch.tensor([1, seed, epoch]))

    def masked(self, row: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and labels ``[T]`` of an encoded row."""
        training, seed, epoch = self.draw.tolist()
        rng = np.random.default_rng([row["row"], *([seed, epoch] if training else [])])
        ids, words = np.array(row["input_ids"]), np.array(row["words"])
        positions = chosen(words, self.fraction, self.whole_word, rng)
        return hidden(ids, positions, self.tokenizer.mask_token_id, self.others, rng)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """A padded batch. Labels ``[B, T]`` hold the hidden tokens, -100 elsewhere; of a pair of texts, the first
        token, which is a mark and never hidden, has the label of the pair. Rows of ``predict`` have none."""
        found = [self.masked(row) if "row" in row else (row["input_ids"], None) for row in rows]
        inputs = [
            {name: row[name] for name in self.names if name in row} | {"input_ids": np.asarray(ids).tolist()}
            for row, (ids, _) in zip(rows, found, strict=True)
        ]
        batch = dict(self.tokenizer.pad(inputs, return_tensors="pt"))
        if "row" in rows[0]:
            labels = [values.tolist() for _, values in found if values is not None]
            if "next" in rows[0]:
                labels = [[row["next"], *values[1:]] for row, values in zip(rows, labels, strict=True)]
            batch["labels"] = padded(labels, batch["input_ids"], self.tokenizer.padding_side)
        return batch


def padded(labels: Sequence[Sequence[int]], ids: torch.Tensor, side: str) -> torch.Tensor:
    """Labels as a tensor of the shape of ``ids``, -100 where they end."""
    found = torch.full_like(ids, IGNORED)
    for line, values in zip(found, labels, strict=True):
        place = slice(len(line) - len(values), None) if side == "left" else slice(0, len(values))
        line[place] = torch.tensor(values)
    return found
