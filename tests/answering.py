"""A user's own family of decoders that answer, with the faults that such families have; for the label inspector."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers

from ptft_hf.recipes import CustomTaskRecipe
from ptft_hf.tasks import TaskDefaults
from ptft_hf.tasks.marks import IGNORED


class Answering(TaskDefaults):
    """Columns ``prompt`` and ``answer``; the loss is on the answer alone. ``options`` of the recipe:

    mask: ``attention`` is right; ``pad`` masks labels by the number of the padding token (upstream's collator);
        ``none`` trains the padding.
    template: ``once`` is right; ``twice`` writes the begin token, which the tokenizer adds too.
    end: Whether an end token stands behind the answer.
    marker: What the answer is found by, for a mask that finds nothing.
    """

    auto_class = "AutoModelForCausalLM"
    peft_task_type = "CAUSAL_LM"
    required = ("prompt", "answer")
    optional = ()
    otherwise = ()
    text_columns = ("prompt",)
    label_column = "answer"
    best_metric = "loss"
    long_inputs = "were truncated"
    smooths_labels = False
    trains_end_token = True

    def __init__(self, recipe: CustomTaskRecipe) -> None:
        self.recipe = recipe
        self.labels: list[str] = []
        self.options: dict[str, Any] = {"mask": "attention", "template": "once", "end": True, **recipe.options}

    def look_at(self, splits: Any) -> list[str]:
        return []

    def config(self) -> dict[str, Any]:
        return {}

    def encode(self, rows: Any, tokenizer: Any, max_length: int) -> tuple[Any, int]:
        begin = tokenizer.bos_token if self.options["template"] == "twice" else ""
        end = tokenizer.eos_token_id if self.options["end"] else None
        cut = 0

        def encode(row: Mapping[str, Any]) -> dict[str, Any]:
            nonlocal cut
            prompt = tokenizer(f"{begin}{row['prompt']} {self.options.get('marker', '')}")["input_ids"][:-1]
            answer = tokenizer(row["answer"], add_special_tokens=False)["input_ids"] + ([end] if end else [])
            ids = (prompt + answer)[:max_length]
            cut += len(prompt + answer) > max_length
            return {"input_ids": ids, "prompt_length": min(len(prompt), len(ids)), "length": len(ids)}

        return rows.map(encode, remove_columns=rows.column_names), cut

    def collator(self, tokenizer: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Labels ``[B, T]`` stand at the tokens themselves, as transformers' models take them."""
        upstream = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)

        def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
            plain = [{"input_ids": row["input_ids"], "attention_mask": [1] * row["length"]} for row in rows]
            if self.options["mask"] == "pad":
                return dict(upstream(plain))
            batch = dict(tokenizer.pad(plain, return_tensors="pt"))
            labels = batch["input_ids"].clone()
            if self.options["mask"] == "attention":
                labels[batch["attention_mask"] == 0] = IGNORED
            for line, row in zip(labels, rows, strict=True):
                line[: row["prompt_length"]] = IGNORED
            return batch | {"labels": labels}

        return collate

    def sampling_weights(self, encoded: Any) -> None:
        return None

    def loss_weight(self, labels: torch.Tensor) -> torch.Tensor:
        return torch.tensor(1.0)


class Shifted(Answering):
    """As :class:`Answering`, each label being the token that follows."""

    def collator(self, tokenizer: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        collate = super().collator(tokenizer)

        def shift(rows: list[dict[str, Any]]) -> dict[str, Any]:
            batch = collate(rows)
            labels = torch.full_like(batch["labels"], IGNORED)
            labels[:, :-1] = batch["labels"][:, 1:]
            return batch | {"labels": labels}

        return shift
