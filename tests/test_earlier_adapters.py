"""PPO and TRL's trainers from an adapter that was trained before: on its base, and on no other."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import ptft_hf
from ptft_hf.errors import AdapterError, PtftError
from ptft_hf.recipes import task_from_dict
from ptft_hf.rlhf import by_trl
from tests import test_by_trl
from tests.ppo_runs import change_weights, characters, run_ppo
from tests.test_instruction import TALK, checkpoint

pytestmark = test_by_trl.pytestmark


class Earlier(NamedTuple):
    """An SFT run on ``base``; ``other`` has the base's shape and other weights."""

    base: Path
    other: Path
    sft: Path


def make_sft(base: Path, folder: Path, **fields: Any) -> Path:
    table = datasets.Dataset.from_list([{"messages": TALK}] * 4)
    ptft_hf.train(
        model=str(base),
        task=task_from_dict({"name": "sft", "family": "instruction", **fields}),
        adapter="lora/r16_all_linear",
        output_dir=folder,
        data=datasets.DatasetDict({name: table for name in ("train", "validation", "test")}),
        settings={"max_steps": 1, "model.max_length": 100},
    )
    return folder


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Earlier:
    root = tmp_path_factory.mktemp("earlier")
    base, other = checkpoint(root / "base"), checkpoint(root / "other")
    model = transformers.AutoModelForCausalLM.from_pretrained(other)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(other)
    return Earlier(base, other, make_sft(base, root / "sft"))


def ppo(policy: Path, folder: Path, **given: Any) -> dict[str, Any]:
    data = test_by_trl.prompts()
    task = task_from_dict({"name": "test", "family": "prompts"})
    return run_ppo(policy, folder, characters, task=task, data=data, total_episodes=8, **given)


def test_dpo_on_another_base_is_refused(earlier: Earlier, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=f"was trained on another base .{earlier.base}, in float32"):
        test_by_trl.run("dpo", earlier.other, tmp_path / "run", str(earlier.sft))
    assert not (tmp_path / "run").exists()


def test_ppo_on_a_base_that_has_changed_is_refused(earlier: Earlier, tmp_path: Path) -> None:
    weights = "model.safetensors"
    before = (earlier.base / weights).read_bytes()
    (earlier.base / weights).write_bytes((earlier.other / weights).read_bytes())
    try:
        with pytest.raises(AdapterError, match="was trained on another base"):
            ppo(earlier.sft, tmp_path / "run")
    finally:
        (earlier.base / weights).write_bytes(before)
    assert not (tmp_path / "run").exists()


def test_the_same_base_in_another_dtype_is_no_other(earlier: Earlier, tmp_path: Path) -> None:
    found = ppo(earlier.sft, tmp_path / "ppo", bf16=True)
    assert found["model"]["dtype"] == "bfloat16"
    test_by_trl.run("dpo", earlier.base, tmp_path / "dpo", str(tmp_path / "ppo"))


def test_a_stopped_run_does_not_go_on_from_an_adapter_that_has_changed(
    earlier: Earlier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(self: Any) -> None:
        raise KeyboardInterrupt

    sft = shutil.copytree(earlier.sft, tmp_path / "sft")
    saved = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(by_trl.Run, "finish", die)
        test_by_trl.run("dpo", earlier.base, tmp_path / "run", str(sft), settings=saved)
    change_weights(sft)
    with pytest.raises(PtftError, match="contents"):
        test_by_trl.run("dpo", earlier.base, tmp_path / "run", str(sft), settings=saved, resume=True)


@pytest.mark.parametrize("given", ["base", "other"])
def test_an_adapter_of_plain_peft_is_trained_further_on_its_own_base(
    given: str, earlier: Earlier, tmp_path: Path
) -> None:
    plain = tmp_path / "plain"
    model = transformers.AutoModelForCausalLM.from_pretrained(earlier.base)
    config = peft.LoraConfig("CAUSAL_LM", r=4, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(plain)
    if given == "other":
        with pytest.raises(AdapterError, match=f"was trained on {earlier.base}, not on {earlier.other}"):
            test_by_trl.run("dpo", earlier.other, tmp_path / "run", str(plain))
        assert not (tmp_path / "run").exists()
        return
    found = test_by_trl.run("dpo", earlier.base, tmp_path / "run", str(plain))
    assert found["adapter"]["config"]["r"] == 4
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (plain, tmp_path / "run"))
    assert one.keys() == other.keys() and any(not torch.equal(one[name], other[name]) for name in one)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)  # it is the reference
