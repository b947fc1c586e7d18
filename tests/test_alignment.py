"""Words -> tokens -> words, against independent computations; windows; trap 24 from both sides."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import transformers

from ptft_hf import tasks
from ptft_hf.errors import ModelError, RecipeError
from ptft_hf.models import load_tokenizer
from ptft_hf.recipes import TokenClassificationRecipe
from ptft_hf.tasks import alignment
from ptft_hf.tasks.alignment import FINE, LIKE_TOKENS, Window, joined, split
from ptft_hf.tasks.tags import entities
from tests.tiny import make_tokenizer

KINDS = ("WordPiece", "byte-level BPE", "Unigram")
SENTENCE = [
    "Jürgen",
    "'s",
    "wife",
    "flew",
    "to",
    "São-Paulo",
    "😀👍🏽",
    "…",
    "http://t.co/aBc",
    ".",
    "东京",
    "ﬁn",
]
"""Letters with marks, a clitic, an address, emoji of several code points, signs, ideographs, a ligature."""


def train_tokenizer(kind: str, texts: Sequence[str]) -> Any:
    """A tokenizer of one of the three kinds, as ``transformers`` wraps it."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    marks = ["<pad>", "<s>", "</s>", "<unk>"]
    if kind == "byte-level BPE":  # as RoBERTa: no space before the first word, offsets without spaces
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer: Any = trainers.BpeTrainer(vocab_size=3000, special_tokens=marks, initial_alphabet=alphabet)
    elif kind == "Unigram":  # as XLM-R: NFKC, and a mark for the space before a word
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=3000, special_tokens=marks, unk_token="<unk>")
    else:
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=3000, special_tokens=marks)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    names = {f"{name}_token": mark for name, mark in zip(("pad", "bos", "eos", "unk"), marks, strict=True)}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_input_names=["input_ids", "attention_mask"], **names
    )


@pytest.fixture(scope="module")
def real(real_data: Path) -> dict[str, list[tuple[list[str], list[str]]]]:
    """Words and tags of each split of WNUT 2017."""
    return {
        split: [
            (row["tokens"], row["ner_tags"])
            for row in map(json.loads, (real_data / f"wnut17/{split}.jsonl").read_text("utf-8").splitlines())
        ]
        for split in ("train", "validation", "test")
    }


@pytest.fixture(scope="module")
def tokenizer_of(real: Any) -> Callable[[str], Any]:
    made: dict[str, Any] = {}

    def get(kind: str) -> Any:
        if kind not in made:
            made[kind] = train_tokenizer(kind, [" ".join(words) for words, _ in real["train"]])
        return made[kind]

    return get


def first_tokens(parts: Sequence[Window]) -> dict[int, list[tuple[int, int]]]:
    """Word: (window, position) of every token that answers for it."""
    found: dict[int, list[tuple[int, int]]] = {}
    for k, part in enumerate(parts):
        for i, word in enumerate(part.words):
            if word >= 0:
                found.setdefault(word, []).append((k, i))
    return found


def ends_of(tokenizer: Any, words: Sequence[str]) -> list[int]:
    """How many tokens stand before the end of each word: those of the text up to there, tokenized alone."""
    texts = [" ".join(words[: n + 1]) for n in range(len(words))]
    return [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


# --- every word has its first token -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_token_of_a_word_is_the_one_after_the_text_before_it(
    kind: str, real: Any, tokenizer_of: Callable[[str], Any]
) -> None:
    """Independent of offsets: tokens of the text before a word are counted, since no token spans a space."""
    tokenizer = tokenizer_of(kind)
    for words, _ in [*real["validation"][:150], (SENTENCE, [])]:
        ((only,),) = alignment.windows([joined(words)], tokenizer, 512, 64)
        begins = [0, *ends_of(tokenizer, words)[:-1]]
        found = {word: i - 1 for i, word in enumerate(only.words) if word >= 0}  # <s> stands before
        mute = {i for i, (a, b) in enumerate(zip(begins, ends_of(tokenizer, words), strict=True)) if a == b}
        assert set(found) == set(range(len(words)))
        if not mute:  # else unknown tokens stand for words without any
            gaps = [tokenizer.convert_ids_to_tokens(only.inputs["input_ids"][1 + n]) for n in begins]
            lone = [n > 0 and gap in ("▁", "Ġ") for n, gap in zip(begins, gaps, strict=True)]  # a bare space
            assert [found[i] for i in range(len(words))] == [
                n + skip for n, skip in zip(begins, lone, strict=True)
            ]


@pytest.mark.parametrize("size", [32, 128])
@pytest.mark.parametrize("kind", KINDS)
def test_words_to_tokens_to_words_is_the_identity_and_no_entity_is_lost(
    kind: str, size: int, real: Any, tokenizer_of: Callable[[str], Any]
) -> None:
    recipe = TokenClassificationRecipe(name="t", family="token_classification")
    task: Any = tasks.build(recipe)
    task.labels = sorted({t[2:] for rows in real.values() for _, tags in rows for t in tags if t != "O"})
    tokenizer, lost, entities_of_all = tokenizer_of(kind), 0, 0
    for rows in real.values():
        table = datasets.Dataset.from_list([{"tokens": words, "tags": tags} for words, tags in rows])
        encoded, several = task.encode(table, tokenizer, size)
        assert max(encoded["length"]) <= size
        assert size > 32 or several > 100  # windows are really used
        answers = [one_hot(labels, len(task.tags)) for labels in encoded["labels"][:]]
        found = list(task._answers(answers, task.targets(encoded)))
        assert len(found) == len(rows)
        for (words, tags), (reading, predicted, _) in zip(rows, found, strict=True):
            assert [reading.words.text[a:b] for a, b in reading.words.spans] == words
            assert predicted == tags
            lost += len(set(entities(tags)) - set(entities(predicted)))
            entities_of_all += len(entities(tags))
    assert (lost, entities_of_all) == (0, 1975 + 836 + 1079)


def one_hot(labels: Sequence[int], n: int) -> np.ndarray:
    """Logits that say each token's label, and O where it has none."""
    logits = np.zeros((len(labels), n), dtype=np.float32)
    logits[np.arange(len(labels)), np.maximum(labels, 0)] = 9
    return logits


def test_the_real_tokenizer_of_minilm_agrees_with_upstreams_word_ids(minilm: str, real: Any) -> None:
    tokenizer = load_tokenizer(minilm)
    rows = [words for words, _ in real["test"]]
    upstream = tokenizer(rows, is_split_into_words=True)
    for i, (words, parts) in enumerate(
        zip(rows, alignment.windows(list(map(joined, rows)), tokenizer, 512, 0), strict=True)
    ):
        (only,) = parts
        if len({w for w in upstream.word_ids(i) if w is not None}) == len(words):
            assert only.inputs["input_ids"] == upstream["input_ids"][i]
            assert only.inside == [-1 if word is None else word for word in upstream.word_ids(i)]


# --- trap 24 ----------------------------------------------------------------------------------------------


def test_upstream_needs_add_prefix_space_and_ours_does_not(tokenizer_of: Callable[[str], Any]) -> None:
    """Words of a byte-level tokenizer, given one by one, are stuck together without a space."""
    tokenizer, words = tokenizer_of("byte-level BPE"), ["The", "film", "was", "good"]
    text = tokenizer(" ".join(words))["input_ids"]
    upstream = tokenizer(words, is_split_into_words=True)["input_ids"]
    assert upstream != text
    assert tokenizer.decode(upstream, skip_special_tokens=True) == "Thefilmwasgood"
    ((only,),) = alignment.windows([joined(words)], tokenizer, 64, 0)
    assert only.inputs["input_ids"] == text


def test_upstream_truncates_entities_away_and_ours_does_not() -> None:
    tokenizer, words = make_tokenizer("roberta"), ["the"] * 40 + ["London"]
    cut = tokenizer(words, is_split_into_words=True, truncation=True, max_length=32)
    assert 40 not in cut.word_ids()
    (parts,) = alignment.windows([joined(words)], tokenizer, 32, 8)
    assert set(first_tokens(parts)) == set(range(41))


# --- windows ----------------------------------------------------------------------------------------------


def test_windows_by_hand() -> None:
    """Five words of one token each, two marks, windows of 4 + 2 tokens that share 2: 0 1 2 3 and 2 3 4."""
    words = joined(["the", "film", "was", "very", "good"])
    first, second = alignment.windows([words], make_tokenizer("roberta"), 6, 2)[0]
    # Word 2 has one word right of it in the first window and none left of it in the second; 3 is the reverse.
    assert first.words == [-1, 0, 1, 2, -1, -1]
    assert second.words == [-1, -1, 3, 4, -1]
    assert first.inside == [-1, 0, 1, 2, 3, -1]
    assert second.inside == [-1, 2, 3, 4, -1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "stride"), [(32, 8), (32, 0), (16, 13), (12, 3)])
def test_every_word_is_one_windows_own(
    kind: str, size: int, stride: int, real: Any, tokenizer_of: Callable[[str], Any]
) -> None:
    tokenizer = tokenizer_of(kind)
    rows = [words for words, _ in real["test"][:200]] + [["supercalifragilistic" * 9, "x"], SENTENCE * 5]
    whole = alignment.windows(list(map(joined, rows)), tokenizer, 10_000, 0)
    for words, parts, (all_of_it,) in zip(
        rows, alignment.windows(list(map(joined, rows)), tokenizer, size, stride), whole, strict=True
    ):
        found = first_tokens(parts)
        assert sorted(found) == list(range(len(words)))
        assert all(len(places) == 1 for places in found.values())
        assert all(len(part.words) <= size for part in parts)
        begins = {
            word: all_of_it.inputs["input_ids"][i] for i, word in enumerate(all_of_it.words) if word >= 0
        }
        for word, ((k, i),) in found.items():  # the token is the word's first one, not one in its middle
            assert parts[k].inputs["input_ids"][i] == begins[word]


def test_a_word_that_the_tokenizer_makes_nothing_of_is_read_as_unknown(tokenizer_of: Any) -> None:
    words = ["the", "\u200b", "", "\x07", "film"]
    for kind in KINDS:
        ((only,),) = alignment.windows([joined(words)], tokenizer_of(kind), 64, 0)
        assert sorted(word for word in only.words if word >= 0) == [0, 1, 2, 3, 4]
    tokenizer = tokenizer_of("WordPiece")
    ((only,),) = alignment.windows([joined(words)], tokenizer, 64, 0)
    read = tokenizer.convert_ids_to_tokens([only.inputs["input_ids"][only.words.index(i)] for i in range(5)])
    assert read == ["the", "<unk>", "<unk>", "<unk>", "film"]
    upstream = tokenizer([words], is_split_into_words=True).word_ids(0)
    assert set(upstream) == {None, 0, 4}  # upstream has no token for three of the five


def test_a_text_that_spells_a_mark_is_still_text() -> None:
    words = ["the", "</s>", "film"]
    ((only,),) = alignment.windows([joined(words)], make_tokenizer("roberta"), 64, 0)
    assert [word for word in only.words if word >= 0] == [0, 1, 2]


def test_windows_that_cannot_be_are_refused() -> None:
    tokenizer = make_tokenizer("roberta")
    assert alignment.overlap(tokenizer, 34, None) == 8
    with pytest.raises(RecipeError, match="stride: 6 is not less than the 6 tokens of a window"):
        alignment.overlap(tokenizer, 8, 6)
    with pytest.raises(RecipeError, match="max_length: 3 tokens leave no room"):
        alignment.overlap(tokenizer, 3, None)


def test_a_tokenizer_without_offsets_is_refused(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text('{"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3, "a": 4}')
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    slow = transformers.CTRLTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    assert not slow.is_fast
    with pytest.raises(ModelError, match="CTRLTokenizer does not say from which characters"):
        alignment.overlap(slow, 64, None)


# --- words of running text --------------------------------------------------------------------------------


def words_of(text: str, pattern: str) -> list[str]:
    return [text[a:b] for a, b in split(text, pattern).spans]


def test_words_of_running_text() -> None:
    text = "@bob's U.S. flat (in well-known 东京) costs $3.50: http://t.co/x! don't"
    spaced = "@bob 's U.S . flat ( in well-known 东 京 ) costs $ 3.50 : http://t.co/x! don 't"
    assert words_of(text, LIKE_TOKENS) == spaced.split()
    assert words_of("U.S. state-run x_1", FINE) == ["U", ".", "S", ".", "state", "-", "run", "x_1"]
    assert words_of(" \t\n", FINE) == words_of("", LIKE_TOKENS) == []


@pytest.mark.parametrize("pattern", [FINE, LIKE_TOKENS])
def test_every_character_but_white_space_is_in_one_word(pattern: str, real: Any) -> None:
    for words, _ in real["test"]:
        text = " ".join(words)
        assert "".join(words_of(text, pattern)) == re.sub(r"\s", "", text)
