"""Steps 3.3 and 3.4 of PPO: answers are read, and with their scores become what an update learns from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ptft_hf.rlhf import ppo_math, rollouts
from ptft_hf.rlhf.rollouts import Rollouts

if TYPE_CHECKING:
    from ptft_hf.rlhf.ppo import Run


BY_TOKEN = ("logprobs", "values", "kl", "advantages", "returns")


class Forward(NamedTuple):
    """A pass of the policy over ``B`` answers of up to ``T`` tokens; each ``[B, T]``, 0 at padding."""

    logprobs: Tensor
    entropy: Tensor
    values: Tensor | None
    """The critic's, if it is a head on the policy's hidden states."""


class Experience(NamedTuple):
    """What an update learns from: ``B`` answers of up to ``T`` tokens; all but ``rollouts``, ``scores`` and
    ``forward`` are ``[B, T]``, 0 at padding."""

    rollouts: Rollouts
    scores: Tensor
    """``[B]``, the missing end token's penalty taken off."""
    logprobs: Tensor
    values: Tensor
    kl: Tensor
    advantages: Tensor
    returns: Tensor
    forward: list[Forward]
    """The policy's pass over this process's answers, from which ``logprobs`` is, if it is to be the first step's,
    which takes it out; else empty."""

    def take(self, rows: Tensor) -> Experience:
        """Some rows, without the columns that are padding in all of them."""
        some = self.rollouts.take(rows)
        length = some.mask.shape[1]
        by_token = {name: value[rows, :length] for name, value in self._asdict().items() if name in BY_TOKEN}
        return Experience(some, self.scores[rows], **by_token, forward=[])


def policy_forward(run: Run, model: Any, made: Rollouts) -> Forward:
    """The policy's pass over answers, while it plays."""
    states = rollouts.hidden_states(model, made)
    found = rollouts.answer_logprobs(model, states, made, run.config.temperature)
    values = run.roles.critic.values(made, states) if run.roles.shares_trunk else None
    return Forward(*found, values)


@torch.no_grad()
def read_answers(run: Run, made: Rollouts) -> tuple[Tensor, Tensor]:
    """The reference's log-probabilities, and the values of a critic with weights of its own: each ``[B, T]``, of this
    process's answers, else 0."""
    roles, parts = run.roles, _parts(run, made)
    reference, values = (torch.zeros(made.mask.shape, device=run.device) for _ in range(2))
    with roles.reference.playing() as model, run.autocast():
        for rows in parts:
            batch = made.take(rows)
            states = rollouts.hidden_states(model, batch)
            found = rollouts.answer_logprobs(model, states, batch, run.config.temperature)
            _fill(reference, rows, found.logprobs)
    if not roles.shares_trunk:
        with roles.critic.playing(), run.autocast():
            for rows in parts:
                _fill(values, rows, roles.critic.values(made.take(rows)))
    return reference, values


def _parts(run: Run, made: Rollouts) -> list[Tensor]:
    """Rows of this process that run together, the longest first."""
    order = sorted(run.share(range(len(made.mask))), key=lambda i: -int(made.attention[i].sum()))
    return list(torch.tensor(order).split(run.config.local_rollout_forward_batch_size))  # type: ignore[no-untyped-call]


def _fill(target: Tensor, rows: Tensor, found: Tensor) -> None:
    target[rows, : found.shape[1]] = found.detach().float()


def make_experience(
    run: Run, made: Rollouts, scores: list[float], read: tuple[Tensor, Tensor]
) -> tuple[Experience, dict[str, float]]:
    """The policy's log-probabilities, KL, rewards and advantages of all answers, and figures for the log; ``read`` is
    what :func:`read_answers` gave."""
    config, roles, mask = run.config, run.roles, made.mask
    reference, values = read
    policy, entropy = (torch.zeros(mask.shape, device=run.device) for _ in range(2))
    # Where one pass is all that an update's first step needs, it is this one: its activations are held until then.
    again = config.gradient_checkpointing and run.one_pass
    parts = [torch.tensor(run.share(range(len(mask))))] if run.one_pass else _parts(run, made)
    with torch.set_grad_enabled(run.one_pass), roles.policy.playing(checkpointing=again) as model, run.autocast():
        for rows in parts:
            forward = policy_forward(run, model, made.take(rows))
            _fill(policy, rows, forward.logprobs)
            _fill(entropy, rows, forward.entropy)
            if forward.values is not None:
                _fill(values, rows, forward.values)
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
    kept = [forward] if run.one_pass else []
    return Experience(made, given, policy, values, kl, advantages, returns, kept), figures
