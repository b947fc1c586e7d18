"""Causal language models: the next token, told by those before it, in blocks without padding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ptft_hf.errors import DataError, ModelError
from ptft_hf.models import quiet
from ptft_hf.recipes import CausalLMRecipe
from ptft_hf.tasks import Usage, corpora, generation
from ptft_hf.tasks.inputs import text_row
from ptft_hf.tasks.language_models import LanguageModel, mean, perplexity
from ptft_hf.tasks.marks import IGNORED
from ptft_hf.tasks.masking import padded

USAGE = """text = TEXT
ids = tokenizer(text, add_special_tokens=False)["input_ids"]
inputs = torch.tensor([FIRSTids])
with torch.no_grad():
    written = model.generate(
        input_ids=inputs,
        attention_mask=torch.ones_like(inputs),
        GIVEN,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
continuation = tokenizer.decode(written[0, inputs.shape[1] :], skip_special_tokens=True)
print(continuation)"""
SAMPLES = ("It was late in the evening when", "Once upon a time")
NEW_TOKENS = 50
"""Of a continuation, unless the recipe's ``generation`` says more."""


class CausalLM(LanguageModel):
    """The documents of a split, each with an end token, stand one after another and are cut into blocks of
    ``max_length``: every token but the first is told once, and there is no padding.

    Labels are shifted already: the label of a position is the token that follows it, if need be the next block's
    first one. With ``separate_documents`` no token attends to another document, positions begin anew in each (and in
    each block), and no document's first token is told from the document before.
    """

    auto_class = "AutoModelForCausalLM"
    peft_task_type = "CAUSAL_LM"
    long_inputs = "are spread over several"
    separating = "separate_documents"
    """The recipe's name for keeping the documents of a block apart."""

    def __init__(self, recipe: CausalLMRecipe) -> None:
        self.recipe: CausalLMRecipe = recipe
        self.separates = recipe.separate_documents
        self.labels = []
        self.begins = False

    # ---- before training ----

    def documents(self, rows: Any) -> list[list[int]]:
        return corpora.documents(rows, self.recipe.document_begins, "each")

    def check_model(self, model: Any, tokenizer: Any, max_length: int) -> None:
        """Before training, on a few tokens.

        Raises:
            ModelError: The tokenizer has no end token, a prediction of the model depends on later tokens, or it
                cannot keep documents apart.
        """
        if tokenizer.eos_token_id is None:
            raise ModelError("the tokenizer has no end token, which the model is to learn; give it one (eos_token)")
        ids = torch.arange(12) % (len(tokenizer) - 1) + 1
        other = ids.clone()
        other[-1] = ids[0]
        before, after = (_logits(model, row[None])[0, :-1] for row in (ids, other))
        if not torch.allclose(before, after, atol=1e-4):
            raise ModelError(
                f"{type(model).__name__} ({model.config.model_type}) attends to later tokens, so there would be "
                "nothing to tell; take a decoder, or a masked_lm task"
            )
        if self.separates:
            self._check_separation(model, ids, max_length)

    def _check_separation(self, model: Any, ids: torch.Tensor, max_length: int) -> None:
        """Two documents in a block against each of them alone."""
        setting = self.separating
        config = model.config.get_text_config()
        window = getattr(config, "sliding_window", None) or getattr(config, "window_size", None)
        if isinstance(window, int) and window < max_length:
            raise ModelError(
                f"{setting}: {config.model_type!r} attends to the last {window} tokens alone, which blocks "
                f"of {max_length} would undo; set model.max_length to at most {window}"
            )
        alone = torch.cat([_logits(model, part[None])[0] for part in (ids[:7], ids[7:])])
        segments = torch.tensor([[0] * 7 + [1] * 5])
        try:
            together = _logits(model, ids[None], **apart(segments))[0]
        except (ValueError, TypeError, RuntimeError, IndexError) as error:
            together, why = alone + torch.inf, f": {error}"
        else:
            why = ""
        if not torch.allclose(alone, together, atol=1e-4 * max(1.0, alone.abs().max().item())):
            raise ModelError(
                f"{setting}: {type(model).__name__} with this adapter does not keep documents apart in a "
                f"block{why}; leave {setting} out, or take a model of another architecture"
            )

    # ---- rows to batches ----

    def encode(self, rows: Any, tokenizer: Any, max_length: int) -> tuple[Any, int]:
        """Blocks of ``max_length`` tokens, the last one shorter.

        Returns:
            Rows with ``input_ids``, ``labels`` (shifted), ``length`` and, if documents are kept apart, ``segments``,
            the number of each token's document; and how many texts are longer than a block.

        Raises:
            DataError: No text.
        """
        first = self._first(tokenizer)
        if "text" not in rows.column_names:
            return self._given(rows, tokenizer, max_length, first)
        found = self.documents(rows)
        last = {document[-1] for document in found}
        texts = [
            text if row in last else text + self.recipe.separator for row, text in enumerate(rows["text"][:])
        ]
        tokens = [text.ids for text in corpora.tokenize(texts, tokenizer)]
        end = np.array([tokenizer.eos_token_id], dtype=np.int32)
        whole = [[tokens[row] for row in document] for document in found]
        streams = [np.concatenate([first, *parts, end]) for parts in whole if sum(map(len, parts))]
        if not streams:
            raise DataError("there is no text in these rows: all are empty")
        stream = np.concatenate(streams)
        owner = np.repeat(np.arange(len(streams)), list(map(len, streams)))
        labels = stream[1:].astype(np.int64)
        if self.separates:
            labels[owner[1:] != owner[:-1]] = IGNORED

        def block(start: int) -> dict[str, Any]:
            part = slice(start, min(start + max_length, len(labels)))
            values = {"input_ids": stream[part], "labels": labels[part], "length": part.stop - start}
            segments = {"segments": owner[part] - owner[start]} if self.separates else {}
            return {**values, **segments}

        blocks = (block(start) for start in range(0, len(labels), max_length))
        names = ["input_ids", "labels", "length", *(["segments"] if self.separates else [])]
        return corpora.dataset(blocks, names), sum(len(text) > max_length for text in tokens)

    def _first(self, tokenizer: Any) -> np.ndarray:
        """The token that begins a document, where the tokenizer puts one before a text."""
        begins = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
        self.begins = bool(begins)
        return np.array([tokenizer.bos_token_id] if begins else [], dtype=np.int32)

    def _given(self, rows: Any, tokenizer: Any, max_length: int, first: np.ndarray) -> tuple[Any, int]:
        """Beginnings for ``predict``; of long ones the end, with room for what is to be written."""
        room = max(1, max_length - self._generation(max_length).get("max_new_tokens", NEW_TOKENS) - len(first))
        made, long = [], 0
        for given, text in zip(rows["given"][:], corpora.tokenize(rows["given"][:], tokenizer), strict=True):
            ids = [*first, *text.ids[-room:]] or [tokenizer.eos_token_id]
            long += len(text.ids) > room
            made.append({"input_ids": ids, "length": len(ids), "given": given, "limit": max_length})
        return corpora.dataset(made, ["input_ids", "length", "given", "limit"]), long

    def _generation(self, max_length: int) -> dict[str, Any]:
        """``generation``, with at most half an input of new tokens by default."""
        given = self.recipe.generation
        counted = {"max_new_tokens", "max_length"} & given.keys()
        default = {} if counted else {"max_new_tokens": min(NEW_TOKENS, max(1, max_length // 2))}
        return {"do_sample": False, **default, **given}

    def collator(self, tokenizer: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Pads the blocks of a batch to the longest: labels ``[B, T]`` with -100; documents that are kept apart have
        an attention mask ``[B, 1, T, T]`` and positions of their own."""

        def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
            inputs = [{"input_ids": row["input_ids"]} for row in rows]
            batch = dict(tokenizer.pad(inputs, return_tensors="pt"))
            side = tokenizer.padding_side
            if "segments" in rows[0]:
                batch |= apart(padded([row["segments"] for row in rows], batch["input_ids"], side))
            if "labels" in rows[0]:
                batch["labels"] = padded([row["labels"] for row in rows], batch["input_ids"], side)
            return batch

        return collate

    # ---- after the model ----

    def metrics(self, outputs: np.ndarray, targets: Any) -> dict[str, float]:
        """``loss``; ``perplexity``, ``exp`` of the mean loss of a token; ``token_accuracy``."""
        loss = mean(outputs[:, 0], outputs[:, 1])
        return {
            "loss": loss,
            "perplexity": perplexity(loss),
            "token_accuracy": mean(outputs[:, 2], outputs[:, 1]),
        }

    def report(self, outputs: np.ndarray, targets: Any) -> dict[str, Any]:
        """How many tokens were told, and what chance would give: always the most frequent one."""
        return {"tokens": int(outputs[:, 1].sum()), "chance": {"token_accuracy": targets["commonest"]}}

    def answers(
        self, model: Any, encoded: Any, tokenizer: Any, batch_size: int, progress: bool
    ) -> list[dict[str, Any]]:
        """``{"text", "continuation"}`` of each beginning, padded on the left as generation wants it."""
        limits = encoded["limit"][:]
        written = generation.generate(
            model,
            encoded["input_ids"][:],
            pad_token_id=tokenizer.pad_token_id,
            ends=[tokenizer.eos_token_id],
            has_encoder=False,
            batch_size=batch_size,
            progress=progress,
            eos_token_id=tokenizer.eos_token_id,
            **self._generation(limits[0] if limits else 0),
        )
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids, _ in written]
        return [{"text": t, "continuation": more} for t, more in zip(encoded["given"][:], texts, strict=True)]

    def same(self, one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
        return bool(one["continuation"] == other["continuation"])

    # ---- in use ----

    def input_row(self, value: Any, columns: Sequence[str]) -> dict[str, Any]:
        """A text, which is continued, or an object with ``text``."""
        return {"given": text_row(value, ["text"])["text"]}

    def usage(self, columns: Sequence[str], max_length: int) -> Usage:
        given = ", ".join(f"{name}={value!r}" for name, value in self._generation(max_length).items())
        first = "[tokenizer.bos_token_id] + " if self.begins else ""
        code = USAGE.replace("TEXT", f'"{SAMPLES[0]}"').replace("FIRST", first).replace("GIVEN", given)
        return Usage(code, list(SAMPLES), "", "continues texts")

    def state(self) -> dict[str, Any]:
        return {"begins": self.begins}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.begins = bool(state["begins"])


def apart(segments: torch.Tensor) -> dict[str, torch.Tensor]:
    """Attention mask and positions that keep documents apart.

    The mask is added to the attention's scores, a form that all implementations take alike: 0 within a document up to
    the token itself, else the least number of float32.

    Args:
        segments: ``[B, T]`` the number of each token's document; padding, whatever its number, sees itself.

    Returns:
        ``attention_mask`` ``[B, 1, T, T]`` and ``position_ids`` ``[B, T]``.
    """
    length = segments.shape[1]
    seen = (segments[:, :, None] == segments[:, None, :]) & torch.ones(length, length, dtype=torch.bool).tril()
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    return {"attention_mask": mask[:, None], "position_ids": seen.sum(-1) - 1}


def _logits(model: Any, ids: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
    device = next(model.parameters()).device
    given = {name: value.to(device) for name, value in {"input_ids": ids, **inputs}.items()}
    with torch.no_grad(), quiet():
        logits: torch.Tensor = model.eval()(**given)["logits"]
    return logits.float().cpu()
