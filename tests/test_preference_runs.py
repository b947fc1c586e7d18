"""Runs of the family of preferences: round trips, the loss beside TRL's, what is learnt, and reward models in PPO."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pytest
import torch
import transformers
from typer.testing import CliRunner

import ptft_hf
from ptft_hf import cli, models
from ptft_hf.errors import ModelError, RecipeError
from ptft_hf.recipes.prompts import PromptsRecipe
from ptft_hf.rlhf import preparing as ppo_preparing
from ptft_hf.rlhf import rewards, rollouts
from tests.conftest import write_rows
from tests.ppo_runs import QUICK, run_ppo
from tests.preferences import SPACED, make_decoder, pairs, recipe, splits
from tests.runs import build, curve, learner, logged
from tests.test_distributed import assert_same_curves, on_two_processes
from tests.test_model_card import card_of, code_of
from tests.tiny import make_checkpoint

# PEFT asks a transformers model for an attribute that was renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

FAST = {("bert", "full/default"), ("bert", "lora/r8_attention"), ("llama", "full/default"),
        ("llama", "lora/r16_all_linear"), ("gpt2", "partial/top_2_layers"),
        ("bart", "lora/r16_all_linear")}  # fmt: skip
METHODS = ("full/default", "lora/r8_attention", "lora/r16_all_linear", "partial/top_2_layers",
           "bottleneck/pfeiffer", "prefix/tokens20", "ia3/default")  # fmt: skip
ARCHITECTURES = ("bert", "roberta", "distilbert", "deberta-v2", "xlnet", "gpt2", "llama", "qwen2", "opt", "bart",
                 "t5")  # fmt: skip
CELLS = [
    pytest.param(name, method, marks=() if (name, method) in FAST else pytest.mark.slow)
    for name in ARCHITECTURES
    for method in METHODS
]
PAIRS = [*pairs(4, seed=7), {**pairs(1, seed=8)[0], "prompt": "so very much " * 40 + "good , "}]
"""The last prompt is too long for the tiny models."""
GIVEN: list[Any] = [*PAIRS, *({"prompt": row["prompt"], "answer": row["chosen"]} for row in PAIRS)]


def run(base: Path, method: Any, folder: Path, data: Any = None, **settings: Any) -> Any:
    quick = {"max_steps": 2, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "warmup_steps": 0}
    quick |= {"bf16": False, "eval_strategy": "no", "save_strategy": "no"}
    return ptft_hf.train(
        model=str(base),
        task=recipe(),
        adapter=method,
        output_dir=folder,
        data=data or splits(16),
        settings={**quick, **settings},
    )


# ---- round trips ----


@pytest.mark.parametrize(("architecture", "method"), CELLS)
def test_what_is_saved_is_what_was_trained(
    architecture: str, method: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    try:
        trained = run(checkpoint(architecture), method, tmp_path / "run")
    except ptft_hf.AdapterError:
        assert (architecture, method) not in FAST
        pytest.skip("the method is refused on this architecture, see tests/test_round_trip.py")
    assert trained.run["proof"] == {"max_difference": 0.0, "examples": 24}  # both answers of 12 pairs
    loaded = ptft_hf.load(tmp_path / "run")
    assert loaded.tokenizer.truncation_side == "left"
    answers = loaded.predict(GIVEN)
    assert answers == trained.predict(GIVEN)
    assert len({answer["score"] for answer in answers[5:]}) == 5
    for single, pair in zip(answers[5:], answers[:5], strict=True):
        assert single["score"] == pytest.approx(pair["scores"]["chosen"], abs=1e-5)
    for alone, answer in zip((loaded.predict([one])[0] for one in GIVEN[5:]), answers[5:], strict=True):
        assert alone["score"] == pytest.approx(answer["score"], abs=1e-5)
    upstream = code_of(card_of(tmp_path / "run")[1])[0]
    if "ptft_hf" in upstream:
        return  # bottleneck adapters and prefixes
    scope: dict[str, Any] = {}
    with models.quiet():
        exec(upstream, scope)
    example = json.loads(json.dumps(loaded.task.usage(["prompt", "chosen", "rejected"], 64).inputs[0]))
    assert scope["score"].item() == pytest.approx(loaded.predict([example])[0]["score"], abs=1e-5)


@pytest.mark.parametrize(("chat", "shown"), [(SPACED, "text.rindex(end)"), (None, "convert_ids_to_tokens(2)")])
def test_the_cards_lines_give_the_score_of_a_chat_and_of_an_end_that_is_written(
    chat: str | None, shown: str, tmp_path: Path
) -> None:
    trained = run(make_decoder(tmp_path / "base", chat=chat), "full/default", tmp_path / "run")
    upstream = code_of(card_of(tmp_path / "run")[1])[0]
    assert shown in upstream
    scope: dict[str, Any] = {}
    with models.quiet():
        exec(upstream, scope)
    given = {"prompt": "Why is the sky blue?", "answer": "Air scatters blue light most."}
    assert scope["score"].item() == pytest.approx(trained.predict([given])[0]["score"], abs=1e-5)


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that has learnt which word makes an answer good."""
    folder = tmp_path_factory.mktemp("learnt")
    for name, table in splits(96).items():
        write_rows(folder / f"{name}.jsonl", table.to_list())
    run(learner(folder / "bert"), "full/default", folder / "run", str(folder), max_steps=48, learning_rate=3e-3)
    return folder / "run"


def test_a_preference_is_learnt_and_reported_beside_its_rivals(learnt: Path) -> None:
    record = json.loads((learnt / "run.json").read_text("utf-8"))
    metrics, report = record["metrics"]["test"], record["report"]["test"]
    assert set(metrics) == {"accuracy", "loss"}
    assert metrics["accuracy"] == 1.0
    assert metrics["loss"] < 0.3
    assert report["pairs"] == 8 and report["accuracy_interval"][1] == 1.0
    assert report["rivals"]["bag_of_words"] == 1.0
    assert 0.2 < report["rivals"]["length"] < 0.8
    assert any("validation: accuracy 1.000 (0.758 to 1.000) on 12 pairs; the " in note for note in record["notes"])
    assert any("scores are centred: " in note for note in record["notes"])
    assert "It gives an answer a score, higher for better ones" in (learnt / "README.md").read_text("utf-8")


def test_the_mean_score_of_training_answers_is_zero(learnt: Path) -> None:
    loaded = ptft_hf.load(learnt)
    assert abs(loaded.task.centre) > 1e-3
    scores = [score for found in loaded.predict(pairs(96)) for score in found["scores"].values()]
    assert np.mean(scores) == pytest.approx(0, abs=1e-5)
    assert np.std(scores) > 1


def test_evaluate_gives_the_figures_of_the_run(learnt: Path) -> None:
    record = json.loads((learnt / "run.json").read_text("utf-8"))
    found = ptft_hf.load(learnt).evaluate(datasets.Dataset.from_list(pairs(8, seed=2)))
    report, expected = found.pop("report"), record["report"]["test"]
    assert report.keys() == expected.keys()
    for name, value in expected.items():
        assert report[name] == pytest.approx(value), name
    assert found == pytest.approx(record["metrics"]["test"])
    turned = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in pairs(8, seed=2)]
    assert ptft_hf.evaluate(learnt, datasets.Dataset.from_list(turned))["accuracy"] == 0.0


def test_the_command_line_says_scores_and_which_is_better(learnt: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "in.jsonl", [GIVEN[0], GIVEN[5]])
    done = CliRunner().invoke(cli.app, ["predict", str(learnt), "--input", str(tmp_path / "in.jsonl")])
    pair, single = [json.loads(line) for line in done.stdout.splitlines()]
    assert pair["better"] == "chosen" and pair["probability"] > 0.5
    assert single == {"score": pytest.approx(pair["scores"]["chosen"], abs=1e-5)}


def test_what_it_cannot_be_exported_to_is_refused(learnt: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from ptft_hf import exporting, onnx_models

    monkeypatch.setattr(onnx_models, "check_packages", lambda: None)
    with pytest.raises(ModelError, match="onnx: for classifiers and taggers, not for preference"):
        exporting.export(learnt, tmp_path / "out", to="onnx")


def test_a_merged_adapter_gives_the_same_scores(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    trained = run(checkpoint("bert"), "lora/r8_attention", tmp_path / "run", learning_rate=0.05)
    merged, comparison = ptft_hf.inference.merge(tmp_path / "run", tmp_path / "merged")
    assert comparison["label_changes"] == 0
    for one, other in zip(merged.predict(GIVEN[5:]), trained.predict(GIVEN[5:]), strict=True):
        assert one["score"] == pytest.approx(other["score"], abs=1e-5)


# ---- the Trainer ----


def test_the_loss_is_trls_on_the_same_batch(tmp_path: Path) -> None:
    from trl import RewardConfig, RewardTrainer

    base = make_checkpoint("qwen2", tmp_path / "base", initializer_range=0.3)
    rows = [{**row, "margin": i / 4} for i, row in enumerate(pairs(6))]
    with models.quiet():
        model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=1).eval()
        trainer = RewardTrainer(
            model=model,
            args=RewardConfig(
                str(tmp_path),
                per_device_train_batch_size=6,
                bf16=False,
                report_to="none",
                dataloader_pin_memory=False,
            ),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=transformers.AutoTokenizer.from_pretrained(base),
        )
        batch = next(iter(trainer.get_train_dataloader()))
        model.eval()
        with torch.no_grad():
            theirs = trainer.compute_loss(model, dict(batch)).item()
            logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    interleaved = torch.cat(logits.chunk(2), 1)  # theirs has all chosen answers before all rejected ones
    labels = torch.stack([torch.ones(6), batch["margin"].cpu()], 1)
    task = ptft_hf.tasks.build(recipe())
    ours = (task.loss(interleaved.cpu(), labels) / task.loss_weight(labels)).item()
    assert ours == pytest.approx(theirs, abs=1e-5)
    assert task.loss(interleaved.cpu(), labels * torch.tensor([1.0, 0.0])).item() / 6 < ours - 0.1  # margins count


def test_a_step_does_not_depend_on_how_its_pairs_are_batched(tmp_path: Path) -> None:
    base = make_checkpoint("llama", tmp_path / "base", initializer_range=0.2)
    rows = [{**row, "margin": i % 3 / 2, "tie": i % 3 == 0} for i, row in enumerate(pairs(12))]
    data = datasets.DatasetDict(dict.fromkeys(("train", "validation", "test"), datasets.Dataset.from_list(rows)))
    curves = []
    for size, steps in ((12, 1), (3, 4), (5, 3)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        trainer, ready = build(base, data, tmp_path / str(size), task=recipe(), num_train_epochs=2, **options)
        batch = trainer.data_collator(ready.encoded["train"].to_list())
        trainer.train()
        curves.append((logged(trainer), logged(trainer, "grad_norm"), trainer.evaluate()["eval_loss"]))
        assert batch["input_ids"].shape[0] == 24 and batch["labels"].shape == (12, 2)
    assert len(curves[0][0]) == 2
    for other in curves[1:]:
        for one, two in zip(curves[0], other, strict=True):
            assert two == pytest.approx(one, abs=1e-5)


def test_frozen_layers_are_computed_once_for_both_answers(tmp_path: Path) -> None:
    base = make_checkpoint("bert", tmp_path / "bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    options = {"num_train_epochs": 3, "max_steps": -1, "eval_strategy": "epoch", "logging_steps": 1}
    kept, anew = (
        run(base, "partial/head_only", tmp_path / f"{size}", **options, **{"adapter.frozen_cache_gb": size})
        for size in (2.0, 0.0)
    )
    assert (kept.run["training"]["layers_computed_once"], anew.run["training"]["layers_computed_once"]) == (3, 0)
    for name in ("loss", "eval_loss"):
        assert curve(tmp_path / "2.0", name) == pytest.approx(curve(tmp_path / "0.0", name), abs=1e-5)


@pytest.mark.slow
def test_two_processes_give_the_curve_of_one_with_twice_the_batch(tmp_path: Path) -> None:
    base = make_checkpoint("llama", tmp_path / "base", initializer_range=0.2)
    for name, table in splits(19).items():  # the last batch has 3 pairs, and the second process none of them
        write_rows(tmp_path / f"{name}.jsonl", table.to_list())
    task = tmp_path / "task.yaml"
    files = "{train: train.jsonl, validation: validation.jsonl, test: test.jsonl}"
    task.write_text(f"family: preference\ndata: {{path: json, data_files: {files}}}\n", encoding="utf-8")
    common = {"num_train_epochs": 2, "logging_steps": 1, "learning_rate": 1e-3, "bf16": False}
    options: dict[str, Any] = {"model": str(base), "task": task, "adapter": "full/default", "seed": 1}
    one, two = ({**common, "per_device_train_batch_size": size} for size in (8, 4))
    one = ptft_hf.train(**options, output_dir=tmp_path / "one", settings=one).run
    done = on_two_processes(base, task, "full/default", tmp_path / "two", two)
    assert done.returncode == 0, done.stderr[-3000:]
    names = ("step", "loss", "grad_norm", "eval_loss", "eval_accuracy")
    assert_same_curves(tmp_path / "one", tmp_path / "two", names)
    two = json.loads((tmp_path / "two/run.json").read_text("utf-8"))
    assert two["task_state"]["centre"] == pytest.approx(one["task_state"]["centre"], abs=1e-5)
    assert two["metrics"]["test"] == pytest.approx(one["metrics"]["test"], abs=1e-5)


# ---- a reward in PPO ----

ANSWERS = [" good story", " bad", " the plot was lovely so much"]


def asked(chat: str | None) -> list[Any]:
    """Prompts, as texts or as messages."""
    texts = ["the film was", "a", "this story ,"]
    return texts if chat is None else [[{"role": "user", "content": text}] for text in texts]


def answered(chat: str | None) -> rewards.Answered:
    """Answers whose ids are somebody else's: a reward that has a form of its own does not look at them."""
    made = rollouts.collate([[5]] * 3, [[6]] * 3, frozenset({2}), 0)
    return rewards.Answered(["another text"] * 3, ANSWERS, made, asked(chat))


class Rewarded(NamedTuple):
    """A chat template or none, a policy's base, and a reward model that is an adapter of this recipe on it."""

    chat: str | None
    base: Path
    folder: Path
    adapter: str


@pytest.fixture(
    scope="module", params=[(None, "lora/r8_attention"), (SPACED, "lora/r16_all_linear")], ids=["text", "chat"]
)
def rewarded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Rewarded:
    chat, adapter = request.param
    folder = tmp_path_factory.mktemp("rewarded")
    base = make_decoder(folder / "base", chat=chat, initializer_range=0.3)
    data = splits(16, messages=chat is not None)
    run(base, adapter, folder / "reward", data, max_steps=6, learning_rate=0.02)
    return Rewarded(chat, base, folder / "reward", adapter)


def prompts(chat: str | None) -> datasets.DatasetDict:
    rows = [{"prompt": prompt} for prompt in asked(chat)] * 4
    return datasets.DatasetDict(dict.fromkeys(("train", "validation", "test"), datasets.Dataset.from_list(rows)))


def test_on_the_policys_base_it_scores_as_the_run_does(rewarded: Rewarded) -> None:
    chat, base, folder, adapter = rewarded
    loaded = ptft_hf.load(folder)
    given = [{"prompt": prompt, "answer": answer} for prompt, answer in zip(asked(chat), ANSWERS, strict=True)]
    expected = [found["score"] for found in loaded.predict(given)]
    assert np.std(expected) > 0.01 and abs(loaded.task.centre) > 1e-4
    alone = rewards.build([str(folder)], lambda _: None, 2)
    assert isinstance(alone.rewards[0], rewards.PreferenceReward)
    assert alone(answered(chat)) == pytest.approx(expected, abs=1e-5)
    task = PromptsRecipe(name="test", family="prompts")
    plan = ppo_preparing.make_plan(base, str(folder), task, adapter, None, 1, QUICK)
    ready = ppo_preparing.prepare(plan, prompts(chat))
    (shared,) = ready.reward.rewards
    assert isinstance(shared, rewards.AdapterReward)
    assert shared(answered(chat)) == pytest.approx(expected, abs=1e-5)
    shared.batch_size = 1
    assert shared(answered(chat)) == pytest.approx(expected, abs=1e-5)
    # A critic that starts from it expects what it will be given: the centre is taken off there, too.
    assert ready.roles.critic.head.bias.item() == pytest.approx(-loaded.task.centre)


def test_ppo_is_given_the_runs_scores(rewarded: Rewarded, tmp_path: Path) -> None:
    chat, base, folder, adapter = rewarded
    record = run_ppo(
        base,
        tmp_path / "ppo",
        reward=str(folder),
        adapter=adapter,
        data=prompts(chat),
        total_episodes=8,
        num_sample_generations=1,
    )
    assert record["proof"]["max_difference"] == 0.0
    lines = [json.loads(line) for line in (tmp_path / "ppo/samples.jsonl").read_text("utf-8").splitlines()]
    sources = prompts(chat)["validation"]["prompt"][:8] * 2  # before the first update, and after the last
    pairs_of = zip(sources, lines, strict=True)
    given = [{"prompt": prompt, "answer": line["answer"]} for prompt, line in pairs_of]
    expected = [found["score"] for found in ptft_hf.load(folder).predict(given)]
    assert [line["scores"][str(folder)] for line in lines] == pytest.approx(expected, abs=1e-4)


def test_a_label_of_a_reward_model_is_refused(learnt: Path) -> None:
    for end in ("#good", "#:answer"):
        with pytest.raises(RecipeError, match=f"a reward model has no labels; leave {end} out"):
            rewards.build([f"{learnt}{end}"], lambda _: None, 2)


def test_an_encoder_judges_another_models_prompts(learnt: Path) -> None:
    reward = rewards.build([f"2*{learnt}"], lambda _: None, 2)
    given = [{"prompt": prompt, "answer": answer} for prompt, answer in zip(asked(None), ANSWERS, strict=True)]
    expected = [2 * found["score"] for found in ptft_hf.load(learnt).predict(given)]
    assert reward(answered(None)) == pytest.approx(expected, abs=1e-5)
    assert reward(answered(SPACED)) == pytest.approx(expected, abs=1e-5)  # one message is its text
