"""The PPO doctor: each finding from a series that shows it, and none from healthy ones."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from ptft_hf.errors import ModelError
from ptft_hf.recipes.prompts import FINDINGS, PPOConfig
from ptft_hf.rlhf import doctor
from tests.ppo_runs import LORA, by_prompt, characters, metrics, run_ppo, share_of_good

HEALTHY = {
    "objective/kl": 1.0,
    "objective/scores": 0.5,
    "objective/judge": 0.5,
    "objective/scores_std": 0.5,
    "objective/judge_std": 0.5,
    "policy/entropy_avg": 3.0,
    "policy/clipfrac_avg": 0.05,
    "policy/approxkl_avg": 0.004,
    "policy/grad_norm": 0.5,
    "val/grad_norm": 2.0,
    "val/answer_length": 12.0,
    "val/ended": 0.5,
    "val/explained_variance": 0.4,
    "val/scores_share": 0.9,
    "loss/policy_avg": -0.01,
    "loss/value_avg": 0.1,
    "lr": 1e-4,
}


def series(count: int = 16, **changes: Callable[[int], Any]) -> list[dict[str, Any]]:
    """Healthy lines, in which some figures (named by the end of their names) are functions of the update."""
    lines = []
    for i in range(count):
        given = {
            name: function(i)
            for short, function in changes.items()
            for name in HEALTHY
            if name.endswith(short)
        }
        rising = {"objective/scores": 0.5 + 0.02 * i + 0.01 * (i % 2), "objective/judge": 0.5 + 0.01 * i}
        lines.append({**HEALTHY, **rising, **given})
    return lines


def names(history: list[dict[str, Any]], **options: Any) -> list[str]:
    return [finding.name for finding in doctor.examine(history, PPOConfig(**options))]


def test_a_healthy_series_has_no_finding_at_any_of_its_updates() -> None:
    for end in range(17):
        assert names(series()[:end]) == []


def test_every_finding_has_a_check_and_says_figures_and_a_cure() -> None:
    assert list(doctor.CHECKS) == list(FINDINGS)
    (finding,) = doctor.examine(series(kl=lambda i: -2.5), PPOConfig())
    assert str(finding).startswith(
        "negative kl: the KL against the reference is -2.50 nats an answer over the last 3"
    )
    assert "top-k" in finding.cure and "lower learning_rate" in finding.cure
    assert "k3" not in finding.cure  # which is never negative: it would end the finding, and not its cause


@pytest.mark.parametrize(
    ("name", "changes", "options"),
    [
        ("negative_kl", {"kl": lambda i: -0.2 * i}, {}),
        ("kl_runaway", {"kl": lambda i: 2.0**i / 100}, {}),
        ("kl_runaway", {"kl": lambda i: 0.6 * i}, {"adap_kl_ctrl": True, "target": 1.0}),
        ("answers_grow", {"answer_length": lambda i: 5.0 + i}, {}),
        ("answers_grow", {"ended": lambda i: max(0.0, 0.9 - 0.1 * i)}, {}),
        ("answers_collapse", {"answer_length": lambda i: max(1.0, 12.0 - i)}, {}),
        ("critic_useless", {"explained_variance": lambda i: -0.3}, {}),
        ("critic_useless", {"explained_variance": lambda i: -5.0, "scores_share": lambda i: 0.45}, {}),
        ("clip_fraction_zero", {"clipfrac_avg": lambda i: 0.0, "approxkl_avg": lambda i: 1e-9}, {}),
        ("clip_fraction_high", {"clipfrac_avg": lambda i: 0.1 + 0.05 * i}, {}),
        ("entropy_collapse", {"entropy_avg": lambda i: 3.0 * 0.7**i}, {}),
        ("reward_hacking", {"count": 20, "judge": lambda i: 0.5 - 0.01 * i}, {}),
        ("reward_hacking", {"count": 20, "judge": lambda i: 0.5 + 0.01 * (i % 2)}, {}),
        ("not_a_number", {"loss/policy_avg": lambda i: None if i == 15 else 0.1}, {}),
    ],
)
def test_a_series_that_shows_it(name: str, changes: dict[str, Any], options: dict[str, Any]) -> None:
    assert names(series(**changes), **options) == [name]
    assert names(series(**changes)[:2], **options) == []  # two updates say nothing yet


def test_what_looks_alike_and_is_none() -> None:
    one_odd = series()
    one_odd[-1] = {
        **one_odd[-1],
        "objective/kl": -2.9,
        "policy/clipfrac_avg": 0.9,
        "policy/entropy_avg": 0.01,
    }
    assert names(one_odd) == []  # one odd batch
    assert names(series(kl=lambda i: 2.0**i / 100), kl_coef=0.0) == []  # nobody wanted it to stay near
    still = {"clipfrac_avg": lambda i: 0.0, "approxkl_avg": lambda i: 0.0}
    assert names(series(**still), num_ppo_epochs=1) == []  # a single step: every ratio is 1
    assert names(series(**still, lr=lambda i: 1e-4 * (1 - i / 16))) == []  # the schedule has gone down
    assert (
        names(series(explained_variance=lambda i: None)) == []
    )  # all returns are the same: nothing to explain
    assert names(series(explained_variance=lambda i: -5.0 if i < 8 else 0.3)) == []  # it has learnt since
    noise = {"explained_variance": lambda i: -0.3, "scores_share": lambda i: 0.2}
    assert names(series(**noise)) == []  # of the KL's estimate: nothing to explain either
    both = {"scores": lambda i: 0.5 + 0.02 * i, "judge": lambda i: 0.5 + 0.003 * i}
    assert names(series(20, **both)) == []  # the judge rises, too, if slowly
    narrow = {"judge": lambda i: 0.5 + 0.001 * i, "judge_std": lambda i: 0.1}
    assert names(series(20, **narrow)) == []  # by little; but its scores differ by little


@pytest.mark.parametrize(
    ("updates", "judge_rise", "least", "most"),
    [(40, 0.16, 0, 5), (40, 0.4, 0, 1), (40, -0.32, 90, 100), (280, 0.0, 90, 100)],
)
def test_reward_hacking_of_noisy_judges(updates: int, judge_rise: float, least: int, most: int) -> None:
    """100 runs in which the reward rises by 0.8, asked again and again as ``stop_on`` does: a judge that rises by a
    fifth of that is hardly ever accused, one that falls is, and a flat one where there are enough updates to tell."""
    draw, accused = random.Random(0), 0
    for _ in range(100):
        scores, judged = (
            [0.5 + rise * i / updates + draw.gauss(0, 0.08) for i in range(updates)] for rise in (0.8, judge_rise)
        )
        lines = series(updates, scores=scores.__getitem__, judge=judged.__getitem__)
        accused += any(doctor.reward_hacking(lines[: i + 1], PPOConfig()) for i in range(0, updates, updates // 40))
    assert least <= accused <= most


# ---- runs that go wrong on purpose, and healthy ones ----


FAR = {"response_length": 24, "learning_rate": 5e-3, "num_ppo_epochs": 4, "kl_coef": 1e-3}


def words(prompts: list[str], answers: list[str]) -> list[float]:
    return [len(answer.split()) / 24 for answer in answers]


def few_words(prompts: list[str], answers: list[str]) -> list[float]:
    return [-score for score in words(prompts, answers)]


def huge(prompts: list[str], answers: list[str]) -> list[float]:
    return [1e30 * len(answer) for answer in answers]


def ending(base: Path, folder: Path, times: float) -> Path:
    """The same model, with end tokens where they happen to be likely."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(base)
    shutil.copytree(base, folder)
    with torch.no_grad():
        model.lm_head.weight[model.config.eos_token_id] *= times
    model.save_pretrained(folder)
    return folder


def found(llama: Path, folder: Path, reward: Any = share_of_good, **settings: Any) -> set[str]:
    record = run_ppo(llama, folder, reward, adapter=LORA, **{"total_episodes": 8 * 16, **settings})
    return {finding["name"] for finding in record["findings"]}


def test_a_finding_is_said_once_and_stands_in_the_record(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "clip_fraction_zero" in found(llama, tmp_path / "run", learning_rate=1e-9, total_episodes=80)
    told = capsys.readouterr()
    assert told.err.count("clip fraction zero: 0.00% of the ratios were clipped") == 1
    assert "doctor, update 6: clip fraction zero" in told.err
    assert "doctor, update 6: clip fraction zero" in told.out.replace("\n", " ")  # and below the table


def test_stop_on_ends_the_run_with_a_checkpoint(llama: Path, tmp_path: Path) -> None:
    settings = {"learning_rate": 1e-9, "total_episodes": 80}
    with pytest.raises(ModelError, match="the doctor stopped the run at update 6: clip fraction zero"):
        found(llama, tmp_path / "run", stop_on=["clip_fraction_zero"], **settings)
    assert (tmp_path / "run/checkpoints/checkpoint-6").is_dir()
    assert not (tmp_path / "run/run.json").exists()
    assert "clip_fraction_zero" in found(llama, tmp_path / "run", resume=True, **settings)
    assert len(metrics(tmp_path / "run")) == 10


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "reward", "settings"),
    [
        (
            {"kl_runaway", "clip_fraction_high", "critic_useless"},
            share_of_good,
            {"learning_rate": 3e-2, "kl_coef": 1e-6, "num_ppo_epochs": 4},
        ),
        (
            {"clip_fraction_high", "kl_runaway", "answers_collapse"},
            share_of_good,
            {"learning_rate": 5e-2, "num_ppo_epochs": 6},
        ),
        ({"clip_fraction_zero", "critic_useless"}, share_of_good, {"learning_rate": 1e-9}),
        ({"critic_useless"}, by_prompt, {"critic_learning_rate": 1e-9}),
        (
            {"answers_grow", "reward_hacking", "kl_runaway", "critic_useless"},
            words,
            {**FAR, "ends": 3.0, "judge": few_words},
        ),
        ({"answers_collapse", "kl_runaway", "critic_useless"}, few_words, {**FAR, "ends": 2.0}),
    ],
)
def test_a_bad_setting_is_named(names: set[str], reward: Any, settings: Any, llama: Path, tmp_path: Path) -> None:
    """With what it brings along, and nothing else (on one thread, as tests are run). All but a negative KL, which no
    setting makes (answers are drawn from what is scored), and what ``test_ppo`` and the next test have."""
    given = {**BATCHES, **settings}
    base = ending(llama, tmp_path / "base", given.pop("ends", 1.0))
    assert found(base, tmp_path / "run", reward, **given) == names


@pytest.mark.slow
def test_a_run_whose_weights_are_no_numbers_ends_without_a_checkpoint(llama: Path, tmp_path: Path) -> None:
    settings = {"learning_rate": 0.1, "max_grad_norm": 0.0, "whiten_advantages": False, "save_steps": 1}
    with pytest.raises(ModelError, match=r"(?s)at update 1: not a number.*start again with a lower learning_rate"):
        found(llama, tmp_path / "run", huge, **settings)
    assert not list((tmp_path / "run").glob("checkpoints/checkpoint-*"))


BATCHES = {"per_device_train_batch_size": 16, "total_episodes": 32 * 25}
LEARNING = {"learning_rate": 1e-3, "critic_learning_rate": 1e-2, "vf_coef": 0.5}


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        LEARNING,
        {"learning_rate": 5e-3, "value_model": "policy_trunk", "vf_coef": 0.5},
        {**LEARNING, "adap_kl_ctrl": True, "target": 2.0, "horizon": 500},
        {**LEARNING, "kl_estimator": "k3", "whiten_rewards": True},
        {**LEARNING, "judge": characters},
    ],
)
def test_a_healthy_run_has_no_finding(settings: Any, llama: Path, tmp_path: Path) -> None:
    assert found(llama, tmp_path / "run", by_prompt, **BATCHES, **settings) == set()
