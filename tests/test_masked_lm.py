"""Masked language models as a task: masking, pairs of texts, inputs, loss, figures; upstream's traps."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers

from ptft_hf.errors import DataError, ModelError
from ptft_hf.recipes import MaskedLMRecipe, TokenizerRecipe
from ptft_hf.tasks import corpora, masking
from ptft_hf.tasks.masked_lm import MaskedLM
from ptft_hf.tasks.sentence_pairs import FAR, IS_NEXT, IS_RANDOM, Unit, pairs_of
from tests.corpus import books, tokenizer_of
from tests.tiny import make_tokenizer


def task(**fields: Any) -> MaskedLM:
    return MaskedLM(MaskedLMRecipe(name="test", family="masked_lm", **fields))


def rows_of(texts: list[str], documents: list[str] | None = None) -> datasets.Dataset:
    columns = {"text": texts, **({"document": documents} if documents else {})}
    return datasets.Dataset.from_dict(columns)


# --- which tokens are hidden ------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "count"), [(1, 1), (3, 1), (20, 3), (100, 15), (126, 19)])
def test_exactly_fifteen_percent_are_chosen(tokens: int, count: int) -> None:
    words = np.concatenate([[-1], np.arange(tokens), [-1, -1]])
    for seed in range(20):
        places = masking.chosen(words, 0.15, False, np.random.default_rng(seed))
        assert len(places) == count
        assert (np.diff(places) > 0).all()
        assert (words[places] >= 0).all()
    assert len(masking.chosen(np.array([-1, -1]), 0.15, False, np.random.default_rng(0))) == 0


def test_every_token_is_chosen_equally_often() -> None:
    words, times = np.arange(40), 4000
    counts = np.zeros(40)
    for seed in range(times):
        counts[masking.chosen(words, 0.15, False, np.random.default_rng(seed))] += 1
    assert counts.sum() == 6 * times
    spread = math.sqrt(times * 0.15 * 0.85)
    assert (np.abs(counts - 0.15 * times) < 5 * spread).all()


def test_whole_words_are_chosen_whole() -> None:
    sizes = [1, 2, 1, 4, 1, 3, 1, 1, 5, 1]
    words = np.concatenate([[-1], np.repeat(np.arange(10), sizes), [-1]])
    seen = Counter[int]()
    for seed in range(300):
        places = masking.chosen(words, 0.25, True, np.random.default_rng(seed))
        picked = set(words[places].tolist())
        assert sum(sizes[word] for word in picked) == len(places) <= 5  # a quarter of 20
        seen.update(picked)
    assert set(seen) == set(range(10))
    only_long = np.repeat([0, 1], [7, 6])  # neither fits into 2: the shorter one
    assert masking.chosen(only_long, 0.15, True, np.random.default_rng(0)).tolist() == [7, 8, 9, 10, 11, 12]


def test_what_is_hidden_is_replaced_80_10_10() -> None:
    ids = np.arange(10, 10 + 50_000) % 90 + 10
    positions = np.arange(0, 50_000, 2)
    others = np.arange(5, 100)
    inputs, labels = masking.hidden(ids, positions, 4, others, np.random.default_rng(3))
    assert (labels[positions] == ids[positions]).all()
    rest = np.setdiff1d(np.arange(50_000), positions)
    assert (labels[rest] == -100).all()
    assert (inputs[rest] == ids[rest]).all()
    n = len(positions)
    masked = (inputs[positions] == 4).sum()
    same = (inputs[positions] == ids[positions]).sum()
    random = n - masked - same
    by_chance = 1 / len(others)  # a random token may be the very one
    for count, share in ((masked, 0.8), (same, 0.1 + 0.1 * by_chance), (random, 0.1 * (1 - by_chance))):
        assert abs(count - share * n) < 4 * math.sqrt(n * share * (1 - share))
    drawn = Counter(inputs[positions][(inputs[positions] != 4) & (inputs[positions] != ids[positions])].tolist())
    assert set(drawn) == set(others.tolist())  # never a special token, and each of the others


def test_masks_depend_on_seed_epoch_and_row_alone() -> None:
    tokenizer = make_tokenizer("bert")
    encoded, _ = task(pack=False).encode(rows_of(books(1, 24)), tokenizer, 64)
    rows = encoded.to_list()
    collate = task().collator(tokenizer)

    def drawn(seed: int, epoch: int, order: list[int], size: int, workers: int = 0) -> list[tuple[Any, Any]]:
        collate.begin_epoch(seed, epoch)
        some = [rows[i] for i in order]
        loader = torch.utils.data.DataLoader(
            some, batch_size=size, collate_fn=collate, num_workers=workers, persistent_workers=workers > 0
        )
        found = [pair for batch in loader for pair in zip(batch["input_ids"], batch["labels"], strict=True)]
        both = sorted(zip(order, found, strict=True), key=lambda entry: entry[0])
        lengths = [rows[i]["length"] for i, _ in both]
        return [(a[:n].tolist(), b[:n].tolist()) for n, (_, (a, b)) in zip(lengths, both, strict=True)]

    straight = list(range(24))
    first = drawn(1, 0, straight, 8)
    assert drawn(1, 0, straight[::-1], 5) == first
    assert drawn(1, 0, straight, 8, workers=2) == first
    for other in (drawn(1, 1, straight, 8), drawn(2, 0, straight, 8)):
        assert sum(a != b for a, b in zip(first, other, strict=True)) > 20
    fixed = [task().collator(tokenizer)(rows)["labels"].tolist() for _ in range(2)]
    assert fixed[0] == fixed[1]


def test_workers_that_outlive_an_epoch_see_the_next_one() -> None:
    tokenizer = make_tokenizer("bert")
    encoded, _ = task(pack=False).encode(rows_of(books(1, 16)), tokenizer, 64)
    collate = task().collator(tokenizer)
    loader = torch.utils.data.DataLoader(
        encoded.to_list(), batch_size=16, collate_fn=collate, num_workers=1, persistent_workers=True
    )
    for epoch in (0, 1):
        collate.begin_epoch(3, epoch)
        (batch,) = list(loader)
        assert torch.equal(batch["labels"], collate(encoded.to_list())["labels"])


@pytest.mark.parametrize("kind", ["wordpiece", "byte_bpe", "sentencepiece"])
def test_words_are_those_of_the_text(kind: str) -> None:
    """Against splitting the text oneself, for WordPiece's ##, byte-level BPE and SentencePiece."""
    texts = books(1, 30)
    tokenizer = tokenizer_of(kind, texts)
    texts.append("these scenery actors is plotless, filmstory film")
    for text, tokens in zip(texts, corpora.tokenize(texts, tokenizer), strict=True):
        groups: dict[int, list[int]] = {}
        for token, word in zip(tokens.ids.tolist(), tokens.words.tolist(), strict=True):
            groups.setdefault(word, []).append(token)
        found = [tokenizer.decode(ids).strip() for ids in groups.values()]
        # Punctuation is a word of its own to WordPiece and to byte-level BPE, and belongs to a word in SentencePiece.
        pattern = r"\S+" if kind == "sentencepiece" else r"\w+|[^\w\s]+"
        assert found == re.findall(pattern, text)
    assert max(map(len, groups.values())) > 1  # of the last text, whose words are new


def test_special_tokens_in_a_text_are_never_hidden() -> None:
    tokenizer = make_tokenizer("bert")
    (tokens,) = corpora.tokenize(["the <mask> film </s>"], tokenizer)
    assert tokens.words.tolist() == [0, -1, 2, -1] or (tokens.words < 0).tolist() == [False, True, False, True]


# --- inputs -----------------------------------------------------------------------------------------------


def test_packed_inputs_hold_every_token_of_a_document_once_and_no_other_documents() -> None:
    tokenizer = make_tokenizer("bert")
    texts = books(3, 7)
    names = [f"book {i // 7}" for i in range(21)]
    encoded, long = task().encode(rows_of(texts, names), tokenizer, 32)
    assert long == sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) > 30 for text in texts)
    inputs = [row["input_ids"] for row in encoded]
    assert all(ids[0] == 1 and ids[-1] == 2 and len(ids) <= 32 for ids in inputs)
    whole = [[i for text in texts[b * 7 : b * 7 + 7] for i in tokenizer(text)["input_ids"][1:-1]] for b in range(3)]
    expected = [[1, *part, 2] for book in whole for part in (book[i : i + 30] for i in range(0, len(book), 30))]
    assert inputs == expected
    assert encoded["length"][:] == list(map(len, inputs))
    assert encoded["row"][:] == list(range(len(inputs)))


def test_without_documents_a_split_is_one_text_and_unpacked_each_text_an_input() -> None:
    tokenizer, texts = make_tokenizer("bert"), ["the film", "", "a good story"]
    packed, _ = task().encode(rows_of(texts), tokenizer, 32)
    assert [row["input_ids"][1:-1] for row in packed] == [
        tokenizer("the film a good story", add_special_tokens=False)["input_ids"]
    ]
    single, long = task(pack=False).encode(rows_of([*texts, "good " * 50]), tokenizer, 32)
    assert [row["length"] for row in single] == [4, 5, 32]
    assert long == 1
    with pytest.raises(DataError, match="no text in these rows"):
        task().encode(rows_of(["", " "]), tokenizer, 32)


def test_documents_begin_where_a_pattern_says() -> None:
    rows = rows_of([" = One = ", "text", " = = Part = = ", "more", " = Two = ", "end"])
    assert corpora.documents(rows, " = [^=]", "one") == [[0, 1, 2, 3], [4, 5]]
    assert corpora.documents(rows, None, "each") == [[i] for i in range(6)]
    scattered = rows_of(["a", "b", "c"], ["x", "y", "x"])
    assert corpora.documents(scattered, None, "one") == [[0, 2], [1]]


# --- pairs of texts: upstream has none any more, ours are right ----------------------------------------------


def test_upstream_builds_no_next_sentence_pairs() -> None:
    """It has the model and its objective, and nothing that makes their data."""
    assert hasattr(transformers, "BertForPreTraining")
    assert "next_sentence_label" in transformers.BertForPreTraining.forward.__doc__
    makers = [name for name in dir(transformers) if re.search("NextSentence|SentenceOrder|ForSOP", name)]
    assert all("Dataset" not in name and "Collator" not in name for name in makers)
    assert not hasattr(transformers, "TextDatasetForNextSentencePrediction")
    assert not hasattr(transformers, "DataCollatorForNextSentencePrediction")


def test_pairs_are_half_next_and_half_of_other_documents() -> None:
    """Checked against the texts themselves: each has a word that says its place."""
    tokenizer = tokenizer_of("wordpiece", [f"b{b} p{p} " for b in range(5) for p in range(60)] * 2)
    texts = [f"b{b} p{p} b{b}" for b in range(5) for p in range(60)]
    names = [f"book {b}" for b in range(5) for _ in range(60)]
    encoded, _ = task(next_sentence=True).encode(rows_of(texts, names), tokenizer, 24)
    kinds = Counter(encoded["next"][:])
    assert abs(kinds[IS_NEXT] - kinds[IS_RANDOM]) <= 1
    seen = Counter[tuple[str, str]]()
    for row in encoded:
        tokens = tokenizer.decode(row["input_ids"])
        assert re.fullmatch(r"\[CLS\] [^\[]+ \[SEP\] [^\[]+ \[SEP\]", tokens)
        first, second = (re.findall(r"b(\d+) p(\d+) b\1", part) for part in tokens.split("[SEP]")[:2])
        ids = row["input_ids"]
        border = ids.index(tokenizer.sep_token_id) + 1
        assert row["token_type_ids"] == [0] * border + [1] * (len(ids) - border)
        (book, last), (other, begin) = first[-1], second[0]
        if row["next"] == IS_NEXT:
            assert (other, int(begin)) == (book, int(last) + 1)
        else:
            assert other != book
        for part in (first, second):  # each text is some neighbouring paragraphs of one book
            places = [int(p) for _, p in part]
            assert len({b for b, _ in part}) == 1
            assert places == list(range(places[0], places[0] + len(places)))
        seen.update(first)
        seen.update(second if row["next"] == IS_NEXT else [])
    # Every paragraph once, but for the end of a book that nothing follows.
    assert set(seen.values()) == {1}
    assert len(seen) >= len(texts) - 5 * 3


def test_random_texts_of_a_single_document_are_far_away() -> None:
    units = [[Unit(i // 2, 5) for i in range(400)]]  # each paragraph in two pieces
    pairs = pairs_of(units, 30, np.random.default_rng(1))
    random = [pair for pair in pairs if pair.label == IS_RANDOM]
    assert abs(2 * len(random) - len(pairs)) <= 1
    for pair in random:
        first, second = ({units[0][i].paragraph for i in part} for part in (pair.first, pair.second))
        assert min(abs(a - b) for a in first for b in second) >= FAR
    assert {min(p.second) > max(p.first) for p in random} == {True, False}
    with pytest.raises(DataError, match="the only document has 40 paragraphs, too few"):
        pairs_of([[Unit(i, 5) for i in range(40)]], 30, np.random.default_rng(1))
    with pytest.raises(DataError, match="no document has two texts"):
        pairs_of([[Unit(0, 5)], [Unit(0, 5)], [Unit(0, 5)]], 30, np.random.default_rng(1))


@pytest.mark.parametrize("seed", range(20))
def test_pairs_fit_and_random_texts_are_of_any_other_place(seed: int) -> None:
    rng = np.random.default_rng(seed)
    documents = [[Unit(i, int(n)) for i, n in enumerate(rng.integers(1, 17, size))] for size in (1, 9, 30, 2)]
    pairs = pairs_of(documents, 33, rng)
    assert abs(sum(p.label for p in pairs) * 2 - len(pairs)) <= 1
    for pair in pairs:
        used = [documents[pair.document][i].tokens for i in pair.first]
        used += [documents[pair.other][i].tokens for i in pair.second]
        assert sum(used) <= 33
        assert (pair.document == pair.other) == (pair.label == IS_NEXT)
        assert pair.label == IS_RANDOM or pair.second.start == pair.first.stop
    assert pairs == pairs_of(documents, 33, _again(seed))


def _again(seed: int) -> np.random.Generator:
    rng = np.random.default_rng(seed)
    for size in (1, 9, 30, 2):
        rng.integers(1, 17, size)
    return rng


def test_long_texts_are_cut_between_words() -> None:
    text = corpora.Tokens(np.arange(12), np.array([0, 0, 1, 1, 1, 2, 3, 3, 3, 3, 3, 3]))
    assert [part.ids.tolist() for part in corpora.pieces(text, 4)] == [
        [0, 1],
        [2, 3, 4, 5],
        [6, 7, 8, 9],  # a word that is longer than a piece
        [10, 11],
    ]


def test_a_split_of_one_document_is_said_aloud() -> None:
    one, two = rows_of(["a"] * 3, ["x"] * 3), rows_of(["a"] * 2, ["x", "y"])
    splits = type("Splits", (), {"train": two, "validation": one, "test": two})
    notes = task(next_sentence=True).look_at(splits)
    assert notes == [
        "train: 2 texts, 2 documents",
        "validation: 3 texts, 1 document",
        "test: 2 texts, 2 documents",
        "validation is one document: its random second texts are of the same one, at least 50 paragraphs away",
    ]
    assert task().look_at(splits)[3:] == []


# --- loss and figures -------------------------------------------------------------------------------------


def bert_for(tokenizer: Any, kind: str = "BertForPreTraining") -> Any:
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(transformers, kind)(config).eval()


def test_the_joint_loss_is_berts_own() -> None:
    """Upstream's model, given the labels, adds the mean over the masked tokens and the mean over the pairs."""
    tokenizer, it = make_tokenizer("bert"), task(next_sentence=True)
    encoded, _ = it.encode(rows_of(books(3, 12), [f"b{i // 12}" for i in range(36)]), tokenizer, 48)
    batch = it.collator(tokenizer)(encoded.to_list())
    labels, model = batch.pop("labels"), bert_for(tokenizer)
    hidden = labels.clone()
    hidden[:, 0] = -100
    with torch.no_grad():
        theirs = model(**batch, labels=hidden, next_sentence_label=labels[:, 0])
    heads = [theirs.prediction_logits, theirs.seq_relationship_logits]
    ours = (it.loss(heads, labels) / it.loss_weight(labels)).sum()
    assert ours.item() == pytest.approx(theirs.loss.item(), rel=1e-6)
    assert it.loss_weight(labels).tolist() == [(hidden != -100).sum(), len(labels)]
    outputs = it.outputs(model, encoded, tokenizer, 5)
    assert it.mean_loss(outputs, encoded) == pytest.approx(theirs.loss.item(), rel=1e-5)
    metrics, report = it.metrics(outputs, it.targets(encoded)), it.report(outputs, it.targets(encoded))
    told = heads[0].argmax(-1)[hidden != -100] == hidden[hidden != -100]
    assert metrics["masked_accuracy"] == pytest.approx(told.float().mean().item())
    right = (heads[1].argmax(-1) == labels[:, 0]).float().mean().item()
    assert metrics["nsp_accuracy"] == pytest.approx(right)
    mlm = F.cross_entropy(heads[0].flatten(0, 1), hidden.flatten()).item()
    assert metrics["perplexity"] == pytest.approx(math.exp(mlm), rel=1e-5)
    assert report["pairs"] == len(encoded)
    assert report["masked_tokens"] == (hidden != -100).sum()
    assert 0.5 <= report["chance"]["nsp_accuracy"] <= 0.52


def test_figures_do_not_depend_on_batches() -> None:
    tokenizer, it = make_tokenizer("bert"), task()
    encoded, _ = it.encode(rows_of(books(2, 20)), tokenizer, 24)
    model = bert_for(tokenizer, "BertForMaskedLM")
    one, other = (it.outputs(model, encoded, tokenizer, size) for size in (1, 16))
    assert one.shape == (len(encoded), 3)
    assert np.allclose(one, other, rtol=1e-5)
    batch = it.collator(tokenizer)(encoded.to_list())
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = model(**batch).logits
    assert it.mean_loss(one, encoded) == pytest.approx(F.cross_entropy(logits.flatten(0, 1), labels.flatten()).item())
    assert it.outcomes(one, None)[3] == pytest.approx(-one[3, 0] / one[3, 1])
    ids = Counter(i for row in encoded for i in row["input_ids"][1:-1])
    chance = it.report(one, it.targets(encoded))["chance"]["masked_accuracy"]
    assert chance == pytest.approx(ids.most_common(1)[0][1] / ids.total())


def test_logits_that_are_not_numbers_are_refused() -> None:
    outputs = np.array([[float("nan"), 2.0, 0.0]])
    with pytest.raises(ModelError, match="the loss is not a number"):
        task().metrics(outputs, None)


# --- models that cannot -----------------------------------------------------------------------------------


def test_models_that_cannot_learn_the_task_are_refused(checkpoint: Callable[[str], Path]) -> None:
    tokenizer = make_tokenizer("bert")
    model = bert_for(tokenizer, "BertForMaskedLM")
    task().check_model(model, tokenizer, 32)
    with pytest.raises(ModelError, match="'bert' has no head that tells whether two texts follow"):
        task(next_sentence=True).check_model(model, tokenizer, 32)
    tokenizer.mask_token = None
    with pytest.raises(ModelError, match="no mask token"):
        task().check_model(model, tokenizer, 32)
    with pytest.raises(ModelError, match="leaves no room"):
        task().encode(rows_of(["the film"]), tokenizer, 3)


# --- predict ----------------------------------------------------------------------------------------------


def test_what_predict_takes() -> None:
    it = task(next_sentence=True)
    assert it.input_row("a [MASK]", []) == {"given": "a [MASK]", "following": None}
    assert it.input_row({"text": "a", "next": "b"}, []) == {"given": "a", "following": "b"}
    for value in (5, {}, {"text": 5}, {"text": "a", "next": 5}):
        with pytest.raises(DataError):
            it.input_row(value, [])
    with pytest.raises(DataError, match="next_sentence"):
        task().input_row({"text": "a", "next": "b"}, [])


def test_masks_are_filled_with_the_likeliest_tokens() -> None:
    tokenizer, it = make_tokenizer("bert"), task(top_k=3)
    model = bert_for(tokenizer, "BertForMaskedLM")
    texts = ["the [MASK] was <mask> .", "no mask", "[MASK]"]
    rows = datasets.Dataset.from_list([it.input_row(text, []) for text in texts])
    encoded, _ = it.encode(rows, tokenizer, 32)
    answers = it.predictions(it.outputs(model, encoded, tokenizer, 2))
    assert [len(answer["masks"]) for answer in answers] == [2, 0, 1]
    assert answers[1] == {"text": "no mask", "masks": []}
    inputs = tokenizer("the <mask> was <mask> .", return_tensors="pt")
    with torch.no_grad():
        odds = model(**inputs).logits[0].softmax(-1)
    places = (inputs["input_ids"][0] == 4).nonzero()[:, 0].tolist()
    for mask, place in zip(answers[0]["masks"], places, strict=True):
        best = odds[place].topk(3)
        assert [entry["score"] for entry in mask] == pytest.approx(best.values.tolist(), rel=1e-4)
        assert [entry["token"] for entry in mask] == [tokenizer.decode([i]).strip() for i in best.indices.tolist()]
    first, second = (mask[0]["token"] for mask in answers[0]["masks"])
    assert answers[0]["text"] == f"the {first} was {second} ."
    long = datasets.Dataset.from_list([it.input_row("good " * 40 + "[MASK]", [])])
    with pytest.raises(DataError, match="input 1: a mask stands behind the first 30 tokens"):
        it.encode(long, tokenizer, 32)


def test_a_pair_is_judged_in_predict() -> None:
    tokenizer, it = make_tokenizer("bert"), task(next_sentence=True)
    model = bert_for(tokenizer)
    values = [{"text": "the film", "next": "was good"}, {"text": "the <mask>"}]
    encoded, _ = it.encode(datasets.Dataset.from_list([it.input_row(v, []) for v in values]), tokenizer, 32)
    pair, alone = it.outputs(model, encoded, tokenizer, 2)
    assert "is_next" not in alone
    with torch.no_grad():
        logits = model(**tokenizer("the film", "was good", return_tensors="pt")).seq_relationship_logits
    assert pair["is_next"] == pytest.approx(logits.softmax(-1)[0, 0].item(), rel=1e-4)


def test_a_tokenizer_of_the_corpus_is_the_same_each_time() -> None:
    """Upstream's WordPiece trainer numbers pieces by the order of a hash table; ours is told their numbers."""
    from ptft_hf.models import nothing

    texts = books(2, 60)
    for kind in ("wordpiece", "byte_bpe"):
        made = {
            nothing.tokenizer_fingerprint(
                nothing.train_tokenizer(
                    texts, TokenizerRecipe(vocab_size=300), kind, generates=False, token_types=True
                )
            )
            for _ in range(3)
        }
        assert len(made) == 1


def test_upstreams_wordpiece_trainer_gives_another_vocabulary_each_time() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    texts, found = books(2, 60), set[str]()
    for _ in range(8):
        made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        made.train_from_iterator(
            texts, trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]"], show_progress=False)
        )
        found.add(made.to_str())
    assert len(found) > 1
