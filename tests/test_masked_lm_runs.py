"""Runs of masked language models: round trips, steps, resumes, models from nothing, the card, prediction."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers

import ptft_hf
from ptft_hf import inference, settings
from ptft_hf.errors import ModelError, OutputError, RecipeError
from ptft_hf.recipes import Cleaning, MaskedLMRecipe, TokenizerRecipe
from tests.conftest import write_rows
from tests.corpus import corpus, write_corpus
from tests.runs import NO_DROPOUT, build, equal_weights, logged, weights
from tests.stopped_runs import Place, assert_same
from tests.test_distributed import assert_same_curves, on_one_process, on_two_processes
from tests.test_model_card import card_of, code_of, result_of
from tests.tiny import SIZES, make_checkpoint, make_tokenizer

# PEFT asks a transformers model for an attribute that was renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

ENCODERS = [
    "bert",
    "roberta",
    "xlm-roberta",
    "distilbert",
    "albert",
    "electra",
    "deberta",
    "deberta-v2",
    "modernbert",
    "mpnet",
    "xlm",
]
FAST = {("bert", "lora/r16_all_linear"), ("roberta", "full/default")}
CELLS = [
    pytest.param(name, method, marks=() if (name, method) in FAST else pytest.mark.slow)
    for name in ENCODERS
    for method in ("full/default", "lora/r16_all_linear")
]
LARGER = corpus(train=32, paragraphs=12)
SIZES_OF_BERT = {f"model.{name}": value for name, value in {**SIZES["bert"], "num_hidden_layers": 2}.items()}


def recipe(**fields: Any) -> MaskedLMRecipe:
    return MaskedLMRecipe(name="test", family="masked_lm", **fields)


def run(model: Any, method: Any, output: Path, data: Any = None, fields: Any = None, **given: Any) -> Any:
    quick = {"max_steps": 2, "per_device_train_batch_size": 8, "learning_rate": 0.01, "warmup_steps": 0}
    options = {name: given.pop(name) for name in ("seed", "resume") if name in given}
    return ptft_hf.train(
        model=str(model),
        task=recipe(**(fields or {})),
        adapter=method,
        output_dir=output,
        data=data or corpus(),
        settings={**quick, "model.max_length": 32, **given},
        **options,
    )


def with_head(name: str, folder: Path, kind: str = "AutoModelForMaskedLM") -> Path:
    """A checkpoint that has the head, too."""
    make_checkpoint(name, folder)
    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(11)
        getattr(transformers, kind).from_config(config).save_pretrained(folder)
    return folder


# --- round trips ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("architecture", "method"), CELLS)
def test_what_is_saved_is_what_was_trained(
    architecture: str, method: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    base, output = checkpoint(architecture), tmp_path / "run"
    trained = run(base, method, output)
    assert trained.run["proof"]["max_difference"] == 0
    batch = trained.tokenizer(["the good <mask> was bad", "a <mask>"], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = trained.model(**batch)[0]
        assert torch.equal(ptft_hf.load(output).model(**batch)[0], expected)
        assert torch.equal(load_plainly(output, base)(**batch)[0], expected)
    assert expected.shape == (*batch["input_ids"].shape, len(trained.tokenizer))
    assert len(trained.predict(["the <mask> was [MASK]"])[0]["masks"]) == 2
    assert trained.run["metrics"]["test"]["perplexity"] > 1


def load_plainly(folder: Path, base: Path, kind: str = "AutoModelForMaskedLM") -> Any:
    """By ``transformers`` and ``peft`` alone."""
    auto = getattr(transformers, kind)
    if not (folder / "adapter_config.json").exists():
        return auto.from_pretrained(folder, dtype=torch.float32).eval()
    config = transformers.AutoConfig.from_pretrained(folder)
    model = auto.from_pretrained(base, config=config, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(model, folder).eval()


def test_the_matrix_is_as_wide_as_promised() -> None:
    assert len(ENCODERS) >= 8
    assert {cell.values for cell in CELLS if not cell.marks} == FAST


@pytest.mark.parametrize(
    ("architecture", "method", "full_head"),
    [
        ("bert", "full/default", False),
        pytest.param("bert", "lora/r16_all_linear", True, marks=pytest.mark.slow),
        pytest.param("bert", "lora/r16_all_linear", False, marks=pytest.mark.slow),
        pytest.param("bert", "full/default", True, marks=pytest.mark.slow),
        pytest.param("megatron-bert", "full/default", True, marks=pytest.mark.slow),
    ],
)
def test_both_objectives_round_trip_with_tied_embeddings(
    architecture: str, method: str, full_head: bool, tmp_path: Path, checkpoint: Callable[[str], Path]
) -> None:
    SIZES.setdefault("megatron-bert", SIZES["bert"])
    kind = "AutoModelForPreTraining"
    base = with_head(architecture, tmp_path / "base", kind) if full_head else checkpoint(architecture)
    trained = run(base, method, tmp_path / "run", fields={"next_sentence": True})
    assert trained.run["proof"]["max_difference"] == 0
    plain = load_plainly(tmp_path / "run", base, kind)
    output, table = (m() for m in (plain.get_output_embeddings, plain.get_input_embeddings))
    if method == "full/default":
        assert output.weight is table.weight
        first = load_plainly(base, base, kind).get_input_embeddings().weight
        assert not torch.equal(table.weight, first)
    batch = trained.tokenizer(["the good <mask>"], ["was bad"], return_tensors="pt")
    if architecture == "megatron-bert":
        batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    with torch.no_grad():
        ours, theirs = trained.model(**batch), plain(**batch)
    for name in ("prediction_logits", "seq_relationship_logits"):
        assert torch.equal(ours[name], theirs[name])
    assert set(trained.run["metrics"]["test"]) == {"loss", "perplexity", "masked_accuracy", "nsp_accuracy"}
    assert trained.run["report"]["test"]["chance"]["nsp_accuracy"] == pytest.approx(0.5, abs=0.03)


def test_a_head_is_trained_whole_if_it_is_new_and_kept_if_it_came_with_the_checkpoint(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    new = run(checkpoint("bert"), "lora/r16_all_linear", tmp_path / "new")
    assert new.run["model"]["head"] == ["cls.predictions.transform"]
    assert new.model.peft_config["default"].modules_to_save == ["cls.predictions.transform"]
    base = with_head("bert", tmp_path / "base")
    old = run(base, "lora/r16_all_linear", tmp_path / "old")
    assert old.run["model"]["head"] == []
    assert not old.model.peft_config["default"].modules_to_save
    assert "cls.predictions.transform.dense" in old.model.peft_config["default"].target_modules
    kept = load_plainly(base, base).cls.predictions.bias
    assert torch.equal(old.model.get_base_model().cls.predictions.bias, kept)


# --- steps ------------------------------------------------------------------------------------------------

ONE_STEP = {
    "train_sampling_strategy": "sequential",
    "eval_strategy": "no",
    "save_strategy": "no",
    "max_grad_norm": 1e9,
    "max_steps": 1,
}


@pytest.mark.parametrize(
    "pairs", [pytest.param(False, marks=pytest.mark.slow), True], ids=["masked", "masked and pairs"]
)
def test_one_step_is_the_same_however_the_batch_is_cut(pairs: bool, tmp_path: Path) -> None:
    """Micro-batches with unequal counts of hidden tokens (trap 1), against one batch in plain PyTorch: the mean over
    the tokens and the mean over the pairs, each over the whole batch."""
    base = with_head("bert", tmp_path / "bert", "AutoModelForPreTraining")
    config = transformers.AutoConfig.from_pretrained(base)
    config.update(NO_DROPOUT)
    config.save_pretrained(base)

    def step(size: int, accumulated: int) -> Any:
        cut = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated}
        fields = {"next_sentence": True} if pairs else {"pack": False}
        folder = tmp_path / f"{size}x{accumulated}"
        return build(base, corpus(), folder, task=recipe(model={"max_length": 40}, **fields), **cut, **ONE_STEP)

    trainer, ready = step(16, 1)
    collate = ready.task.collator(ready.tokenizer)
    collate.begin_epoch(trainer.args.seed, 0)
    batch = collate(ready.encoded["train"].select(range(16)).to_list())
    labels = batch.pop("labels")
    outputs = ready.model(**batch)
    hidden = labels.clone()
    if pairs:
        hidden[:, 0] = -100
    assert len({int((part != -100).sum()) for part in hidden.split(4)}) > 1
    loss = F.cross_entropy(outputs[0].flatten(0, 1), hidden.flatten())
    if pairs:
        loss = loss + F.cross_entropy(outputs.seq_relationship_logits, labels[:, 0])
    parameters = [p for p in ready.model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    norm = torch.stack([g.norm() for g in gradients if g is not None]).norm().item()
    trainer.train()
    for size, accumulated in ((16, 1), (4, 4), (8, 2)):
        cut, _ = step(size, accumulated)
        cut.train()
        assert logged(cut) == [pytest.approx(loss.item(), abs=1e-5)], (size, accumulated)
        assert logged(cut, "grad_norm") == [pytest.approx(norm, rel=1e-5)], (size, accumulated)


def test_training_hides_other_tokens_in_each_epoch(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    trainer, _ = build(checkpoint("bert"), corpus(), tmp_path, task=recipe(), num_train_epochs=3)
    seen: list[tuple[int, torch.Tensor]] = []
    collate = trainer.data_collator.__call__
    whole = trainer.train_dataset.to_list()
    original = trainer._run_epoch

    def spied(model: Any, epoch: int, *args: Any, **kwargs: Any) -> None:
        original(model, epoch, *args, **kwargs)
        seen.append((epoch, collate(whole)["labels"]))

    trainer._run_epoch = spied
    trainer.train()
    assert [epoch for epoch, _ in seen] == [0, 1, 2]
    counts = {int((labels != -100).sum()) for _, labels in seen}
    assert len(counts) == 1
    assert not torch.equal(seen[0][1], seen[1][1])
    assert not torch.equal(seen[1][1], seen[2][1])


def test_a_resumed_run_is_the_unbroken_run(tmp_path: Path, checkpoint: Callable[[str], Path]) -> None:
    place = Place(tmp_path, checkpoint("bert"))
    files = json.dumps(write_corpus(tmp_path))
    (tmp_path / "task.yaml").write_text(
        f"family: masked_lm\ndata: {{path: json, data_files: {files}}}\nnext_sentence: true\n"
        "model: {max_length: 32}\n"
    )
    settings = {"eval_steps": 4, "save_steps": 1, "load_best_model_at_end": False, "gradient_accumulation_steps": 1}
    whole = place.run("whole", settings=settings)
    assert whole.run["training"]["steps"] >= 6
    for step in (whole.run["training"]["steps"] - 2,):  # in the middle of the second epoch
        stopped = place.stopped(step, place.folder / "whole")
        place.run(stopped.name, settings=settings, resume=True)
        assert_same(place.folder / "whole", stopped)


@pytest.mark.slow
def test_two_processes_give_the_curve_of_one_with_twice_the_batch(tmp_path: Path) -> None:
    """Each term of the loss is counted over both processes, whose rows have unlike numbers of hidden tokens; masks do
    not depend on which process draws them; both train the same tokenizer and begin with the same weights."""
    (tmp_path / "task.yaml").write_text(
        f"family: masked_lm\ndata: {{path: json, data_files: {json.dumps(write_corpus(tmp_path))}}}\n"
        "next_sentence: true\nmodel: {max_length: 32}\n"
    )
    settings_ = {
        "num_train_epochs": 2,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "bf16": False,
        **SIZES_OF_BERT,
        **{f"model.{name}": rate for name, rate in NO_DROPOUT.items()},
    }
    nothing: Any = "config:bert"
    sizes = [{**settings_, "per_device_train_batch_size": size} for size in (16, 8)]
    on_one_process(nothing, tmp_path / "task.yaml", "full/default", tmp_path / "one", sizes[0])
    done = on_two_processes(nothing, tmp_path / "task.yaml", "full/default", tmp_path / "two", sizes[1])
    assert done.returncode == 0, done.stderr[-3000:]
    names = ("step", "loss", "grad_norm", "eval_loss", "eval_nsp_accuracy", "eval_perplexity")
    assert_same_curves(tmp_path / "one", tmp_path / "two", names)


# --- from nothing -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nothing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of random weights with a tokenizer of its corpus, pre-trained with both objectives until it learns."""
    root = tmp_path_factory.mktemp("nothing")
    run(
        "config:bert",
        "full/default",
        root / "run",
        LARGER,
        {"next_sentence": True, "tokenizer": TokenizerRecipe(vocab_size=300)},
        num_train_epochs=6,
        max_steps=-1,
        learning_rate=3e-3,
        bf16=False,
        eval_strategy="no",
        save_strategy="no",
        **SIZES_OF_BERT,
        # Without dropout, and with larger initial weights than BERT's own: it learns in some seconds.
        **{"model.initializer_range": 0.1, **{f"model.{name}": rate for name, rate in NO_DROPOUT.items()}},
    )
    return root / "run"


def test_a_model_from_nothing_learns_and_is_saved_whole(nothing: Path) -> None:
    model = ptft_hf.load(nothing)
    record = model.run
    assert record["model"]["reference"] == "config:bert"
    assert type(model.model).__name__ == "BertForPreTraining"
    assert model.model.config.vocab_size == len(model.tokenizer) < 300
    assert record["metrics"]["test"]["masked_accuracy"] > record["report"]["test"]["chance"]["masked_accuracy"] + 0.07
    assert record["metrics"]["test"]["perplexity"] < 0.5 * len(model.tokenizer)
    assert model.tokenizer.model_max_length == model.model.config.max_position_embeddings == 512
    assert any("a WordPiece tokenizer of" in note for note in record["notes"])
    assert any("the weights are random" in note for note in record["notes"])
    result = model.evaluate(split="test", source=LARGER)
    assert result.pop("report") == record["report"]["test"]
    assert result == record["metrics"]["test"]
    assert model.predict(["the film [MASK] very good ."])[0]["masks"][0][0]["token"] in ("was", "is")
    assert 0 <= model.predict([{"text": "the film was", "next": "very good ."}])[0]["is_next"] <= 1


def test_the_cards_lines_give_the_same_tokens(nothing: Path, tmp_path: Path) -> None:
    _, cells = card_of(nothing)
    upstream, own = code_of(cells)
    tokens = result_of(upstream, "tokens", tmp_path)
    text = "She opened the [MASK] and looked out."
    assert f"model.predict([{json.dumps(text)}])" in own
    (answer,) = ptft_hf.load(nothing).predict([text])
    assert [(e["token"], pytest.approx(e["score"], rel=1e-4)) for e in answer["masks"][0]] == tokens
    text = (nothing / "README.md").read_text("utf-8")
    assert "`config:bert`, trained from random weights with `full/default`" in text
    assert "It tells hidden words, and whether two texts follow each other." in text


def test_a_model_from_nothing_is_fine_tuned_like_any_checkpoint(nothing: Path, tmp_path: Path) -> None:
    rows = [{"text": f"the film was {w} {i}", "label": w} for i in range(8) for w in ("good", "bad")]
    files = {name: str(write_rows(tmp_path / f"{name}.jsonl", rows)) for name in ("train", "validation", "test")}
    (tmp_path / "task.yaml").write_text(
        f"family: sequence_classification\ndata: {{path: json, data_files: {json.dumps(files)}}}\n"
    )
    tuned = ptft_hf.train(
        model=str(nothing),
        task=tmp_path / "task.yaml",
        adapter="full/default",
        output_dir=tmp_path / "tuned",
        settings={"max_steps": 1},
    )
    assert tuned.run["proof"]["max_difference"] == 0
    assert tuned.run["model"]["new_parameters"] == ["classifier.bias", "classifier.weight"]


def test_the_same_seed_gives_the_same_model_and_resumes(tmp_path: Path) -> None:
    fields = {"tokenizer": TokenizerRecipe(vocab_size=300)}
    one = run("config:bert", "full/default", tmp_path / "one", None, fields, **SIZES_OF_BERT)
    two = run("config:bert", "full/default", tmp_path / "two", None, fields, **SIZES_OF_BERT)
    assert equal_weights(weights(one.model), weights(two.model))
    assert one.run["model"]["tokenizer"] == two.run["model"]["tokenizer"]
    assert one.run["model"]["fingerprint"] == two.run["model"]["fingerprint"]
    (tmp_path / "two" / "run.json").unlink()
    run("config:bert", "full/default", tmp_path / "two", None, fields, resume=True, **SIZES_OF_BERT)
    assert equal_weights(weights(one.model), weights(ptft_hf.load(tmp_path / "two").model))
    (tmp_path / "two" / "run.json").unlink()
    other = {"tokenizer": TokenizerRecipe(vocab_size=300, lowercase=True)}
    with pytest.raises(OutputError, match=r"task\.tokenizer\.lowercase"):
        run("config:bert", "full/default", tmp_path / "two", None, other, resume=True, **SIZES_OF_BERT)


@pytest.mark.slow
def test_configuration_and_tokenizer_are_taken_from_a_checkpoint(tmp_path: Path) -> None:
    base = with_head("roberta", tmp_path / "base")
    trained = run(f"config:{base}", "full/default", tmp_path / "run", **{"model.num_hidden_layers": 1})
    assert trained.model.config.num_hidden_layers == 1
    assert trained.model.config.hidden_size == 32
    assert trained.tokenizer.get_vocab() == make_tokenizer("roberta").get_vocab()
    first = load_plainly(base, base).get_input_embeddings().weight
    assert not torch.equal(trained.model.get_input_embeddings().weight, first)
    named = run("config:bert", "full/default", tmp_path / "named", None, {"tokenizer": str(base)}, **SIZES_OF_BERT)
    assert named.tokenizer.get_vocab() == trained.tokenizer.get_vocab()


@pytest.mark.parametrize(
    ("model", "method", "settings", "error", "message"),
    [
        ("config:bert", "lora/r8_attention", {}, RecipeError, "config:bert has random weights: use full/default"),
        ("config:bert", "partial/head_only", {}, RecipeError, "use full/default"),
        ("config:brt", "full/default", {}, ModelError, r"'brt' is no model type .*did you mean 'bert'"),
        ("config:", "full/default", {}, RecipeError, "config: what"),
        ("config:bert", "full/default", {"model.hiden_size": 8}, ModelError, "hiden_size: BertConfig has no such"),
        ("config:bert", "full/default", {"model.hidden_size": 33}, ModelError, "is not a multiple of the number of"),
        ("config:gpt2", "full/default", {}, ModelError, "no AutoModelForMaskedLM for the architecture 'gpt2'"),
        ("config:/nowhere/x", "full/default", {}, ModelError, "/nowhere/x"),
    ],
)
def test_what_cannot_begin_from_nothing_is_refused(
    model: str, method: str, settings: Any, error: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        run(model, method, tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def test_other_families_do_not_begin_from_nothing(task_file: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="random weights know nothing that"):
        ptft_hf.train(
            model="config:bert", task=task_file, adapter="full/default", output_dir=tmp_path / "run"
        )


# --- beside -----------------------------------------------------------------------------------------------


def test_cleaning_is_listed_and_the_recipes_tokenizer_is_said_to_be_unused(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    data = corpus()
    texts = [f"  {text}  " if i < 5 else text for i, text in enumerate(data["train"]["text"])]
    data["train"] = data["train"].remove_columns("text").add_column("text", texts)
    fields = {"cleaning": Cleaning(white_space=True, min_characters=20), "tokenizer": TokenizerRecipe()}
    trained = run(checkpoint("bert"), "full/default", tmp_path / "run", data, fields)
    notes = trained.run["notes"]
    assert "cleaning, train: white space changed 5 of 96 texts" in notes
    (dropped,) = [note for note in notes if note.startswith("cleaning, test: length of 20 or more characters")]
    left = trained.run["data"]["test"]["rows"]
    assert dropped.endswith(f": {48 - left} of 48 texts dropped")
    assert "tokenizer: the checkpoint's own is used; the recipe's is for models from nothing" in notes
    assert trained.evaluate(data["test"])["loss"] == trained.run["metrics"]["test"]["loss"]


@pytest.mark.slow
def test_an_adapter_is_merged_and_compared(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    base = with_head("bert", tmp_path / "base")
    run(base, "lora/r16_all_linear", tmp_path / "run")
    merged, comparison = inference.merge(tmp_path / "run", tmp_path / "merged")
    assert comparison["examples"] > 0
    assert merged.predict(["the [MASK] was good"])[0]["masks"]


def test_perplexity_may_choose_the_checkpoint_and_lower_is_better(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    settings_ = settings.complete({"metric_for_best_model": "perplexity"}, 1e-4, "loss")
    assert settings_["greater_is_better"] is False
    with pytest.raises(RecipeError, match="'f1' is not computed here; choose among loss, perplexity, masked_acc"):
        run(checkpoint("bert"), "full/default", tmp_path / "other", metric_for_best_model="f1")
