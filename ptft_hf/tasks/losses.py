"""Losses that several families share, summed and in float32."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F

from ptft_hf.models.lm_heads import LazyLogits


def cross_entropy(
    logits: torch.Tensor | LazyLogits,
    labels: torch.Tensor,
    weights: torch.Tensor | None,
    label_smoothing: float = 0.0,
    focal_gamma: float = 0.0,
) -> torch.Tensor:
    """Sum of ``N`` cross-entropies; with ``focal_gamma`` each is multiplied by ``(1 - p)**gamma`` (Lin et al. 2017).

    Args:
        logits: ``[N, C]``, or those of a language model that are yet to be computed.
        labels: ``[N]``, each below ``C``.
        weights: ``[C]``, or None for 1.
        label_smoothing: As in ``torch.nn.functional.cross_entropy``; not heeded under ``focal_gamma``.
        focal_gamma: 0 is cross-entropy.
    """
    if isinstance(logits, LazyLogits):
        return logits.summed(
            partial(cross_entropy, weights=weights, label_smoothing=label_smoothing, focal_gamma=focal_gamma), labels
        )
    logits = logits.float()
    if not focal_gamma:
        return F.cross_entropy(logits, labels, weights, reduction="sum", label_smoothing=label_smoothing)
    log_p = F.log_softmax(logits, -1).gather(-1, labels[:, None]).squeeze(-1)
    scale = weights[labels] if weights is not None else 1.0
    return (-log_p * (1 - log_p.exp()) ** focal_gamma * scale).sum()
