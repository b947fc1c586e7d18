"""Recipes of pre-training: running text, where its documents begin, and how it is cleaned and tokenized."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from ptft_hf.recipes.faults import Fault, column_faults, generation_faults
from ptft_hf.recipes.models import TaskRecipe, _Strict

GENERATION_SET_BY_THE_RUN = {
    **dict.fromkeys(("pad_token_id", "eos_token_id", "bos_token_id"), "it is the tokenizer's"),
    "num_return_sequences": "a text has one continuation",
}
"""``GenerationConfig`` names that a recipe may not give, and why."""


class Cleaning(_Strict):
    """What is done to texts before anything else, in this order; each step counts what it changed."""

    unicode: Literal["NFC", "NFKC"] | None = None
    """Unicode's composed form; ``NFKC`` also makes one character of those that only look different."""
    white_space: bool = False
    """Runs of spaces and tabs become one space, line ends one line feed, ends are stripped."""
    duplicate_lines: bool = False
    """Drop lines that repeat an earlier line of the same text."""
    min_characters: Annotated[int, Field(ge=1)] | None = None
    """Drop shorter texts."""
    max_characters: Annotated[int, Field(ge=1)] | None = None
    """Drop longer texts."""
    duplicate_texts: bool = False
    """Drop texts that repeat an earlier text of the same split."""

    @classmethod
    def faults(cls, values: Mapping[str, Any]) -> Iterator[Fault]:
        least, most = values.get("min_characters"), values.get("max_characters")
        if isinstance(least, int) and isinstance(most, int) and least > most:
            yield ("min_characters",), f"{least} is more than max_characters, {most}: no text would be left"


class TokenizerRecipe(_Strict):
    """A tokenizer that is trained on the training texts."""

    kind: Literal["wordpiece", "byte_bpe"] | None = None
    """``wordpiece`` (BERT) or ``byte_bpe`` (byte-level BPE: RoBERTa, GPT-2, Llama 3); None is WordPiece for masked
    and BPE for causal models."""
    vocab_size: Annotated[int, Field(ge=300)] = 30_000
    """At most so many tokens, about as many as BERT has; a small corpus gives fewer."""
    lowercase: bool = False
    """Read all texts in lower case."""
    min_frequency: Annotated[int, Field(ge=1)] = 2
    """A token must stand so often in the corpus."""


class CorpusRecipe(TaskRecipe):
    """Running text, one paragraph or one document a row."""

    cleaning: Cleaning | None = None
    """None leaves texts as they are."""
    tokenizer_kind: ClassVar[Literal["wordpiece", "byte_bpe"]]
    """Of a tokenizer that is trained, where the recipe names none."""
    document_begins: str | None = None
    """A regular expression: a text that it matches at its begin is the first of a document. For corpora without a
    column ``document``."""
    tokenizer: str | TokenizerRecipe | None = None
    """Of a model from nothing (``--model config:...``): how it is trained, or the folder or hub id that it is taken
    from. None is that of the configuration's own checkpoint, or else one trained with the defaults. A pretrained
    checkpoint brings its own."""

    @classmethod
    def faults(cls, values: Mapping[str, Any]) -> Iterator[Fault]:
        yield from super().faults(values)
        yield from column_faults(values, ("text", "document"))
        pattern = values.get("document_begins")
        try:
            re.compile(pattern if isinstance(pattern, str) else "")
        except re.error as error:
            yield ("document_begins",), f"{pattern!r} is not a regular expression: {error}"
        for name, kind in (("cleaning", Cleaning), ("tokenizer", TokenizerRecipe)):
            if isinstance(values.get(name), dict):  # a model has checked itself
                yield from (((name, *key), message) for key, message in kind.faults(values[name]))


class MaskedLMRecipe(CorpusRecipe):
    """Words that are hidden, told by what stands around them (BERT)."""

    tokenizer_kind = "wordpiece"

    mask_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Share of the tokens that are predicted (Devlin et al. 2019): of these 80 % are replaced by the mask token,
    10 % by a random one, and 10 % stay."""
    whole_word: bool = False
    """Choose whole words instead of tokens."""
    next_sentence: bool = False
    """Pairs of text, half of which follow each other, told apart beside the masked tokens (BERT's NSP)."""
    pack: bool = True
    """Fill each input with the texts of one document in their order; False makes each text an input of its own,
    longer ones cut."""
    top_k: Annotated[int, Field(ge=1)] = 5
    """How many tokens ``predict`` gives for each mask."""

    @classmethod
    def faults(cls, values: Mapping[str, Any]) -> Iterator[Fault]:
        yield from super().faults(values)
        if values.get("next_sentence") and values.get("pack") is False:
            yield ("pack",), "has no meaning beside next_sentence, which fills both halves itself; leave it out"


class CausalLMRecipe(CorpusRecipe):
    """The next token, told by those before it (GPT)."""

    tokenizer_kind = "byte_bpe"

    separator: str = "\n"
    """What stands between the texts of one document."""
    separate_documents: bool = False
    """No attention from one document to another in the same block, and positions that begin anew with each."""
    generation: dict[str, Any] = Field(default_factory=dict)
    """``transformers.GenerationConfig`` by name, for ``predict``; 50 new tokens, the likeliest, if it is empty."""

    @classmethod
    def faults(cls, values: Mapping[str, Any]) -> Iterator[Fault]:
        yield from super().faults(values)
        yield from generation_faults(values.get("generation"), GENERATION_SET_BY_THE_RUN)
