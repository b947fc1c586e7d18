"""The parts of PPO on one base, and as models of their own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from ptft_hf import models
from ptft_hf.rlhf import ppo, roles, rollouts
from ptft_hf.rlhf.evaluating import evaluate_policy
from tests.ppo_runs import (
    LORA,
    frozen,
    length,
    make_language_model,
    make_run,
    prompts,
    recipe,
    reward_folder,
    run_ppo,
    sft_adapter,
)


class StandAlone:
    """The same reward model by plain transformers and PEFT, one answer at a time, without padding."""

    name = "stand-alone"

    def __init__(self, base: Path, folder: Path) -> None:
        with models.quiet():
            model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
            self.model = peft.PeftModel.from_pretrained(model, str(folder)).eval()

    def __call__(self, batch: Any) -> list[float]:
        rows = [
            ids[mask.bool()] for ids, mask in zip(batch.rollouts.ids, batch.rollouts.attention, strict=True)
        ]
        with torch.no_grad():
            states = [
                self.model.base_model.model.model(input_ids=row[None]).last_hidden_state for row in rows
            ]
            return [float(self.model.base_model.model.score(state[0, -1])) for state in states]


def separate(run: ppo.Run, base: Path, reward: StandAlone) -> None:
    """Give a run four models in place of the one base, with the same weights."""

    def load() -> Any:
        with models.quiet():
            return transformers.AutoModelForCausalLM.from_pretrained(base).eval()

    def alone(adapter: str) -> Any:
        shared = run.roles.policy.model
        config = copy.deepcopy(shared.peft_config[adapter])
        with models.quiet():
            model = peft.get_peft_model(load(), config)
        own = {
            n.replace(f".{adapter}.", ".default."): p
            for n, p in shared.named_parameters()
            if f".{adapter}." in n
        }
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in own:
                    parameter.copy_(own.pop(name))
        assert not own
        return model.eval()

    assert isinstance(run.roles.critic.head, torch.nn.Linear)
    head = copy.deepcopy(run.roles.critic.head)
    parts = roles.Roles(
        roles.Role(alone("default"), "default"),
        roles.Role(load().requires_grad_(False)),
        roles.Role(alone("critic"), "default", head),
        {},
    )
    run.roles = parts
    run.ready = run.ready._replace(roles=parts, reward=type(run.ready.reward)([reward], [1.0]))
    run.trained = parts.trained()
    run.optimizer = run._optimizer()
    run.scheduler = transformers.get_scheduler("linear", run.optimizer, 0, run.updates)


def recorded(run: ppo.Run) -> list[list[int]]:
    """Learn, and return all answers."""
    answers: list[list[int]] = []
    answer = run.answer

    def keep(*given: Any, **options: Any) -> Any:
        batch, drawn = answer(*given, **options)
        answers.extend(batch.rollouts.answers.tolist())
        return batch, drawn

    run.answer = keep  # type: ignore[method-assign]
    run.learn()
    return answers


@pytest.mark.parametrize("name", ["llama", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_one_base_is_as_good_as_four_models(
    name: str, language_model: Callable[[str], Path], tmp_path: Path
) -> None:
    base = language_model(name)
    settings = {"learning_rate": 1e-3, "kl_coef": 0.2, "whiten_rewards": True, "missing_eos_penalty": 0.3}
    if name == "llama":
        folder = reward_folder(base, tmp_path / "reward")
        one = make_run(base, tmp_path / "one", str(folder), **settings)
        assert one.ready.reward.rewards[0].__class__.__name__ == "AdapterReward"
        alone: Any = StandAlone(base, folder)
    else:
        one = make_run(base, tmp_path / "one", length, **settings)
        alone = one.ready.reward.rewards[0]
    four = make_run(base, tmp_path / "four", length, **settings)
    for target, source in zip(four.trained.values(), one.trained.values(), strict=True):
        if target.keys() == source.keys() and all(target[n].shape == source[n].shape for n in target):
            with torch.no_grad():
                for key in target:
                    target[key].copy_(source[key])
    if name == "llama":
        four.roles = one.roles
    separate(four, base, alone)
    trained = [p.detach().clone() for part in one.trained.values() for p in part.values()]
    first, second = recorded(one), recorded(four)
    assert len(first) == 40 and first == second
    assert one.update == four.update == 5
    for line, other in zip(one.history, four.history, strict=True):
        for key, value in line.items():
            near = 1e-4 if key.endswith("grad_norm") else 1e-5
            assert other[key] == pytest.approx(value, abs=1e-5, rel=near), key
    moved = [p for part in one.trained.values() for p in part.values()]
    assert any(not torch.equal(p, before) for p, before in zip(moved, trained, strict=True))


def test_base_reference_and_reward_are_bit_equal_to_before(llama: Path, tmp_path: Path) -> None:
    sft, reward = sft_adapter(llama, tmp_path / "sft"), reward_folder(llama, tmp_path / "reward")
    run = make_run(sft, tmp_path / "run", str(reward), adapter=None)
    before, policy = frozen(run), {n: p.detach().clone() for n, p in run.trained["policy"].items()}
    kinds = {kind for kind in ("base_layer", ".reference.", ".reward_1.") for name in before if kind in name}
    assert kinds == {"base_layer", ".reference.", ".reward_1."}
    run.learn()
    after = frozen(run)
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert all(not torch.equal(policy[n], p) for n, p in run.trained["policy"].items())
    # The policy starts at the reference: the first update's KL is rounding.
    assert abs(run.history[0]["objective/kl"]) < 1e-6 < abs(run.history[-1]["objective/kl"])


@pytest.mark.parametrize("adapter", [LORA, "full/default"])
def test_where_a_base_lies_in_its_checkpoint_is_not_said_of_a_run_on_it(adapter: str, tmp_path: Path) -> None:
    """As ``gguf_file`` of a recipe that is used for SFT's checkpoint and for its run's folder."""
    make_language_model("llama", tmp_path / "base" / "inner")
    given = {"task": recipe(model={"subfolder": "inner"}), "total_episodes": 8}
    run_ppo(tmp_path / "base", tmp_path / "first", adapter=adapter, **given)
    again = {} if adapter == LORA else {"adapter": LORA}
    record = run_ppo(tmp_path / "first", tmp_path / "second", **again, **given)
    assert record["forecast"] is not None
    of = {"task": given["task"], "judge": length, "data": prompts()}
    found = evaluate_policy(policy=tmp_path / "second", against=tmp_path / "first", **of)
    assert found["metrics"]["kl"] != 0


def test_a_critic_starts_from_the_reward_model(llama: Path, tmp_path: Path) -> None:
    run = make_run(llama, tmp_path / "run", str(reward_folder(llama, tmp_path / "reward")), adapter=LORA)
    critic, (reward,) = run.roles.critic, run.roles.scorers.values()
    made = rollouts.collate([[5, 6, 7], [8]], [[9, 10], [11]], frozenset({2}), 0)
    with torch.no_grad():
        with critic.playing():
            states = rollouts.hidden_states(critic.model, made)
            last = critic.head(states[:, -2:].float()).squeeze(-1)  # type: ignore[misc]
        with reward.playing():
            scores = reward.scores(made)
    torch.testing.assert_close(torch.stack([last[0, 1], last[1, 0]]), scores)


def test_in_full_with_models_of_their_own(llama: Path, tmp_path: Path) -> None:
    settings = {"adapter": "full/default", "total_episodes": 16, "learning_rate": 1e-3}
    record = run_ppo(llama, tmp_path / "run", length, **settings)
    assert record["proof"]["max_difference"] == 0.0
    with models.quiet():
        before, after = (
            transformers.AutoModelForCausalLM.from_pretrained(place).state_dict()
            for place in (llama, tmp_path / "run")
        )
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert (tmp_path / "run/critic/model.safetensors").is_file()
    # Policy, reference and the critic's trunk are three models; the head is a row and its bias.
    one = sum(value.numel() for value in before.values())
    head = before["model.embed_tokens.weight"].shape[1] + 1
    output = before["lm_head.weight"].numel()  # the critic's takes no part
    assert record["parameters"] == {"trainable": 2 * one - output + head, "total": 3 * one + head}
    run = make_run(llama, tmp_path / "again", adapter="full/default")
    reference = run.roles.reference.model
    run.learn()
    assert all(torch.equal(value, before[name]) for name, value in reference.state_dict().items())
