"""SFT, a reward model, PPO, comparison: stages that run once, go on where they were, and end in a report."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ptft_hf import feedback
from ptft_hf import pipeline as stages
from ptft_hf.comparing import pages
from ptft_hf.errors import DataError, OutputError, RecipeError
from ptft_hf.feedback import judging
from ptft_hf.pipeline import findings, run_pipeline
from ptft_hf.recipes.pipeline import load_pipeline
from ptft_hf.rlhf.reward import train_reward
from ptft_hf.rlhf.sft import train_sft
from tests.feedback import as_of_version_1
from tests.ppo_runs import change_weights, make_classifier
from tests.test_instruction import TALK, checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
QUICK = ["max_steps=2", "per_device_train_batch_size=4", "model.max_length=100"]
PPO = ["total_episodes=8", "per_device_train_batch_size=4", "response_length=4", "bf16=false"]
WATER = "Water. Much of it!"


def files(folder: Path) -> dict[str, Any]:
    """A pipeline with its data and recipes in a folder."""
    rows = {
        "instructions": [{"messages": TALK}] * 12,
        "pairs": [
            {"prompt": f"What is the sea? {i}", "chosen": WATER, "rejected": "Air."} for i in range(12)
        ],
        "prompts": [{"prompt": [{"role": "user", "content": f"What is the sea? {i}"}]} for i in range(12)],
    }
    families = {"instructions": "instruction", "pairs": "preference", "prompts": "prompts"}
    for name, content in rows.items():
        lines = "".join(json.dumps(row) + "\n" for row in content)
        (folder / f"{name}.jsonl").write_text(lines, "utf-8")
        splits = {split: f"{name}.jsonl" for split in ("train", "validation", "test")}
        recipe = {"family": families[name], "data": {"path": "json", "data_files": splits}}
        (folder / f"{name}.yaml").write_text(json.dumps(recipe), "utf-8")
    checkpoint(folder / "base")
    return {
        "model": "base",
        "seed": 1,
        "sft": {"task": "instructions.yaml", "set": QUICK},
        "reward": {"task": "pairs.yaml", "set": QUICK},
        "ppo": {"task": "prompts.yaml", "set": PPO},
        "evaluation": {"judge": "tests.test_pipeline:judge", "prompts": 4},
    }


def judge(prompts: list[str], answers: list[str]) -> list[float]:
    return [float(len(answer)) for answer in answers]


def written(folder: Path, values: dict[str, Any]) -> Path:
    path = folder / "pipeline.yaml"
    path.write_text(json.dumps(values), "utf-8")  # JSON is YAML
    return path


def test_all_stages_run_once_and_what_has_changed_runs_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    values, output = files(tmp_path), tmp_path / "out"
    found = run_pipeline(written(tmp_path, values), output)
    assert list(found) == ["sft", "reward", "ppo", "evaluation"]
    assert found["ppo"]["model"]["policy"] == str(output / "sft")
    assert found["ppo"]["reward"] == str(output / "reward")
    report = (output / "report.md").read_text("utf-8")
    assert "Win rate 0." in report and "Accuracy on 12 held-out pairs" in report
    left_out = {**found["evaluation"], "notes": ["2 of 6 prompts are longer"]}
    assert "- 2 of 6 prompts are longer" in pages.markdown("title", findings({"evaluation": left_out}))
    page = (output / "report.html").read_text("utf-8")
    assert "<script" not in page and "://" not in page.replace("http://www.w3.org", "")

    capsys.readouterr()
    times = {name: (output / name / "run.json").stat().st_mtime_ns for name in found}
    run_pipeline(written(tmp_path, values), output)
    assert {name: (output / name / "run.json").stat().st_mtime_ns for name in found} == times
    assert capsys.readouterr().err.count("finished, and nothing that it builds on has changed") == 4

    # Another rate of PPO: what stands before it stays, what builds on it is run anew.
    values["ppo"]["set"] = [*PPO, "learning_rate=0.001"]
    run_pipeline(written(tmp_path, values), output)
    after = {name: (output / name / "run.json").stat().st_mtime_ns for name in found}
    assert {name for name in found if after[name] != times[name]} == {"ppo", "evaluation"}

    # Another row of preferences: the reward model is trained again, and with it PPO; the SFT model is not.
    with (tmp_path / "pairs.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"prompt": "And the sky?", "chosen": "Air.", "rejected": "Water."}) + "\n")
    run_pipeline(written(tmp_path, values), output)
    last = {name: (output / name / "run.json").stat().st_mtime_ns for name in found}
    assert {name for name in found if last[name] != after[name]} == {"reward", "ppo", "evaluation"}


def test_what_lies_in_the_same_place_may_have_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values, output = files(tmp_path), tmp_path / "out"
    del values["sft"], values["reward"]
    function = tmp_path / "reward_of_this_test.py"
    function.write_text("def score(prompts, answers):\n    return [len(a) for a in answers]\n", "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    values["ppo"]["reward"] = ["reward_of_this_test:score"]
    values["evaluation"]["judge"] = "classifier#LABEL_1"
    test = Path(shutil.copy(tmp_path / "prompts.jsonl", tmp_path / "test.jsonl"))
    recipe = json.loads((tmp_path / "prompts.yaml").read_text("utf-8"))
    recipe["data"]["data_files"]["test"] = "test.jsonl"
    (tmp_path / "prompts.yaml").write_text(json.dumps(recipe), "utf-8")
    make_classifier(tmp_path / "classifier")

    def times() -> dict[str, int]:
        found = run_pipeline(written(tmp_path, values), output)
        return {name: (output / name / "run.json").stat().st_mtime_ns for name in found}

    before = times()
    for change, again in (
        (lambda: test.write_text(test.read_text("utf-8").replace("sea", "sky"), "utf-8"), {"evaluation"}),
        (lambda: change_weights(tmp_path / "classifier"), {"evaluation"}),
        (lambda: change_weights(tmp_path / "base"), {"ppo", "evaluation"}),
        (lambda: function.write_text(function.read_text("utf-8") + "# the same\n", "utf-8"), {"ppo", "evaluation"}),
    ):
        change()
        after = times()
        assert {name for name in after if after[name] != before[name]} == again
        before = after


def test_a_stage_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values, output = files(tmp_path), tmp_path / "out"
    values["sft"]["set"] = [*QUICK[1:], "max_steps=4", "save_strategy=steps", "save_steps=1", "eval_strategy=steps"]
    values["sft"]["set"] += ["eval_steps=1"]
    pipeline = written(tmp_path, values)

    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    from ptft_hf import training

    with monkeypatch.context() as patch:
        patch.setattr(training, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            run_pipeline(pipeline, output)
    assert not (output / "sft" / "run.json").exists() and list((output / "sft" / "checkpoints").iterdir())
    seen: list[dict[str, bool]] = []
    original = stages.train_sft
    monkeypatch.setattr(
        stages,
        "train_sft",
        lambda **given: seen.append({n: given[n] for n in ("resume", "overwrite")}) or original(**given),
    )
    monkeypatch.setattr(stages.Stages, "ppo", stop)
    with pytest.raises(KeyboardInterrupt):
        run_pipeline(pipeline, output)
    assert seen == [{"resume": True, "overwrite": False}]


def test_a_stage_that_was_refused_is_not_taken_for_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With other inputs, and what was there before still in its folder."""
    values, output = files(tmp_path), tmp_path / "out"
    del values["sft"], values["reward"]
    values["ppo"]["reward"] = ["tests.test_pipeline:judge"]
    run_pipeline(written(tmp_path, values), output)
    before = {name: (output / name / "run.json").read_text("utf-8") for name in ("ppo", "evaluation")}
    for stage, key in (("ppo", "reward"), ("evaluation", "judge")):
        good = values[stage][key]
        wrong = "tests.test_pipeline:no_such_judge"
        values[stage][key] = [wrong] if stage == "ppo" else wrong
        for _ in range(2):
            with pytest.raises(RecipeError, match="no_such_judge"):
                run_pipeline(written(tmp_path, values), output)
        values[stage][key] = good
    capsys.readouterr()
    run_pipeline(written(tmp_path, values), output)
    assert {name: (output / name / "run.json").read_text("utf-8") for name in before} == before
    assert capsys.readouterr().err.count("finished, and nothing that it builds on has changed") == 2


def test_a_stage_that_is_run_anew_and_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values, output = files(tmp_path), tmp_path / "out"
    del values["sft"], values["reward"], values["evaluation"]
    values["ppo"]["reward"] = ["tests.test_pipeline:judge"]
    run_pipeline(written(tmp_path, values), output)
    values["ppo"]["set"] = [*PPO, "learning_rate=0.001"]
    seen: list[dict[str, bool]] = []

    def stopped(**given: Any) -> None:
        seen.append({name: given[name] for name in ("resume", "overwrite")})
        if len(seen) > 1:
            (output / "ppo" / "run.json").unlink(missing_ok=True)  # as a run does that replaces one, when it begins
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "train_ppo", stopped)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            run_pipeline(written(tmp_path, values), output)
    anew, further = {"resume": False, "overwrite": True}, {"resume": True, "overwrite": False}
    assert seen == [anew, anew, further]


def test_an_adapter_of_sft_that_ppo_cannot_train_further_is_refused_before_any_stage_runs(tmp_path: Path) -> None:
    values = files(tmp_path)
    refused = {"adalora/r12_to_8": "ADALORA cannot play several parts", "bottleneck/houlsby": "not with bottleneck"}
    for adapter, said in refused.items():
        values["sft"]["adapter"] = adapter
        with pytest.raises(RecipeError, match=f"yaml: ppo: {adapter}: .*{said}"):
            load_pipeline(written(tmp_path, values))
    for adapter in ("lora/pissa", "lora/loraplus", "partial/top_2_layers", "full/default"):
        values["sft"]["adapter"] = adapter
        load_pipeline(written(tmp_path, values))


def test_all_faults_of_a_pipeline_are_told_together(tmp_path: Path) -> None:
    values = files(tmp_path)
    values["sft"]["set"] = ["learnin_rate=1"]
    values["reward"]["task"] = "instructions.yaml"
    values["ppo"]["set"] = ["kl_coeff=1"]
    with pytest.raises(RecipeError) as caught:
        load_pipeline(written(tmp_path, values))
    text = "\n".join(caught.value.problems)
    assert "sft: --set learnin_rate: unknown Training" in text
    assert "is a recipe of the family instruction; this stage needs preference" in text
    assert "ppo: --set kl_coeff=1: unknown option of PPO" in text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sftt": {}}, "unknown key 'sftt' (did you mean 'sft'?)"),
        ({"sft": {"task": "x", "adaptor": "y"}}, "unknown key 'adaptor' (did you mean 'adapter'?)"),
        ({"reward": None}, "reward: is missing: say how a reward model is trained"),
        ({"ppo": {"set": []}}, "ppo.task: is missing"),
        ({"seed": -1}, "expected a number of at least 0"),
        ({"evaluation": {"prompts": 3}}, "evaluation.judge: is missing"),
    ],
)
def test_faulty_files_are_refused(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load_pipeline(written(tmp_path, {**files(tmp_path), **change}))
    assert said in "\n".join(caught.value.problems)


def test_rewards_and_judges_that_cannot_be_used_are_refused_before_any_stage_runs(tmp_path: Path) -> None:
    values = files(tmp_path)
    make_classifier(tmp_path / "classifier")
    values["ppo"] |= {"reward": ["classifier#LABEL_1", "2*classifier#pos"], "judge": "tests.test_pipeline:nobody"}
    values["evaluation"]["judge"] = "classifier"
    with pytest.raises(RecipeError) as caught:
        run_pipeline(written(tmp_path, values), tmp_path / "out")
    place = tmp_path / "classifier"
    begins = [
        f"ppo: reward {place}: has no label 'pos'",
        "ppo: judge tests.test_pipeline:nobody: cannot be imported",
        f"evaluation: judge {place}: say which label is the reward",
    ]
    assert [p[: len(b)] for p, b in zip(caught.value.problems, begins, strict=True)] == begins
    assert not list((tmp_path / "out").iterdir())


def test_recipes_without_data_are_refused_before_any_stage_runs(tmp_path: Path) -> None:
    values = files(tmp_path)
    for name in ("instructions", "pairs", "prompts"):
        recipe = json.loads((tmp_path / f"{name}.yaml").read_text("utf-8"))
        (tmp_path / f"{name}.yaml").write_text(json.dumps({"family": recipe["family"]}), "utf-8")
    with pytest.raises(RecipeError) as caught:
        load_pipeline(written(tmp_path, values))
    said = [problem for problem in caught.value.problems if "names no data; add data: to the recipe" in problem]
    assert {problem.split(": ")[1] for problem in said} == {"sft", "reward", "ppo"}
    values["feedback"] = {"task": "prompts.yaml"}
    with pytest.raises(RecipeError) as caught:
        load_pipeline(written(tmp_path, values))
    said = [problem.split(": ")[1] for problem in caught.value.problems]
    assert said == ["sft", "feedback", "ppo"]  # people's judgements are the reward model's data


def test_other_peoples_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("x", "utf-8")
    with pytest.raises(OutputError, match="holds other files"):
        run_pipeline(written(tmp_path, files(tmp_path)), tmp_path / "out")
    with pytest.raises(RecipeError, match="there is no such file"):
        load_pipeline(tmp_path / "nothing.yaml")


@pytest.mark.parametrize(
    ("stage", "flags", "said"),
    [
        ("sft", ["--model", "m", "--task", "nothing", "--adapter", "full/default"], "nothing"),
        ("ppo", ["--policy", "p", "--reward", "r", "--task", "nothing"], "nothing"),
        ("evaluating", ["p", "--against", "q", "--judge", "r", "--task", "nothing"], "nothing"),
    ],
)
def test_a_stage_is_a_module_for_launchers(stage: str, flags: list[str], said: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", f"ptft_hf.rlhf.{stage}", *flags, "--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_a_stage_takes_recipes_of_its_family_alone(stage: str, tmp_path: Path) -> None:
    train: Any = {"sft": train_sft, "reward": train_reward}[stage]
    with pytest.raises(RecipeError, match=r"family prompts; (instruction|preference) is needed here"):
        train(model="m", task="prompts/tldr", adapter="full/default", output_dir=tmp_path / "out")


# ---- people's judgements ----


def judged(database: Path, count: int, verdict: str = "left") -> None:
    """Somebody sits down before the page."""
    with feedback.Store(database) as store:
        for _ in range(count):
            shown = judging.assign(store, "ada", feedback.Policy("random", 0.0, 2))
            assert shown is not None
            judging.judge(store, shown.assignment, verdict)


def test_the_reward_model_learns_what_people_prefer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values, output = files(tmp_path), tmp_path / "out"
    del values["evaluation"]
    values["feedback"] = {"task": "prompts.yaml", "prompts": 10}
    pipeline, database = written(tmp_path, values), output / "feedback" / "answers.sqlite"
    with pytest.raises(DataError, match=r"0 of \d+ pairs are judged; `ptft feedback serve .*answers.sqlite` shows"):
        run_pipeline(pipeline, output)
    with feedback.Store(database) as store:
        pairs, answers = store.counts()["pairs"], store.answered()
    assert pairs >= 8 and not (output / "reward").exists()
    judged(database, pairs - 1)
    with pytest.raises(DataError, match=f"{pairs - 1} of {pairs} pairs are judged"):
        run_pipeline(pipeline, output)
    judged(database, 1)
    found = run_pipeline(pipeline, output)
    assert found["feedback"]["judged"] == found["feedback"]["exported"]["rows"] == pairs
    with feedback.Store(database) as store:
        assert store.answered() == answers  # none was drawn twice
    rows = sum(found["reward"]["data"][split]["rows"] for split in ("train", "validation", "test"))
    assert rows == pairs
    exported = (database.parent / "preferences.jsonl").read_text("utf-8").splitlines()
    (asked,) = json.loads(exported[0])["prompt"]
    assert asked["role"] == "user" and asked["content"].startswith("What is the sea? ")
    assert f"{pairs} of {pairs} pairs of answers were judged" in (output / "report.md").read_text("utf-8")

    capsys.readouterr()
    run_pipeline(pipeline, output)
    assert capsys.readouterr().err.count("finished, and nothing that it builds on has changed") == 4

    as_of_version_1(database)
    run_pipeline(pipeline, output)  # the messages are noted; the preferences are the same
    assert capsys.readouterr().err.count("finished, and nothing that it builds on has changed") == 3

    # What is said later counts: the reward model, and what builds on it, learn anew.
    with feedback.Store(database) as store:
        again = judging.assign(store, "bob", feedback.Policy("random", 1.0, 2))
        assert again is not None
        judging.judge(store, again.assignment, "both_bad")
    run_pipeline(pipeline, output)
    assert capsys.readouterr().err.count("finished, and nothing that it builds on has changed") == 1

    # Other prompts: other answers; what was said of those before is kept.
    values["feedback"] = {"task": "prompts.yaml", "prompts": 5, "judged": 1}
    with pytest.raises(DataError, match="0 of 1 pairs are judged"):
        run_pipeline(written(tmp_path, values), output)
    with feedback.Store(database.with_stem("answers-1")) as store:
        assert len(store.judgements()) == pairs + 1


def test_judgements_that_prefer_nothing_are_told_before_the_reward_model(tmp_path: Path) -> None:
    values, output = files(tmp_path), tmp_path / "out"
    del values["sft"]
    values["feedback"] = {"task": "prompts.yaml", "prompts": 2}
    database = output / "feedback" / "answers.sqlite"
    with pytest.raises(DataError, match="pairs are judged"):
        run_pipeline(written(tmp_path, values), output)
    judged(database, 2, "tie")
    with pytest.raises(DataError, match="of the 2 pairs that are judged none has an answer that most prefer"):
        run_pipeline(written(tmp_path, values), output)
    assert not (output / "feedback" / "run.json").exists()


def test_feedback_needs_a_reward_model(tmp_path: Path) -> None:
    values = {**files(tmp_path), "feedback": {"task": "prompts.yaml"}}
    values["ppo"]["reward"] = ["tests.test_pipeline:judge"]
    del values["reward"]
    with pytest.raises(RecipeError, match="nothing else learns from what people prefer"):
        load_pipeline(written(tmp_path, values))
