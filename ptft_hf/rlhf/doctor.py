"""The PPO doctor: what the running metrics say is going wrong, with the figures and the usual cure.

Pure functions over the lines of ``metrics.jsonl``, one a finished update, oldest first. A finding needs several
updates: one odd batch is no finding. Each threshold stands beside its reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

from ptft_hf.recipes.prompts import FINDINGS, PPOConfig

History = Sequence[Mapping[str, Any]]
WINDOW = 3
"""Updates whose mean is looked at."""
WARM_UP = 10
"""Updates that a critic is given before it is judged."""


class Finding(NamedTuple):
    """One thing that goes wrong."""

    name: str
    """One of :data:`ptft_hf.recipes.prompts.FINDINGS`."""
    figures: str
    cure: str

    def __str__(self) -> str:
        return f"{self.name.replace('_', ' ')}: {self.figures}. {self.cure}"


def examine(history: History, config: PPOConfig) -> list[Finding]:
    """All findings of a run so far, in the order of :data:`FINDINGS`."""
    found = [check(history, config) for check in CHECKS.values()]
    return [finding for finding in found if finding is not None]


def history_of(history: History, config: PPOConfig) -> list[dict[str, Any]]:
    """What was found in a run so far, each with its first update."""
    findings: dict[str, dict[str, Any]] = {}
    for end in range(1, len(history) + 1):
        for finding in examine(history[:end], config):
            findings.setdefault(finding.name, {"name": finding.name, "update": end, "text": str(finding)})
    return list(findings.values())


def last(history: History, name: str, count: int = WINDOW) -> float:
    """Mean over the last ``count`` updates; NaN if there are fewer, or one of them has no number."""
    return _mean(history[-count:], name) if len(history) >= count else math.nan


def first(history: History, name: str, count: int = WINDOW) -> float:
    """As :func:`last`, of the first updates."""
    return _mean(history[:count], name) if len(history) >= count else math.nan


def _mean(lines: History, name: str) -> float:
    values = [line.get(name) for line in lines]
    numbers = [float(value) for value in values if value is not None]
    return fmean(numbers) if numbers and len(numbers) == len(values) else math.nan


# ---- the checks ----


def not_a_number(history: History, config: PPOConfig) -> Finding | None:
    """A loss or norm of the last update that is not finite."""
    names = ("loss/policy_avg", "loss/value_avg", "objective/kl", "policy/grad_norm", "val/grad_norm")
    wrong = [name for name in names if history and name in history[-1] and not _finite(history[-1][name])]
    if not wrong:
        return None
    return Finding(
        "not_a_number",
        f"{', '.join(wrong)} of update {len(history)} {'is' if len(wrong) == 1 else 'are'} not finite",
        "Look at the rewards of the last samples, and start again with a lower learning_rate (--overwrite)",
    )


def _finite(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def negative_kl(history: History, config: PPOConfig) -> Finding | None:
    """A KL is never negative; its k1 estimate is on average, where samples do not come from the policy that gives the
    log-probabilities. Below -1 nat an answer it is no noise any more."""
    kl = last(history, "objective/kl")
    if not kl < -1.0:
        return None
    return Finding(
        "negative_kl",
        f"the KL against the reference is {kl:.2f} nats an answer over the last {WINDOW} updates, and it cannot be "
        "below 0",
        "Answers do not come from the distribution that is scored: look for a temperature, a top-k or a dropout that "
        "one of them has alone, and lower learning_rate, for the penalty now pays for what it should cost",
    )


def kl_runaway(history: History, config: PPOConfig) -> Finding | None:
    """Far from the reference and still on the way: over 1 nat a token (a token in e is the reference's choice), or
    five times an adaptive controller's target, and more than before. Without a penalty this is what was asked for."""
    kl, length = last(history, "objective/kl"), last(history, "val/answer_length")
    before = _mean(history[-2 * WINDOW : -WINDOW], "objective/kl") if len(history) >= 2 * WINDOW else math.nan
    limit = 5 * config.target if config.adap_kl_ctrl else 1.0 * length
    if config.kl_coef == 0 or not (kl > limit and kl > before):
        return None
    return Finding(
        "kl_runaway",
        f"the KL against the reference is {kl:.1f} nats an answer ({kl / length:.2f} a token), "
        f"{before:.1f} {WINDOW} updates before",
        "Raise kl_coef, set adap_kl_ctrl=true with a target, or lower learning_rate",
    )


def answers_grow(history: History, config: PPOConfig) -> Finding | None:
    """Twice as long as at the start, or up from a share that ended to nearly none that does."""
    now, before = last(history, "val/answer_length"), first(history, "val/answer_length")
    ended, ended_before = last(history, "val/ended"), first(history, "val/ended")
    if len(history) < 2 * WINDOW or not ((now > 2 * before) or (ended < 0.1 and ended_before > 0.5)):
        return None
    return Finding(
        "answers_grow",
        f"answers have {now:.1f} tokens, {before:.1f} at the start; {ended:.0%} end by themselves, "
        f"{ended_before:.0%} at the start",
        "Set missing_eos_penalty, and see whether the reward rises with length alone",
    )


def answers_collapse(history: History, config: PPOConfig) -> Finding | None:
    """A quarter of what they were at the start."""
    now, before = last(history, "val/answer_length"), first(history, "val/answer_length")
    if len(history) < 2 * WINDOW or not now < 0.25 * before:
        return None
    return Finding(
        "answers_collapse",
        f"answers have {now:.1f} tokens, {before:.1f} at the start",
        "The reward or the KL penalty pays for stopping early: look at the samples, raise kl_coef, or lower gamma's "
        "distance from 1",
    )


def critic_useless(history: History, config: PPOConfig) -> Finding | None:
    """After a warm-up a critic explains some of the returns; at 0 a constant would do as well. Where most of what the
    returns differ by is the noise of the KL penalty's estimate, nothing is to be explained; but below -1 the critic
    adds more than all of that noise."""
    variance = last(history, "val/explained_variance", WARM_UP // 2)
    least = -1.0 if last(history, "val/scores_share", WARM_UP // 2) < 0.5 else 0.05
    if len(history) < WARM_UP or not variance < least:
        return None
    return Finding(
        "critic_useless",
        f"the critic explains {variance:.2f} of the returns' variance over the last {WARM_UP // 2} updates (1 is "
        "all, 0 is none, less is harm)",
        "Raise critic_learning_rate, vf_coef or cliprange_value; a sum of rewards of very unlike size wants "
        "whiten_rewards=true",
    )


def clip_fraction_zero(history: History, config: PPOConfig) -> Finding | None:
    """No ratio leaves its range though the learning rate has not gone down yet: the policy hardly moves. With one
    step an update all ratios are 1, and that is no finding."""
    clipped, moved = last(history, "policy/clipfrac_avg"), last(history, "policy/approxkl_avg")
    rate, peak = last(history, "lr"), max((line.get("lr") or 0.0 for line in history), default=0.0)
    one_step = config.num_ppo_epochs * config.num_mini_batches == 1
    if one_step or len(history) < 2 * WINDOW or not (clipped < 1e-3 and moved < 1e-5 and rate > 0.5 * peak):
        return None
    return Finding(
        "clip_fraction_zero",
        f"{clipped:.2%} of the ratios were clipped and an update moved the policy by {moved:.1e} nats a token",
        "Raise learning_rate",
    )


def clip_fraction_high(history: History, config: PPOConfig) -> Finding | None:
    """Where 40 % of the tokens are clipped, most of an update's gradient is thrown away."""
    clipped, moved = last(history, "policy/clipfrac_avg"), last(history, "policy/approxkl_avg")
    if not clipped > 0.4:
        return None
    return Finding(
        "clip_fraction_high",
        f"{clipped:.0%} of the ratios were clipped over the last {WINDOW} updates, which moved the policy by "
        f"{moved:.2g} nats a token each",
        "Lower learning_rate or num_ppo_epochs",
    )


def entropy_collapse(history: History, config: PPOConfig) -> Finding | None:
    """A tenth of the entropy at the start: the policy says one thing, and there is nothing left to learn from."""
    now, before = last(history, "policy/entropy_avg"), first(history, "policy/entropy_avg")
    if len(history) < 2 * WINDOW or not now < 0.1 * before:
        return None
    return Finding(
        "entropy_collapse",
        f"the entropy is {now:.3f} nats a token, {before:.3f} at the start",
        "Raise kl_coef or temperature, lower learning_rate; look at the samples for one repeated answer",
    )


def reward_hacking(history: History, config: PPOConfig) -> Finding | None:
    """From the first quarter to the last the reward has risen, and the held-out judge by less than a tenth of that,
    each in standard deviations of an update's scores: by three standard errors, because it is asked again and again,
    and of means of five updates or more, which tell how large an error is."""
    size = len(history) // 4
    if size < 5 or "objective/judge" not in history[-1]:
        return None
    rise, error = _difference(history, "objective/scores", size)
    judged, judge_error = _difference(history, "objective/judge", size)
    spread, judge_spread = (_mean(history, f"objective/{name}_std") for name in ("scores", "judge"))
    tenth = 0.1 * rise / spread * judge_spread if spread else math.nan
    if not (rise > 3 * error and judged + 3 * judge_error < tenth):
        return None
    return Finding(
        "reward_hacking",
        f"the reward has risen by {rise:.3g} (standard error {error:.2g}), which is {rise / spread:.2g} standard "
        f"deviations of an update's scores; the held-out judge's by {judged:.3g} (standard error {judge_error:.2g}), "
        f"where a tenth as much were {tenth:.2g}",
        "The policy has found what the reward is wrong about: raise kl_coef, stop earlier, or mend the reward",
    )


def _difference(history: History, name: str, size: int) -> tuple[float, float]:
    """Last less first mean of ``size`` updates, and its standard error."""
    one, other = ([line.get(name) for line in part] for part in (history[:size], history[-size:]))
    numbers = [[float(v) for v in part if v is not None] for part in (one, other)]
    if any(len(part) < 2 for part in numbers):
        return math.nan, math.nan
    error = math.sqrt(sum(stdev(part) ** 2 / len(part) for part in numbers))
    return fmean(numbers[1]) - fmean(numbers[0]), error


CHECKS: dict[str, Callable[[History, PPOConfig], Finding | None]] = {
    name: globals()[name] for name in FINDINGS
}
