"""Causal language models as a task: blocks, end tokens, documents kept apart, loss, continuations."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers

from ptft_hf.errors import DataError, ModelError
from ptft_hf.recipes import CausalLMRecipe
from ptft_hf.tasks.causal_lm import CausalLM, apart
from tests.corpus import books
from tests.tiny import SIZES, SPECIAL, make_tokenizer

DECODERS = ["gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma", "opt"]
END = SPECIAL["eos"]


def task(**fields: Any) -> CausalLM:
    return CausalLM(CausalLMRecipe(name="test", family="causal_lm", **fields))


def decoder(name: str, attention: str = "sdpa", **fields: Any) -> Any:
    ids = {f"{key}_token_id": SPECIAL[key] for key in ("pad", "bos", "eos")}
    size = len(make_tokenizer(name))
    config = transformers.AutoConfig.for_model(name, vocab_size=size, **SIZES[name], **ids, **fields)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        kind = transformers.AutoModelForCausalLM
        return kind.from_config(config, attn_implementation=attention, dtype=torch.float32).eval()


def padding(tokenizer: Any) -> Any:
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def rows_of(texts: list[str], documents: list[str] | None = None) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": texts, **({"document": documents} if documents else {})})


# --- blocks -----------------------------------------------------------------------------------------------


def test_blocks_hold_every_token_once_with_an_end_token_after_each_document() -> None:
    tokenizer = make_tokenizer("gpt2")
    texts = books(3, 5)
    encoded, long = task(separator=" ").encode(rows_of(texts, [f"b{i // 5}" for i in range(15)]), tokenizer, 16)
    stream = []
    for b in range(3):
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts[5 * b : 5 * b + 5]]
        stream += [1, *(i for part in ids for i in part), END]  # this tokenizer begins a text with <s>
    rows = encoded.to_list()
    assert [i for row in rows for i in row["input_ids"]] == stream[:-1]
    assert [i for row in rows for i in row["labels"]] == stream[1:]  # shifted, over the borders of blocks too
    assert {row["length"] for row in rows[:-1]} == {16}
    assert rows[-1]["length"] == (len(stream) - 1) % 16 or rows[-1]["length"] == 16
    assert sum(label == END for row in rows for label in row["labels"]) == 3
    assert long == sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) > 16 for text in texts)


def test_without_documents_each_text_is_one() -> None:
    tokenizer = make_tokenizer("gpt2")
    encoded, _ = task().encode(rows_of(["the film", "", "a story"]), tokenizer, 32)
    (row,) = encoded.to_list()
    words = tokenizer.convert_ids_to_tokens(row["input_ids"])
    assert words == ["<s>", "the", "film", "</s>", "<s>", "a", "story"]
    with pytest.raises(DataError, match="no text in these rows"):
        task().encode(rows_of(["", ""]), tokenizer, 32)


def test_the_end_token_is_trained_where_it_also_pads() -> None:
    """Trap: with pad = eos, labels that are masked by the padding's number never teach the end."""
    tokenizer = padding(make_tokenizer("gpt2"))
    assert tokenizer.pad_token_id == END
    it = task()
    encoded, _ = it.encode(rows_of(["the film", "a very good story was the plot"]), tokenizer, 8)
    batch = it.collator(tokenizer)(encoded.to_list())
    assert (batch["labels"] == END).sum() == 2
    upstream = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    theirs = upstream([{"input_ids": row["input_ids"]} for row in encoded])
    assert END in batch["input_ids"]
    assert (theirs["labels"] == END).sum() == 0


# --- documents kept apart ---------------------------------------------------------------------------------


def test_labels_do_not_lead_from_one_document_to_the_next() -> None:
    tokenizer, it = make_tokenizer("gpt2"), task(separate_documents=True)
    encoded, _ = it.encode(rows_of(["the film", "a story", "the plot"]), tokenizer, 6)
    rows = encoded.to_list()
    assert [row["segments"] for row in rows] == [[0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 1]]
    film, story, plot = (tokenizer(w, add_special_tokens=False)["input_ids"][0] for w in ("film", "story", "plot"))
    the, a = (tokenizer(w, add_special_tokens=False)["input_ids"][0] for w in ("the", "a"))
    assert [row["labels"] for row in rows] == [[the, film, END, -100, a, story], [END, -100, the, plot, END]]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", DECODERS)
def test_a_document_in_a_block_is_as_if_it_were_alone(name: str, attention: str) -> None:
    tokenizer, it = padding(make_tokenizer(name)), task(separate_documents=True)
    texts = books(1, 9)
    encoded, _ = it.encode(rows_of(texts), tokenizer, 48)
    model, rows = decoder(name, attention), encoded.to_list()
    batch = it.collator(tokenizer)(rows)
    labels = batch.pop("labels")
    with torch.no_grad():
        packed = model(**batch).logits
    assert len(rows) > 1
    assert (labels[-1] == -100).sum() > 0
    for row, logits in zip(rows, packed, strict=True):
        segments = np.array(row["segments"])
        for segment in range(segments.max() + 1):
            at = np.flatnonzero(segments == segment)
            with torch.no_grad():
                alone = model(torch.tensor([row["input_ids"]])[:, at]).logits[0]
            assert (alone - logits[at]).abs().max().item() < 2e-6  # fp32: other shapes are summed in another order
    # In the same shape, to the last bit: other documents may hold anything.
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    segments = torch.tensor(rows[0]["segments"])
    other["input_ids"][0, segments != 1] = 7
    with torch.no_grad():
        changed = model(**other).logits
    assert torch.equal(changed[0, segments == 1], packed[0, segments == 1])
    assert not torch.equal(changed[0, segments == 0], packed[0, segments == 0])


def test_without_it_documents_do_see_each_other() -> None:
    tokenizer, it = padding(make_tokenizer("llama")), task()
    encoded, _ = it.encode(rows_of(books(1, 4)), tokenizer, 48)
    batch = it.collator(tokenizer)(encoded.to_list())
    assert "position_ids" not in batch
    assert batch["attention_mask"].dim() == 2
    model = decoder("llama")
    other = batch["input_ids"].clone()
    other[0, 1] = 7
    with torch.no_grad():
        one, two = (model(input_ids=ids).logits[0, -1] for ids in (batch["input_ids"], other))
    assert not torch.equal(one, two)


def test_upstreams_packing_by_positions_is_lost_in_evaluation() -> None:
    """The trap behind our own mask: in evaluation a cache is made, and documents see each other."""
    model, ids = decoder("llama"), torch.arange(5, 17)[None]
    positions = torch.cat([torch.arange(7), torch.arange(5)])[None]
    with torch.no_grad():
        alone = model(ids[:, 7:]).logits[0]
        theirs = model(input_ids=ids, position_ids=positions).logits[0, 7:]
        ours = model(input_ids=ids, **apart(torch.tensor([[0] * 7 + [1] * 5]))).logits[0, 7:]
    assert (theirs - alone).abs().max() > 1e-3
    assert (ours - alone).abs().max() < 2e-6


def test_masks_and_positions_by_hand() -> None:
    found = apart(torch.tensor([[0, 0, 1, 1, -100]]))
    least = torch.finfo(torch.float32).min
    seen = torch.tensor(
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]], dtype=torch.bool
    )
    assert torch.equal(found["attention_mask"][0, 0], torch.zeros(5, 5).masked_fill(~seen, least))
    assert found["position_ids"].tolist() == [[0, 1, 0, 1, 0]]


# --- loss and figures -------------------------------------------------------------------------------------


def test_the_loss_is_upstreams_on_the_whole_stream_and_figures_do_not_depend_on_batches() -> None:
    tokenizer, it = padding(make_tokenizer("gpt2")), task()
    encoded, _ = it.encode(rows_of(books(2, 8)), tokenizer, 24)
    model = decoder("gpt2")
    batch = it.collator(tokenizer)(encoded.to_list())
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = model(**batch).logits
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten()).item()
    assert (it.loss(logits, labels) / it.loss_weight(labels)).item() == pytest.approx(expected, rel=1e-6)
    row = encoded[0]
    with torch.no_grad():
        theirs = model(torch.tensor([row["input_ids"]]), labels=torch.tensor([row["input_ids"]])).loss.item()
    own = F.cross_entropy(logits[0, :-1], labels[0, :-1]).item()
    assert own == pytest.approx(theirs, rel=1e-5)
    outputs = [it.outputs(model, encoded, tokenizer, size) for size in (1, 7)]
    assert np.allclose(*outputs, rtol=1e-5)
    metrics = it.metrics(outputs[0], it.targets(encoded))
    assert metrics["loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)
    told = (logits.argmax(-1) == labels)[labels != -100]
    assert metrics["token_accuracy"] == pytest.approx(told.float().mean().item())
    assert it.report(outputs[0], it.targets(encoded))["tokens"] == sum(encoded["length"][:])


# --- what cannot be had -----------------------------------------------------------------------------------


def test_models_that_cannot_learn_the_task_are_refused() -> None:
    tokenizer = make_tokenizer("gpt2")
    for name in DECODERS:
        task(separate_documents=True).check_model(decoder(name), tokenizer, 32)
    ids = {f"{key}_token_id": SPECIAL[key] for key in ("pad", "bos", "eos")}
    bert = transformers.BertLMHeadModel(transformers.BertConfig(vocab_size=90, **SIZES["bert"], **ids)).eval()
    with pytest.raises(ModelError, match="attends to later tokens"):
        task().check_model(bert, tokenizer, 32)
    config = transformers.BloomConfig(vocab_size=len(tokenizer), hidden_size=32, n_layer=1, n_head=2)
    bloom = transformers.BloomForCausalLM(config).eval()
    task().check_model(bloom, tokenizer, 32)
    with pytest.raises(ModelError, match="BloomForCausalLM with this adapter does not keep documents apart"):
        task(separate_documents=True).check_model(bloom, tokenizer, 32)
    windowed = decoder("mistral", sliding_window=16)
    task(separate_documents=True).check_model(windowed, tokenizer, 16)
    with pytest.raises(ModelError, match="the last 16 tokens alone, which blocks of 32 would undo"):
        task(separate_documents=True).check_model(windowed, tokenizer, 32)
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no end token"):
        task().check_model(bloom, tokenizer, 32)


# --- predict ----------------------------------------------------------------------------------------------


def test_continuations_are_those_of_generate_one_by_one() -> None:
    tokenizer = padding(make_tokenizer("llama"))
    it, model = task(generation={"max_new_tokens": 7}), decoder("llama")
    texts = ["the film was", "a", "", "this story is very lovely and the plot was"]
    rows = datasets.Dataset.from_list([it.input_row(text, ["text"]) for text in texts])
    encoded, _ = it.encode(rows, tokenizer, 64)
    answers = it.predictions(it.outputs(model, encoded, tokenizer, 4))
    assert [answer["text"] for answer in answers] == texts
    for text, answer in zip(texts, answers, strict=True):
        ids = torch.tensor([[1, *tokenizer(text, add_special_tokens=False)["input_ids"]]])
        written = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=7,
            do_sample=False,
            pad_token_id=END,
            eos_token_id=END,
        )
        more = tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
        assert answer["continuation"] == more
    long = datasets.Dataset.from_list([it.input_row("good " * 100, ["text"])])
    (row,) = it.encode(long, tokenizer, 16)[0].to_list()
    assert row["length"] == 16 - 7
    with pytest.raises(DataError):
        it.input_row(5, ["text"])


def test_by_default_half_an_input_at_most_is_written() -> None:
    assert task()._generation(16) == {"do_sample": False, "max_new_tokens": 8}
    assert task()._generation(512)["max_new_tokens"] == 50
    given = {"do_sample": True, "max_length": 9}
    assert task(generation=given)._generation(64) == given


def test_state_is_restored(tmp_path: Path) -> None:
    it = task()
    it.encode(rows_of(["the film"]), make_tokenizer("gpt2"), 16)
    other = task()
    other.restore(it.state())
    assert other.begins is True
    assert "[tokenizer.bos_token_id] + ids" in other.usage(["text"], 64).code
