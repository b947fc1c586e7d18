"""Running text for tests of pre-training: small books that a tiny model can learn something of, and tokenizers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import datasets

from ptft_hf.models import nothing
from ptft_hf.recipes import TokenizerRecipe
from tests.conftest import write_rows

SUBJECTS = ("the film", "this story", "the plot", "a scene", "the actor")
VERBS = ("was", "is")
ADJECTIVES = ("good", "fine", "great", "lovely", "bad", "poor", "awful", "dull")


def books(count: int, paragraphs: int, seed: int = 0) -> list[str]:
    """Paragraphs of some sentences, book after book; every book has two adjectives of its own."""
    draw, texts = random.Random(seed), list[str]()
    for _ in range(count):
        own = draw.sample(ADJECTIVES, 2)
        for _ in range(paragraphs):
            sentences = [
                f"{draw.choice(SUBJECTS)} {draw.choice(VERBS)} very {draw.choice(own)}{draw.choice([',', ' .', ''])}"
                for _ in range(draw.randint(1, 4))
            ]
            texts.append(" ".join(sentences))
    return texts


def corpus(train: int = 4, paragraphs: int = 24) -> datasets.DatasetDict:
    """Books of train, and of validation and test two others each."""
    sizes = {"train": (train, 1), "validation": (2, 2), "test": (2, 3)}
    return datasets.DatasetDict(
        {
            name: datasets.Dataset.from_dict(
                {
                    "text": books(count, paragraphs, seed),
                    "document": [f"{name} {i // paragraphs}" for i in range(count * paragraphs)],
                }
            )
            for name, (count, seed) in sizes.items()
        }
    )


def write_corpus(folder: Path) -> dict[str, str]:
    """``data_files`` of a corpus on disk."""
    splits = corpus()
    return {name: str(write_rows(folder / f"{name}.jsonl", splits[name].to_list())) for name in splits}


def tokenizer_of(kind: str, texts: list[str]) -> Any:
    """A fast tokenizer of these texts; ``sentencepiece`` is Unigram with its word mark."""
    if kind != "sentencepiece":
        return nothing.train_tokenizer(
            texts, TokenizerRecipe(vocab_size=300), kind, generates=False, token_types=kind == "wordpiece"
        )
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.Unigram())
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=60, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")
