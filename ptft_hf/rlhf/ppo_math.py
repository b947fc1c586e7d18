"""The arithmetic of PPO for language models: pure functions of tensors.

``B`` is a number of answers and ``T`` of positions; answers that ended early are padded on the right. ``mask`` is
``[B, T]``, 1 at an answer's tokens (its end token included) and 0 at the padding after them; each answer has at least
one token. What stands at padding never counts, whatever its value. Log-probabilities are in nats.

Sources: Schulman et al. 2016 (GAE) and 2017 (PPO); Ziegler et al. 2019 (rewards, adaptive KL); Schulman 2020,
"Approximating KL Divergence" (k1, k3); Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO".
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

# ---- means under a mask ----


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of ``[B, T]`` where ``mask`` is 1: a scalar, or with ``dim=1`` the mean of each answer, ``[B]``."""
    kept = values.masked_fill(mask == 0, 0.0)
    if dim is None:
        return kept.sum() / mask.sum()
    return kept.sum(dim) / mask.sum(dim)


def masked_moments(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (divided by ``n - 1``) where ``mask`` is 1, two scalars; of one value the variance is 0."""
    count = mask.sum()
    mean = masked_mean(values, mask)
    squares = ((values - mean) ** 2).masked_fill(mask == 0, 0.0).sum()
    return mean, squares / (count - 1).clamp(min=1)


def masked_whiten(values: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """``[B, T]`` divided by the standard deviation, with mean 0 or, without ``shift_mean``, the mean that it had
    (a reward's sign means something); 0 at padding."""
    mean, variance = masked_moments(values, mask)
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    if not shift_mean:
        whitened = whitened + mean
    return whitened.masked_fill(mask == 0, 0.0)


# ---- KL ----


def kl_per_token(
    logprobs: Tensor, reference_logprobs: Tensor, mask: Tensor, estimator: Literal["k1", "k3"] = "k1"
) -> Tensor:
    """Estimates of KL(policy || reference) at each token that the policy sampled, ``[B, T]``, 0 at padding.

    ``k1`` is ``log p - log q``: right on average, of either sign at a single token. ``k3`` is
    ``q/p - 1 - log(q/p)``: right on average too, never negative, and of less variance where the two are close. As
    part of a reward it holds a policy less, near the reference hardly at all: the policy gradient of k1 is that of
    ``KL(p || q)``, of k3 that of ``KL(p || q) - KL(q || p)``, since ``E_p[q/p grad log p] = -grad KL(q || p)``.
    """
    difference = (logprobs - reference_logprobs).masked_fill(mask == 0, 0.0)
    return difference if estimator == "k1" else torch.expm1(-difference) + difference


class AdaptiveKLController:
    """Moves the KL coefficient such that an answer's mean KL approaches a target (Ziegler et al. 2019, 2.2).

    Args:
        kl_coef: The coefficient at the start.
        target: Nats an answer.
        horizon: Answers over which a relative error of 0.2 or more changes the coefficient by a fifth.
    """

    def __init__(self, kl_coef: float, target: float, horizon: int) -> None:
        self.value, self.target, self.horizon = kl_coef, target, horizon

    def update(self, kl: float, answers: int) -> None:
        """``kl`` is the mean over the last ``answers`` answers, in nats an answer."""
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.value *= 1 + error * answers / self.horizon


class FixedKLController:
    """A KL coefficient that stays."""

    def __init__(self, kl_coef: float) -> None:
        self.value = kl_coef

    def update(self, kl: float, answers: int) -> None:
        pass


# ---- rewards and advantages ----


def last_positions(mask: Tensor) -> Tensor:
    """Index of each answer's last token, ``[B]``."""
    return mask.sum(1).long() - 1


def penalised_scores(scores: Tensor, ended: Tensor, missing_eos_penalty: float | None) -> Tensor:
    """Scores ``[B]``, less the penalty where ``ended`` (``[B]``, bool) says that the end token is missing."""
    if missing_eos_penalty is None:
        return scores
    return scores - missing_eos_penalty * (~ended).to(scores.dtype)


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Rewards ``[B, T]``: the KL penalty ``-kl_coef * kl`` at each token, and the score ``[B]`` at the last one."""
    rewards = (-kl_coef * kl).masked_fill(mask == 0, 0.0)
    rewards[torch.arange(len(scores), device=scores.device), last_positions(mask)] += scores
    return rewards


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation.

    Args:
        rewards: ``[B, T]``; of a token, once it is taken.
        values: ``[B, T]``; what the critic expects before the token is taken.
        mask: ``[B, T]``. Beyond an answer's last token the value is 0: the episode is over.
        gamma: Discount.
        lam: From 0 (one step, all critic) to 1 (all rewards, no critic).

    Returns:
        Advantages and returns (advantages + values), each ``[B, T]`` and 0 at padding.
    """
    real = mask != 0
    rewards, values = rewards.masked_fill(~real, 0.0), values.masked_fill(~real, 0.0)
    advantages = torch.zeros_like(values)
    later = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        next_value = values[:, t + 1] if t + 1 < values.shape[1] else torch.zeros_like(later)
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        later = torch.where(real[:, t], delta + gamma * lam * later, 0.0)
        advantages[:, t] = later
    return advantages, (advantages + values).masked_fill(~real, 0.0)


# ---- losses ----


class Clipped(NamedTuple):
    """A clipped loss, token by token."""

    losses: Tensor
    """``[B, T]``, 0 at padding. What the optimizer gets is their sum over the minibatch, divided by its tokens."""
    clipped: Tensor
    """``[B, T]``: 1.0 where the clipped term is the larger one, so that the token gives no gradient."""


def policy_losses(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, cliprange: float
) -> Clipped:
    """``max(-A r, -A clip(r, 1 - cliprange, 1 + cliprange))`` with ``r = exp(logprobs - old_logprobs)``; all
    ``[B, T]`` (Schulman et al. 2017, eq. 7)."""
    ratio = torch.exp((logprobs - old_logprobs).masked_fill(mask == 0, 0.0))
    advantages = advantages.masked_fill(mask == 0, 0.0)
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    return _larger(plain, clipped, mask)


def value_losses(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, cliprange_value: float
) -> Clipped:
    """Half of ``max((V - R)^2, (C - R)^2)``, where ``C`` is ``V`` kept within ``cliprange_value`` of ``old_values``;
    all ``[B, T]``."""
    values, old_values, returns = (v.masked_fill(mask == 0, 0.0) for v in (values, old_values, returns))
    clipped = torch.clamp(values, old_values - cliprange_value, old_values + cliprange_value)
    return _larger(0.5 * (values - returns) ** 2, 0.5 * (clipped - returns) ** 2, mask)


def _larger(plain: Tensor, clipped: Tensor, mask: Tensor) -> Clipped:
    losses = torch.maximum(plain, clipped).masked_fill(mask == 0, 0.0)
    return Clipped(losses, (clipped > plain).float().masked_fill(mask == 0, 0.0).detach())


# ---- what tells whether it goes well ----


def entropy_from_logits(logits: Tensor) -> Tensor:
    """Entropy in nats of each distribution: ``[..., V]`` to ``[...]``. A logit of ``-inf`` is a chance of 0."""
    logprobs = torch.log_softmax(logits.float(), -1)
    return -(logprobs.exp() * logprobs.masked_fill(logprobs == -torch.inf, 0.0)).sum(-1)


def approx_kl(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """How far an update has moved the policy, in nats a token: the mean of half the squared difference ``[B, T]``."""
    return 0.5 * masked_mean((logprobs - old_logprobs) ** 2, mask)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """``1 - Var(returns - values) / Var(returns)``, a scalar: 1 is a perfect critic, 0 is no better than a constant,
    below 0 is worse. NaN where all returns are the same."""
    _, unexplained = masked_moments(returns - values, mask)
    _, variance = masked_moments(returns, mask)
    return torch.where(variance > 0, 1 - unexplained / variance, torch.nan)


def scores_share(scores: Tensor, rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """How much of the variance of the discounted rewards to come ``[B, T]`` the scores ``[B]`` alone have; a scalar.

    What is left is the KL penalty's estimate on sampled tokens, which is mostly noise: no critic can know it
    beforehand. NaN where all rewards to come are the same.
    """
    alone = token_rewards(scores, torch.zeros_like(rewards), mask, 0.0)
    _, of_scores = masked_moments(gae(alone, torch.zeros_like(rewards), mask, gamma, 1.0)[1], mask)
    _, of_all = masked_moments(gae(rewards, torch.zeros_like(rewards), mask, gamma, 1.0)[1], mask)
    return torch.where(of_all > 0, of_scores / of_all, torch.nan)
