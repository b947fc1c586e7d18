"""Instructions and their answers: supervised fine-tuning of decoders (Ouyang et al. 2022, InstructGPT, stage 1)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ptft_hf import report
from ptft_hf.errors import DataError, ModelError
from ptft_hf.recipes.instruction import InstructionRecipe
from ptft_hf.tasks import Usage, corpora, generation, summary_usage, turns
from ptft_hf.tasks.causal_lm import CausalLM
from ptft_hf.tasks.inputs import check_text, text_row
from ptft_hf.tasks.language_models import commonest_share
from ptft_hf.tasks.marks import IGNORED
from ptft_hf.tasks.prompting import beginning, speech_of
from ptft_hf.tasks.turns import Marked

SAMPLES = ("What is the capital of Norway?", "Write a sentence about the sea.")


class Instruction(CausalLM):
    """Columns ``messages`` (``{"role", "content"}`` each), ``prompt`` and ``completion`` (texts as they stand, or
    messages both), or ``text``.

    The loss is that of the assistant's turns, of completions, or of whole texts; the token that ends each is trained,
    too. Marks come from the data's mask, never from the padding's number. Labels are shifted already. What is longer
    than ``max_length`` is cut at its end; a row of which nothing is left to train is left out.
    """

    required: Sequence[str] = ("messages",)
    optional: Sequence[str] = ()
    otherwise: Sequence[Sequence[str]] = (("prompt", "completion"), ("text",))
    text_columns: Sequence[str] = ("messages", "prompt", "completion", "text")
    group_column = None
    begins_from_nothing = False
    trains_end_token = True
    long_inputs = "were truncated"
    separating = "packing"
    cleaning = None

    def __init__(self, recipe: InstructionRecipe) -> None:
        """
        Raises:
            RecipeError: Upstream refuses the generation settings.
        """
        self.recipe: InstructionRecipe = recipe  # type: ignore[assignment]
        self.separates = recipe.packing
        self.fields = generation.settings(recipe.generation)
        self.labels = []
        self.columns: list[str] = []
        self.chats = False
        self.end = -1

    # ---- before training ----

    def look_at(self, splits: Any) -> list[str]:
        """Check all rows; say how many turns there are.

        Raises:
            DataError: Rows that are no conversation, or have no turn of the assistant's, and the like.
        """
        notes, problems = [], []
        for name in ("train", "validation", "test"):
            rows = getattr(splits, name)
            self.columns = [column for column in self.text_columns if column in rows.column_names]
            faults = [f"{name}: row {n}: {fault}" for n, row in enumerate(rows, 1) if (fault := _fault(row))]
            problems += [*faults[:3], *([f"{name}: {len(faults):,} such rows in all"] if len(faults) > 3 else [])]
            if not faults:
                counts = [len(messages) for messages in rows["messages"][:]] if "messages" in self.columns else []
                more = f", {sum(counts) / len(counts):.1f} turns on average" if counts else ""
                notes.append(f"{name}: {len(rows):,} {'conversations' if counts else 'texts'}{more}")
        if problems:
            raise DataError(*problems)
        self.chats = not isinstance(splits.train[0][self.columns[0]], str)
        return notes

    def look_at_checkpoint(self, config: Any, tokenizer: Any) -> list[str]:
        """What ends an answer.

        Raises:
            ModelError: The checkpoint is no decoder, or its tokenizer has no chat template where there are
                conversations, or none of the tokens that are needed.
        """
        speech = speech_of(config, tokenizer, "{document}")
        if speech.has_encoder:
            raise ModelError(
                f"{config.model_type}: an encoder-decoder; instructions are learnt by decoders (Llama, Qwen, GPT-2). "
                "Train it as a summarization task, whose documents and summaries may be any texts"
            )
        if not tokenizer.is_fast:
            raise ModelError("the tokenizer does not say where its tokens stand; take a fast one (tokenizer.json)")
        if not self.chats:
            self.end = tokenizer.eos_token_id
            return []
        if not tokenizer.chat_template:
            raise ModelError(
                "the data are conversations, and the tokenizer has no chat template; take the checkpoint's instruct "
                "version or give its tokenizer a template, or give the data as prompt and completion"
            )
        self.end = speech.end
        return []

    # ---- rows to batches ----

    def encode(self, rows: Any, tokenizer: Any, max_length: int) -> tuple[Any, int]:
        """Inputs of at most ``max_length`` tokens with ``labels`` (shifted), ``length`` and, if they are packed,
        ``segments``, the number of each token's example; and how many examples are longer.

        Raises:
            DataError: Nothing is left to train, or a row cannot be encoded.
        """
        if "given" in rows.column_names:
            return self._prompts(rows, tokenizer, max_length)
        found, long, empty = [], 0, 0
        with report.bar(
            len(rows), "Tokenizing", "row", stays=False, show=len(rows) > corpora.MANY_ROWS
        ) as bar:
            for number, row in enumerate(rows, 1):
                marked = self._marked(row, tokenizer, number)
                long += len(marked.ids) > max_length + 1
                inputs = marked.ids[:-1][:max_length]
                labels = [
                    i if trained else IGNORED
                    for i, trained in zip(marked.ids[1:], marked.trained[1:], strict=True)
                ][:max_length]
                if any(label != IGNORED for label in labels):
                    found.append({"input_ids": inputs, "labels": labels, "length": len(inputs)})
                else:
                    empty += 1
                bar.update()
        if not found:
            raise DataError(
                f"nothing is left to train of {len(rows):,} rows: all answers begin behind token {max_length} "
                "(model.max_length)"
            )
        if empty:
            report.say(f"- {empty:,} of {len(rows):,} rows are left out: nothing of them is trained")
        if self.separates:
            found = list(packed(found, max_length))
        return corpora.dataset(found, list(found[0])), long

    def _marked(self, row: Mapping[str, Any], tokenizer: Any, number: int) -> Marked:
        try:
            if "messages" in row:
                return turns.of_messages(tokenizer, row["messages"])
            if "text" in row:
                return turns.of_text(tokenizer, row["text"])
            prompt, completion = row["prompt"], row["completion"]
            if isinstance(prompt, str):
                return turns.of_pair(tokenizer, prompt, completion)
            return turns.of_messages(tokenizer, [*prompt, *completion], len(prompt))
        except ModelError as error:
            raise ModelError(*(f"row {number}: {problem}" for problem in error.problems)) from error

    def _prompts(self, rows: Any, tokenizer: Any, max_length: int) -> tuple[Any, int]:
        """What ``predict`` was given, to be answered; the answer must find room behind it."""
        found, room = [], max_length - self.fields.get("max_new_tokens", 0)
        for given in rows["given"][:]:
            messages = [{"role": "user", "content": given}] if isinstance(given, str) else given
            ids = (
                turns.prompt_ids(tokenizer, messages) if self.chats else beginning(tokenizer, given)
            )
            if len(ids) > room:
                raise DataError(
                    f"a prompt of {len(ids)} tokens is longer than the {max(room, 0)} that {max_length} "
                    "(model.max_length) and generation.max_new_tokens leave"
                )
            found.append({"input_ids": ids or [tokenizer.eos_token_id], "length": len(ids)})
        names = ["input_ids", "length"]
        return corpora.dataset(found, names).add_column("given", rows["given"][:]), 0

    # ---- after the model ----

    def outputs(
        self, model: Any, encoded: Any, tokenizer: Any, batch_size: int, progress: bool = False
    ) -> Any:
        generation.settle(model, tokenizer, self.end, self.fields)
        return super().outputs(model, encoded, tokenizer, batch_size, progress)

    def targets(self, encoded: Any) -> dict[str, float]:
        """Chance: the share of the most frequent token among those that are trained."""
        if "labels" not in encoded.column_names:
            return {}
        labels = np.concatenate(encoded["labels"][:])
        return {"commonest": commonest_share(labels[labels != IGNORED])}

    def answers(
        self, model: Any, encoded: Any, tokenizer: Any, batch_size: int, progress: bool
    ) -> list[dict[str, Any]]:
        """``{"prompt", "answer", "cut_off": whether it came to no end within max_new_tokens}`` of each prompt."""
        written = generation.generate(
            model,
            encoded["input_ids"][:],
            pad_token_id=tokenizer.pad_token_id,
            ends=generation.settle(model, tokenizer, self.end, self.fields),
            has_encoder=False,
            batch_size=batch_size,
            progress=progress,
        )
        return [
            {"prompt": given, "answer": tokenizer.decode(ids, skip_special_tokens=True), "cut_off": not ended}
            for given, (ids, ended) in zip(encoded["given"][:], written, strict=True)
        ]

    def same(self, one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
        return bool(one["answer"] == other["answer"])

    # ---- in use ----

    def input_row(self, value: Any, columns: Sequence[str]) -> dict[str, Any]:
        """A text, which is the user's turn of a conversation; or an object with ``prompt`` or ``messages``."""
        if isinstance(value, Mapping) and "messages" in value:
            value = value["messages"]
        elif isinstance(value, Mapping):
            value = value.get("prompt")
        if isinstance(value, str) or not self.chats:
            return {"given": text_row(value, ["prompt"])["prompt"]}
        if fault := turns.fault(value):
            raise DataError(f"'messages': {fault}")
        for message in value:
            check_text("messages", message.get("content") or "")
        return {"given": value}

    def usage(self, columns: Sequence[str], max_length: int) -> Usage:
        room = max_length - self.fields.get("max_new_tokens", 0)
        code = summary_usage.code_of("chat" if self.chats else "decoder", SAMPLES[0], "text", room, "answer")
        return Usage(code, list(SAMPLES), "", "answers instructions")

    def state(self) -> dict[str, Any]:
        return {"columns": self.columns, "chats": self.chats, "end": self.end}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.columns, self.chats, self.end = list(state["columns"]), bool(state["chats"]), int(state["end"])


def packed(rows: Iterable[Mapping[str, Any]], max_length: int) -> Iterable[dict[str, Any]]:
    """Examples in blocks of at most ``max_length`` tokens: the longest first, each into the fullest block that has
    room for it (best-fit decreasing; Ding et al. 2024), so that none is cut.

    Args:
        rows: ``input_ids``, ``labels`` and ``length``.
        max_length: No row is longer.
    """
    blocks: list[list[Mapping[str, Any]]] = []
    with_room: dict[int, list[int]] = {}  # room: numbers of blocks
    for row in sorted(rows, key=lambda row: -row["length"]):
        room = min((r for r, numbers in with_room.items() if numbers and r >= row["length"]), default=None)
        if room is None:
            room, number = max_length, len(blocks)
            blocks.append([])
        else:
            number = with_room[room].pop()
        blocks[number].append(row)
        with_room.setdefault(room - row["length"], []).append(number)
    for block in blocks:
        yield {
            "input_ids": [i for row in block for i in row["input_ids"]],
            "labels": [i for row in block for i in row["labels"]],
            "length": sum(row["length"] for row in block),
            "segments": [n for n, row in enumerate(block) for _ in row["input_ids"]],
        }


def _fault(row: Mapping[str, Any]) -> str | None:
    """What is wrong with a row, if anything is."""
    if "messages" in row:
        return turns.fault(row["messages"]) or _without_answer(row["messages"])
    texts = [row[name] for name in ("prompt", "completion", "text") if name in row]
    if all(isinstance(text, str) for text in texts):
        return None
    if "text" in row:
        return "'text' is no text"
    if any(isinstance(text, str) for text in texts):
        return "'prompt' and 'completion' must be both texts or both messages"
    for name in ("prompt", "completion"):
        if fault := turns.fault(row[name]):
            return f"{name!r}: {fault}"
    return _without_answer(row["completion"])


def _without_answer(messages: Sequence[Mapping[str, Any]]) -> str | None:
    roles = [message["role"] for message in messages]
    return None if "assistant" in roles else f"no turn is the assistant's; the roles are {', '.join(roles)}"
