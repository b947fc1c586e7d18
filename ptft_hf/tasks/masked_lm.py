"""Masked language models: hidden words told by what stands around them, and whether two texts follow each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ptft_hf import forward
from ptft_hf.errors import DataError, ModelError
from ptft_hf.recipes import MaskedLMRecipe
from ptft_hf.tasks import Usage, corpora, losses
from ptft_hf.tasks.corpora import Frame, Tokens
from ptft_hf.tasks.figures import scores
from ptft_hf.tasks.inputs import check_text
from ptft_hf.tasks.language_models import LanguageModel, mean, perplexity
from ptft_hf.tasks.marks import IGNORED, Mark, Segment, pieces
from ptft_hf.tasks.masking import Masking
from ptft_hf.tasks.sentence_pairs import FAR, IS_NEXT, Unit, pairs_of

USAGE = """text = f"She opened the {tokenizer.mask_token} and looked out."
inputs = tokenizer(text, return_tensors="pt")
with torch.no_grad():
    LOGITS = model(**inputs).LOGITS[0]
(place,) = (inputs["input_ids"][0] == tokenizer.mask_token_id).nonzero()[:, 0]
best = LOGITS[place].softmax(-1).topk(TOP)
tokens = [(tokenizer.decode([int(i)]).strip(), float(p)) for p, i in zip(best.values, best.indices)]
print(tokens)"""
SAMPLES = ("She opened the [MASK] and looked out.", "It was a [MASK] night, and nobody [MASK].")
MASK = "[MASK]"
"""What ``predict`` takes for a mask beside the tokenizer's own token."""


class MaskedLM(LanguageModel):
    """BERT's objectives: hidden tokens, and with ``next_sentence`` whether the second text follows the first.

    With pairs, outputs have three figures more, of the pair: its loss, 1, and whether it was told right; the loss is
    the mean over the hidden tokens and the mean over the pairs, added up.
    """

    peft_task_type = "FEATURE_EXTRACTION"

    def __init__(self, recipe: MaskedLMRecipe) -> None:
        self.recipe: MaskedLMRecipe = recipe
        self.labels = []

    @property
    def auto_class(self) -> str:
        return "AutoModelForPreTraining" if self.recipe.next_sentence else "AutoModelForMaskedLM"

    @property
    def long_inputs(self) -> str:
        return "are spread over several" if self.recipe.pack else "were truncated"

    # ---- before training ----

    def documents(self, rows: Any) -> list[list[int]]:
        return corpora.documents(rows, self.recipe.document_begins, "one" if self.recipe.pack else "each")

    def look_at(self, splits: Any) -> list[str]:
        notes = super().look_at(splits)
        if self.recipe.next_sentence:
            for name in ("train", "validation", "test"):
                if len(self.documents(getattr(splits, name))) == 1:
                    notes.append(
                        f"{name} is one document: its random second texts are of the same one, at least {FAR} "
                        "paragraphs away"
                    )
        return notes

    def check_model(self, model: Any, tokenizer: Any, max_length: int) -> None:
        """Before training.

        Raises:
            ModelError: The tokenizer has no mask token, or the model no head for pairs.
        """
        if tokenizer.mask_token_id is None:
            raise ModelError("the tokenizer has no mask token, so nothing can be hidden; is this an encoder's?")
        if not self.recipe.next_sentence:
            return
        inputs = tokenizer("a", "a", return_tensors="pt")
        try:
            with torch.no_grad():
                outputs = model.eval()(**inputs.to(next(model.parameters()).device))
        except (ValueError, TypeError, RuntimeError) as error:
            raise ModelError(f"next_sentence: {type(model).__name__} cannot be run: {error}") from error
        if not isinstance(outputs, Mapping) or "seq_relationship_logits" not in outputs:
            raise ModelError(
                f"next_sentence: the architecture {model.config.model_type!r} has no head that tells whether two "
                "texts follow each other; take a BERT (bert, megatron-bert, mobilebert), or leave next_sentence out"
            )

    # ---- rows to batches ----

    def encode(self, rows: Any, tokenizer: Any, max_length: int) -> tuple[Any, int]:
        """Inputs of up to ``max_length`` tokens, none of them hidden yet.

        Returns:
            Rows with ``input_ids``, ``words`` (the word of each token, -1 for marks), ``length``, their number
            ``row`` and, of pairs, ``next``; and how many texts are longer than an input.

        Raises:
            DataError: No text, or texts of which no pairs can be made.
        """
        pair = self.recipe.next_sentence
        if "given" in rows.column_names:
            return self._given(rows, tokenizer, max_length)
        marks = corpora.frame(tokenizer, pair)
        room = max_length - marks.marks
        if room < 2:
            raise ModelError(f"model.max_length: {max_length} leaves no room for text between the marks")
        tokens = corpora.tokenize(rows["text"][:], tokenizer)
        found = [[tokens[row] for row in rows_ if len(tokens[row].ids)] for rows_ in self.documents(rows)]
        found = [texts for texts in found if texts]
        if not found:
            raise DataError("there is no text in these rows: all are empty")
        if pair:
            made = _pairs(found, marks, room)
        else:
            made = _packed(found, marks, room) if self.recipe.pack else _single(found, marks, room)
        types = ["token_type_ids"] if marks.types is not None else []
        columns = ["input_ids", "words", *types, "length", "row", *(["next"] if pair else [])]
        numbered = ({**row, "row": number} for number, row in enumerate(made))
        return corpora.dataset(numbered, columns), sum(len(text.ids) > room for text in tokens)

    def _given(self, rows: Any, tokenizer: Any, max_length: int) -> tuple[Any, int]:
        """Inputs of ``predict``: one a row, cut at their end.

        Raises:
            DataError: A mask would be cut away.
        """
        following = rows["following"][:]
        alone, both = (corpora.frame(tokenizer, pair) for pair in (False, self.recipe.next_sentence))
        texts = [text.replace(MASK, tokenizer.mask_token) for text in rows["given"][:]]
        tokens = corpora.tokenize(texts, tokenizer)
        seconds = corpora.tokenize([text or "" for text in following], tokenizer)
        made, long = [], 0
        for number, (given, first, second) in enumerate(zip(texts, tokens, seconds, strict=True), 1):
            marks = alone if following[number - 1] is None else both
            room = max_length - marks.marks
            kept = first.part(0, max(1, room - len(second.ids)))
            second = second.part(0, max(0, room - len(kept.ids)))
            lost = (first.ids == tokenizer.mask_token_id).sum() - (kept.ids == tokenizer.mask_token_id).sum()
            if lost:
                raise DataError(f"input {number}: a mask stands behind the first {len(kept.ids)} tokens; shorten it")
            long += len(kept.ids) < len(first.ids)
            made.append({**marks.around(kept, second), "given": given})
        types = ["token_type_ids"] if alone.types is not None else []
        return corpora.dataset(made, ["input_ids", *types, "length", "given"]), long

    def segments(self, row: Mapping[str, Any], tokenizer: Any) -> list[Segment]:
        """The text with the tokens hidden that one of the epochs hides, each above what it was; a pair's kind stands
        below its first mark."""
        inputs, labels = self.collator(tokenizer).masked(dict(row))
        marks: list[tuple[Mark, str]] = [
            ("input", "") if label == IGNORED else ("trained", tokenizer.decode([label]).strip()) for label in labels
        ]
        if "next" in row:
            marks[0] = ("trained", "is next" if row["next"] == IS_NEXT else "random")
        return pieces(tokenizer, inputs.tolist(), marks)

    def collator(self, tokenizer: Any) -> Masking:
        """Hides tokens, pads, and makes labels ``[B, T]``: see :class:`ptft_hf.tasks.masking.Masking`."""
        return Masking(tokenizer, self.recipe.mask_fraction, self.recipe.whole_word)

    # ---- loss ----

    def loss_weight(self, labels: torch.Tensor) -> torch.Tensor:
        """Number of hidden tokens; with pairs ``[2]``, the number of pairs beside it."""
        if not self.recipe.next_sentence:
            return super().loss_weight(labels)
        counts = [(part != IGNORED).sum() for part in (labels[:, 1:], labels[:, 0])]
        return torch.stack(counts).float()

    def loss(self, logits: Any, labels: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
        """Sum over the hidden tokens; with pairs ``[2]``, the sum over the pairs beside it.

        Args:
            logits: ``[B, T, V]``; with pairs also those of the pairs, ``[B, 2]``.
            labels: ``[B, T]``, -100 where there is none; with pairs the first is that of the pair.
            label_smoothing: As in ``TrainingArguments.label_smoothing_factor``.
        """
        if not self.recipe.next_sentence:
            return super().loss(logits, labels, label_smoothing)
        tokens, pairs = logits
        return torch.stack(
            [
                super().loss(tokens[:, 1:], labels[:, 1:], label_smoothing),
                losses.cross_entropy(pairs, labels[:, 0], None, label_smoothing),
            ]
        )

    # ---- after the model ----

    def scored(self, outputs: Any, labels: torch.Tensor) -> torch.Tensor:
        """Figures ``[B, 3]``; with pairs ``[B, 6]``."""
        if not self.recipe.next_sentence:
            return super().scored(outputs, labels)
        tokens, pairs = forward.logits_of_heads(outputs)
        return torch.cat([scores(tokens[:, 1:], labels[:, 1:]), scores(pairs[:, None], labels[:, :1])], 1)

    def targets(self, encoded: Any) -> dict[str, float]:
        """What chance would give: of the hidden tokens, the share of the most frequent one; of the pairs, of the more
        frequent kind."""
        found = super().targets(encoded)
        if "next" in encoded.column_names:
            share = float(np.mean(encoded["next"][:]))
            found["pairs"] = max(share, 1 - share)
        return found

    def mean_loss(self, outputs: np.ndarray, encoded: Any) -> float:
        """The mean over the hidden tokens; with pairs the mean over these is added."""
        parts = range(0, outputs.shape[1], 3)
        return sum(mean(outputs[:, at], outputs[:, at + 1]) for at in parts)

    def metrics(self, outputs: np.ndarray, targets: Any) -> dict[str, float]:
        """``loss``; ``perplexity``, ``exp`` of the hidden tokens' mean loss; ``masked_accuracy``; of pairs,
        ``nsp_accuracy``."""
        found = {
            "loss": self.mean_loss(outputs, None),
            "perplexity": perplexity(mean(outputs[:, 0], outputs[:, 1])),
            "masked_accuracy": mean(outputs[:, 2], outputs[:, 1]),
        }
        if outputs.shape[1] > 3:
            found["nsp_accuracy"] = mean(outputs[:, 5], outputs[:, 4])
        return found

    def report(self, outputs: np.ndarray, targets: Any) -> dict[str, Any]:
        """How many tokens and pairs the metrics are of, and what chance would give: always the most frequent token,
        and always the same answer."""
        found: dict[str, Any] = {"masked_tokens": int(outputs[:, 1].sum())}
        chance = {"masked_accuracy": targets["commonest"]}
        if outputs.shape[1] > 3:
            found["pairs"] = int(outputs[:, 4].sum())
            chance["nsp_accuracy"] = targets["pairs"]
        return {**found, "chance": chance}

    def answers(
        self, model: Any, encoded: Any, tokenizer: Any, batch_size: int, progress: bool
    ) -> list[dict[str, Any]]:
        """The likeliest tokens for each mask, the text with the first of them, and the chance that the second text
        follows."""
        found: dict[int, dict[str, Any]] = {}
        given = encoded["given"][:]
        for rows, batch, outputs in self.passes(model, encoded, tokenizer, batch_size, progress):
            heads = forward.logits_of_heads(outputs)
            for i, row in enumerate(rows.tolist()):
                logits = heads[0][i][batch["input_ids"][i] == tokenizer.mask_token_id].float().cpu()
                found[row] = _filled(given[row], logits.softmax(-1), tokenizer, self.recipe.top_k)
                if len(heads) > 1 and 1 in encoded[row].get("token_type_ids", ()):
                    found[row]["is_next"] = float(F.softmax(heads[1][i].float(), -1)[IS_NEXT])
        return [found[row] for row in range(len(encoded))]

    # ---- in use ----

    def input_row(self, value: Any, columns: Sequence[str]) -> dict[str, Any]:
        """A text with masks, or an object with ``text`` and, for models of pairs, ``next``, which may follow it."""
        row = {"text": value} if isinstance(value, str) else value
        if not isinstance(row, Mapping) or not isinstance(row.get("text"), str):
            raise DataError(f"{value!r} is neither a text nor an object with the key 'text'")
        following = row.get("next")
        if following is not None and not (self.recipe.next_sentence and isinstance(following, str)):
            raise DataError("'next', a second text, is for models that were trained with next_sentence")
        check_text("text", row["text"])
        check_text("next", following or "")
        return {"given": row["text"], "following": following}

    def usage(self, columns: Sequence[str], max_length: int) -> Usage:
        name = "prediction_logits" if self.recipe.next_sentence else "logits"
        code = USAGE.replace(".LOGITS", f".{name}").replace("LOGITS", "logits").replace("TOP", str(self.recipe.top_k))
        told = "tells hidden words"
        if self.recipe.next_sentence:
            told += ", and whether two texts follow each other"
        return Usage(code, list(SAMPLES), "", told)


def _filled(text: str, odds: torch.Tensor, tokenizer: Any, top_k: int) -> dict[str, Any]:
    """``{"text", "masks": [[{"token", "score"}]]}``; ``odds``: ``[masks, V]``."""
    best = odds.topk(min(top_k, odds.shape[-1]), -1)
    masks = [
        [
            {"token": tokenizer.decode([token]).strip(), "score": score}
            for token, score in zip(tokens, values, strict=True)
        ]
        for tokens, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
    pieces = text.split(tokenizer.mask_token)
    words = [mask[0]["token"] for mask in masks][: len(pieces) - 1]  # others are of the second text
    filled = "".join(a + b for a, b in zip(pieces, [*words, ""], strict=True))
    return {"text": filled, "masks": masks}


def _packed(documents: Sequence[Sequence[Tokens]], marks: Frame, room: int) -> Iterator[dict[str, Any]]:
    """Each document's texts one after another, cut into inputs."""
    for texts in documents:
        whole = corpora.joined(texts)
        for start in range(0, len(whole.ids), room):
            yield marks.around(whole.part(start, start + room))


def _single(documents: Sequence[Sequence[Tokens]], marks: Frame, room: int) -> Iterator[dict[str, Any]]:
    """Each text an input, cut at its end."""
    for texts in documents:
        yield from (marks.around(text.part(0, room)) for text in texts)


def _pairs(documents: Sequence[Sequence[Tokens]], marks: Frame, room: int) -> Iterator[dict[str, Any]]:
    """Pairs of texts, the same for every seed: they are data."""
    pieces, units = list[list[Tokens]](), list[list[Unit]]()
    for texts in documents:
        parts = [(n, piece) for n, text in enumerate(texts) for piece in corpora.pieces(text, room // 2)]
        pieces.append([part for _, part in parts])
        units.append([Unit(number, len(part.ids)) for number, part in parts])
    for pair in pairs_of(units, room, np.random.default_rng(0)):
        first = corpora.joined([pieces[pair.document][i] for i in pair.first])
        second = corpora.joined([pieces[pair.other][i] for i in pair.second])
        yield {**marks.around(first, second), "next": pair.label}
