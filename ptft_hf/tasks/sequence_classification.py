"""Classification of texts and text pairs: single-label, multi-label, and regression."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ptft_hf.tasks import Usage
from ptft_hf.tasks.classification import Classification
from ptft_hf.tasks.inputs import padded, text_row, tokenized
from ptft_hf.tasks.marks import Segment, pieces

USAGE = """inputs = tokenizer({inputs}, padding=True, truncation=True, max_length={max_length}, return_tensors="pt")
with torch.no_grad():
    logits = model(**inputs).logits
print(logits)"""


class SequenceClassification(Classification):
    """One label, several labels or a number for each text (or pair of texts): columns ``text``, optionally
    ``text_pair``, and ``label``."""

    auto_class = "AutoModelForSequenceClassification"
    peft_task_type = "SEQ_CLS"
    required = ("text", "label")
    optional = ("text_pair",)
    text_columns = ("text", "text_pair")
    long_inputs = "were truncated"

    def encode(self, rows: Any, tokenizer: Any, max_length: int) -> tuple[Any, int]:
        """Token ids of every row, cut to ``max_length`` tokens; labels as ids, multi-hot vectors or floats.

        Returns:
            The encoded rows, with their ``length`` in tokens; and the number of rows that were cut.
        """
        index = {label: i for i, label in enumerate(self.labels)}
        truncated = 0

        def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
            nonlocal truncated
            texts = [batch["text"]] + ([batch["text_pair"]] if "text_pair" in batch else [])
            encoded = dict(tokenizer(*texts, truncation=True, max_length=max_length))
            encoded["length"] = [len(ids) for ids in encoded["input_ids"]]
            full = [i for i, n in enumerate(encoded["length"]) if n == max_length]
            if full:
                whole = tokenizer(*([t[i] for i in full] for t in texts), verbose=False)["input_ids"]
                truncated += sum(len(ids) > max_length for ids in whole)
            if "label" in batch:
                encoded["labels"] = [self.encode_label(value, index) for value in batch["label"]]
            return encoded

        return tokenized(rows, encode), truncated

    def segments(self, row: Mapping[str, Any], tokenizer: Any) -> list[Segment]:
        """The label, and the text that it is learnt from."""
        read = pieces(tokenizer, row["input_ids"], [("input", "")] * len(row["input_ids"]))
        return [Segment(self.answer(row), "trained"), Segment(" <- "), *read]

    def collator(self, tokenizer: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Pads each batch to its own longest row."""
        def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
            batch = padded(tokenizer, rows)
            if "labels" in rows[0]:
                batch["labels"] = torch.tensor([row["labels"] for row in rows])
            return batch

        return collate

    def input_row(self, value: Any, columns: Sequence[str]) -> dict[str, Any]:
        return text_row(value, columns)

    def usage(self, columns: Sequence[str], max_length: int) -> Usage:
        texts = ["A sentence to classify.", "Another one."][: len(columns)]
        given = ", ".join(f'["{text}"]' for text in texts)
        pair = dict(zip(columns, texts, strict=True))
        inputs: list[Any] = [pair, dict(zip(columns, texts[::-1], strict=True))]
        if len(texts) == 1:
            inputs = [*texts, "Another one, a little longer than the first."]
        return Usage(USAGE.format(inputs=given, max_length=max_length), inputs, "predicts a label among")
