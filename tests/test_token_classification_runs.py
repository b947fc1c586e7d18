"""Runs of the family of named entities: round trips, steps, the card, prediction and evaluation."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from typer.testing import CliRunner

import ptft_hf
from ptft_hf import cli
from ptft_hf.errors import DataError, RecipeError
from ptft_hf.recipes import TokenClassificationRecipe
from ptft_hf.tasks.alignment import joined
from ptft_hf.tasks.tags import entities
from tests.conftest import write_rows
from tests.runs import build, learner, logged
from tests.test_model_card import card_of, code_of, result_of
from tests.tiny import SIZES, make_checkpoint

# PEFT asks a transformers model for an attribute that was renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

FILLERS = ["the", "a", "this", "film", "story", "plot", "actor", "scene", "was", "is", "very", "quite"]
NAMES = {"good": (["good", "fine"], "lovely"), "bad": (["bad", "poor"], "awful")}
"""First words of a type's names, and the second one that some have."""
ARCHITECTURES = [name for name in SIZES if name not in ("bart", "opt")]  # these have no such head upstream
FAST = {
    *((name, "lora/r16_all_linear") for name in ("bert", "gpt2", "t5", "deberta-v2")),
    *((name, "full/default") for name in ("roberta", "llama", "xlnet")),
}
CELLS = [
    pytest.param(name, method, marks=() if (name, method) in FAST else pytest.mark.slow)
    for name in ARCHITECTURES
    for method in ("full/default", "lora/r16_all_linear")
]


def sentences(count: int, seed: int, longest: int = 9) -> list[dict[str, Any]]:
    """Words in which names of two types stand, of one or two words, told by the words themselves."""
    draw = random.Random(seed)
    rows = []
    for i in range(count):
        words = [draw.choice(FILLERS) for _ in range(draw.randint(2, longest))]
        tags = ["O"] * len(words)
        for kind in draw.sample(sorted(NAMES), draw.randint(1, 2)):
            first, second = NAMES[kind]
            at, name = draw.randint(0, len(words)), [draw.choice(first), second][: draw.randint(1, 2)]
            if at < len(words) and tags[at].startswith("I-"):
                continue
            words[at:at], tags[at:at] = name, [f"B-{kind}", f"I-{kind}"][: len(name)]
        rows.append({"tokens": [*words, str(i)], "tags": [*tags, "O"]})
    return rows


def splits(count: int, longest: int = 9) -> datasets.DatasetDict:
    sizes = {"train": count, "validation": 8, "test": 8}
    return datasets.DatasetDict(
        {
            name: datasets.Dataset.from_list(sentences(n, seed, longest))
            for seed, (name, n) in enumerate(sizes.items())
        }
    )


def recipe(**fields: Any) -> TokenClassificationRecipe:
    return TokenClassificationRecipe(name="test", family="token_classification", **fields)


def run(base: Path, method: Any, output: Path, data: Any = None, fields: Any = None, **settings: Any) -> Any:
    quick = {"max_steps": 2, "per_device_train_batch_size": 8, "learning_rate": 0.01, "warmup_steps": 0}
    return ptft_hf.train(
        model=str(base),
        task=recipe(**(fields or {})),
        adapter=method,
        output_dir=output,
        data=data or splits(16),
        settings={**quick, **settings},
    )


# --- round trips ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("architecture", "method"), CELLS)
def test_what_is_saved_is_what_was_trained(
    architecture: str, method: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    base, output = checkpoint(architecture), tmp_path / "run"
    trained = run(base, method, output)
    assert trained.run["proof"]["max_difference"] == 0
    batch = trained.tokenizer(["the good film was bad", "a"], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = trained.model(**batch)[0]
        assert torch.equal(ptft_hf.load(output).model(**batch)[0], expected)
        assert torch.equal(load_plainly(output, base)(**batch)[0], expected)
    assert expected.shape == (2, batch["input_ids"].shape[1], 5)
    assert not torch.equal(expected[0, 0], expected[0, 1])


def load_plainly(folder: Path, base: Path) -> Any:
    """By ``transformers`` and ``peft`` alone."""
    auto = transformers.AutoModelForTokenClassification
    if not (folder / "adapter_config.json").exists():
        return auto.from_pretrained(folder, dtype=torch.float32).eval()
    config = transformers.AutoConfig.from_pretrained(folder)
    model = auto.from_pretrained(base, config=config, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(model, folder).eval()


def test_the_matrix_is_as_wide_as_promised() -> None:
    assert len(ARCHITECTURES) >= 8
    assert {(name, method) for name, method in FAST} <= {cell.values for cell in CELLS}


# --- trap 7 -----------------------------------------------------------------------------------------------


def test_upstreams_all_linear_fails_on_token_classification_and_ours_does_not(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    base = checkpoint("bert")
    model = transformers.AutoModelForTokenClassification.from_pretrained(base, num_labels=5)
    config = peft.LoraConfig(task_type="TOKEN_CLS", target_modules="all-linear")
    with pytest.raises(TypeError):
        peft.get_peft_model(model, config)
    trained = run(base, "lora/r16_all_linear", tmp_path / "run")
    saved = trained.model.peft_config["default"]
    assert trained.run["model"]["head"] == ["classifier"]
    assert "classifier" in saved.modules_to_save
    assert "classifier" not in saved.target_modules
    kinds = {name.rpartition(".")[2] for name in saved.target_modules}
    assert kinds == {"query", "key", "value", "dense"}


# --- steps ------------------------------------------------------------------------------------------------

ONE_STEP = {
    "train_sampling_strategy": "sequential",
    "eval_strategy": "no",
    "save_strategy": "no",
    "max_grad_norm": 1e9,
}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "class weights": {"class_weights": {"O": 1.0, "good": 9.0, "bad": 3.0}},
    "focal": {"loss": "focal", "class_weights": "balanced"},
}


@pytest.mark.parametrize("case", CASES)
def test_one_step_is_the_same_however_the_batch_is_cut(case: str, tmp_path: Path) -> None:
    """Micro-batches with unequal counts of words (trap 1), against one batch in plain PyTorch."""
    bert = learner(tmp_path / "bert")
    data = splits(16, longest=14)
    trainer, ready = step(bert, data, tmp_path, case, 16, 1)
    batch = ready.task.collator(ready.tokenizer)(ready.encoded["train"].to_list())
    labels = batch.pop("labels")
    assert len({int((part != -100).sum()) for part in labels.split(4)}) > 1
    logits = ready.model(**batch).logits
    loss = plain_loss(ready, case, logits[labels != -100], labels[labels != -100])
    gradients = torch.autograd.grad(loss, [p for p in ready.model.parameters() if p.requires_grad])
    norm = torch.stack([g.norm() for g in gradients]).norm().item()
    trainer.train()
    for size, steps in ((16, 1), (4, 4), (5, 4)):
        cut, _ = step(bert, data, tmp_path, case, size, steps)
        cut.train()
        assert logged(cut) == [pytest.approx(loss.item(), abs=1e-5)], (size, steps)
        assert logged(cut, "grad_norm") == [pytest.approx(norm, rel=1e-5)], (size, steps)


def step(bert: Path, data: Any, folder: Path, case: str, size: int, steps: int) -> Any:
    settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, **ONE_STEP}
    return build(bert, data, folder / f"{size}x{steps}", task=recipe(**CASES[case]), **settings)


def plain_loss(ready: Any, case: str, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    weights = ready.task.weights
    if case == "focal":
        p = logits.softmax(-1)[torch.arange(len(labels)), labels]
        return (-((1 - p) ** 2) * p.log() * weights[labels]).sum() / weights[labels].sum()
    return F.cross_entropy(logits, labels, weights)


def test_the_evaluation_loss_is_the_mean_over_all_words(tmp_path: Path) -> None:
    trainer, ready = step(learner(tmp_path / "bert"), splits(16), tmp_path, "class weights", 16, 1)
    batch = ready.task.collator(ready.tokenizer)(ready.encoded["validation"].to_list())
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = ready.model.eval()(**batch).logits
    expected = F.cross_entropy(logits.view(-1, 5), labels.view(-1), ready.task.weights).item()
    for size in (8, 3):
        trainer.args.per_device_eval_batch_size = size
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


# --- a run in use -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learnt its names, with long inputs in windows of 16 tokens, from files."""
    root = tmp_path_factory.mktemp("entities")
    for name, count, seed in (("train", 96, 1), ("dev", 16, 2), ("test", 16, 3)):
        write_rows(root / f"{name}.jsonl", sentences(count, seed, longest=24))
    files = "{train: train.jsonl, validation: dev.jsonl, test: test.jsonl}"
    (root / "task.yaml").write_text(
        f"family: token_classification\ndata: {{path: json, data_files: {files}}}\nmodel: {{max_length: 16}}\n"
    )
    ptft_hf.train(
        model=str(learner(root / "bert")),
        task=root / "task.yaml",
        adapter="lora/r16_all_linear",
        output_dir=root / "run",
        settings={
            "num_train_epochs": 20,
            "per_device_train_batch_size": 8,
            "learning_rate": 2e-3,
            "bf16": False,
        },
    )
    return root / "run"


def test_it_learns_and_says_what_it_read(finished: Path) -> None:
    record = json.loads((finished / "run.json").read_text("utf-8"))
    assert record["metrics"]["test"]["f1"] > 0.8
    assert list(record["metrics"]["test"]) == ["precision", "recall", "f1", "macro_f1", "partial_f1"]
    assert [row["label"] for row in record["report"]["test"]["per_class"]] == ["bad", "good"]
    (note,) = [note for note in record["notes"] if note.startswith("train: ")]
    assert "of 96 inputs are longer than 16 tokens and are read in overlapping windows" in note
    assert record["labels"] == ["bad", "good"]


def test_evaluate_gives_what_the_run_recorded(finished: Path) -> None:
    model = ptft_hf.load(finished)
    result = model.evaluate(split="test")
    assert result.pop("report") == model.run["report"]["test"]
    assert result == model.run["metrics"]["test"]


def test_evaluate_on_files_of_the_other_layouts(finished: Path, tmp_path: Path) -> None:
    model, rows = ptft_hf.load(finished), sentences(12, 9)
    conll = "\n\n".join(
        "\n".join(f"{w} {t}" for w, t in zip(row["tokens"], row["tags"], strict=True)) for row in rows
    )
    (tmp_path / "other.conll").write_text(conll)
    texts = []
    for row, answer in zip(rows, model.predict(rows), strict=True):
        spans = [{"start": e["start"], "end": e["end"], "label": e["type"]} for e in answer["entities"]]
        texts.append({"text": " ".join(row["tokens"]), "spans": spans})
    by_words = model.evaluate(str(tmp_path / "other.conll"))
    assert by_words == model.evaluate(str(write_rows(tmp_path / "other.jsonl", rows)))
    assert model.evaluate(str(write_rows(tmp_path / "own.jsonl", texts)))["f1"] == 1  # its own answers
    write_rows(tmp_path / "new.jsonl", [{"tokens": ["x"], "tags": ["B-new"]}])
    with pytest.raises(
        DataError, match=r"labels \['new'\] are unknown to this model; it knows \['bad', 'good'\]"
    ):
        model.evaluate(str(tmp_path / "new.jsonl"))


def test_long_inputs_are_answered_to_their_end(finished: Path) -> None:
    """Twelve sentences in a row, a text of many windows: the names are found where they stand, all along."""
    model, rows = ptft_hf.load(finished), sentences(12, 9, longest=24)
    words, tags = ([x for row in rows for x in row[name]] for name in ("tokens", "tags"))
    text, spans = joined(words)
    wanted = {(spans[e.start][0], spans[e.end - 1][1], e.type) for e in entities(tags)}
    (answer,) = model.predict([{"tokens": words}])
    found = {(e["start"], e["end"], e["type"]) for e in answer["entities"]}
    assert len(wanted & found) >= 0.8 * max(len(wanted), len(found))
    assert max(wanted & found)[0] > 0.8 * len(text)
    for entity in answer["entities"]:
        assert text[entity["start"] : entity["end"]] == entity["text"]
        assert 0 < entity["score"] <= 1


def test_texts_words_and_batches_of_any_size_give_the_same_answers(finished: Path) -> None:
    model, rows = ptft_hf.load(finished), sentences(9, 5, longest=30)
    given = [{"tokens": row["tokens"]} for row in rows]
    expected = model.predict(given)
    assert all(map(model.task.same, expected, model.predict(given, batch_size=2)))
    assert all(map(model.task.same, expected, model.predict([" ".join(r["tokens"]) for r in rows])))
    assert model.predict(["", " ", {"tokens": []}]) == [{"text": t, "entities": []} for t in ("", " ", "")]
    with pytest.raises(DataError, match="input 2: 5 is neither a text nor an object"):
        model.predict(["a", 5])


def test_the_command_gives_json_lines(finished: Path, tmp_path: Path) -> None:
    sentence = " ".join(sentences(1, 3)[0]["tokens"])
    write_rows(tmp_path / "in.jsonl", [{"tokens": ["a", "good", "film"]}, {"text": "a good film"}, sentence])
    runner = CliRunner()
    done = runner.invoke(cli.app, ["predict", str(finished), "--input", str(tmp_path / "in.jsonl")])
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert answers[0] == answers[1]
    assert answers == ptft_hf.load(finished).predict(["a good film", "a good film", sentence])
    assert answers[2]["entities"]
    assert {key for entity in answers[2]["entities"] for key in entity} == {
        "text",
        "type",
        "start",
        "end",
        "score",
    }


def test_the_cards_lines_for_upstreams_libraries_give_the_same_tags(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(
        learner(tmp_path / "bert"), "lora/r16_all_linear", folder, learning_rate=1e-5
    )  # a varied, random head
    _, cells = card_of(folder)
    upstream, own = code_of(cells)
    assert "ptft_hf" not in upstream.replace("# of up to 64 tokens; ptft_hf reads longer ones in windows", "")
    tags = result_of(upstream, "tags", tmp_path)
    (answer,) = result_of(
        own.replace("print(model.predict(", "answers = (model.predict("), "answers", tmp_path
    )
    words = answer["text"].split()
    found = [(" ".join(words[e.start : e.end]), e.type) for e in entities(tags)]
    assert found
    assert [(e["text"], e["type"]) for e in answer["entities"]] == found
    assert "It finds entities of the types `bad`, `good`." in (folder / "README.md").read_text("utf-8")


def test_a_merged_model_gives_the_same_entities(finished: Path, tmp_path: Path) -> None:
    from ptft_hf import inference

    merged, comparison = inference.merge(finished, tmp_path / "merged")
    assert comparison["examples"] == 16
    assert comparison["label_changes"] == 0
    texts = ["a good film", {"tokens": ["bad", "awful", "plot"]}]
    assert all(map(merged.task.same, merged.predict(texts), ptft_hf.load(finished).predict(texts)))


# --- bad settings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "settings", "message"),
    [
        ({"stride": 62}, {}, "stride: 62 is not less than the 62 tokens of a window"),
        ({}, {"metric_for_best_model": "accuracy"}, r"'accuracy' is not computed here.*loss, precision"),
        ({"loss": "focal"}, {"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        ({"class_weights": {"good": 1.0}}, {}, "class_weights: 'bad' has none"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(
    fields: Any, settings: Any, message: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        run(checkpoint("bert"), "full/default", tmp_path / "run", fields=fields, **settings)
    assert not (tmp_path / "run").exists()


def test_an_architecture_without_such_a_head_is_refused(tmp_path: Path) -> None:
    from ptft_hf.errors import ModelError

    base = make_checkpoint("opt", tmp_path / "opt")
    with pytest.raises(ModelError, match="no AutoModelForTokenClassification for the architecture 'opt'"):
        run(base, "full/default", tmp_path / "run")


def test_outputs_of_several_processes_are_put_in_order() -> None:
    from ptft_hf import forward

    parts = [[np.zeros((1, 2)), np.full((3, 2), 2)], [np.ones((2, 2)), np.zeros((1, 2))]]
    assert [part[0, 0] for part in forward.in_order(parts, 3)] == [0, 1, 2]
    assert forward.in_order([np.array([[0], [2]]), np.array([[1], [9]])], 3).tolist() == [[0], [1], [2]]
