"""What masked and causal language models share as tasks: running text without labels, and figures of each row."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ptft_hf import forward, models
from ptft_hf.errors import DataError, ModelError
from ptft_hf.recipes import Cleaning
from ptft_hf.tasks import TaskDefaults, figures, losses
from ptft_hf.tasks.marks import IGNORED


class LanguageModel(TaskDefaults):
    """Text (column ``text``) that is its own label, in documents (column ``document``).

    Outputs are figures of each row, ``[N, 3]``: the summed loss, the number of predicted tokens, and how many were
    right. Logits, one for each token of the vocabulary, are never kept.
    """

    labels: list[str]
    peft_task_type: str
    required: Sequence[str] = ("text",)
    optional: Sequence[str] = ("document",)
    otherwise: Sequence[Sequence[str]] = ()
    text_columns: Sequence[str] = ("text",)
    label_column: str | None = None
    best_metric = "loss"
    smooths_labels = True
    group_column: str | None = "document"
    begins_from_nothing = True
    loss_from_states = True
    recipe: Any

    @property
    def auto_class(self) -> str:
        raise NotImplementedError

    @property
    def cleaning(self) -> Cleaning | None:  # type: ignore[override]
        return self.recipe.cleaning  # type: ignore[no-any-return]

    # ---- before training ----

    def look_at_checkpoint(self, config: Any, tokenizer: Any) -> list[str]:
        if self.recipe.tokenizer is None:
            return []
        return ["tokenizer: the checkpoint's own is used; the recipe's is for models from nothing"]

    def reader_from_nothing(self, reference: str, config: Any, rows: Any) -> tuple[Any, list[str]]:
        """The recipe's tokenizer, or one that is trained on the rows."""
        tokenizer, note = models.tokenizer_of(
            reference,
            self.recipe.tokenizer,
            rows["text"][:],
            kind=self.recipe.tokenizer_kind,
            token_types=models.takes_token_types(self.auto_class, config),
        )
        return tokenizer, [note]

    def documents(self, rows: Any) -> list[list[int]]:
        """Row numbers of each document."""
        raise NotImplementedError

    def look_at(self, splits: Any) -> list[str]:
        """How many texts and documents there are."""
        notes = []
        for name in ("train", "validation", "test"):
            rows = getattr(splits, name)
            found = self.documents(rows)
            notes.append(f"{name}: {len(rows):,} texts, {_counted(len(found), 'document')}")
        return notes

    def config(self) -> dict[str, Any]:
        return {}

    def sampling_weights(self, encoded: Any) -> list[float] | None:
        return None

    # ---- loss ----

    def loss_weight(self, labels: torch.Tensor) -> torch.Tensor:
        """Number of labels; -100 is none."""
        return (labels != IGNORED).sum().float()

    def loss(self, logits: Any, labels: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
        """Sum of the cross-entropies of all predicted tokens.

        Args:
            logits: ``[B, T, V]``.
            labels: ``[B, T]``: the token that each position is to predict, -100 where there is none.
            label_smoothing: As in ``TrainingArguments.label_smoothing_factor``.
        """
        kept = labels != IGNORED
        return losses.cross_entropy(logits[kept], labels[kept], None, label_smoothing)

    # ---- after the model ----

    def collator(self, tokenizer: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        raise NotImplementedError

    def outputs(
        self, model: Any, encoded: Any, tokenizer: Any, batch_size: int, progress: bool = False
    ) -> Any:
        """Figures ``[N, 3]`` of each row; of inputs of ``predict``, its answers."""
        if "given" in encoded.column_names:
            return self.answers(model, encoded, tokenizer, batch_size, progress)
        return figures.of_rows(model, encoded, self.collator(tokenizer), batch_size, progress, self.scored)

    def answers(
        self, model: Any, encoded: Any, tokenizer: Any, batch_size: int, progress: bool
    ) -> list[dict[str, Any]]:
        raise NotImplementedError

    def passes(
        self, model: Any, encoded: Any, tokenizer: Any, batch_size: int, progress: bool
    ) -> Iterator[tuple[np.ndarray, dict[str, torch.Tensor], Any]]:
        """Forward passes in batches whose logits fit into memory."""
        size = forward.fitting(model, batch_size, max(encoded["length"][:], default=1))
        yield from forward.passes(model, encoded, self.collator(tokenizer), size, progress)

    def scored(self, outputs: Any, labels: torch.Tensor) -> torch.Tensor:
        """Figures of each row of a batch, in float64."""
        return figures.token_figures(outputs, labels)

    def targets(self, encoded: Any) -> dict[str, float]:
        """What there is to be had by chance: the share of the most frequent token among the rows' own."""
        return {"commonest": _commonest(encoded)}

    def mean_loss(self, outputs: np.ndarray, encoded: Any) -> float:
        """The mean loss over all predicted tokens."""
        return mean(outputs[:, 0], outputs[:, 1])

    def metrics(self, outputs: np.ndarray, targets: Any) -> dict[str, float]:
        raise NotImplementedError

    def outcomes(self, outputs: np.ndarray, targets: Any) -> list[float]:
        """Minus the mean loss of each row, which is the log-likelihood of a token."""
        return [-mean(row[0], row[1]) if row[1] else 0.0 for row in outputs]

    def after_training(self, outputs: Any, targets: Any) -> list[str]:
        return []

    def predictions(self, outputs: list[dict[str, Any]], targets: Any = None) -> list[dict[str, Any]]:
        return outputs

    def same(self, one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
        return bool(one["text"] == other["text"])

    # ---- in use ----

    def unknown_labels(self, rows: Any) -> list[str]:
        return []

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Nothing was learnt from the data but the weights."""


def mean(total: Any, count: Any) -> float:
    """A mean over all rows.

    Raises:
        ModelError: It is no number, or of nothing.
    """
    if not np.sum(count):
        raise DataError("nothing is predicted on these rows: their texts are empty")
    value = float(np.sum(total) / np.sum(count))
    if not math.isfinite(value):
        raise ModelError("the loss is not a number; if training diverged, try a lower learning rate")
    return value


def perplexity(loss: float) -> float:
    """``exp`` of the mean loss of a token; infinite from where a float ends."""
    return math.exp(loss) if loss < 700 else math.inf


def commonest_share(ids: np.ndarray) -> float:
    return float(np.bincount(ids).max() / len(ids)) if len(ids) else 0.0


def _commonest(encoded: Any) -> float:
    columns = [encoded[name][:] for name in ("input_ids", "words") if name in encoded.column_names]
    if len(columns) == 1:
        return commonest_share(np.concatenate(columns[0]))
    pairs = zip(*columns, strict=True)
    return commonest_share(np.concatenate([np.array(ids)[np.array(words) >= 0] for ids, words in pairs]))


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
