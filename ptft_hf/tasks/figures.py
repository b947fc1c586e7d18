"""Figures of each row of a language model, from which losses and accuracies are made; logits are never kept, and made
where there are labels."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ptft_hf import forward, models
from ptft_hf.models.lm_heads import CHUNK, states_kept
from ptft_hf.tasks.marks import IGNORED


def where_labelled(model: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch with its labels cut to the columns in which some row has one, and with ``logits_to_keep``, by which
    upstream's decoders make logits there alone: of a summary behind its document these are a tenth of all.

    Other models' batches stay as they are.
    """
    labels: torch.Tensor | None = batch.get("labels")
    if labels is None or labels.ndim != 2 or labels.shape != batch.get("input_ids", labels[:0]).shape[:2]:
        return dict(batch)
    columns = (labels != IGNORED).any(0).nonzero()[:, 0]
    takes = inspect.signature(type(models.plain_model(model)).forward).parameters
    if "logits_to_keep" not in takes or len(columns) in (0, labels.shape[1]):
        return dict(batch)
    return {**batch, "labels": labels[:, columns], "logits_to_keep": columns}


@torch.no_grad()
def can_be_lazy(model: Any, batch: Mapping[str, Any]) -> bool:
    """Whether :func:`ptft_hf.models.lm_heads.lm_logits` of what the head is given are the model's own logits, tried
    on a batch."""
    head = models.plain_model(model).get_output_embeddings()
    if not isinstance(getattr(head, "weight", None), torch.Tensor):
        return False
    inputs, training = {name: value for name, value in batch.items() if name != "labels"}, model.training
    model.eval()
    try:
        expected = forward.first_logits(model(**inputs)).float()
        with states_kept(model) as kept:
            model(**inputs)
        found = kept[0].computed()
    except (TypeError, IndexError, ValueError, RuntimeError):
        return False
    finally:
        model.train(training)
    rounding = 1e-4 * expected.abs().max().item()
    return len(kept) == 1 and found.shape == expected.shape and torch.allclose(found, expected, atol=rounding)


def token_figures(outputs: Any, labels: torch.Tensor) -> torch.Tensor:
    """:func:`scores` of what a model says, by its first head."""
    return scores(forward.first_logits(outputs), labels)


def scores(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Summed loss, number and number of right answers ``[B, 3]``, in float64 on the CPU; of the logits no more than
    :data:`ptft_hf.models.lm_heads.CHUNK` are copied at a time.

    Args:
        logits: ``[B, T, V]``.
        labels: ``[B, T]``, -100 where there is none.
    """
    places = (labels != IGNORED).nonzero()
    table = torch.zeros(len(labels), 3, dtype=torch.float64)
    for rows, columns in (some.unbind(1) for some in torch.split(places, max(1, CHUNK // logits.shape[-1]))):
        told, wanted = logits[rows, columns].float(), labels[rows, columns].to(logits.device)
        losses = F.cross_entropy(told, wanted, reduction="none")
        values = torch.stack([losses, torch.ones_like(losses), (told.argmax(-1) == wanted).float()], 1)
        table.index_add_(0, rows.cpu(), values.double().cpu())
    return table


def of_rows(
    model: Any,
    encoded: Any,
    collate: Callable[..., Any],
    batch_size: int,
    progress: bool = False,
    of_batch: Callable[[Any, torch.Tensor], torch.Tensor] = token_figures,
) -> np.ndarray:
    """Figures ``[N, K]`` of the ``N`` rows, in their order.

    Args:
        model: The language model.
        encoded: Rows with ``length``, and labels once they are collated.
        collate: Makes a batch of them.
        batch_size: Rows that run together, or fewer: see :func:`ptft_hf.forward.fitting`.
        progress: Show a bar.
        of_batch: Figures ``[B, K]`` of what the model says and the labels.
    """
    own = encoded["labels"][:] if "labels" in encoded.column_names else ()  # a decoder's may be the longer ones
    longest = max([1, *encoded["length"][:], *map(len, own)])
    size = forward.fitting(model, batch_size, longest)
    found: dict[int, np.ndarray] = {}

    def collated(rows: list[dict[str, Any]]) -> dict[str, Any]:
        return where_labelled(model, collate(rows))

    for rows, batch, outputs in forward.passes(model, encoded, collated, size, progress):
        found.update(zip(rows.tolist(), of_batch(outputs, batch["labels"]).numpy(), strict=True))
    return np.stack([found[row] for row in range(len(encoded))])
