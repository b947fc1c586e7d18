"""The arithmetic of PPO: sums worked by hand, and what TRL's trainer computed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ptft_hf.rlhf import ppo_math

TRL = Path(__file__).parent / "references" / "trl_ppo.safetensors"
NAN = math.nan


def close(one: Tensor, other: Tensor | list[float] | list[list[float]] | float) -> None:
    torch.testing.assert_close(one, torch.as_tensor(other, dtype=one.dtype), equal_nan=True)


MASK = torch.tensor([[1, 1, 1], [1, 0, 0]])

# ---- means ----


def test_means_leave_out_padding() -> None:
    values = torch.tensor([[1.0, 2.0, 6.0], [7.0, NAN, 99.0]])
    close(ppo_math.masked_mean(values, MASK), 4.0)  # (1 + 2 + 6 + 7) / 4
    close(ppo_math.masked_mean(values, MASK, 1), [3.0, 7.0])
    mean, variance = ppo_math.masked_moments(values, MASK)
    close(mean, 4.0)
    close(variance, 26 / 3)  # (9 + 4 + 4 + 9) / (4 - 1)


def test_whitening() -> None:
    values, deviation = torch.tensor([[1.0, 2.0, 6.0], [7.0, NAN, 99.0]]), math.sqrt(26 / 3)
    white = torch.tensor([[-3.0, -2.0, 2.0], [3.0, 0.0, 0.0]]) / deviation
    close(ppo_math.masked_whiten(values, MASK), white)
    close(ppo_math.masked_whiten(values, MASK, shift_mean=False), (white + 4.0) * MASK)
    alone = ppo_math.masked_whiten(torch.tensor([[5.0]]), torch.tensor([[1]]))
    close(alone, [[0.0]])  # of a single value there is no variance, and no NaN


# ---- KL ----


def test_kl_estimators() -> None:
    policy, reference = torch.tensor([[-1.0, -2.0, NAN]]), torch.tensor([[-1.5, -1.0, 0.0]])
    mask = torch.tensor([[1, 1, 0]])
    close(ppo_math.kl_per_token(policy, reference, mask, "k1"), [[0.5, -1.0, 0.0]])
    k3 = [[math.exp(-0.5) - 1 + 0.5, math.exp(1.0) - 1 - 1.0, 0.0]]
    close(ppo_math.kl_per_token(policy, reference, mask, "k3"), k3)


def test_both_estimators_are_right_on_average() -> None:
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    exact = (p * (p / q).log()).sum()
    for estimator in ("k1", "k3"):
        each = ppo_math.kl_per_token(p.log()[None], q.log()[None], torch.ones(1, 3), estimator)
        close((p * each[0]).sum(), exact)
        assert estimator == "k1" or (each >= 0).all()


def test_the_adaptive_controller_follows_ziegler() -> None:
    controller = ppo_math.AdaptiveKLController(0.2, target=6.0, horizon=10_000)
    controller.update(6.6, 100)  # 10 % too much, 100 of 10,000 answers: up by 0.1 %
    assert controller.value == pytest.approx(0.2 * (1 + 0.1 * 100 / 10_000))
    controller = ppo_math.AdaptiveKLController(0.2, target=6.0, horizon=10_000)
    controller.update(60.0, 1000)  # errors beyond a fifth count as a fifth
    assert controller.value == pytest.approx(0.2 * (1 + 0.2 * 0.1))
    controller.update(-3.0, 1000)
    assert controller.value == pytest.approx(0.2 * 1.02 * 0.98)
    fixed = ppo_math.FixedKLController(0.2)
    fixed.update(60.0, 1000)
    assert fixed.value == 0.2


# ---- rewards and advantages ----


def test_the_score_stands_at_the_last_token_and_the_penalty_at_each() -> None:
    kl = torch.tensor([[0.1, -0.2, 0.3], [0.4, NAN, NAN]])
    rewards = ppo_math.token_rewards(torch.tensor([1.0, -2.0]), kl, MASK, kl_coef=0.5)
    close(rewards, [[-0.05, 0.1, 0.85], [-2.2, 0.0, 0.0]])


def test_a_missing_end_token_costs() -> None:
    scores, ended = torch.tensor([1.0, 1.0]), torch.tensor([True, False])
    close(ppo_math.penalised_scores(scores, ended, 0.7), [1.0, 0.3])
    assert ppo_math.penalised_scores(scores, ended, None) is scores


def test_gae_by_hand() -> None:
    rewards = torch.tensor([[1.0, 2.0, 3.0], [5.0, NAN, NAN]])
    values = torch.tensor([[0.5, 1.0, 1.5], [2.0, NAN, 100.0]])
    advantages, returns = ppo_math.gae(rewards, values, MASK, gamma=0.9, lam=0.8)
    # deltas of the first: 1 + .9*1 - .5 = 1.4; 2 + .9*1.5 - 1 = 2.35; 3 - 1.5 = 1.5
    third = 1.5
    second = 2.35 + 0.72 * third
    first = 1.4 + 0.72 * second
    close(advantages, [[first, second, third], [3.0, 0.0, 0.0]])  # 5 - 2: nothing comes after the last token
    close(returns, [[first + 0.5, second + 1.0, third + 1.5], [5.0, 0.0, 0.0]])


def test_gae_at_its_two_ends() -> None:
    rewards, values = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[3.0, 1.0, 2.0]])
    mask = torch.ones(1, 3)
    _, returns = ppo_math.gae(rewards, values, mask, gamma=1.0, lam=1.0)
    close(returns, [[7.0, 6.0, 4.0]])  # lam 1: the rewards that follow
    advantages, _ = ppo_math.gae(rewards, values, mask, gamma=1.0, lam=0.0)
    close(advantages, [[-1.0, 3.0, 2.0]])  # lam 0: one step


def test_padding_and_neighbours_change_no_advantage() -> None:
    draw = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 4, generator=draw), torch.randn(2, 4, generator=draw)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    both, _ = ppo_math.gae(rewards, values, mask, 0.9, 0.8)
    alone, _ = ppo_math.gae(rewards[:1, :2], values[:1, :2], mask[:1, :2], 0.9, 0.8)
    assert torch.equal(both[:1, :2], alone)


# ---- losses ----


def test_the_policy_loss_is_the_pessimistic_one() -> None:
    ratios = torch.tensor([[1.5, 0.5, 1.5, 0.5, 1.1, 9.0]])
    advantages = torch.tensor([[1.0, 1.0, -1.0, -1.0, 2.0, NAN]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 0]])
    found = ppo_math.policy_losses(ratios.log(), torch.zeros(1, 6), advantages, mask, cliprange=0.2)
    close(found.losses, [[-1.2, -0.5, 1.5, 0.8, -2.2, 0.0]])
    close(found.clipped, [[1.0, 0.0, 0.0, 1.0, 0.0, 0.0]])


def test_clipped_tokens_and_padding_give_no_gradient() -> None:
    logprobs = torch.tensor([[math.log(1.5), math.log(0.5), 0.0]], requires_grad=True)
    advantages = torch.tensor([[1.0, 1.0, NAN]])
    mask = torch.tensor([[1, 1, 0]])
    ppo_math.policy_losses(logprobs, torch.zeros(1, 3), advantages, mask, 0.2).losses.sum().backward()
    close(logprobs.grad, [[0.0, -0.5, 0.0]])  # type: ignore[arg-type]  # d(-A r)/d log r = -A r


def test_the_value_loss_is_clipped_about_the_old_value() -> None:
    values = torch.tensor([[1.0, 1.0, 0.1, NAN]], requires_grad=True)
    old, returns = torch.zeros(1, 4), torch.tensor([[2.0, 0.0, 1.0, NAN]])
    mask = torch.tensor([[1, 1, 1, 0]])
    found = ppo_math.value_losses(values, old, returns, mask, cliprange_value=0.2)
    # max(1, 1.8^2) / 2; max(1, .2^2) / 2; .9^2 / 2
    close(found.losses, [[1.62, 0.5, 0.405, 0.0]])
    close(found.clipped, [[1.0, 0.0, 0.0, 0.0]])
    found.losses.sum().backward()
    close(values.grad, [[0.0, 1.0, -0.9, 0.0]])  # type: ignore[arg-type]


# ---- what tells whether it goes well ----


def test_entropy() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [math.log(3.0), 0.0, -math.inf, -math.inf]])
    close(ppo_math.entropy_from_logits(logits), [math.log(4), -0.75 * math.log(0.75) - 0.25 * math.log(0.25)])


def test_approx_kl() -> None:
    new, old = torch.tensor([[-1.0, -2.0, 0.0]]), torch.tensor([[-1.4, -2.2, 9.0]])
    close(ppo_math.approx_kl(new, old, torch.tensor([[1, 1, 0]])), 0.5 * (0.16 + 0.04) / 2)


def test_the_scores_share_of_what_is_to_come() -> None:
    """By hand: with scores alone it is all; with a penalty of 1 at the first token the rewards to come are
    (1, 2) and (4 - 1, 4), of variance 1.25, and of the scores alone (2, 2) and (4, 4), of variance 1."""
    mask, scores = torch.ones(2, 2), torch.tensor([2.0, 4.0])
    kl = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    free, penalised = (ppo_math.token_rewards(scores, kl, mask, weight) for weight in (0.0, 1.0))
    close(ppo_math.scores_share(scores, free, mask, 1.0), 1.0)
    close(ppo_math.scores_share(scores, penalised, mask, 1.0), 1.0 / 1.25)
    assert ppo_math.scores_share(torch.zeros(2), torch.zeros(2, 2), mask, 1.0).isnan()


def test_explained_variance() -> None:
    returns, mask = torch.tensor([[1.0, 3.0, 5.0, NAN]]), torch.tensor([[1, 1, 1, 0]])
    close(ppo_math.explained_variance(returns, returns, mask), 1.0)
    close(ppo_math.explained_variance(torch.full((1, 4), 2.0), returns, mask), 0.0)
    close(ppo_math.explained_variance(6 - returns, returns, mask), -3.0)  # residuals of twice the spread
    assert ppo_math.explained_variance(returns, torch.ones(1, 4), mask).isnan()


# ---- TRL 1.12.0, the last that had PPO (tests/references/make_trl_ppo.py) ----


@pytest.fixture(scope="module")
def trl() -> dict[str, Tensor]:
    return load_file(TRL)


def updates(trl: dict[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    for name in ("u1", "u2"):
        found = {k.removeprefix(f"{name}."): v for k, v in trl.items() if k.startswith(f"{name}.")}
        found["mask"] = (found["padding_mask"] == 0).long()
        # TRL gives a critic one position more than the policy, after an answer that ended early.
        found["value_mask"] = (found["padding_mask_p1"] == 0).long()
        yield name, found


def test_the_reference_has_answers_that_ended_early_and_tokens_that_were_clipped(
    trl: dict[str, Tensor],
) -> None:
    for _, found in updates(trl):
        lengths = found["mask"].sum(1)
        assert lengths.min() < lengths.max() == found["mask"].shape[1]
        assert 0 < found["contain_eos_token"].sum() < len(lengths)
    assert max(v.item() for k, v in trl.items() if k.endswith("clipfrac")) > 0.2


def test_rewards_and_advantages_are_those_of_trl(trl: dict[str, Tensor]) -> None:
    for _, found in updates(trl):
        kl = ppo_math.kl_per_token(found["logprobs"], found["ref_logprobs"], found["mask"], "k3")
        close(kl, found["kl"])
        close(-0.15 * kl, found["non_score_reward"])
        # TRL puts the score one position after an early end; there the reward is the score alone.
        rewards = ppo_math.token_rewards(found["scores"], kl, found["value_mask"], 0.15)
        rewards = ppo_math.masked_whiten(rewards, found["value_mask"], shift_mean=False)
        close(rewards, found["rewards"])
        advantages, returns = ppo_math.gae(found["rewards"], found["values"], found["value_mask"], 0.9, 0.8)
        close(returns, found["returns"])
        close(ppo_math.masked_whiten(advantages, found["mask"]), found["advantages"])


def test_losses_and_figures_are_those_of_trl(trl: dict[str, Tensor]) -> None:
    seen = 0
    for _, found in updates(trl):
        for number in range(8):
            mb = {k.removeprefix(f"m{number}."): v for k, v in found.items() if k.startswith(f"m{number}.")}
            rows = mb["micro_batch_inds"]
            mask, value_mask = found["mask"][rows], found["value_mask"][rows]
            old = found["logprobs"][rows]
            policy = ppo_math.policy_losses(mb["new_logprobs"], old, found["advantages"][rows], mask, 0.05)
            close(ppo_math.masked_mean(policy.losses, mask), mb["pg_loss"])
            close(ppo_math.masked_mean(policy.clipped, mask), mb["pg_clipfrac"])
            value = ppo_math.value_losses(
                mb["vpred"], found["values"][rows], found["returns"][rows], value_mask, 0.03
            )
            close(ppo_math.masked_mean(value.losses, value_mask), mb["vf_loss"])
            close(ppo_math.masked_mean(value.clipped, value_mask), mb["vf_clipfrac"])
            # TRL divides by all positions, padding included.
            share = mask.sum() / mask.numel()
            close(ppo_math.approx_kl(mb["new_logprobs"], old, mask) * share, mb["approxkl"])
            seen += 1
    close(ppo_math.entropy_from_logits(trl["u1.m1.logits"]), trl["u1.m1.entropy"])
    assert seen == 16


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_what_an_estimator_in_the_reward_pulls_at(estimator: Any) -> None:
    """The policy gradient over all tokens, each with its probability: of k1 it is the KL's, of k3 only what two KLs
    differ by, which is next to nothing near the reference."""
    reference = torch.log_softmax(torch.tensor([0.3, -0.2, 0.9, 0.0], dtype=torch.float64), 0)
    logits = (reference + torch.tensor([0.02, -0.01, 0.0, 0.03], dtype=torch.float64)).requires_grad_()
    policy = torch.log_softmax(logits, 0)
    mask = torch.ones(1, 4, dtype=torch.float64)
    kl = ppo_math.kl_per_token(policy[None].detach(), reference[None], mask, estimator)[0]
    (found,) = torch.autograd.grad((policy.detach().exp() * policy * kl).sum(), logits, retain_graph=True)
    forward = (policy.exp() * (policy - reference)).sum()
    backward = (reference.exp() * (reference - policy)).sum()
    (pull,) = torch.autograd.grad(forward, logits, retain_graph=True)
    (push,) = torch.autograd.grad(backward, logits)
    torch.testing.assert_close(found, pull if estimator == "k1" else pull - push, rtol=1e-9, atol=1e-12)
    assert bool(found.norm() < 0.05 * pull.norm()) is (estimator == "k3")
