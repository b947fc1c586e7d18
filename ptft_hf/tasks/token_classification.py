"""Named entities: types and places of spans, in given words or in running text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ptft_hf import forward
from ptft_hf.errors import DataError, ModelError, RecipeError
from ptft_hf.recipes import TokenClassificationRecipe
from ptft_hf.tasks import TaskDefaults, Usage, alignment, annotated, losses, spans, token_rows
from ptft_hf.tasks.alignment import FINE, LIKE_TOKENS
from ptft_hf.tasks.annotated import Annotated
from ptft_hf.tasks.inputs import check_text
from ptft_hf.tasks.marks import IGNORED, Segment
from ptft_hf.tasks.tags import OUTSIDE, entities, iob2, misfits, scheme_of
from ptft_hf.tasks.token_rows import Reading, Targets

USAGE = """import re

text = {text}  # of up to {max_length} tokens; ptft_hf reads longer ones in windows
words = list(re.finditer(r"\\S+", text))
inputs = tokenizer(text, return_tensors="pt")
with torch.no_grad():
    best = model(**inputs).logits[0].argmax(-1)
tags = [model.config.id2label[int(best[inputs.char_to_token(word.start())])] for word in words]
print([(word.group(), tag) for word, tag in zip(words, tags)])"""
SAMPLES = (
    "Ada Lovelace met Charles Babbage in London in 1833",
    "the story of Anna Karenina is set in Moscow and Saint Petersburg",
)


class TokenClassification(TaskDefaults):
    """Entities in words (columns ``tokens`` and ``tags``) or in running text (``text`` and ``spans``).

    Tags are strings, or integers with names; spans are objects with ``start`` and ``end`` (characters, the
    end exclusive) and ``label``. The model has a label for ``O``, and ``B-`` and ``I-`` for each type. One
    encoded row is a window of a row: see :func:`ptft_hf.tasks.alignment.windows`. Outputs are the logits
    ``[T, C]`` of each window.
    """

    auto_class = "AutoModelForTokenClassification"
    peft_task_type = "TOKEN_CLS"
    required = ("tokens", "tags")
    optional = ()
    otherwise = (("text", "spans"),)
    text_columns = ("tokens", "text")
    label_column = "tags"
    best_metric = "f1"
    long_inputs = "are read in overlapping windows"
    loses_tails = False

    def __init__(self, recipe: TokenClassificationRecipe) -> None:
        self.recipe = recipe
        self.labels: list[str] = []  # the types
        self.pattern = LIKE_TOKENS
        self.weights: torch.Tensor | None = None

    @property
    def tags(self) -> list[str]:
        """The model's labels: O, then B- and I- of each type."""
        return [OUTSIDE, *(f"{prefix}-{name}" for name in self.labels for prefix in "BI")]

    @property
    def smooths_labels(self) -> bool:
        return self.recipe.loss != "focal"

    # ---- before training ----

    def look_at(self, splits: Any) -> list[str]:
        """Learn the types and class weights; count what of the annotations is broken or cannot be kept.

        Raises:
            DataError: Rows that are not annotated as they should be, no entity, or types that train lacks.
            RecipeError: ``class_weights`` do not fit the types.
        """
        tables = {name: getattr(splits, name) for name in ("train", "validation", "test")}
        names = self.recipe.tag_names
        if problems := [p for name, rows in tables.items() for p in annotated.faults(name, rows, names)]:
            raise DataError(*problems)
        in_words = "tokens" in splits.train.column_names
        self.pattern = LIKE_TOKENS if in_words else FINE
        notes = self._look_at_tags(tables) if in_words else _look_at_spans(tables, self.pattern)
        rows = {name: [self._read(row).tags or [] for row in table] for name, table in tables.items()}
        counts = {name: Counter(e.type for tags in rows[name] for e in entities(tags)) for name in rows}
        self.labels = sorted(counts["train"])
        if not self.labels:
            raise DataError("train has no entity at all: there is nothing to learn")
        problems = [
            f"{name}: type {kind!r} ({n} entities) is not in the training split, so no model could learn it; "
            "add such rows to train or take them out"
            for name in ("validation", "test")
            for kind, n in sorted(counts[name].items())
            if kind not in counts["train"]
        ]
        if problems:
            raise DataError(*problems)
        words = Counter(tag if tag == OUTSIDE else tag[2:] for tags in rows["train"] for tag in tags)
        self.weights = self._class_weights(words)
        total, most = counts["train"].total(), counts["train"].most_common()
        shown = ", ".join(f"{kind} {n:,} ({n / total:.0%})" for kind, n in most[:8])
        rest = f", and {len(most) - 8} more down to {most[-1][0]} {most[-1][1]}" if len(most) > 8 else ""
        rows_ = f"{len(tables['train']):,} training rows"
        return [*notes, f"{len(most)} types, {total:,} entities in {rows_}: {shown}{rest}"]

    def _look_at_tags(self, tables: Mapping[str, Any]) -> list[str]:
        """The scheme of all splits together, and how many of their tags break it."""
        named = {
            name: [annotated.named(tags, self.recipe.tag_names) for tags in table["tags"][:]]
            for name, table in tables.items()
        }
        try:
            scheme = scheme_of(tags for rows in named.values() for tags in rows)
        except ValueError as error:
            raise DataError(f"tags: {error}") from error
        notes = [f"tags: {scheme}" + ("" if scheme == "IOB2" else ", read as IOB2 (B- begins, I- continues)")]
        for name, rows in named.items():
            broken = [n for n in (misfits(tags, scheme) for tags in rows) if n]
            if broken:
                notes.append(
                    f"{name}: {sum(broken):,} tags in {len(broken):,} rows break {scheme}; an entity is taken to "
                    "begin where its type does"
                )
        return notes

    def _class_weights(self, words: Mapping[str, int]) -> torch.Tensor | None:
        """``[C]``; B- and I- of a type weigh the same. ``words``: how many have each type, or O."""
        wanted, classes = self.recipe.class_weights, [OUTSIDE, *self.labels]
        if wanted is None:
            return None
        if wanted == "balanced":
            total = sum(words.values())
            weights = {name: total / (len(classes) * max(words.get(name, 0), 1)) for name in classes}
        else:
            assert isinstance(wanted, Mapping)
            wrong = [f"no type {name!r}" for name in sorted(wanted.keys() - set(classes))]
            wrong += [f"{name!r} has none" for name in sorted(set(classes) - wanted.keys())]
            if wrong:
                known = f"it needs a weight for each of {classes}"
                raise RecipeError(*(f"{self.recipe.name}: class_weights: {w}; {known}" for w in wrong))
            weights = {name: float(wanted[name]) for name in classes}
        return torch.tensor([weights[OUTSIDE], *(weights[name] for name in self.labels for _ in "BI")])

    def config(self) -> dict[str, Any]:
        return {
            "num_labels": len(self.tags),
            "id2label": dict(enumerate(self.tags)),
            "label2id": {tag: i for i, tag in enumerate(self.tags)},
        }

    # ---- rows to batches ----

    def _read(self, row: Mapping[str, Any]) -> Annotated:
        return annotated.read(row, self.recipe.tag_names, self.pattern)

    def encode(self, rows: Any, tokenizer: Any, max_length: int) -> tuple[Any, int]:
        """The windows of all rows; text, words and tags of a row stand beside its first window.

        Returns:
            The windows, with their ``length`` in tokens; and how many rows have more than one.
        """
        return token_rows.encode(
            rows,
            self._read,
            tokenizer,
            max_length,
            stride=self.recipe.stride,
            tags=self.tags,
            all_subwords=self.recipe.label_all_subwords,
        )

    def segments(self, row: Mapping[str, Any], tokenizer: Any) -> list[Segment]:
        """A window's words with their tags; the words that another window answers for have none."""
        return token_rows.segments(row, tokenizer, self.tags)

    def collator(self, tokenizer: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Pads each batch to its own longest window; labels ``[B, T]`` with -100."""
        return token_rows.collator(tokenizer)

    def sampling_weights(self, encoded: Any) -> list[float] | None:
        return None

    # ---- loss ----

    def loss_weight(self, labels: torch.Tensor) -> torch.Tensor:
        """Number of labels, or the sum of their class weights; -100 is none."""
        labels = labels[labels != IGNORED]
        if self.weights is not None:
            return self.weights.to(labels.device)[labels].sum()
        return torch.tensor(float(labels.numel()), device=labels.device)

    def loss(self, logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
        """Sum of the losses of all labelled tokens: see :func:`ptft_hf.tasks.losses.cross_entropy`.

        Args:
            logits: ``[..., C]``.
            labels: ``[...]``, -100 where there is none.
            label_smoothing: As in ``TrainingArguments.label_smoothing_factor``.
        """
        kept = labels != IGNORED
        weights = None if self.weights is None else self.weights.to(logits.device)
        gamma = self.recipe.focal_gamma if self.recipe.loss == "focal" else 0.0
        return losses.cross_entropy(logits[kept], labels[kept], weights, label_smoothing, gamma)

    # ---- after the model ----

    def outputs(
        self, model: Any, encoded: Any, tokenizer: Any, batch_size: int, progress: bool = False
    ) -> list[np.ndarray]:
        """Logits ``[T, C]`` of each window."""
        return forward.token_logits_of(model, encoded, self.collator(tokenizer), batch_size, progress)

    def targets(self, encoded: Any) -> Targets:
        return token_rows.targets(encoded)

    def mean_loss(self, outputs: Sequence[np.ndarray], encoded: Any) -> float:
        logits = torch.from_numpy(np.concatenate(outputs))
        labels = torch.tensor([label for labels in encoded["labels"][:] for label in labels])
        return (self.loss(logits, labels) / self.loss_weight(labels)).item()

    def metrics(self, outputs: Sequence[np.ndarray], targets: Targets) -> dict[str, float]:
        """``precision``, ``recall`` and ``f1`` over all entities, each right if type and borders are;
        ``macro_f1``, the mean over the types; ``partial_f1``, where a matching part counts one half."""
        gold, predicted = self._sequences(outputs, targets)
        found = spans.strict(gold, predicted)
        types = spans.by_type(found, self.labels)
        micro = found.get("micro avg", {"precision": 0.0, "recall": 0.0, "f1-score": 0.0})
        return {
            "precision": float(micro["precision"]),
            "recall": float(micro["recall"]),
            "f1": float(micro["f1-score"]),
            "macro_f1": sum(row["f1"] for row in types) / len(types),
            "partial_f1": spans.partial(gold, predicted)["f1"],
        }

    def report(self, outputs: Sequence[np.ndarray], targets: Targets) -> dict[str, Any]:
        """Figures of each type, and the matches in part."""
        gold, predicted = self._sequences(outputs, targets)
        return {
            "per_class": spans.by_type(spans.strict(gold, predicted), self.labels),
            "partial": spans.partial(gold, predicted),
        }

    def outcomes(self, outputs: Sequence[np.ndarray], targets: Targets) -> list[float]:
        """1.0 for a row whose entities are all found, and no others, else 0.0."""
        gold, predicted = self._sequences(outputs, targets)
        return [float(entities(t) == entities(p)) for t, p in zip(gold, predicted, strict=True)]

    def _sequences(
        self, outputs: Sequence[np.ndarray], targets: Targets
    ) -> tuple[list[list[str]], list[list[str]]]:
        """True and predicted tags of each row."""
        gold, predicted = [], []
        for reading, tags, _ in self._answers(outputs, targets):
            assert reading.tags is not None
            gold.append([self.tags[i] for i in reading.tags])
            predicted.append(tags)
        return gold, predicted

    def _answers(
        self, outputs: Sequence[np.ndarray], targets: Targets
    ) -> Iterator[tuple[Reading, list[str], np.ndarray]]:
        """For each row its predicted tags, as IOB2, and the probability ``[words]`` of each.

        Raises:
            ModelError: Logits that are not numbers.
        """
        chosen = {n: np.zeros(len(r.words.spans), dtype=np.int64) for n, r in targets.rows.items()}
        scores = {n: np.ones(len(r.words.spans)) for n, r in targets.rows.items()}
        for logits, (number, words) in zip(outputs, targets.windows, strict=True):
            own = np.array(words)
            answers = logits[own >= 0].astype(np.float64)
            if not np.isfinite(answers).all():
                raise ModelError("logits: NaN or infinity; if training diverged, try a lower learning rate")
            odds = np.exp(answers - answers.max(-1, keepdims=True))
            chosen[number][own[own >= 0]] = odds.argmax(-1)
            scores[number][own[own >= 0]] = odds.max(-1) / odds.sum(-1)
        names = self.tags
        for number, reading in sorted(targets.rows.items()):
            tags = [names[i] for i in chosen[number]]
            yield reading, iob2(entities(tags), len(tags)), scores[number]

    def after_training(self, outputs: Any, targets: Any) -> list[str]:
        return []

    def predictions(
        self, outputs: Sequence[np.ndarray], targets: Targets | None = None
    ) -> list[dict[str, Any]]:
        """``{"text": ..., "entities": [{"text", "type", "start", "end", "score"}]}`` for each row.

        ``start`` and ``end`` are characters of ``text`` (given words are joined by spaces), ``score`` is the
        mean probability of the entity's tags.
        """
        assert targets is not None
        found = []
        for (words, _), tags, scores in self._answers(outputs, targets):
            marked = []
            for kind, first, end in entities(tags):
                start, stop = words.spans[first][0], words.spans[end - 1][1]
                score = float(scores[first:end].mean())
                text = words.text[start:stop]
                marked.append({"text": text, "type": kind, "start": start, "end": stop, "score": score})
            found.append({"text": words.text, "entities": marked})
        return found

    def same(self, one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
        places = [[(e["type"], e["start"], e["end"]) for e in p["entities"]] for p in (one, other)]
        return places[0] == places[1]

    # ---- in use ----

    def input_row(self, value: Any, columns: Sequence[str]) -> dict[str, Any]:
        """A text, or an object with ``text`` or with ``tokens``, whatever the model was trained on."""
        row = {"text": value} if isinstance(value, str) else value
        if not isinstance(row, Mapping):
            raise DataError(f"{value!r} is neither a text nor an object with the key 'text' or 'tokens'")
        tokens, text = row.get("tokens"), row.get("text")
        if tokens is not None:
            if not isinstance(tokens, list | tuple) or not all(isinstance(token, str) for token in tokens):
                raise DataError("'tokens' must be a list of words, as text")
            for token in tokens:
                check_text("tokens", token)
            return {"tokens": list(tokens), "text": None}
        if not isinstance(text, str):
            raise DataError(
                f"'text', as text, or 'tokens', a list of words, must be given; the input has "
                f"{sorted(map(str, row))}"
            )
        check_text("text", text)
        return {"tokens": None, "text": text}

    def unknown_labels(self, rows: Any) -> list[str]:
        """Types that the model does not have.

        Raises:
            DataError: Rows that are not annotated as they should be.
        """
        if problems := annotated.faults("data", rows, self.recipe.tag_names):
            raise DataError(*problems)
        found = {e.type for row in rows for e in entities(self._read(row).tags or [])}
        return sorted(found - set(self.labels))

    def usage(self, columns: Sequence[str], max_length: int) -> Usage:
        return Usage(
            USAGE.format(text=f'"{SAMPLES[0]}"', max_length=max_length),
            list(SAMPLES),
            "finds entities of the types",
        )

    def state(self) -> dict[str, Any]:
        return {"types": self.labels, "pattern": self.pattern}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.labels, self.pattern = list(state["types"]), str(state["pattern"])


def _look_at_spans(tables: Mapping[str, Any], pattern: str) -> list[str]:
    """What words cannot say of each split's spans."""
    notes = []
    for name, table in tables.items():
        pairs = zip(table["text"][:], table["spans"][:], strict=True)
        moved = [annotated.tags_of_spans(alignment.split(text, pattern), spans)[1] for text, spans in pairs]
        total = sum(map(len, table["spans"][:]))
        if widened := sum(m.widened for m in moved):
            notes.append(
                f"{name}: {widened:,} of {total:,} spans begin or end inside a word: taken to its borders"
            )
        if dropped := sum(m.dropped for m in moved):
            notes.append(
                f"{name}: {dropped:,} of {total:,} spans share words with a longer one: left out, since a word "
                "has one tag"
            )
    return notes
