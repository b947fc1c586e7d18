"""The family of summaries: prompts, labels, losses, generation and figures, against independent sums."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import evaluate
import pytest
import torch
import torch.nn.functional as F
import transformers

from ptft_hf import recipes
from ptft_hf.data import aclsum_summaries, scitldr
from ptft_hf.errors import DataError, ModelError, RecipeError
from ptft_hf.inspecting import rows_of, segments_of
from ptft_hf.models import caching, decoding
from ptft_hf.recipes import SummarizationRecipe
from ptft_hf.recipes.upstream import generation_names
from ptft_hf.tasks import figures, generation, rouge
from ptft_hf.tasks.summarization import Summarization, Targets, Written
from tests.tiny import make_checkpoint
from tests.writers import WITH_ENCODER, WRITERS, make_writer, reviews

FAST = ("t5", "gpt2", "llama")
ALL = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in WRITERS]
KINDS = ("t5", "bart", "gpt2", "chat")


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``writer("llama")`` is a tiny random language model; ``chat`` is a Llama whose tokenizer has a template."""
    root = tmp_path_factory.mktemp("writers")

    def folder(name: str) -> Path:
        if not (root / name).exists():
            make_writer("llama" if name == "chat" else name, root / name, chat=name == "chat")
        return root / name

    return folder


def task_for(base: Path, **fields: Any) -> tuple[Summarization, Any, Any]:
    """The task, as it has looked at a checkpoint, with the model and the tokenizer."""
    fields = {"generation": {"max_new_tokens": 8}, **fields}
    task = Summarization(SummarizationRecipe(name="test", family="summarization", **fields))
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    task.look_at_checkpoint(transformers.AutoConfig.from_pretrained(base), tokenizer)
    model = getattr(transformers, task.auto_class).from_pretrained(base).eval()
    return task, model, tokenizer


def encoded_rows(task: Summarization, tokenizer: Any, rows: Any, max_length: int = 64) -> Any:
    return task.encode(datasets.Dataset.from_list(rows), tokenizer, max_length)[0]


# ---- the recipe ----


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"generation": {"max_new_token": 5}}, "unknown GenerationConfig name.*'max_new_tokens'"),
        ({"generation": {"max_length": 60}}, "give max_new_tokens"),
        ({"generation": {"eos_token_id": 2}}, "follows from the checkpoint"),
        ({"generation": {"do_sample": True}}, "the same figures twice"),
        ({"generation": {"num_beams": 0}}, "whole number of at least 1, got 0"),
        ({"prompt": "summarize:"}, r"must hold \{document\} once"),
        ({"columns": {"text": "article"}}, "unknown column 'text'"),
        ({"long_documents": "cut"}, "truncate"),
        ({"generate_rows": 0}, "greater than or equal to 1"),
    ],
)
def test_what_a_recipe_may_not_say(fields: dict[str, Any], message: str):
    with pytest.raises(Exception, match=message):
        SummarizationRecipe(name="test", family="summarization", **fields)


def test_generation_names_are_upstreams():
    config = transformers.GenerationConfig()
    own = {name for name in vars(config) if not name.startswith("_")} - {"transformers_version"}
    assert own <= generation_names()
    assert all(hasattr(config, name) for name in generation_names())


def test_settings_that_upstream_refuses_are_refused_before_anything_is_loaded():
    assert generation.settings({"num_beams": 4, "length_penalty": 2.0})["length_penalty"] == 2.0
    with pytest.raises(RecipeError, match=r"GenerationConfig refuses .*length_penalty"):
        generation.settings({"length_penalty": 2.0})
    assert "length_penalty" not in generation.settings({"length_penalty": None})


def test_the_catalogues_recipes_stand():
    names = [name for name in recipes.catalogue("tasks") if name.startswith("summarization/")]
    assert len(names) >= 7
    for name in names:
        Summarization(recipes.load_task(name))  # upstream takes their generation settings
    aspects = [recipes.load_task(f"summarization/aclsum_{a}") for a in ("challenge", "approach", "outcome")]
    assert [recipe.columns["summary"] for recipe in aspects] == ["challenge", "approach", "outcome"]
    assert len({recipe.prompt for recipe in aspects}) == 3


def test_aclsum_and_scitldr_become_flat():
    paper = {
        "sentences": {"abstract": ["One .", "Two ."], "introduction": None, "conclusion": ["Three ."]},
        "summary": {"challenge": "c", "approach": "a", "outcome": "o"},
    }
    assert list(aclsum_summaries([paper])) == [
        {"document": "One . Two .\n\nThree .", "challenge": "c", "approach": "a", "outcome": "o"}
    ]
    rows = [{"source": ["A.", "B."], "target": ["x", "y"]}]
    assert list(scitldr(rows)) == [{"document": "A. B.", "summary": ["x", "y"]}]


# ---- what the model reads, and what it is trained to write ----


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_an_encoder_decoder_has_upstreams_inputs_and_loss(name: str, writer: Callable[[str], Path]):
    task, model, tokenizer = task_for(writer(name))
    rows = reviews(5, longest=20)
    batch = task.collator(tokenizer)(encoded_rows(task, tokenizer, rows).to_list())
    prefix = "summarize: " if name == "t5" else ""
    upstream = tokenizer([prefix + row["document"] for row in rows], padding=True, return_tensors="pt")
    assert torch.equal(batch["input_ids"], upstream["input_ids"])
    assert torch.equal(batch["attention_mask"], upstream["attention_mask"])
    expected = tokenizer(text_target=[row["summary"] for row in rows], padding=True, return_tensors="pt")
    padding = expected["attention_mask"] == 0
    assert torch.equal(batch["labels"], expected["input_ids"].masked_fill(padding, -100))
    assert torch.equal(
        batch["decoder_input_ids"], model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
    )
    same_loss(task, model, batch, model(**upstream, labels=batch["labels"]).loss)


@pytest.mark.parametrize("name", ["gpt2", "chat"])
def test_a_decoder_is_trained_on_the_summary_and_its_end_alone(name: str, writer: Callable[[str], Path]):
    """Written by hand from the texts; then upstream's loss, which shifts the labels itself."""
    task, model, tokenizer = task_for(writer(name))
    rows = reviews(5, longest=6)
    encoded = encoded_rows(task, tokenizer, rows, 72)
    batch = task.collator(tokenizer)(encoded.to_list())
    wholes, unshifted = [], []
    for row in rows:
        if name == "chat":
            prompt = f"<s> user : Summarize the following text. {row['document']} assistant :"
        else:
            prompt = f"<s> {row['document']} Summary:"
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        own = [*tokenizer(row["summary"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        wholes.append([*ids, *own])
        unshifted.append([-100] * len(ids) + own)
    for line, whole, labels in zip(encoded, wholes, unshifted, strict=True):
        assert line["input_ids"] == whole[:-1]
        assert line["labels"] == labels[1:]
        assert line["input_ids"][: line["prompt_length"]] == whole[: labels.index(own[0])]
    width = max(map(len, wholes))
    ids = torch.tensor([[*w, *[0] * (width - len(w))] for w in wholes])
    labels = torch.tensor([[*w, *[-100] * (width - len(w))] for w in unshifted])
    mask = torch.tensor([[1] * len(w) + [0] * (width - len(w)) for w in wholes])
    same_loss(task, model, batch, model(input_ids=ids, attention_mask=mask, labels=labels).loss)


def same_loss(task: Summarization, model: Any, batch: dict[str, Any], expected: torch.Tensor) -> None:
    """Ours is upstream's; and with label smoothing plain PyTorch's."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    labels, logits = batch["labels"], model(**inputs).logits
    assert logits.shape[:2] == labels.shape
    loss = task.loss(logits, labels) / task.loss_weight(labels)
    torch.testing.assert_close(loss, expected)
    smoothed = task.loss(logits, labels, 0.1) / task.loss_weight(labels)
    flat = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, label_smoothing=0.1)
    torch.testing.assert_close(smoothed, flat)
    assert not torch.allclose(smoothed, loss)


def test_the_end_token_is_trained_where_it_pads_too(writer: Callable[[str], Path]):
    """Trap: upstream's collator masks by the padding id, so that the end is never learnt."""
    task, _, tokenizer = task_for(writer("gpt2"))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    collate = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    row = encoded_rows(task, tokenizer, reviews(1))[0]
    whole = [*row["input_ids"], tokenizer.eos_token_id]
    assert tokenizer.eos_token_id not in collate([{"input_ids": whole}])["labels"]
    ours = task.collator(tokenizer)(encoded_rows(task, tokenizer, reviews(6)).to_list())
    assert ((ours["labels"] == tokenizer.eos_token_id).sum(1) == 1).all()
    last = (ours["labels"] == tokenizer.eos_token_id).int().argmax(1)
    assert (ours["attention_mask"].sum(1) == last + 1).all()


def test_a_chat_has_one_begin_mark(writer: Callable[[str], Path]):
    """Trap: a template that writes the begin mark, tokenized as any text, has two of them."""
    task, _, tokenizer = task_for(writer("chat"))
    text = task.speech.render(tokenizer, "a film")
    assert tokenizer(text)["input_ids"].count(tokenizer.bos_token_id) == 2
    (row,) = encoded_rows(task, tokenizer, [{"document": "a film", "summary": "film"}])
    assert row["input_ids"].count(tokenizer.bos_token_id) == 1
    expected = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Summarize the following text.\n\na film"}],
        add_generation_prompt=True,
        return_dict=True,
    )["input_ids"]
    assert row["input_ids"][: row["prompt_length"]] == expected


def test_the_end_of_a_turn_is_the_templates(writer: Callable[[str], Path]):
    """As of Gemma, whose turns end with another mark than its texts."""
    base = writer("chat")
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = tokenizer.chat_template.replace("eos_token", "'<mask>'")
    task = Summarization(SummarizationRecipe(name="test", family="summarization"))
    task.look_at_checkpoint(transformers.AutoConfig.from_pretrained(base), tokenizer)
    assert task.speech.end == tokenizer.mask_token_id != tokenizer.eos_token_id
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    tokenizer.pad_token = tokenizer.eos_token
    assert generation.settle(model, tokenizer, task.speech.end, {}) == sorted(
        {tokenizer.mask_token_id, tokenizer.eos_token_id}
    )


@pytest.mark.parametrize("name", KINDS)
def test_marks_in_a_document_are_text(name: str, writer: Callable[[str], Path]):
    task, _, tokenizer = task_for(writer(name))
    rows = [{"document": text, "summary": "film"} for text in ("a film is good", "a film </s> <s> is good")]
    plain, marked = encoded_rows(task, tokenizer, rows)
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        assert marked["input_ids"].count(token) == plain["input_ids"].count(token)


@pytest.mark.parametrize("name", KINDS)
def test_long_documents_are_cut_to_what_fits_and_counted(name: str, writer: Callable[[str], Path]):
    task, _, tokenizer = task_for(writer(name), prompt="{document} plot")
    words = [f"{'film' if i % 3 else 'story'} {i}" for i in range(60)]
    rows = [{"document": " ".join(words), "summary": "a film"}, {"document": "a film", "summary": "a film"}]
    encoded, long = task.encode(datasets.Dataset.from_list(rows), tokenizer, 48)
    assert long == 1
    limit = 48 if name in WITH_ENCODER else 40  # a decoder's summary takes up to 8 of them
    first = encoded[0]
    assert first["prompt_length"] == limit
    assert max(encoded["length"]) <= 48
    text = tokenizer.decode(first["input_ids"][: first["prompt_length"]])
    assert "story 0 film 1" in text
    endings = {"t5": "plot </s>", "bart": "plot </s>", "gpt2": "plot", "chat": "plot assistant <unk>"}
    assert text.replace(" ##", "").endswith(endings[name])
    assert first["rest"] == []


@pytest.mark.parametrize("name", KINDS)
def test_a_split_document_is_read_to_its_end(name: str, writer: Callable[[str], Path]):
    task, _, tokenizer = task_for(writer(name), long_documents="split", prompt="{document}")
    words = [f"{'film' if i % 3 else 'story'} {i}" for i in range(60)]
    document = " ".join(words)
    encoded, long = task.encode(
        datasets.Dataset.from_list([{"document": document, "summary": "a film"}]), tokenizer, 48
    )
    row = encoded[0]
    parts = [row["input_ids"][: row["prompt_length"]], *row["rest"]]
    assert (long, len(parts)) == (1, 1 + len(row["rest"]))
    assert len(parts) > 2
    assert all(len(part) <= (48 if name in WITH_ENCODER else 40) for part in parts)
    together = " ".join(tokenizer.decode(part, skip_special_tokens=True) for part in parts)
    together = together.replace(" ##", "").replace("user ", "").replace(" assistant", "")
    assert together.split() == document.split()


def test_a_prompt_that_leaves_no_room_is_refused(writer: Callable[[str], Path]):
    task, _, tokenizer = task_for(writer("gpt2"), prompt="the film " * 25 + "{document}")
    rows = [{"document": "a film " * 20, "summary": "film"}]
    with pytest.raises(RecipeError, match=r"prompt: its \d+ tokens leave too little of 56"):
        encoded_rows(task, tokenizer, rows)


@pytest.mark.parametrize("name", KINDS)
def test_a_summary_that_is_cut_keeps_its_end(
    name: str, writer: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
):
    task, _, tokenizer = task_for(writer(name))
    rows = datasets.Dataset.from_list([{"document": "a film", "summary": "good film story plot " * 5}])
    encoded = encoded_rows(task, tokenizer, rows.to_list())
    trained = [i for i in encoded[0]["labels"] if i != -100]
    assert (len(trained), trained[-1]) == (8, tokenizer.eos_token_id)
    assert "1 of 1 summaries are cut for training to the 8 tokens" in capsys.readouterr().err
    assert rows_of(task, rows, encoded, tokenizer, 1)  # looks for tails, and says nothing of it
    assert not capsys.readouterr().err


def test_an_encoder_is_refused_though_upstream_has_it_as_a_causal_model(tmp_path: Path):
    base = make_checkpoint("bert", tmp_path / "bert")
    config = transformers.AutoConfig.from_pretrained(base)
    assert type(config) in transformers.AutoModelForCausalLM._model_mapping
    with pytest.raises(ModelError, match="bert: an encoder, each of whose tokens sees those behind it"):
        task_for(base)


def test_a_tokenizer_without_an_end_is_refused(writer: Callable[[str], Path]):
    base = writer("llama")
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.eos_token = None
    task = Summarization(SummarizationRecipe(name="test", family="summarization"))
    with pytest.raises(ModelError, match="no end token"):
        task.look_at_checkpoint(transformers.AutoConfig.from_pretrained(base), tokenizer)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"document": ["a", "b"], "summary": "a"}], "train: row 1 has a 'document' that is no text"),
        ([{"document": "a", "summary": []}], r"train: row 1 has the 'summary' '\[\]'"),
        ([{"document": "a", "summary": ["b", " "]}], "a list of texts that are not empty"),
    ],
)
def test_columns_of_other_kinds_are_refused(rows: Any, message: str):
    task = Summarization(SummarizationRecipe(name="test", family="summarization"))
    table = datasets.Dataset.from_list(rows)
    splits = type("Splits", (), {"train": table, "validation": table, "test": table})
    with pytest.raises(DataError, match=message):
        task.look_at(splits)


# ---- what it writes ----


def plainly_greedy(model: Any, ids: list[int], ends: list[int], start: int | None, count: int) -> list[int]:
    """One text at a time, without padding or cache: at each step the likeliest token."""
    own = [] if start is None else [start]
    for _ in range(count):
        with torch.no_grad():
            if start is None:
                logits = model(input_ids=torch.tensor([[*ids, *own]]), use_cache=False).logits
            else:
                logits = model(
                    input_ids=torch.tensor([ids]), decoder_input_ids=torch.tensor([own]), use_cache=False
                ).logits
        own.append(int(logits[0, -1].argmax()))
        if own[-1] in ends:
            return own[:-1] if start is None else own[1:-1]
    return own if start is None else own[1:]


@pytest.mark.parametrize("name", ALL)
def test_in_batches_it_writes_what_it_writes_alone(
    name: str, writer: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(decoding, "READ_AT_ONCE", 2)
    monkeypatch.setattr(decoding, "CACHE_BYTES", 0)  # batches of the size that is asked for
    monkeypatch.setattr(caching, "STEPS", 3)
    task, model, tokenizer = task_for(writer(name))
    encoded = encoded_rows(task, tokenizer, [{"document": r["document"]} for r in reviews(7, longest=25)])
    prompts = encoded["input_ids"][:]
    ends = generation.settle(model, tokenizer, task.speech.end, task.fields)
    expected = [plainly_greedy(model, ids, ends, task.speech.start, 8) for ids in prompts]
    for size in (7, 3, 1):
        found = generation.generate(
            model,
            prompts,
            pad_token_id=tokenizer.pad_token_id,
            ends=ends,
            has_encoder=task.speech.has_encoder,
            batch_size=size,
        )
        assert [ids for ids, _ in found] == expected
        assert [ended for _, ended in found] == [len(ids) < 8 for ids in expected]


def test_beams_give_the_same_in_batches(writer: Callable[[str], Path]):
    for name in ("t5", "llama"):
        task, model, tokenizer = task_for(writer(name), generation={"max_new_tokens": 6, "num_beams": 3})
        rows = encoded_rows(task, tokenizer, [{"document": r["document"]} for r in reviews(5, longest=20)])
        one, all_ = (task.outputs(model, rows, tokenizer, size) for size in (1, 5))
        assert one == all_
        assert model.generation_config.num_beams == 3


def test_a_checkpoints_own_sampling_and_penalties_do_not_leak(writer: Callable[[str], Path]):
    """Upstream fills what is not given from the checkpoint's own settings."""
    task, model, tokenizer = task_for(writer("llama"))
    rows = encoded_rows(task, tokenizer, reviews(4))
    expected = task.outputs(model, rows, tokenizer, 4)
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=[2, 4], do_sample=True, temperature=5.0, repetition_penalty=9.0, forced_eos_token_id=2
    )
    assert [row.summary for row in task.outputs(model, rows, tokenizer, 4)] == [r.summary for r in expected]
    assert model.generation_config.eos_token_id == [2, 4]
    assert not model.generation_config.do_sample


@pytest.mark.parametrize("name", KINDS)
def test_losses_of_rows_are_those_of_plain_pytorch(name: str, writer: Callable[[str], Path]):
    task, model, tokenizer = task_for(writer(name))
    encoded = encoded_rows(task, tokenizer, reviews(6, longest=20))
    for size in (6, 2):
        outputs = task.outputs(model, encoded, tokenizer, size)
        for row, found in zip(encoded.to_list(), outputs, strict=True):
            batch = task.collator(tokenizer)([row])
            labels = batch.pop("labels")[0]
            with torch.no_grad():
                logits = model(**batch).logits[0]
            expected = F.cross_entropy(logits[labels != -100], labels[labels != -100], reduction="sum")
            assert found.loss == pytest.approx(expected.item(), rel=1e-4)
            assert found.tokens == (labels != -100).sum()
    total = sum(row.tokens for row in outputs)
    assert task.mean_loss(outputs, encoded) == pytest.approx(sum(row.loss for row in outputs) / total)


@pytest.mark.parametrize("name", ALL)
def test_logits_are_made_where_something_is_trained(name: str, writer: Callable[[str], Path]):
    task, model, tokenizer = task_for(writer(name))
    encoded = encoded_rows(task, tokenizer, reviews(6, longest=20))
    whole = task.collator(tokenizer)(encoded.to_list())
    cut = figures.where_labelled(model, whole)
    if task.speech.has_encoder:
        assert cut.keys() == whole.keys()
        return
    losses = []
    for batch in (whole, cut):
        labels = batch["labels"]
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
        assert logits.shape[:2] == labels.shape
        losses.append(task.loss(logits, labels))
    rows = whole["labels"].tolist()
    columns = [column for column in range(len(rows[0])) if any(row[column] != -100 for row in rows)]
    assert cut["logits_to_keep"].tolist() == columns and len(columns) < len(rows[0])
    gradients = [torch.autograd.grad(loss, [p for p in model.parameters()]) for loss in losses]
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-6)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_ignored_labels_never_reach_decoding(writer: Callable[[str], Path]):
    """Trap: -100 is no token, and upstream's decoding overflows on it."""
    task, model, tokenizer = task_for(writer("gpt2"))
    encoded = encoded_rows(task, tokenizer, reviews(3))
    assert -100 in encoded["labels"][0]
    with pytest.raises(OverflowError):
        tokenizer.batch_decode(encoded["labels"][:])
    assert all(isinstance(row.summary, str) for row in task.outputs(model, encoded, tokenizer, 3))
    trained = "".join(piece.text for piece in segments_of(task, encoded[0], tokenizer) if piece.mark == "trained")
    assert trained.split() == f"{reviews(3)[0]['summary']} </s>".split()


def test_between_epochs_some_rows_are_summarized_and_the_loss_is_of_all(writer: Callable[[str], Path]):
    task, model, tokenizer = task_for(writer("gpt2"), generate_rows=3)
    encoded = encoded_rows(task, tokenizer, reviews(9))
    some = task.outputs(model, task.between_epochs(encoded), tokenizer, 4)
    whole = task.outputs(model, encoded, tokenizer, 4)
    assert [row.summary is not None for row in some] == [True, False, False] * 3
    assert [row.summary for row in some[::3]] == [row.summary for row in whole[::3]]
    assert task.mean_loss(some, encoded) == pytest.approx(task.mean_loss(whole, encoded))
    targets = task.targets(encoded)
    assert task.metrics(some, targets) == task.metrics(whole[::3], Targets(*(t[::3] for t in targets)))
    assert len(task.outcomes(whole, targets)) == 9


# ---- figures ----


def written(*texts: str, cut_off: bool = False) -> list[Written]:
    return [Written(1.0, 1, text, cut_off) for text in texts]


def test_rouge_by_hand():
    """the cat sat on the mat / the cat was on the mat: five of six words, three of five pairs, five in order."""
    found = rouge.rouge("The cat sat on the mat.", ["the cat was on the mat"])
    assert found == pytest.approx({"rouge1": 5 / 6, "rouge2": 3 / 5, "rougeL": 5 / 6, "rougeLsum": 5 / 6})
    assert rouge.rouge("", ["a cat"]) == dict.fromkeys(rouge.VARIANTS, 0.0)
    assert rouge.rouge("runs", ["running"])["rouge1"] == 1  # stemmed


def test_rouge_against_a_longest_common_subsequence_of_our_own():
    from functools import cache

    texts = [r["document"] for r in reviews(8, seed=3, longest=9)]
    for one, other in zip(texts[::2], texts[1::2], strict=True):
        a, b = rouge.WORD.findall(one), rouge.WORD.findall(other)

        @cache
        def longest(i: int, j: int, a: Any = tuple(a), b: Any = tuple(b)) -> int:
            if i == len(a) or j == len(b):
                return 0
            if a[i] == b[j]:
                return 1 + longest(i + 1, j + 1)
            return max(longest(i + 1, j), longest(i, j + 1))

        length = longest(0, 0)
        expected = 2 * length / (len(a) + len(b))
        assert rouge.rouge(one, [other])["rougeL"] == pytest.approx(expected)


def test_of_several_references_the_best_counts_for_each_variant():
    references = ["the cat was on the mat", "mat the on sat cat the"]
    each = [rouge.rouge("the cat sat on the mat", [reference]) for reference in references]
    both = rouge.rouge("the cat sat on the mat", references)
    assert each[0]["rouge2"] > each[1]["rouge2"]
    assert each[0]["rouge1"] < each[1]["rouge1"] == 1
    assert both == {name: max(one[name] for one in each) for name in rouge.VARIANTS}


def test_sentences_are_compared_one_by_one_in_rougelsum_alone():
    one, other = "The cat sat. The dog ran!", "The dog ran! The cat sat."
    assert rouge.in_sentences(one) == "The cat sat.\nThe dog ran!"
    assert rouge.in_sentences('He said "no." Then 5 left, e.g. two.') == 'He said "no."\nThen 5 left, e.g. two.'
    found = rouge.rouge(one, [other])
    assert found["rougeLsum"] == 1
    assert found["rougeL"] == pytest.approx(1 / 2)


def test_rouge_is_computed_offline_and_evaluates_is_not():
    """Trap: ``evaluate.load`` fetches a script."""
    with pytest.raises((FileNotFoundError, ConnectionError, OSError)):
        evaluate.load("rouge")
    assert rouge.rouge("a cat", ["a cat"])["rougeL"] == 1


def test_figures_that_rouge_does_not_see_by_hand():
    summaries = ["a b c d", "x y x y x y", "", "one two"]
    documents = ["z a b c q b c d", "nothing of it", "a", "one two"]
    assert rouge.ngrams("A b, c d") == [("a", "b", "c"), ("b", "c", "d")]
    assert rouge.copied_ngrams(summaries, documents) == 2 / 6  # of 2 + 4 runs of three words
    assert rouge.repetition(summaries) == 2 / 6
    assert rouge.length_ratio(["a b", "c"], [["a b", "a b c d"], ["d"]]) == 3 / 4
    assert rouge.copied_ngrams([""], ["a"]) == rouge.repetition([""]) == 0


def test_metrics_report_and_outcomes_by_hand():
    task = Summarization(SummarizationRecipe(name="test", family="summarization"))
    outputs = [*written("the cat sat on the mat"), *written(" ", "a b", cut_off=True)]
    targets = Targets(["doc"] * 3, [["the cat was on the mat"], ["x"], ["a b", "q"]])
    metrics = task.metrics(outputs, targets)
    assert list(metrics) == [*rouge.VARIANTS, "length_ratio", "copied_ngrams", "repetition", "empty", "cut_off"]
    assert metrics["rouge1"] == pytest.approx((5 / 6 + 0 + 1) / 3)
    assert (metrics["empty"], metrics["cut_off"]) == pytest.approx((1 / 3, 2 / 3))
    assert metrics["length_ratio"] == pytest.approx(8 / (6 + 1 + 1.5))
    outcomes = task.outcomes(outputs, targets)
    assert outcomes == pytest.approx([5 / 6, 0, 1])
    assert sum(outcomes) / 3 == pytest.approx(metrics[task.best_metric])
    report = task.report(outputs, targets)
    assert report["references"]["words"] == pytest.approx(9 / 3)
    assert report["examples"][2] == {"document": "doc", "references": ["a b", "q"], "summary": "a b"}


def test_what_is_said_of_the_data():
    task = Summarization(SummarizationRecipe(name="test", family="summarization"))
    table = datasets.Dataset.from_list([{"document": "one two three", "summary": ["a b", "c"]}] * 4)
    (train, *_) = task.look_at(type("Splits", (), dict.fromkeys(("train", "validation", "test"), table)))
    assert train == (
        "train: documents of 3 words on average, summaries of 2 (one in twenty has more than 2); 4 have several "
        "references"
    )
