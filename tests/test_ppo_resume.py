"""A PPO run that was stopped goes on with what it began with, and with nothing else under the same name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from ptft_hf import checkpoints
from ptft_hf.errors import OutputError
from tests.ppo_runs import (
    change_weights,
    make_classifier,
    make_language_model,
    reward_folder,
    run_ppo,
    sft_adapter,
    share_of_good,
)

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
REVISION = "0" * 40


def stop(run: Any) -> None:
    raise KeyboardInterrupt


def stopped(monkeypatch: pytest.MonkeyPatch, *given: Any, **options: Any) -> None:
    """A run that has written its settings, and ends before its first update."""
    with monkeypatch.context() as patch:
        patch.setattr("ptft_hf.rlhf.ppo.Run.learn", stop)
        with pytest.raises(KeyboardInterrupt):
            run_ppo(*given, **options)


def test_another_policy_reward_or_judge_of_the_same_name_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_language_model("llama", tmp_path / "base")
    sft, reward = sft_adapter(base, tmp_path / "sft"), reward_folder(base, tmp_path / "reward")
    judge, run = make_classifier(tmp_path / "judge"), tmp_path / "run"
    options = {"judge": f"{judge}#LABEL_1", "total_episodes": 8}
    stopped(monkeypatch, sft, run, f"0.5*{reward}", **options)
    for folder in (sft, reward, judge):
        kept = {path: path.read_bytes() for path in folder.glob("*.safetensors")}
        change_weights(folder)
        with pytest.raises(OutputError, match=rf"cannot be resumed .*contents\.{folder}: 'sha256:") as caught:
            run_ppo(sft, run, f"0.5*{reward}", resume=True, **options)
        assert len(caught.value.problems) == 1
        for path, content in kept.items():
            path.write_bytes(content)
    (sft / "README.md").write_text("What this is.", "utf-8")
    assert run_ppo(sft, run, f"0.5*{reward}", resume=True, **options)["training"]["updates"] == 1


def test_another_function_of_the_same_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, run = make_language_model("llama", tmp_path / "base"), tmp_path / "run"
    file = tmp_path / "reward_to_resume.py"
    file.write_text("def score(prompts, answers):\n    return [len(a) for a in answers]\n", "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    stopped(monkeypatch, base, run, "reward_to_resume:score", total_episodes=8)
    kept = file.read_text("utf-8")
    file.write_text(kept.replace("len(a)", "-len(a)"), "utf-8")
    with pytest.raises(OutputError, match=r"contents\.reward_to_resume:score: 'sha256:") as caught:
        run_ppo(base, run, "reward_to_resume:score", resume=True, total_episodes=8)
    assert len(caught.value.problems) == 1
    file.write_text(kept, "utf-8")
    done = run_ppo(base, run, "reward_to_resume:score", resume=True, total_episodes=8)
    assert done["training"]["updates"] == 1


def test_a_reward_or_judge_is_not_replaced_by_the_run_that_follows_it(tmp_path: Path) -> None:
    from tests.test_by_trl import checkpoint, run

    base = checkpoint(tmp_path / "base")
    for name in ("run", "judge"):
        make_classifier(tmp_path / name)
        (tmp_path / name / "run.json").write_text("{}", "utf-8")
    kept = sorted(tmp_path.rglob("*"))
    with pytest.raises(OutputError, match=r"run: holds what the run starts from, .*run, which"):
        run_ppo(base, tmp_path / "run", f"0.5*{tmp_path / 'run'}#LABEL_1", overwrite=True)
    with pytest.raises(OutputError, match="judge: holds what the run starts from"):
        run_ppo(base, tmp_path / "judge", share_of_good, judge=f"{tmp_path / 'judge'}#LABEL_1", overwrite=True)
    with pytest.raises(OutputError, match="run: holds what the run starts from"):
        run("grpo", base, tmp_path / "run", reward=f"{tmp_path / 'run'}#LABEL_1", overwrite=True)
    assert sorted(tmp_path.rglob("*")) == kept


def test_a_run_of_which_it_is_not_known_what_it_began_with_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, settings = make_language_model("llama", tmp_path / "base"), tmp_path / "run" / "settings.json"
    stopped(monkeypatch, base, tmp_path / "run", share_of_good)
    written = checkpoints.read_json(settings)
    del written["contents"]
    settings.write_text(json.dumps(written), "utf-8")
    with pytest.raises(OutputError, match="contents: None when the run began"):
        run_ppo(base, tmp_path / "run", share_of_good, resume=True)


def test_another_reward_on_the_hub_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--somebody--judge"
    snapshot = make_classifier(repository / "snapshots" / REVISION)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION, "utf-8")
    base = make_language_model("llama", tmp_path / "base")
    stopped(monkeypatch, base, tmp_path / "run", "somebody/judge#LABEL_1")
    change_weights(snapshot)
    with pytest.raises(OutputError, match=r"contents\.somebody/judge: 'sha256:"):
        run_ppo(base, tmp_path / "run", "somebody/judge#LABEL_1", resume=True)
