"""A policy against the model that it started from: win rate, score difference, KL and lengths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from ptft_hf.errors import DataError, ModelError, OutputError, RecipeError
from ptft_hf.rlhf import evaluating, rollouts
from ptft_hf.rlhf.evaluating import evaluate_policy
from ptft_hf.rlhf.rewards import Answered
from tests.commands import Ptft, ptft  # noqa: F401
from tests.ppo_runs import (
    LEARN,
    characters,
    length,
    make_classifier,
    make_language_model,
    prompts,
    recipe,
    run_ppo,
    share_of_good,
    task_file,
)

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
SETTINGS = {"response_length": 6, "temperature": 1.0, "bf16": False}


def compared(policy: Path, against: Path, **given: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {"task": recipe(), "judge": share_of_good, "data": prompts(), "settings": SETTINGS}
    return evaluate_policy(policy=policy, against=against, **{**arguments, **given})


def test_a_policy_against_itself_is_a_tie(tmp_path: Path) -> None:
    base = make_language_model("llama", tmp_path / "base")
    found = compared(base, base)["metrics"]
    assert found["win_rate"] == 0.5 and found["score_difference"] == 0 and found["kl"] == 0
    assert found["policy"] == found["against"]


def test_a_trained_policy_wins(tmp_path: Path) -> None:
    base = make_language_model("llama", tmp_path / "base")
    run_ppo(base, tmp_path / "ppo", share_of_good, **LEARN, total_episodes=64 * 40)
    run = compared(tmp_path / "ppo", base, output_dir=tmp_path / "evaluation")
    found = run["metrics"]
    assert found["win_rate"] > 0.9 and found["kl"] > 5
    assert found["score_difference"] == pytest.approx(found["policy"]["score"] - found["against"]["score"], abs=1e-6)
    low, high = found["win_rate_interval"]
    assert 0.5 < low < found["win_rate"] <= high
    sample = run["samples"][0]
    assert sample["policy"]["score"] == share_of_good([sample["prompt"]], [sample["policy"]["answer"]])[0]
    assert (tmp_path / "evaluation" / "run.json").is_file()
    with pytest.raises(OutputError, match="holds another run"):
        compared(base, base, output_dir=tmp_path / "evaluation")


def test_figures_are_those_worked_by_hand() -> None:
    import numpy as np

    made = rollouts.collate([[1], [1], [1], [1]], [[5, 2], [5], [6, 7, 2], [2]], frozenset({2}), 0)
    other = rollouts.collate([[1], [1], [1], [1]], [[2], [2], [2], [2]], frozenset({2}), 0)
    first, second = np.array([1.0, 0.0, 2.0, 3.0]), np.array([0.0, 1.0, 2.0, 1.0])
    found = evaluating.figures(first, second, torch.tensor([1.0, 2.0, 3.0, 6.0]), made, other)
    assert found["win_rate"] == (1 + 0 + 0.5 + 1) / 4
    assert found["score_difference"] == (1 - 1 + 0 + 2) / 4
    # t with 3 degrees of freedom: 3.1824 x the standard error of (1, -1, 0, 2), 1.29099 / 2
    assert found["score_difference_interval"] == pytest.approx([0.5 - 2.05426, 0.5 + 2.05426], abs=1e-4)
    # Wilson: (p + z2 / 8 -+ z sqrt(p (1 - p) / 4 + z2 / 64)) / (1 + z2 / 4), z2 = 3.8415
    assert found["win_rate_interval"] == pytest.approx([0.21943, 0.90811], abs=1e-4)
    assert (found["kl"], found["policy"]["length"], found["against"]["length"]) == (3.0, 7 / 4, 1.0)


def test_the_kl_is_that_of_both_policies_own_log_probabilities(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    one, other = (make_language_model("llama", tmp_path / name) for name in ("one", "other"))
    model = AutoModelForCausalLM.from_pretrained(other)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.7)
    model.save_pretrained(other)
    seen: list[rollouts.Rollouts] = []
    sources: list[str] = []

    class Judge:
        name = "judge"

        def __call__(self, batch: Answered) -> list[float]:
            seen.append(batch.rollouts)
            sources.extend(batch.sources or ())
            return [0.0] * len(batch.answers)

    found = compared(one, other, judge=Judge())
    first, second = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (one, other))
    total = 0.0
    for ids, attention, mask in zip(seen[0].ids, seen[0].attention, seen[0].mask, strict=True):
        whole, count = ids[attention.bool()], int(mask.sum())
        with torch.no_grad():
            a, b = (m(whole[None]).logits[0, -count - 1 : -1].log_softmax(-1) for m in (first, second))
        chosen = whole[-count:, None]
        total += float((a.gather(1, chosen) - b.gather(1, chosen)).sum())
    assert found["metrics"]["kl"] == pytest.approx(total / 4, abs=1e-4) and abs(total) > 0.1
    assert sources[:4] == [row["prompt"] for row in prompts()["test"]]


class Judge:
    """Keeps what it is shown."""

    name = "judge"

    def __init__(self) -> None:
        self.shown: list[list[str]] = []

    def __call__(self, batch: Answered) -> list[float]:
        self.shown.append(batch.prompts)
        return [float(len(answer)) for answer in batch.answers]


def texts(*given: str) -> datasets.DatasetDict:
    rows = datasets.Dataset.from_list([{"prompt": text} for text in given])
    return datasets.DatasetDict({name: rows for name in ("train", "validation", "test")})


def test_prompts_that_one_side_cannot_take_are_asked_of_neither(tmp_path: Path) -> None:
    one = make_language_model("llama", tmp_path / "one")
    short = make_language_model("llama", tmp_path / "short", max_position_embeddings=14)
    given = {"task": recipe(leakage="warn"), "data": texts(*("the film " * count for count in (1, 6, 2, 30, 3)))}
    judge = Judge()
    run = compared(one, short, judge=judge, prompts=3, **given)
    assert run["prompts"] == 2 and judge.shown == [["the film ", "the film the film "]] * 2
    left_out = f"1 of 3 prompts are longer than 8 tokens for {short} and are left out"
    assert left_out in run["notes"]
    # Both have the same weights, and so the same answers: each to the same prompt, with the same random numbers.
    assert run["metrics"]["win_rate"] == 0.5 and run["metrics"]["kl"] == pytest.approx(0, abs=1e-5)
    assert all(sample["policy"] == sample["against"] for sample in run["samples"])
    whole = compared(one, one, judge=judge, prompts=3, **given)["samples"]
    assert [sample["policy"] for sample in run["samples"]] == [whole[0]["policy"], whole[2]["policy"]]
    with pytest.raises(DataError, match=f"{short}: each of the 1 prompts is longer than 8 tokens for it"):
        compared(one, short, **{**given, "data": texts("the film " * 6, "a")}, prompts=1)


def reorder(folder: Path) -> None:
    """The same model with its words, and their embeddings, in another order."""
    from transformers import AutoModelForCausalLM

    content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    vocabulary: dict[str, int] = content["model"]["vocab"]
    words = sorted(vocabulary, key=vocabulary.__getitem__)
    order = [*range(5), *reversed(range(5, len(words)))]
    content["model"]["vocab"] = {words[old]: new for new, old in enumerate(order)}
    (folder / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            module.weight.copy_(module.weight[order].clone())
    model.save_pretrained(folder)


def test_each_side_reads_the_prompts_with_its_own_tokenizer(tmp_path: Path) -> None:
    one, other = (make_language_model("llama", tmp_path / name) for name in ("one", "other"))
    reorder(other)
    judge = Judge()
    run = compared(one, other, judge=judge, settings={**SETTINGS, "temperature": 0.001})
    assert judge.shown == [[row["prompt"] for row in prompts()["test"]]] * 2
    assert all(sample["policy"] == sample["against"] for sample in run["samples"])
    found = run["metrics"]
    assert found["win_rate"] == 0.5 and found["kl"] is None and "KL" not in evaluating.summary(run)
    assert f"no KL: {other} reads prompts or answers as other tokens than the policy" in run["notes"]


def test_prompts_that_are_cut_at_other_places_are_refused(tmp_path: Path) -> None:
    one, other = (make_language_model("llama", tmp_path / name) for name in ("one", "other"))
    path = other / "tokenizer.json"
    path.write_text(path.read_text("utf-8").replace('"film"', '"zebra"'), "utf-8")
    assert compared(one, one, task=recipe(prompt_tokens=3))["metrics"]["win_rate"] == 0.5
    with pytest.raises(RecipeError, match=rf"cuts prompts elsewhere for {other}.*\('the film', 'the f'\)"):
        compared(one, other, task=recipe(prompt_tokens=3))


@pytest.mark.parametrize("judge", [length, characters])
def test_any_reward_judges(judge: object, tmp_path: Path) -> None:
    base = make_language_model("gpt2", tmp_path / "base")
    assert compared(base, base, judge=judge, prompts=2)["prompts"] == 2


def test_on_the_command_line(ptft: Ptft, tmp_path: Path) -> None:  # noqa: F811
    base = make_language_model("llama", tmp_path / "base")
    flags = ["--judge", "tests.ppo_runs:length", "--task", task_file(tmp_path), "--prompts", "2", "--json"]
    sets = ["--set", "response_length=6", "--set", "bf16=false", "--output", tmp_path / "out"]
    done = ptft("evaluate", base, "--against", base, *flags, *sets)
    assert done.code == 0 and json.loads(done.out)["win_rate"] == 0.5, done.err
    assert json.loads((tmp_path / "out" / "run.json").read_text("utf-8"))["prompts"] == 2
    alone = ptft("evaluate", base, *flags)
    assert alone.code == 2 and "--against, --judge and --task belong together" in alone.err
    elsewhere = ptft("evaluate", base, "--against", base, *flags, "--split", "train")
    assert elsewhere.code == 2 and "--model and --split have no effect with --against" in elsewhere.err


def test_what_is_of_answers_is_refused_without_another_policy(ptft: Ptft, tmp_path: Path) -> None:  # noqa: F811
    given = {"--prompts": 3, "--seed": 0, "--set": "response_length=3", "--output": tmp_path / "out"}
    unused = ptft("evaluate", tmp_path, *(part for pair in given.items() for part in pair))
    assert (unused.code, unused.out) == (2, "")
    assert all(f"{name}: has no effect without --against" in unused.err for name in given)
    one = ptft("evaluate", tmp_path, "--seed", 42)  # as by default, and yet given
    assert (one.code, one.err) == (2, "error: --seed: has no effect without --against\n")


def test_what_cannot_be_compared_is_refused_before_the_first_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(*_: Any, **__: Any) -> None:
        raise AssertionError("answers are written")

    base, classifier = make_language_model("llama", tmp_path / "base"), make_classifier(tmp_path / "classifier")
    monkeypatch.setattr(rollouts, "generate", answer)
    with pytest.raises(RecipeError, match=r"^--judge .*: say which label is the reward"):
        compared(base, base, judge=classifier)
    with pytest.raises(ModelError, match="no-such-folder"):
        compared(base, tmp_path / "no-such-folder")
    with pytest.raises(RecipeError) as caught:
        compared(base, tmp_path / "no-such-folder", judge="tests.ppo_runs:nobody")
    assert "no-such-folder" in caught.value.problems[0]
    assert caught.value.problems[1].startswith("--judge tests.ppo_runs:nobody: cannot be imported")


def test_faults_are_told(tmp_path: Path) -> None:
    base = make_language_model("llama", tmp_path / "base")
    with pytest.raises(DataError, match="names no data"):
        evaluate_policy(policy=base, against=base, task=recipe(), judge=length)
    with pytest.raises(RecipeError, match="prompts: 0 is not at least 1"):
        compared(base, base, prompts=0)
    with pytest.raises(RecipeError, match=r"'respons_length' \(did you mean 'response_length'\?\)"):
        compared(base, base, settings={"respons_length": 3})
