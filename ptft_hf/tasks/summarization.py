"""Summaries: a short text for a long one, written by an encoder-decoder or by a decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ptft_hf import report
from ptft_hf.errors import DataError
from ptft_hf.recipes import SummarizationRecipe
from ptft_hf.tasks import TaskDefaults, Usage, figures, generation, losses, prompting, rouge, summary_usage
from ptft_hf.tasks.inputs import text_row
from ptft_hf.tasks.marks import IGNORED
from ptft_hf.tasks.prompting import Speech
from ptft_hf.tasks.references import described, faults, is_summary, references_of

BATCH = 1000
MANY_ROWS = 20_000
"""Tokenizing fewer takes seconds, and a bar for it is noise."""
SHOWN = 5
"""Summaries that a report shows beside their references."""


class Written(NamedTuple):
    """What the model says on one row.

    Attributes:
        loss: Sum of the cross-entropies of the first reference's tokens; 0 without a reference.
        tokens: How many these are, the end token among them.
        summary: Its own text; None if it was not asked for one, see :meth:`Summarization.between_epochs`.
        cut_off: Whether a part of it came to no end within ``max_new_tokens``.
    """

    loss: float
    tokens: int
    summary: str | None
    cut_off: bool


class Targets(NamedTuple):
    """Documents, and the references of each (None where there are none)."""

    documents: list[str]
    references: list[list[str]] | None


class Summarization(TaskDefaults):
    """Columns ``document`` and ``summary``: a text, or a list of references, of which the first is trained and all
    are scored.

    The checkpoint decides on the kind of model: encoder-decoders read the document and write the summary, decoders
    go on from a prompt with the document in it (a chat, if their tokenizer has a template), trained on the summary
    and its end token alone. One encoded row is a document; ``input_ids[:prompt_length]`` is its prompt and ``rest``
    holds the prompts of its further parts, if it was split. Labels are the tokens to be predicted *at* each position.
    """

    required = ("document", "summary")
    optional = ()
    otherwise = ()
    text_columns = ("document",)
    label_column = "summary"
    labels: list[str] = []  # noqa: RUF012 - none, and never any
    best_metric = "rougeL"
    smooths_labels = True
    loss_from_states = True
    trains_end_token = True

    def __init__(self, recipe: SummarizationRecipe) -> None:
        """
        Raises:
            RecipeError: Upstream refuses the generation settings.
        """
        self.recipe = recipe
        self.fields = generation.settings(recipe.generation)
        self._speech: Speech | None = None

    @property
    def speech(self) -> Speech:
        """How the checkpoint is spoken to."""
        assert self._speech is not None, "look_at_checkpoint or restore comes first"
        return self._speech

    @property
    def auto_class(self) -> str:
        return "AutoModelForSeq2SeqLM" if self.speech.has_encoder else "AutoModelForCausalLM"

    @property
    def peft_task_type(self) -> str:
        return "SEQ_2_SEQ_LM" if self.speech.has_encoder else "CAUSAL_LM"

    @property
    def long_inputs(self) -> str:
        if self.recipe.long_documents == "split":
            return "are read in parts, whose summaries are joined (the first part is trained)"
        return "were truncated"

    # ---- before training ----

    def look_at(self, splits: Any) -> list[str]:
        """Check the columns; say how long documents and summaries are.

        Raises:
            DataError: A document that is no text, or a summary that is neither a text nor a list of texts.
        """
        notes, problems = [], []
        for name in ("train", "validation", "test"):
            table = getattr(splits, name)
            found = faults(name, table)
            problems += found
            if not found:
                notes.append(described(name, table))
        if problems:
            raise DataError(*problems)
        return notes

    def look_at_checkpoint(self, config: Any, tokenizer: Any) -> list[str]:
        """Encoder-decoder or decoder, and with which prompt.

        Raises:
            ModelError: See :func:`ptft_hf.tasks.prompting.speech_of`.
        """
        self._speech = prompting.speech_of(config, tokenizer, self.recipe.prompt)
        return []

    def config(self) -> dict[str, Any]:
        return {}

    # ---- rows to batches ----

    def encode(self, rows: Any, tokenizer: Any, max_length: int) -> tuple[Any, int]:
        """Prompts and labels of all rows; a prompt, and what a decoder writes behind it, fit into ``max_length``.

        Returns:
            The rows, with their ``length`` in tokens; and how many documents are too long.

        Raises:
            RecipeError: The prompt and ``max_new_tokens`` leave no room for a document.
        """
        columns: dict[str, list[Any]] = {}
        long = cut = 0
        with report.bar(len(rows), "Tokenizing", "row", stays=False, show=len(rows) > MANY_ROWS) as bar:
            for start in range(0, len(rows), BATCH):
                some = rows.select(range(start, min(start + BATCH, len(rows)))).to_dict()
                found, many, shortened = self._encoded(some, tokenizer, max_length)
                long, cut = long + many, cut + shortened
                for name, values in found.items():
                    columns.setdefault(name, []).extend(values)
                bar.update(len(some["document"]))
        if cut:
            report.say(
                f"- {cut:,} of {len(rows):,} summaries are cut for training to the {self.fields['max_new_tokens']} "
                "tokens that may be written (generation.max_new_tokens)"
            )
        return _dataset(columns), long

    def _encoded(
        self, rows: Mapping[str, list[Any]], tokenizer: Any, max_length: int
    ) -> tuple[dict[str, list[Any]], int, int]:
        """Columns of some rows, and how many documents are long and how many summaries are cut."""
        speech, room = self.speech, self.fields["max_new_tokens"]
        found = prompting.prompts_of(
            speech,
            tokenizer,
            rows["document"],
            max_length if speech.has_encoder else max_length - room,
            self.recipe.long_documents == "split",
        )
        inputs = [prompt.ids[0] for prompt in found]
        columns: dict[str, list[Any]] = {
            "prompt_length": [len(ids) for ids in inputs],
            "rest": [prompt.ids[1:] for prompt in found],
            "document": rows["document"],
        }
        cut = 0
        if "summary" in rows:
            columns["references"] = [references_of(value) for value in rows["summary"]]
            first = [references[0] for references in columns["references"]]
            targets, cut = prompting.targets_of(speech, tokenizer, found, first, room)
            if not speech.has_encoder:
                pairs = list(zip(inputs, targets, strict=True))
                inputs = [[*prompt, *target[:-1]] for prompt, target in pairs]
                targets = [[IGNORED] * (len(prompt) - 1) + target for prompt, target in pairs]
            columns["labels"] = targets
        columns |= {"input_ids": inputs, "length": [len(ids) for ids in inputs]}
        return columns, sum(prompt.is_long for prompt in found), cut

    def between_epochs(self, encoded: Any) -> Any:
        """With a column that says which rows, spread evenly, are to be summarized: ``generate_rows``."""
        count, rows = len(encoded), self.recipe.generate_rows
        wanted = count if rows == "all" else min(rows, count)
        chosen = {i * count // wanted for i in range(wanted)}
        return encoded.add_column("wanted", [row in chosen for row in range(count)])

    def collator(self, tokenizer: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """See :func:`ptft_hf.tasks.prompting.collator`."""
        return prompting.collator(tokenizer.pad_token_id, lambda: self.speech)

    def sampling_weights(self, encoded: Any) -> list[float] | None:
        return None

    # ---- loss ----

    def loss_weight(self, labels: torch.Tensor) -> torch.Tensor:
        """Number of trained tokens."""
        return (labels != IGNORED).sum().float()

    def loss(self, logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
        """Sum of the cross-entropies of all trained tokens.

        Args:
            logits: ``[B, T, V]``.
            labels: ``[B, T]``, shifted already; -100 where nothing is trained.
            label_smoothing: As in ``TrainingArguments.label_smoothing_factor``.
        """
        kept = labels != IGNORED
        return losses.cross_entropy(logits[kept], labels[kept], None, label_smoothing)

    # ---- after the model ----

    def outputs(
        self, model: Any, encoded: Any, tokenizer: Any, batch_size: int, progress: bool = False
    ) -> list[Written]:
        """Loss and summary of each row; no logits are kept."""
        ends = generation.settle(model, tokenizer, self.speech.end, self.fields)
        scored = [(0.0, 0)] * len(encoded)
        if "labels" in encoded.column_names:
            found = figures.of_rows(model, encoded, self.collator(tokenizer), batch_size, progress)
            scored = [(float(loss), int(tokens)) for loss, tokens, _ in found]
        wanted = encoded["wanted"][:] if "wanted" in encoded.column_names else [True] * len(encoded)
        texts = self._summaries(
            model, encoded.select(np.flatnonzero(wanted)), tokenizer, ends, batch_size, progress
        )
        return [
            Written(*score, *(next(texts) if asked else (None, False)))
            for score, asked in zip(scored, wanted, strict=True)
        ]

    def _summaries(
        self, model: Any, encoded: Any, tokenizer: Any, ends: list[int], batch_size: int, progress: bool
    ) -> Iterator[tuple[str, bool]]:
        """Each row's summary, of all its parts, and whether one of them was cut off."""
        columns = (encoded[name][:] for name in ("input_ids", "prompt_length", "rest"))
        parts = [[ids[:length], *rest] for ids, length, rest in zip(*columns, strict=True)]
        written = iter(
            generation.generate(
                model,
                [ids for row in parts for ids in row],
                pad_token_id=tokenizer.pad_token_id,
                ends=ends,
                has_encoder=self.speech.has_encoder,
                batch_size=batch_size,
                progress=progress,
            )
        )
        for row in parts:
            found = [next(written) for _ in row]
            texts = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids, _ in found]
            yield "\n".join(filter(None, texts)), not all(ended for _, ended in found)

    def targets(self, encoded: Any) -> Targets:
        known = "references" in encoded.column_names
        return Targets(encoded["document"][:], encoded["references"][:] if known else None)

    def mean_loss(self, outputs: Sequence[Written], encoded: Any) -> float:
        """Over all trained tokens."""
        return sum(row.loss for row in outputs) / sum(row.tokens for row in outputs)

    def metrics(self, outputs: Sequence[Written], targets: Targets) -> dict[str, float]:
        """``rouge1``, ``rouge2``, ``rougeL``, ``rougeLsum``: means of :func:`ptft_hf.tasks.rouge.rouge`.

        ``length_ratio``: words over the references' words; ``copied_ngrams``: share of three-word runs that stand
        in the document; ``repetition``: share of those that stood in the summary before; ``empty``: share of
        summaries without a word; ``cut_off``: share that came to no end within ``max_new_tokens``.
        """
        rows = _summarized(outputs, targets)
        scores = [rouge.rouge(text, references) for text, _, _, references in rows]
        texts, documents = [row[0] for row in rows], [row[2] for row in rows]
        return {
            **{name: rouge.mean([score[name] for score in scores]) for name in rouge.VARIANTS},
            "length_ratio": rouge.length_ratio(texts, [row[3] for row in rows]),
            "copied_ngrams": rouge.copied_ngrams(texts, documents),
            "repetition": rouge.repetition(texts),
            "empty": rouge.mean([not rouge.WORD.search(text) for text in texts]),
            "cut_off": rouge.mean([row[1] for row in rows]),
        }

    def report(self, outputs: Sequence[Written], targets: Targets) -> dict[str, Any]:
        """What the references themselves are like, and the first summaries beside theirs."""
        rows = _summarized(outputs, targets)
        first = [references[0] for *_, references in rows]
        return {
            "references": {
                "copied_ngrams": rouge.copied_ngrams(first, [row[2] for row in rows]),
                "repetition": rouge.repetition(first),
                "words": rouge.words_of(first) / len(first),
            },
            "examples": [
                {"document": document[:300], "references": references, "summary": text}
                for text, _, document, references in rows[:SHOWN]
            ],
        }

    def outcomes(self, outputs: Sequence[Written], targets: Targets) -> list[float]:
        """rougeL of each row, whose mean is the metric."""
        rows = _summarized(outputs, targets)
        return [rouge.rouge(text, references)["rougeL"] for text, _, _, references in rows]

    def after_training(self, outputs: Any, targets: Any) -> list[str]:
        return []

    def predictions(self, outputs: Sequence[Written], targets: Any = None) -> list[dict[str, Any]]:
        """``{"summary": ..., "cut_off": whether it came to no end within max_new_tokens}`` for each row."""
        return [{"summary": row.summary, "cut_off": row.cut_off} for row in outputs]

    def same(self, one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
        return bool(one["summary"] == other["summary"])

    # ---- in use ----

    def input_row(self, value: Any, columns: Sequence[str]) -> dict[str, Any]:
        """A text, or an object with ``document``."""
        return text_row(value, self.text_columns)

    def unknown_labels(self, rows: Any) -> list[str]:
        """None: any text may be a summary.

        Raises:
            DataError: One is no text.
        """
        if not all(map(is_summary, rows["summary"][:])):
            raise DataError("'summary' must be a text, or a list of texts that are not empty, in every row")
        return []

    def usage(self, columns: Sequence[str], max_length: int) -> Usage:
        room = 0 if self.speech.has_encoder else self.fields["max_new_tokens"]
        return summary_usage.usage(self.speech, max_length - room)

    def state(self) -> dict[str, Any]:
        return self.speech._asdict()

    def restore(self, state: Mapping[str, Any]) -> None:
        self._speech = Speech(**state)


def _summarized(
    outputs: Sequence[Written], targets: Targets
) -> list[tuple[str, bool, str, list[str]]]:
    """Summary, whether it is cut off, document and references of the rows that have a summary."""
    assert targets.references is not None
    return [
        (row.summary, row.cut_off, document, references)
        for row, document, references in zip(outputs, targets.documents, targets.references, strict=True)
        if row.summary is not None
    ]


def _dataset(columns: Mapping[str, list[Any]]) -> Any:
    import datasets

    whole, text = datasets.Value("int64"), datasets.Value("string")
    kinds = {
        "prompt_length": whole,
        "length": whole,
        "rest": datasets.List(datasets.List(whole)),
        "document": text,
        "references": datasets.List(text),
    }
    features = datasets.Features({name: kinds.get(name, datasets.List(whole)) for name in columns})
    return datasets.Dataset.from_dict(dict(columns), features=features)
