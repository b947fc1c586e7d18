"""Steps 3.3 and 3.4 of PPO: answers are read, and with their scores become what an update learns from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ptft_hf.rlhf import ppo_math, rollouts
from ptft_hf.rlhf.rollouts import LogProbs, Rollouts

if TYPE_CHECKING:
    from ptft_hf.rlhf.ppo import Run


BY_TOKEN = ("logprobs", "values", "kl", "advantages", "returns")


class Forward(NamedTuple):
    """A pass of the critic over ``B`` answers of up to ``T`` tokens."""

    values: Tensor
    """``[B, T]``, 0 at padding."""
    policy: LogProbs | None
    """The policy's, of whose hidden states the critic is a head; None of a critic with weights of its own."""


class Read(NamedTuple):
    """What is known of this process's answers before any step is taken: each ``[B, T]``, 0 elsewhere."""

    reference: Tensor
    """Log-probabilities, as the next."""
    logprobs: Tensor
    entropy: Tensor
    values: Tensor


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
    """The critic's pass over this process's answers from which ``values`` are, if it is to be the first step's, which
    takes it out; else empty."""

    def take(self, rows: Tensor) -> Experience:
        """Some rows, without the columns that are padding in all of them."""
        some = self.rollouts.take(rows)
        length = some.mask.shape[1]
        by_token = {name: value[rows, :length] for name, value in self._asdict().items() if name in BY_TOKEN}
        return Experience(some, self.scores[rows], **by_token, forward=[])


def policy_logprobs(run: Run, model: Any, made: Rollouts, states: Tensor | None = None) -> LogProbs:
    """Of answers, by the part that plays, given its :func:`rollouts.hidden_states` if they are there."""
    states = rollouts.hidden_states(model, made) if states is None else states
    return rollouts.answer_logprobs(model, states, made, run.config.temperature)


def critic_forward(run: Run, model: Any, made: Rollouts) -> Forward:
    """The critic's pass over answers, while it plays; on the policy's trunk the policy's, too."""
    states = rollouts.hidden_states(model, made)
    policy = policy_logprobs(run, model, made, states) if run.roles.shares_trunk else None
    return Forward(run.roles.critic.values(made, states), policy)


@torch.no_grad()
def read_answers(run: Run, made: Rollouts, drawn: LogProbs) -> Read:
    """What is known without gradients: the reference's log-probabilities, the policy's and the critic's values.

    The policy's are those that its answers were ``drawn`` with, and not read again: of that distribution they are
    samples. In float32 it is all the same. In bfloat16 a reading differs from it by 0.055 nats a token (standard
    deviation, SmolLM2), and from a reading with other padding by 0.03.
    """
    roles, parts, own = run.roles, _parts(run, made), _own(run, made)
    read = Read(*(torch.zeros(made.mask.shape, device=run.device) for _ in Read._fields))
    _fill(read.logprobs, own, drawn.logprobs[:, : made.mask.shape[1]])
    _fill(read.entropy, own, drawn.entropy[:, : made.mask.shape[1]])
    with roles.reference.playing() as model, run.autocast():
        for rows in parts:
            _fill(read.reference, rows, policy_logprobs(run, model, made.take(rows)).logprobs)
    if not run.one_pass:
        with roles.critic.playing(), run.autocast():
            for rows in parts:
                _fill(read.values, rows, roles.critic.values(made.take(rows)))
    return read


def _own(run: Run, made: Rollouts) -> Tensor:
    return torch.tensor(run.share(range(len(made.mask))))


def _parts(run: Run, made: Rollouts) -> list[Tensor]:
    """Rows of this process that run together, the longest first."""
    order = sorted(run.share(range(len(made.mask))), key=lambda i: -int(made.attention[i].sum()))
    return list(torch.tensor(order).split(run.config.local_rollout_forward_batch_size))  # type: ignore[no-untyped-call]


def _fill(target: Tensor, rows: Tensor, found: Tensor) -> None:
    target[rows, : found.shape[1]] = found.detach().float()


def make_experience(run: Run, made: Rollouts, scores: list[float], read: Read) -> tuple[Experience, dict[str, float]]:
    """KL, rewards and advantages of all answers, and figures for the log. ``read`` is :func:`read_answers`', and gets
    the values that are still to come."""
    config, mask = run.config, made.mask
    held: list[Forward] = []
    if run.one_pass:
        # One pass is all that an update's first step needs of the critic. It is this one: activations are held until
        # then, those of one part alone, for the policy's log-probabilities are there.
        with run.roles.critic.playing(checkpointing=config.gradient_checkpointing) as model, run.autocast():
            held.append(critic_forward(run, model, made.take(_own(run, made))))
        _fill(read.values, _own(run, made), held[0].values)
    reference, policy, entropy, values = (run.summed(each) for each in read)

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
    return Experience(made, given, policy, values, kl, advantages, returns, held), figures
