"""What a model that writes is given to read, and what it is to write, as token ids.

Encoder-decoders read a prompt and write a text of their own; decoders go on with the prompt, which is a chat where
their tokenizer has a template for chats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ptft_hf.errors import ModelError, PtftError, RecipeError
from ptft_hf.recipes.summarization import DOCUMENT

PROMPTS = {
    "t5": "summarize: {document}",
    "encoder-decoder": "{document}",
    "chat": "Summarize the following text.\n\n{document}",
    "decoder": "{document}\n\nSummary:",
}
"""Prompts by kind of checkpoint: T5 (Raffel et al. 2020, whose prefix it was pretrained with), other
encoder-decoders, decoders whose tokenizer has a chat template, and other decoders."""
LEAST_ROOM = 8
"""Tokens that a prompt must leave for its document."""


class Speech(NamedTuple):
    """How a checkpoint is spoken to, as far as it is not in its tokenizer.

    Attributes:
        kind: A key of :data:`PROMPTS`.
        start: The first input of a decoder that has an encoder; None of other decoders.
        end: The token that ends what the model writes, and that it is trained to write.
        prompt: With ``{document}`` in it.
    """

    kind: str
    start: int | None
    end: int
    prompt: str

    @property
    def has_encoder(self) -> bool:
        return self.kind in ("t5", "encoder-decoder")

    def render(self, tokenizer: Any, document: str) -> str:
        """The prompt with its document, as one text."""
        text = self.prompt.replace(DOCUMENT, without_marks(tokenizer, document))
        if self.kind != "chat":
            return text
        turns = [{"role": "user", "content": text}]
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


def without_marks(tokenizer: Any, text: str) -> str:
    """A text whose marks (``<|im_end|>``) are text: they are broken by a space, so that no tokenizer takes them for
    marks."""
    for mark in tokenizer.convert_ids_to_tokens(sorted(marks_of(tokenizer))):
        if mark in text:
            text = text.replace(mark, f"{mark[0]} {mark[1:]}")
    return text


def marks_of(tokenizer: Any) -> set[int]:
    """Ids of all special tokens, those included that have no name among the tokenizer's own (Llama 3's
    ``<|eot_id|>``)."""
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def render(
    tokenizer: Any,
    turns: Sequence[Mapping[str, Any]],
    add_generation_prompt: bool = False,
    error: type[PtftError] = ModelError,
) -> str:
    """The chat template's text.

    Raises:
        error: The template, a program of the checkpoint's, fails on these turns.
    """
    options = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
    try:
        return str(tokenizer.apply_chat_template(list(turns), **options))
    except Exception as problem:
        roles = ", ".join(str(turn.get("role")) for turn in turns)
        raise error(f"the tokenizer's chat template refuses the roles {roles}: {problem}") from problem


def beginning(tokenizer: Any, text: str) -> list[int]:
    """A text's ids with the marks before it, to be gone on from: some tokenizers close every text, and nothing
    follows an end."""
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    while ids and ids[-1] in (tokenizer.eos_token_id, tokenizer.sep_token_id):
        ids.pop()
    return ids


def speech_of(config: Any, tokenizer: Any, prompt: str | None) -> Speech:
    """How to speak to a checkpoint.

    Args:
        config: The checkpoint's.
        tokenizer: Its tokenizer.
        prompt: Of the recipe, or None.

    Raises:
        ModelError: It cannot write, nothing tells where its texts begin or end, or its chat template cannot be used.
    """
    start = None
    if config.is_encoder_decoder:
        kind = "t5" if config.model_type in ("t5", "mt5", "umt5", "longt5") else "encoder-decoder"
        start = getattr(config, "decoder_start_token_id", None)
        start = config.bos_token_id if start is None else start
        if start is None:
            raise ModelError(f"{config.model_type}: its configuration names no decoder_start_token_id")
    elif is_encoder(config):
        raise ModelError(
            f"{config.model_type}: an encoder, each of whose tokens sees those behind it, so that it cannot write; "
            "choose a decoder (GPT-2, Llama, Qwen) or an encoder-decoder (T5, BART)"
        )
    else:
        kind = "chat" if tokenizer.chat_template else "decoder"
    end = end_of_turn(tokenizer) if kind == "chat" else None
    end = tokenizer.eos_token_id if end is None else end
    if end is None:
        raise ModelError("the tokenizer has no end token: the model could not learn where a summary ends")
    return Speech(kind, start, int(end), prompt or PROMPTS[kind])


def is_encoder(config: Any) -> bool:
    """Whether each token sees those behind it: configurations with a masked language model. Upstream has BERT among
    the causal ones, too, and runs it as the encoder that it is unless ``is_decoder`` is set."""
    import transformers

    encoders: Any = transformers.AutoModelForMaskedLM
    return type(config) in encoders._model_mapping and not getattr(config, "is_decoder", False)


def end_of_turn(tokenizer: Any) -> int | None:
    """The first mark that the chat template writes behind the assistant's turn, if there is one.

    Raises:
        ModelError: The template cannot be used.
    """
    turns = [{"role": "user", "content": "Question."}, {"role": "assistant", "content": "Answer."}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except Exception as error:  # a template is a program of the checkpoint's
        raise ModelError(f"the tokenizer's chat template cannot be used: {error}") from error
    ids: list[int] = tokenizer(text.rpartition("Answer.")[2], add_special_tokens=False)["input_ids"]
    marks = marks_of(tokenizer)
    return next((i for i in ids if i in marks), None)


class Prompt(NamedTuple):
    """The prompts of one document: ``texts`` and their token ids, one of each unless the document was split."""

    texts: list[str]
    ids: list[list[int]]
    is_long: bool


def prompts_of(
    speech: Speech, tokenizer: Any, documents: Sequence[str], limit: int, split: bool
) -> list[Prompt]:
    """The prompts of documents, none of them longer than ``limit`` tokens.

    Args:
        speech: How the model is spoken to.
        tokenizer: A fast one, with character offsets.
        documents: One text each.
        limit: Tokens of a prompt, with the document and all marks.
        split: Whether a document that is too long is read in parts; else it is cut.

    Raises:
        RecipeError: The prompt leaves no room for a document.
    """
    texts = [speech.render(tokenizer, document) for document in documents]
    found = []
    for document, text, ids in zip(documents, texts, _ids(speech, tokenizer, texts), strict=True):
        if len(ids) <= limit:
            found.append(Prompt([text], [ids], False))
            continue
        parts = list(_parts(speech, tokenizer, document, limit, split))
        found.append(Prompt([text for text, _ in parts], [ids for _, ids in parts], True))
    return found


def _parts(
    speech: Speech, tokenizer: Any, document: str, limit: int, split: bool
) -> Iterator[tuple[str, list[int]]]:
    """Prompts for a document's parts, each as long as may be; with ``split`` all of them, up to white space."""
    empty = _ids(speech, tokenizer, [speech.render(tokenizer, "")])[0]
    if limit - len(empty) < LEAST_ROOM:
        raise RecipeError(
            f"prompt: its {len(empty)} tokens leave too little of {limit} for a document; raise model.max_length, or "
            "shorten the prompt (or generation.max_new_tokens, if the model has no encoder)"
        )
    rest = document
    while True:
        part = _beginning(tokenizer, rest, limit - len(empty), split)
        text = speech.render(tokenizer, part)
        ids = _ids(speech, tokenizer, [text])[0]
        room = limit - len(empty)
        while len(ids) > limit:  # at its borders a document may take a token more than by itself
            room -= max(1, len(ids) - limit)
            part = _beginning(tokenizer, rest, room, split)
            text = speech.render(tokenizer, part)
            ids = _ids(speech, tokenizer, [text])[0]
        yield text, ids
        rest = rest[len(part) :].lstrip()
        if not split or not rest:
            return


def _beginning(tokenizer: Any, text: str, tokens: int, at_space: bool) -> str:
    """As much of a text as ``tokens`` hold, up to white space in the second half of it if that is asked for."""
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    if len(offsets) <= tokens:
        return text
    part = text[: max(1, offsets[max(tokens, 1) - 1][1])]
    space = max((i for i, c in enumerate(part) if c.isspace()), default=0)
    inside_word = not text[len(part) :][:1].isspace()
    return part[:space] if at_space and inside_word and space > len(part) // 2 else part


def _ids(speech: Speech, tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of rendered prompts: a chat has its marks in it already, and a decoder goes on where one ends."""
    marked = speech.kind != "chat"
    found: list[list[int]] = tokenizer(list(texts), add_special_tokens=marked, verbose=False)["input_ids"]
    if speech.has_encoder:
        return found
    return [ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids for ids in found]


def targets_of(
    speech: Speech, tokenizer: Any, prompts: Sequence[Prompt], summaries: Sequence[str], limit: int
) -> tuple[list[list[int]], int]:
    """What the model is to write after each (first) prompt: a summary's ids and the end token, which stays where
    a summary is cut.

    Returns:
        At most ``limit`` ids each; and how many summaries were cut.
    """
    if speech.has_encoder:
        written = tokenizer(text_target=list(summaries), verbose=False)["input_ids"]
    else:
        gap = "" if speech.kind == "chat" else " "
        texts = [prompt.texts[0] + gap + summary for prompt, summary in zip(prompts, summaries, strict=True)]
        written = [gap + summary for summary in summaries]
        alone = tokenizer(written, add_special_tokens=False, verbose=False)["input_ids"]
        written = [
            whole[len(prompt.ids[0]) :] if whole[: len(prompt.ids[0])] == prompt.ids[0] else part
            for whole, prompt, part in zip(_ids(speech, tokenizer, texts), prompts, alone, strict=True)
        ]
    written = [ids[:-1] if ids and ids[-1] == speech.end else ids for ids in written]
    cut = sum(len(ids) >= limit for ids in written)
    return [[*ids[: limit - 1], speech.end] for ids in written], cut


def collator(
    pad_token_id: int, speech: Callable[[], Speech]
) -> Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]:
    """Pads a batch on the right to its longest row.

    Labels ``[B, T]`` say which token is to be predicted *at* a position, -100 none: they are shifted already, and
    a decoder beside an encoder gets ``decoder_input_ids``, which are the labels one place further right. Masks come
    from the rows' lengths, since the padding token may be the end token, too.
    """
    import torch

    def padded(rows: Sequence[Sequence[int]], value: int) -> Any:
        width = max(map(len, rows))
        return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])

    def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        inputs = [row["input_ids"] for row in rows]
        batch = {
            "input_ids": padded(inputs, pad_token_id),
            "attention_mask": padded([[1] * len(ids) for ids in inputs], 0),
        }
        labels = [row.get("labels") for row in rows]
        start = speech().start
        if start is not None:
            begun = [[start, *(ids or [])[:-1]] for ids in labels]
            batch["decoder_input_ids"] = padded(begun, pad_token_id)
        if all(ids is not None for ids in labels):
            batch["labels"] = padded(labels, -100)  # type: ignore[arg-type]
        return batch

    return collate
