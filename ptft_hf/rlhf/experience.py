"""Steps 3.3 and 3.4 of PPO: from answers and their scores to what an update learns from."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ptft_hf.rlhf import ppo_math, rollouts
from ptft_hf.rlhf.rollouts import Rollouts

if TYPE_CHECKING:
    from ptft_hf.rlhf.ppo import Run


class Experience(NamedTuple):
    """What an update learns from: ``B`` answers of up to ``T`` tokens; all but ``rollouts`` and ``scores`` are
    ``[B, T]``, 0 at padding."""

    rollouts: Rollouts
    scores: Tensor
    """``[B]``, the missing end token's penalty taken off."""
    logprobs: Tensor
    values: Tensor
    kl: Tensor
    advantages: Tensor
    returns: Tensor

    def take(self, rows: Tensor) -> Experience:
        """Some rows, without the columns that are padding in all of them."""
        some = self.rollouts.take(rows)
        length = some.mask.shape[1]
        return Experience(some, self.scores[rows], *(value[rows, :length] for value in self[2:]))


@torch.no_grad()
def make_experience(run: Run, made: Rollouts, scores: list[float]) -> tuple[Experience, dict[str, float]]:
    """Log-probabilities, values, KL, rewards and advantages of all answers, and figures for the log."""
    config, mask = run.config, made.mask
    order = sorted(run.share(range(len(mask))), key=lambda i: -int(made.attention[i].sum()))
    size = run.config.local_rollout_forward_batch_size
    parts = [torch.tensor(order[start : start + size]) for start in range(0, len(order), size)]
    policy, reference, values, entropy = (torch.zeros(mask.shape, device=run.device) for _ in range(4))

    def fill(target: Tensor, rows: Tensor, found: Tensor) -> None:
        target[rows, : found.shape[1]] = found.float()

    with run.roles.policy.playing() as model, run.autocast():
        for rows in parts:
            batch = made.take(rows)
            states = rollouts.hidden_states(model, batch)
            found = rollouts.answer_logprobs(model, states, batch, config.temperature)
            fill(policy, rows, found.logprobs)
            fill(entropy, rows, found.entropy)
            if run.roles.shares_trunk:
                fill(values, rows, run.roles.critic.values(batch, states))
    with run.roles.reference.playing() as model, run.autocast():
        for rows in parts:
            batch = made.take(rows)
            states = rollouts.hidden_states(model, batch)
            fill(
                reference,
                rows,
                rollouts.answer_logprobs(model, states, batch, config.temperature).logprobs,
            )
    if not run.roles.shares_trunk:
        with run.roles.critic.playing(), run.autocast():
            for rows in parts:
                fill(values, rows, run.roles.critic.values(made.take(rows)))
    policy, reference, values, entropy = (run.summed(v) for v in (policy, reference, values, entropy))

    given = torch.tensor(scores, dtype=torch.float32, device=run.device)
    given = ppo_math.penalised_scores(given, made.ended, config.missing_eos_penalty)
    kl = ppo_math.kl_per_token(policy, reference, mask, config.kl_estimator)
    rewards = ppo_math.token_rewards(given, kl, mask, run.controller.value)
    share = ppo_math.scores_share(given, rewards, mask, config.gamma).item()
    if config.whiten_rewards:
        rewards = ppo_math.masked_whiten(rewards, mask, shift_mean=False)
    advantages, returns = ppo_math.gae(rewards, values, mask, config.gamma, config.lam)
    if config.whiten_advantages:
        advantages = ppo_math.masked_whiten(advantages, mask)
    figures = {
        "objective/entropy": -policy.sum(1).mean().item(),
        "policy/entropy_avg": ppo_math.masked_mean(entropy, mask).item(),
        "val/explained_variance": ppo_math.explained_variance(values, returns, mask).item(),
        "val/scores_share": share,
    }
    return Experience(made, given, policy, values, kl, advantages, returns), figures
