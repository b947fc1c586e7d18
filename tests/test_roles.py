"""Parts on one base: switching, what is trained, and the reward that must not move with the policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from ptft_hf import models
from ptft_hf.errors import CheckpointError, ModelError
from ptft_hf.recipes import PeftRecipe, load_adapter
from ptft_hf.rlhf import roles, rollouts
from tests.ppo_runs import LORA, length, make_run, reward_folder, sft_adapter
from tests.test_ppo_one_base import StandAlone

MADE = rollouts.collate([[5, 6, 7], [8, 9]], [[10, 11, 12], [13]], frozenset({2}), 0)


def load(folder: Path) -> Any:
    with models.quiet():
        return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def recipe() -> PeftRecipe:
    found = load_adapter("lora/r8_attention")
    assert isinstance(found, PeftRecipe)
    return found


def states(role: roles.Role) -> torch.Tensor:
    with torch.no_grad(), role.playing() as model:
        return rollouts.hidden_states(model, MADE)


def disturb(parameters: dict[str, torch.nn.Parameter]) -> None:
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(torch.randn_like(parameter))


def test_elsewhere_the_policys_adapter_lands_in_a_reward_model_on_the_same_backbone(llama: Path) -> None:
    policy = load(llama)
    with models.quiet():
        reward = transformers.AutoModelForSequenceClassification.from_pretrained(llama, num_labels=1).eval()
        reward.model = policy.model  # one backbone for both
        ids = torch.tensor([[5, 6, 7, 10]])
        with torch.no_grad():
            before = reward(input_ids=ids).logits.clone()
        wrapped = peft.get_peft_model(
            policy, peft.LoraConfig("CAUSAL_LM", target_modules=["q_proj", "v_proj"])
        )
    disturb({n: p for n, p in wrapped.named_parameters() if "lora_B" in n})  # what training the policy does
    with torch.no_grad():
        assert not torch.allclose(reward(input_ids=ids).logits, before)


def test_here_no_part_moves_with_the_policy(llama: Path, tmp_path: Path) -> None:
    sft, reward = sft_adapter(llama, tmp_path / "sft"), reward_folder(llama, tmp_path / "reward")
    config = peft.PeftConfig.from_pretrained(str(sft))
    from ptft_hf.adapters import recipe_of_config

    parts = roles.on_one_base(load(llama), recipe_of_config(config), sft, rewards=[reward])
    scorer = parts.scorers[reward]
    others = (parts.reference, parts.critic, scorer)
    before = [states(role) for role in others]
    policy = states(parts.policy)
    assert torch.equal(policy, before[0])  # the policy starts from the reference
    disturb(parts.trained()["policy"])
    assert not torch.allclose(states(parts.policy), policy)
    assert all(torch.equal(states(role), one) for role, one in zip(others, before, strict=True))
    disturb(parts.trained()["critic"])
    assert not torch.allclose(states(parts.critic), before[1])
    assert torch.equal(states(scorer), before[2]) and torch.equal(states(parts.reference), before[0])


def test_without_an_sft_adapter_the_reference_is_the_base_itself(llama: Path) -> None:
    parts = roles.on_one_base(load(llama), recipe())
    disturb(parts.trained()["policy"])
    plain = roles.Role(load(llama))
    assert torch.equal(states(parts.reference), states(plain))
    assert not torch.allclose(states(parts.policy), states(plain))


def test_playing_leaves_what_is_trained_trained_and_what_is_frozen_frozen(
    llama: Path, tmp_path: Path
) -> None:
    reward = reward_folder(llama, tmp_path / "reward")
    parts = roles.on_one_base(load(llama), recipe(), rewards=[reward])
    model = parts.policy.model
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {n.split(".")[-2] for n, on in flags.items() if on} == {"default", "critic"}
    for role in parts.all:
        with role.playing():
            assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
        assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
        assert model.active_adapter == "default"
    # PEFT's own switch would have made the reward trainable, and frozen the policy.
    model.set_adapter("reward_1")
    assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad} == {"reward_1"}


def test_an_error_inside_leaves_the_model_as_it_was(llama: Path) -> None:
    parts = roles.on_one_base(load(llama), recipe())
    before = states(parts.policy)
    for role in (parts.reference, parts.critic):
        with pytest.raises(ZeroDivisionError), role.playing():
            1 / 0  # noqa: B018
        assert torch.equal(states(parts.policy), before)


def test_parts_on_one_base_do_not_play_inside_each_other(llama: Path) -> None:
    parts = roles.on_one_base(load(llama), recipe())
    refused = pytest.raises(RuntimeError, match="play one after the other")
    with parts.policy.playing(), refused, parts.reference.playing():
        pass
    with parts.policy.playing():  # and the refusal has not spoilt anything
        pass


def test_the_critics_gradients_reach_the_critic_alone(llama: Path) -> None:
    parts = roles.on_one_base(load(llama), recipe())
    with parts.critic.playing():
        parts.critic.values(MADE).sum().backward()
    trained = parts.trained()
    assert all(p.grad is None for p in trained["policy"].values())
    assert all(p.grad is not None for p in trained["critic"].values())


def test_a_head_on_the_policys_trunk(llama: Path) -> None:
    parts = roles.on_one_base(load(llama), recipe(), value_model="policy_trunk")
    assert parts.shares_trunk
    assert set(parts.trained()["critic"]) == {"score.weight", "score.bias"}
    assert set(parts.policy.model.peft_config) == {"default"}


def test_a_reward_adapter_is_known_by_base_method_and_head(llama: Path, tmp_path: Path) -> None:
    folder = reward_folder(llama, tmp_path / "reward")
    assert roles.is_reward_adapter(folder, str(llama), "LORA")
    assert not roles.is_reward_adapter(folder, str(llama), "IA3")
    assert not roles.is_reward_adapter(folder, str(tmp_path), "LORA")
    assert not roles.is_reward_adapter(sft_adapter(llama, tmp_path / "sft"), str(llama), "LORA")


def test_a_reward_adapter_that_is_pickled_or_broken_is_refused(llama: Path, tmp_path: Path) -> None:
    folder = reward_folder(llama, tmp_path / "reward")
    weights = folder / "adapter_model.safetensors"
    torch.save(load_file(weights), folder / "adapter_model.bin")
    weights.write_bytes(b"cut off")
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors: a file"):
        roles.is_reward_adapter(folder, str(llama), "LORA")
    weights.unlink()
    with pytest.raises(ModelError, match=r"has no adapter_model\.safetensors, and other formats.* are not read"):
        roles.is_reward_adapter(folder, str(llama), "LORA")
    (folder / "adapter_config.json").write_text('{"peft_type": ')
    with pytest.raises(CheckpointError, match=r"adapter_config.json: not readable as JSON"):
        roles.is_reward_adapter(folder, str(llama), "LORA")


def test_several_rewards_and_the_judge_are_adapters_on_the_one_base(llama: Path, tmp_path: Path) -> None:
    folders = [reward_folder(llama, tmp_path / f"reward{seed}", seed) for seed in (3, 4, 5)]
    given = [str(folders[0]), f"-0.5*{folders[1]}"]
    run = make_run(llama, tmp_path / "run", given, judge=str(folders[2]), adapter=LORA)
    assert list(run.roles.scorers) == folders
    assert {id(role.model) for role in run.roles.all} == {id(run.roles.policy.model)}
    batch, _ = run.answer(run.next_prompts(), run.uniforms(run.batch))
    assert run.ready.judge is not None
    found = [*run.ready.reward.parts(batch).values(), *run.ready.judge.parts(batch).values()]
    for folder, scores in zip(folders, found, strict=True):
        assert scores == pytest.approx(StandAlone(llama, folder)(batch), rel=1e-5, abs=1e-6)
    assert run.ready.reward(batch) == pytest.approx([a - 0.5 * b for a, b in zip(*found[:2], strict=True)])
    # The critic starts from the first reward, and the judge's weights are nobody's start.
    critic, first = run.roles.critic, run.roles.scorers[folders[0]]
    assert critic.head is not None and first.head is not None
    assert torch.equal(critic.head.weight, first.head.weight)
    before = {name: value.clone() for name, value in run.roles.policy.model.state_dict().items() if "reward_" in name}
    assert {name.split("reward_")[1][0] for name in before} == {"1", "2", "3"}
    run.learn()
    after = run.roles.policy.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    # A judge alone gives the critic no start.
    alone = make_run(llama, tmp_path / "alone", length, judge=str(folders[2]), adapter=LORA)
    assert list(alone.roles.scorers) == folders[2:]
    assert alone.roles.critic.head is not None and not alone.roles.critic.head.weight.any()
