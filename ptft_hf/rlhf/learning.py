"""Step 3.5 of PPO: optimizer steps on an update's experience."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ptft_hf.allocator import give_back_freed_memory
from ptft_hf.rlhf import ppo_math, sharding
from ptft_hf.rlhf.experience import Experience, Forward, critic_forward, policy_logprobs
from ptft_hf.rlhf.rollouts import LogProbs

if TYPE_CHECKING:
    from ptft_hf.rlhf.ppo import Run


def learn_from(run: Run, experience: Experience) -> list[dict[str, float]]:
    """Epochs of minibatches in new orders; what :func:`step` returns of each."""
    learnt: list[dict[str, float]] = []
    for _ in range(run.config.num_ppo_epochs):
        order = torch.randperm(run.batch, generator=run.generator)
        for rows in torch.split(order, run.step_size):
            # A pass that has run is one over all rows, in their order.
            learnt.append(step(run, experience, rows.sort().values if experience.forward else rows))
    return learnt


def step(run: Run, experience: Experience, rows: Tensor) -> dict[str, float]:
    """An optimizer step on one minibatch, ``rows`` of the update's answers.

    Its loss is the mean over all tokens of the minibatch, however they fall into passes and processes. Returns means
    over these tokens, and the gradients' norms before they are clipped.
    """
    config, tokens = run.config, experience.rollouts.mask[rows].sum()
    sums: dict[str, Tensor] = {}
    parts = torch.split(rows[run.rank :: run.world], config.per_device_train_batch_size)
    for number, part in enumerate(parts):
        last = number == len(parts) - 1
        for name, value in backward(run, experience.take(part), tokens, experience.forward, last).items():
            sums[name] = sums.get(name, torch.zeros((), device=run.device)) + value
    policy_norm, critic_norm = apply_gradients(run) if run.zero is None else run.zero.step()
    names = list(sums)
    totals = run.summed(torch.stack([sums[name] for name in names])) / tokens
    figures = dict(zip(names, totals.tolist(), strict=True))
    return {**figures, "policy/grad_norm": policy_norm, "val/grad_norm": critic_norm}


def apply_gradients(run: Run) -> list[float]:
    """A step of the optimizer with the gradients of all processes; returns the policy's and the critic's norm, which
    are clipped each by itself."""
    norms = []
    for parameters in run.trained.values():
        own = [p for p in parameters.values() if p.grad is not None]
        run.add_up_gradients([p for p in own if not sharding.is_sharded(p)])  # the others' have been
        norms.append(sharding.clip(own, run.config.max_grad_norm or math.inf) if own else 0.0)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    return norms


def backward(run: Run, batch: Experience, tokens: Tensor, held: list[Forward], last: bool) -> dict[str, Tensor]:
    """Gradients of one pass, added to those of the passes before; returns sums over its tokens. The critic's part of
    it is taken out of ``held``, if it has run. The step's ``last`` pass is followed by no other.

    Each part's backward pass happens while it plays: what is computed again for it meets the same adapter.
    """
    config, mask, roles = run.config, batch.rollouts.mask, run.roles

    def policy_losses(now: LogProbs) -> ppo_math.Clipped:
        return ppo_math.policy_losses(now.logprobs, batch.logprobs, batch.advantages, mask, config.cliprange)

    with roles.critic.playing(checkpointing=config.gradient_checkpointing) as model:
        with run.autocast():
            now = held.pop() if held else critic_forward(run, model, batch.rollouts)
            value = ppo_math.value_losses(now.values, batch.values, batch.returns, mask, config.cliprange_value)
            loss = config.vf_coef * value.losses.sum() / tokens
            found = now.policy
            if found is not None:
                policy = policy_losses(found)
                loss = loss + policy.losses.sum() / tokens
        run.backward(loss, last and found is not None)
    sums = {"loss/value_avg": value.losses.sum().detach(), "val/clipfrac_avg": value.clipped.sum()}
    if found is None:
        del now, value, loss
        if run.device.type == "cpu":
            give_back_freed_memory()
        with roles.policy.playing(checkpointing=config.gradient_checkpointing) as model:
            with run.autocast():
                found = policy_logprobs(run, model, batch.rollouts)
                policy = policy_losses(found)
            run.backward(policy.losses.sum() / tokens, last)
    difference = (found.logprobs - batch.logprobs).detach() * mask
    return {
        **sums,
        "loss/policy_avg": policy.losses.sum().detach(),
        "policy/clipfrac_avg": policy.clipped.sum(),
        "policy/approxkl_avg": 0.5 * (difference**2).sum(),
        "val/ratio": (difference.exp() * mask).sum(),
    }
