"""Preferences between two answers: a reward model, which gives each answer a score."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ptft_hf import forward
from ptft_hf.errors import DataError
from ptft_hf.recipes import PreferenceRecipe
from ptft_hf.tasks import TaskDefaults, Usage, conversations, pairs, rivals, scores
from ptft_hf.tasks.conversations import Reading
from ptft_hf.tasks.inputs import padded, tokenized
from ptft_hf.tasks.marks import Mark, Segment, pieces
from ptft_hf.tasks.pairs import ANSWERS
from ptft_hf.tasks.rivals import Rivals
from ptft_hf.tasks.scores import Targets

CENTRE_ROWS = 500
"""Training pairs whose mean score is the centre, which is then known to a 32nd of the scores' deviation."""
SCORING = """{code}
with torch.no_grad():
    score = model(**inputs).logits[0, 0] - {centre!r}
print(score)"""


class Preference(TaskDefaults):
    """Columns ``chosen`` and ``rejected`` (texts, or messages, of which the last is the answer), and, where there are
    any, ``prompt`` (a text or messages), ``margin`` (a number from 0 on) and ``tie`` (whether none is better).

    The loss is that of Bradley and Terry's model, ``-log sigmoid(score(chosen) - score(rejected) - margin)``
    (Christiano et al. 2017, Ouyang et al. 2022; margins: Touvron et al. 2023); a tie has the target probability 1/2.

    One encoded row is a pair: the ids of both answers, each behind the prompt, stand one behind the other in
    ``input_ids``, and ``parts`` has their lengths. Outputs are scores ``[N, 2]``, the second of them NaN where a row
    has but one answer. :func:`ptft_hf.tasks.conversations.encode` says what is read.
    """

    auto_class = "AutoModelForSequenceClassification"
    peft_task_type = "SEQ_CLS"
    labels: list[str] = []  # noqa: RUF012 - none, and never any
    required = ANSWERS
    optional = ("prompt", "margin", "tie")
    value_columns = ("margin", "tie")
    otherwise = ()
    text_columns = ("prompt", *ANSWERS)
    label_column: str | None = None
    group_column = "prompt"
    best_metric = "accuracy"
    smooths_labels = True
    sequences = 2
    loses_tails = False
    long_inputs = "lose the begin of their prompt"

    def __init__(self, recipe: PreferenceRecipe) -> None:
        self.recipe = recipe
        self.centre = 0.0
        """The mean score of training answers, which every score is given without."""
        self.rivals: Rivals | None = None
        self._reading: Reading | None = None
        self._train: Any = None

    @property
    def reading(self) -> Reading:
        """How the checkpoint reads a prompt with its answer."""
        assert self._reading is not None, "look_at_checkpoint or restore comes first"
        return self._reading

    # ---- before training ----

    def look_at(self, splits: Any) -> list[str]:
        """Check the columns; say how many pairs and ties there are, and how long answers are.

        Raises:
            DataError: Answers or prompts that are neither texts nor messages, a margin or tie that is none, or
                nothing but ties.
        """
        notes, problems = [], []
        for name in ("train", "validation", "test"):
            rows = getattr(splits, name)
            found = pairs.faults(name, rows)
            if not found and all(map(pairs.is_tie, rows)):
                found = [f"{name}: all {len(rows):,} pairs are ties: there is nothing to tell apart"]
            problems += found
            if not found:
                notes.append(pairs.described(name, rows))
        if problems:
            raise DataError(*problems)
        self._train = splits.train
        return notes

    def look_at_checkpoint(self, config: Any, tokenizer: Any) -> list[str]:
        """How it reads a prompt with its answer, and what it pads with.

        Raises:
            ModelError: See :func:`ptft_hf.tasks.conversations.reading_of`.
        """
        given = [name for name in self.text_columns if name in self._train.column_names]
        has_messages = any(not isinstance(self._train[0][name], str) for name in given)
        self._reading, notes = conversations.reading_of(
            config, tokenizer, has_prompts="prompt" in given or has_messages, has_messages=has_messages
        )
        return notes

    def config(self) -> dict[str, Any]:
        return {"num_labels": 1}

    # ---- rows to batches ----

    def encode(self, rows: Any, tokenizer: Any, max_length: int) -> tuple[Any, int]:
        """Token ids of both answers of every row, each behind its prompt; longer ones lose the prompt's begin.

        Returns:
            The rows, with the ``length`` of the longer of their answers; and how many of them were cut.

        Raises:
            DataError: A chat template refuses a conversation.
        """
        cut = 0

        def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
            nonlocal cut
            table = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
            turns = [pairs.conversations_of(row) for row in table]
            flat = [one for several in turns for one in several]
            found, were_cut = conversations.encode(self.reading, tokenizer, flat, max_length)
            sequences, marks = iter(found), iter(were_cut)
            columns: dict[str, list[Any]] = {"parts": [], "length": [], "answers": []}
            for several in turns:
                own = list(islice(sequences, len(several)))
                cut += any(list(islice(marks, len(several))))
                for name in own[0]:
                    columns.setdefault(name, []).append([value for one in own for value in one[name]])
                columns["parts"].append([len(one["input_ids"]) for one in own])
                columns["length"].append(max(columns["parts"][-1]))
                columns["answers"].append([one[-1]["content"] for one in several])
            if "chosen" in batch:
                columns["labels"] = [pairs.label_of(row) for row in table]
            return columns

        return tokenized(rows, encode), cut

    def segments(self, row: Mapping[str, Any], tokenizer: Any) -> list[Segment]:
        """The prompt, and both answers behind it; what is trained is which of them is better."""
        first, second = (one["input_ids"] for one in _sequences(row))
        same = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), len(first))
        same = min(same, len(second))

        def shown(ids: Sequence[int], mark: Mark = "input") -> list[Segment]:
            return pieces(tokenizer, ids, [(mark, "")] * len(ids))

        probability, margin = row["labels"]
        verdict = "chosen better" if probability == 1 else "a tie"
        verdict += f" by {margin:g}" if margin else ""
        both = [Segment(" | chosen: "), *shown(first[same:]), Segment(" | rejected: "), *shown(second[same:])]
        return [Segment(verdict, "trained"), Segment(" <- "), *shown(first[:same]), *both]

    def collator(self, tokenizer: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Pads the answers of a batch to their longest: ``[2 B, T]``, and labels ``[B, 2]``."""

        def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
            batch = padded(tokenizer, [one for row in rows for one in _sequences(row)])
            if "labels" in rows[0]:
                batch["labels"] = torch.tensor([row["labels"] for row in rows])
            return batch

        return collate

    def sampling_weights(self, encoded: Any) -> list[float] | None:
        return None

    # ---- loss ----

    def loss_weight(self, labels: torch.Tensor) -> torch.Tensor:
        """Number of pairs."""
        return torch.tensor(float(len(labels)), device=labels.device)

    def loss(self, logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
        """Sum over the pairs of the cross-entropy between the target probability and
        ``sigmoid(first score - second score - margin)``, in float32.

        Args:
            logits: ``[2 N, 1]`` scores of first, second, first, ... answers, or ``[N, 2]``.
            labels: ``[N, 2]``: target probability and margin.
            label_smoothing: ``e`` makes the target ``p`` one of ``p (1 - e) + e / 2``.
        """
        both, (target, margin) = logits.float().reshape(-1, 2), labels.float().unbind(1)
        target = target * (1 - label_smoothing) + label_smoothing / 2
        return F.binary_cross_entropy_with_logits(both[:, 0] - both[:, 1] - margin, target, reduction="sum")

    # ---- after the model ----

    def outputs(
        self, model: Any, encoded: Any, tokenizer: Any, batch_size: int, progress: bool = False
    ) -> np.ndarray:
        """Scores ``[N, 2]`` as the model gives them, not centred."""
        counts = [len(parts) for parts in encoded["parts"][:]]
        found = np.full((len(encoded), 2), np.nan, dtype=np.float32)
        size = max(1, batch_size // max(counts, default=1))
        for rows, _, logits in forward.batches(model, encoded, self.collator(tokenizer), size, progress):
            given = iter(logits[:, 0].tolist())
            for row in rows:
                found[row, : counts[row]] = list(islice(given, counts[row]))
        return found

    def targets(self, encoded: Any) -> Targets:
        known = "labels" in encoded.column_names
        return Targets(np.array(encoded["labels"][:]) if known else None, encoded["answers"][:])

    def mean_loss(self, outputs: np.ndarray, encoded: Any) -> float:
        """The mean over all pairs."""
        labels = torch.tensor(encoded["labels"][:])
        return (self.loss(torch.from_numpy(outputs), labels) / self.loss_weight(labels)).item()

    def metrics(self, outputs: np.ndarray, targets: Targets) -> dict[str, float]:
        """``accuracy``: see :func:`ptft_hf.tasks.scores.accuracy`. ``loss``: the mean over all pairs."""
        assert targets.labels is not None
        labels = torch.from_numpy(targets.labels)
        loss = self.loss(torch.from_numpy(outputs), labels) / self.loss_weight(labels)
        return {"accuracy": scores.accuracy(outputs, targets), "loss": loss.item()}

    def report(self, outputs: np.ndarray, targets: Targets) -> dict[str, Any]:
        """See :func:`ptft_hf.tasks.scores.report`."""
        return scores.report(outputs, targets, self._fitted_rivals())

    def _fitted_rivals(self) -> Rivals | None:
        """Fitted on the training split, if that is not done yet and it is at hand."""
        if self.rivals is None and self._train is not None:
            self.rivals = rivals.fit([pairs.answers_of(row) for row in self._train if not pairs.is_tie(row)])
        return self.rivals

    def outcomes(self, outputs: np.ndarray, targets: Targets) -> list[float]:
        """See :func:`ptft_hf.tasks.scores.outcomes`."""
        return scores.outcomes(outputs, targets)

    def rows_to_look_back_on(self, encoded: Any) -> Any:
        """Up to :data:`CENTRE_ROWS`, spread evenly."""
        count = min(CENTRE_ROWS, len(encoded))
        return encoded.select([i * len(encoded) // count for i in range(count)])

    def look_back(self, outputs: np.ndarray, targets: Targets) -> list[str]:
        """Take the mean score of training answers as the centre."""
        self.centre = float(outputs.astype(np.float64).mean())
        return [f"scores are centred: {self.centre:.4g} is taken off, the mean of {outputs.size:,} training answers"]

    def after_training(self, outputs: np.ndarray, targets: Targets) -> list[str]:
        """Say how the model fares beside its rivals, and which it does not beat: those whose accuracy on the same
        pairs is no lower than its own, wherever its interval ends."""
        found, accuracy = self.report(outputs, targets), self.metrics(outputs, targets)["accuracy"]
        if not found["pairs"]:
            return []
        low, high = found["accuracy_interval"]
        others = found["rivals"]
        notes = [
            f"validation: accuracy {accuracy:.3f} ({low:.3f} to {high:.3f}) on {found['pairs']:,} pairs; the "
            f"{others['length_prefers']} answer {others['length']:.3f}, a bag of words {others['bag_of_words']:.3f}"
        ]
        names = {"length": "length", "bag_of_words": "a bag of words"}
        if ahead := " or ".join(name for key, name in names.items() if others[key] >= accuracy):
            notes.append(f"the model does not beat {ahead} on validation: PPO would have little to follow")
        return notes

    def predictions(self, outputs: np.ndarray, targets: Any = None) -> list[dict[str, Any]]:
        """For one answer ``{"score": ...}``; for two ``{"scores": {"chosen", "rejected"}, "better", "probability"}``:
        which is better (``tie`` for equal scores), and the probability that ``chosen`` is. Scores are centred."""
        found: list[dict[str, Any]] = []
        for first, second in outputs.tolist():
            if math.isnan(second):
                found.append({"score": first - self.centre})
                continue
            found.append(
                {
                    "scores": {"chosen": first - self.centre, "rejected": second - self.centre},
                    "better": "chosen" if first > second else "rejected" if second > first else "tie",
                    "probability": float(scores.chances(first - second)),
                }
            )
        return found

    def same(self, one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
        """The same answer is better, or scores differ by no more than rounding."""
        if "score" in one:
            return math.isclose(one["score"], other["score"], rel_tol=1e-4, abs_tol=1e-4)
        return bool(one["better"] == other["better"])

    # ---- in use ----

    def input_row(self, value: Any, columns: Sequence[str]) -> dict[str, Any]:
        """A text, which is an answer; or an object with ``answer``, or ``chosen`` and ``rejected``, and with
        ``prompt`` if the training rows had one. Each is a text or a list of messages."""
        row = {"answer": value} if isinstance(value, str) else value
        if not isinstance(row, Mapping):
            raise DataError(f"{value!r} is neither a text nor an object with 'answer', or 'chosen' and 'rejected'")
        names = ("answer",) if "answer" in row else ANSWERS
        needed = [*names, *(["prompt"] if "prompt" in columns else [])]
        if missing := [name for name in needed if name not in row]:
            raise DataError(
                f"{', '.join(map(repr, missing))} must be given, as text or messages; this model was trained on "
                f"{list(columns)}, and the input has {sorted(map(str, row))}"
            )
        prompt = conversations.checked("prompt", row.get("prompt") or "")
        return {
            "conversations": [conversations.conversation(prompt, conversations.checked(n, row[n])) for n in names]
        }

    def unknown_labels(self, rows: Any) -> list[str]:
        """None: there are no labels.

        Raises:
            DataError: See :meth:`look_at`.
        """
        if problems := pairs.faults("data", rows):
            raise DataError(*problems)
        return []

    def usage(self, columns: Sequence[str], max_length: int) -> Usage:
        prompt, answers = "Why is the sky blue?", ("Air scatters blue light most.", "It is not.")
        given = {"prompt": prompt} if "prompt" in columns else {}
        inputs = [{**given, "answer": answers[0]}, {**given, **dict(zip(ANSWERS, answers, strict=True))}]
        code = conversations.usage(self.reading, prompt if given else "", answers[0], max_length)
        return Usage(
            SCORING.format(code=code, centre=self.centre),
            inputs,
            "",
            "gives an answer a score, higher for better ones; the mean over training answers is 0",
        )

    def state(self) -> dict[str, Any]:
        found = self._fitted_rivals()
        return {
            "reading": self.reading._asdict(),
            "centre": self.centre,
            "rivals": None if found is None else found._asdict(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self._reading, self.centre = Reading(**state["reading"]), float(state["centre"])
        self.rivals = Rivals(**state["rivals"]) if state["rivals"] else None


def _sequences(row: Mapping[str, Any]) -> list[dict[str, list[int]]]:
    """What the model reads of each of an encoded row's answers."""
    names = [name for name in row if name not in ("parts", "length", "answers", "labels")]
    found, start = [], 0
    for length in row["parts"]:
        found.append({name: row[name][start : start + length] for name in names})
        start += length
    return found
