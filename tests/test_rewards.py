"""Rewards of every kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ptft_hf.errors import ModelError, PtftError, RecipeError
from ptft_hf.rlhf import reward_names, rewards, rollouts
from tests.finished import Finished, full, lora
from tests.ppo_runs import length, share_of_good

__all__ = ["full", "lora"]
PROMPTS = ["the film was", "a"]
ANSWERS = [" good good", " bad plot so much"]


def batch(prompts: list[str] = PROMPTS, answers: list[str] = ANSWERS) -> rewards.Answered:
    made = rollouts.collate([[5]] * len(prompts), [[6]] * len(prompts), frozenset({2}), 0)
    return rewards.Answered(prompts, answers, made)


def build(*given: Any) -> rewards.WeightedSum:
    return rewards.build(given, lambda _: None, 2)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("runs/x", ("runs/x", None, 1.0, False, False)),
        ("0.5*runs/x#pos", ("runs/x", "pos", 0.5, False, False)),
        ("-1*pkg.mod:f", ("pkg.mod:f", None, -1.0, False, False)),
        ("runs/x#pos:logit", ("runs/x", "pos", 1.0, True, False)),
        ("runs/x#:answer", ("runs/x", None, 1.0, False, True)),
        ("runs/x#pos:logit:answer", ("runs/x", "pos", 1.0, True, True)),
    ],
)
def test_how_a_reward_is_written(text: str, expected: Any) -> None:
    assert reward_names.parse(text) == expected


@pytest.mark.parametrize("text", ["", "x*runs", "2*", "runs#a:prob", "nan*runs"])
def test_how_it_is_not(text: str) -> None:
    with pytest.raises(RecipeError, match="--reward"):
        reward_names.parse(text)


def test_functions_by_name_and_by_hand_and_their_weighted_sum() -> None:
    both = build("2*tests.ppo_runs:share_of_good", length)
    assert both.name == "2 * tests.ppo_runs:share_of_good + length"
    assert both.parts(batch()) == {"tests.ppo_runs:share_of_good": [1.0, 0.0], "length": [2 / 6, 4 / 6]}
    assert both(batch()) == pytest.approx([2 + 2 / 6, 4 / 6])
    tensors = build(lambda p, a: torch.tensor(share_of_good(p, a)))
    assert tensors(batch()) == [1.0, 0.0]
    assert list(build(length, length).parts(batch())) == ["length (1)", "length (2)"]


def nothing(prompts: list[str], answers: list[str]) -> Any:
    return None


def test_what_is_no_list_of_scores_is_named() -> None:
    wrong: tuple[Any, ...] = (lambda p, a: 0.5, lambda p, a: torch.tensor(0.5), lambda p, a: "01")
    for function in (nothing, *wrong):
        with pytest.raises(ModelError, match=r"gave (None|0\.5|'01'), not a list with one score for each answer"):
            build(function)(batch())
    with pytest.raises(ModelError, match=r"reward <lambda>: \[1.0, 2.0\] is no finite number"):
        build(lambda p, a: torch.tensor([[1.0, 2.0]] * 2))(batch())


def test_a_function_that_fails_is_named_with_its_line_and_may_have_no_label() -> None:
    def careless(prompts: list[str], answers: list[str]) -> Any:
        return {}["score"]

    said = r"reward careless: KeyError: 'score' \(.*test_rewards\.py, line \d+\)"
    with pytest.raises(ModelError, match=said) as caught:
        build(careless)(batch())
    assert isinstance(caught.value.__cause__, KeyError)
    for end in ("#pos", "#:answer"):
        with pytest.raises(RecipeError, match=rf"tests\.ppo_runs:length: a function has no labels; leave {end} out"):
            build(f"tests.ppo_runs:length{end}")


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_folder_of_a_run_that_trained_a_classifier(kind: str, request: pytest.FixtureRequest) -> None:
    run: Finished = request.getfixturevalue(kind)
    from ptft_hf import load

    reward = build(f"{run.folder}#pos")
    found = reward(batch())
    texts = [prompt + answer for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
    expected = [answer["scores"]["pos"] for answer in load(run.folder).predict(texts)]
    assert found == pytest.approx(expected, abs=1e-6)
    logits = build(f"{run.folder}#pos:logit")(batch())
    others = build(f"{run.folder}#neg:logit")(batch())
    chances = torch.softmax(torch.tensor([others, logits]), 0)[1]
    assert found == pytest.approx(chances.tolist(), abs=1e-5)
    alone = [reward(batch([p], [a]))[0] for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    assert alone == pytest.approx(found, abs=1e-6)  # neighbours do not matter
    answers = build(f"{run.folder}#pos:answer")
    assert answers.name == f"{run.folder}#pos:answer"
    expected = [answer["scores"]["pos"] for answer in load(run.folder).predict([a.strip() for a in ANSWERS])]
    assert answers(batch()) == pytest.approx(expected, abs=1e-6)
    others = build(f"{run.folder}#pos:answer")(batch(["so bad", ""]))
    assert others == pytest.approx(expected, abs=1e-6)  # nor does the prompt
    assert reward(batch(["so bad", ""])) != pytest.approx(expected, abs=1e-5)


def test_labels_and_checkpoints_that_do_not_fit(full: Finished, checkpoint: Any, tmp_path: Path) -> None:
    for text, message in (
        (str(full.folder), "say which label is the reward: .*#LABEL; it has neg, pos"),
        (f"{full.folder}#poss", r"has no label 'poss' \(did you mean 'pos'\?\)"),
        (str(checkpoint("bert")), "no sequence classifier: .* are not in the checkpoint"),
        ("tests.ppo_runs:nothing", "cannot be imported"),
        ("tests.ppo_runs:QUICK", "is no function but dict"),
    ):
        with pytest.raises(PtftError, match=message):
            build(text)


def test_a_module_in_the_working_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_reward.py").write_text(
        "def one(prompts, answers):\n    return [1 for _ in answers]\n"
    )
    monkeypatch.chdir(tmp_path)
    assert build("my_own_reward:one")(batch()) == [1.0, 1.0]


@pytest.mark.parametrize("text", ["def one(:", "raise ValueError('not today')"])
def test_a_module_that_is_broken_is_named(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_broken_reward.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=r"--reward a_broken_reward:one: cannot be imported: (Syntax|Value)Error: "):
        build("a_broken_reward:one")
