"""Steps 3.6 and 3.7 of PPO: the log, the doctor, and samples for people."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ptft_hf import report
from ptft_hf.rlhf import doctor
from ptft_hf.rlhf.experience import Experience
from ptft_hf.rlhf.preparing import save_every

if TYPE_CHECKING:
    from ptft_hf.rlhf.ppo import Run

SAMPLED_PROMPTS = 8
"""Held-out prompts on the page of samples."""
FATAL = "not_a_number"
"""The finding that always ends a run: from weights that are no numbers none come back."""


def figures(
    run: Run,
    experience: Experience,
    figures: Mapping[str, float],
    learnt: Sequence[Mapping[str, float]],
    parts: Mapping[str, list[float]],
    judged: list[float] | None,
) -> dict[str, Any]:
    """One line of ``metrics.jsonl``; the names are TRL's where it had them."""
    mask, kl = experience.rollouts.mask, experience.kl.sum(1).mean().item()
    score, coefficient = experience.scores.mean().item(), run.controller.value
    line: dict[str, Any] = {
        "update": run.update,
        "episode": run.episode,
        "objective/scores": score,
        "objective/scores_std": experience.scores.std(correction=0).item(),
        "objective/kl": kl,
        "objective/kl_coef": coefficient,
        "objective/non_score_reward": -coefficient * kl,
        "objective/rlhf_reward": score - coefficient * kl,
        **figures,
        **{name: sum(step[name] for step in learnt) / len(learnt) for name in learnt[0]},
        "val/answer_length": mask.sum(1).float().mean().item(),
        "val/ended": experience.rollouts.ended.float().mean().item(),
        "lr": run.optimizer.param_groups[0]["lr"],
    }
    if judged is not None:
        line["objective/judge"] = sum(judged) / len(judged)
        line["objective/judge_std"] = torch.tensor(judged).std(correction=0).item()
    if len(parts) > 1:
        line |= {f"reward/{name}": sum(scores) / len(scores) for name, scores in parts.items()}
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}


def log(run: Run, line: dict[str, Any]) -> None:
    """The line in the run's history, and in ``metrics.jsonl``."""
    run.history.append({name: value for name, value in line.items() if not name.startswith("time/")})
    if run.is_main:
        with (run.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def ask_doctor(run: Run) -> str | None:
    """Say what is newly found; returns what is to end the run."""
    known = {finding["name"] for finding in run.findings}
    stop = None
    for finding in doctor.examine(run.history, run.config):
        if finding.name not in known:
            run.findings.append({"name": finding.name, "update": run.update, "text": str(finding)})
            if run.is_main:
                report.say(f"doctor, update {run.update}: {finding}", style="yellow")
        if {finding.name, "all"} & {*run.config.stop_on, FATAL}:
            stop = stop or str(finding)
    return stop


def is_due(run: Run, times: int) -> bool:
    """Whether this update is one of so many, spread evenly, of which the last is the run's last."""
    return times > 0 and run.update * times // run.updates > (run.update - 1) * times // run.updates


def saves_now(run: Run) -> bool:
    """Whether a checkpoint is due, by ``save_steps``."""
    every = save_every(run.config, run.updates)
    return every > 0 and (run.update % every == 0 or run.update == run.updates)


def sample_held_out(run: Run) -> None:
    """Answers to some held-out prompts, always with the same random numbers, for the page of samples."""
    prompts = run.ready.held_out[:SAMPLED_PROMPTS]
    draw = torch.Generator().manual_seed(run.plan.seed)
    numbers = torch.rand(len(prompts), run.config.response_length, generator=draw)
    batch, _ = run.answer(prompts, numbers, alone=True)
    parts = run.ready.reward.parts(batch)
    if not run.is_main:
        return
    with (run.folder / "samples.jsonl").open("a", encoding="utf-8") as file:
        for i, prompt in enumerate(prompts):
            scores = {name: values[i] for name, values in parts.items()}
            entry = {"update": run.update, "prompt": prompt.text, "reference": prompt.reference}
            file.write(json.dumps({**entry, "answer": batch.answers[i], "scores": scores}) + "\n")
