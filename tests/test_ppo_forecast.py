"""What PPO will take: sums by hand, and that a forecast never harms a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from ptft_hf.errors import ModelError, RecipeError
from ptft_hf.planning import Forecast, machine, memory
from ptft_hf.rlhf import forecasting
from tests.commands import Ptft, ptft  # noqa: F401
from tests.ppo_runs import (
    LORA,
    QUICK,
    length,
    make_language_model,
    metrics,
    prompts,
    recipe,
    reward_folder,
    run_ppo,
    task_file,
)
from tests.tiny import make_checkpoint

# ruff: noqa: F811 - fixtures are imported, and then named as parameters


def planned(
    policy: Path, reward: Any = length, adapter: Any = LORA, limit: int = 10**12, judge: Any = None, **settings: Any
) -> Forecast:
    return forecasting.plan_ppo(
        policy=policy,
        reward=reward,
        task=recipe(),
        adapter=adapter,
        judge=judge,
        data=prompts(),
        settings={**QUICK, **settings},
        memory=limit,
    )


def numbers(folder: Path) -> int:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def one_of(found: Forecast) -> int:
    """Bytes of a checkpoint."""
    return found.disk["policy and critic"] - forecasting.TOKENIZER_FILES + found.stages["learning"]["optimizer"]


def test_terms_are_those_of_a_hand(llama: Path) -> None:
    base = numbers(llama)
    config = transformers.AutoConfig.from_pretrained(llama)
    h, layers, r = config.hidden_size, config.num_hidden_layers, 8
    kv = h // config.num_attention_heads * config.num_key_value_heads
    adapter = layers * r * ((h + h) + (h + kv))  # PEFT's choice for this architecture: queries and values
    head = h + 1
    found = planned(llama)
    learning, writing = found.stages["learning"], found.stages["answers"]
    # The policy's adapter and the critic's; the reference is the bare base.
    assert learning["weights"] == pytest.approx(4 * (base + 2 * adapter + head), rel=0.002)  # and a few buffers
    trained = 2 * adapter + head
    assert learning["optimizer"] == pytest.approx(2 * 4 * trained, rel=0.02)  # two moments, and the steps
    assert found.disk["policy and critic"] - forecasting.TOKENIZER_FILES == 4 * trained
    # Eight prompts of up to n tokens, six more, and room for STEPS: keys and values of each layer; logits as they are
    # and twice in double precision beside the chances.
    n = found.longest[1] - 6
    kept = 8 * (n + 6 + forecasting.STEPS) * 2 * layers * kv * 4
    assert writing["texts being written"] == kept + 8 * config.vocab_size * (4 + 3 * 8)
    assert found.steps == 5 * 4 and found.longest[0] == 4


def test_what_costs_more_is_forecast_to(llama: Path) -> None:
    adapter, trunk = planned(llama), planned(llama, value_model="policy_trunk")
    full = planned(llama, adapter="full/default", learning_rate=1e-4)
    accumulated = planned(llama, gradient_accumulation_steps=2, num_mini_batches=1)
    larger = planned(llama, per_device_train_batch_size=8, num_mini_batches=1)
    assert trunk.stages["learning"]["optimizer"] < adapter.stages["learning"]["optimizer"]
    assert full.stages["learning"]["weights"] > 2.5 * adapter.stages["learning"]["weights"]
    terms, more = adapter.stages["learning"], accumulated.stages["learning"]
    assert more["gradients"] > terms.get("gradients", 0)
    assert larger.stages["learning"]["activations"] > 1.7 * terms["activations"]
    assert planned(llama, save_steps=2, save_total_limit=5).disk["checkpoints"] == 3 * one_of(adapter)
    checkpoints = planned(llama, save_steps=1)
    assert checkpoints.disk["checkpoints"] == checkpoints.disk["being written"] == one_of(adapter)


def test_a_reward_on_the_base_is_counted_once_and_another_model_for_itself(llama: Path, tmp_path: Path) -> None:
    alone = planned(llama)
    reward = str(reward_folder(llama, tmp_path / "reward"))
    on_base = planned(llama, reward)
    assert forecasting.REWARDS not in on_base.stages["loading"]
    same = planned(llama, reward, judge=reward).stages["loading"]
    assert forecasting.REWARDS not in same and same["weights"] == on_base.stages["loading"]["weights"]
    two = planned(llama, reward, judge=str(reward_folder(llama, tmp_path / "judge", 4))).stages["loading"]
    assert forecasting.REWARDS not in two and two["weights"] > on_base.stages["loading"]["weights"]
    # In full it is a model of its own.
    full = planned(llama, reward, "full/default", learning_rate=1e-4)
    assert full.stages["loading"][forecasting.REWARDS] == 4 * numbers(llama)
    assert on_base.stages["loading"]["weights"] > alone.stages["loading"]["weights"]
    other = make_checkpoint("bert", tmp_path / "bert", auto="AutoModelForSequenceClassification")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(other)
    size = sum(p.numel() for p in model.parameters())
    found = planned(llama, [f"{other}#LABEL_1", length])
    assert found.stages["loading"][forecasting.REWARDS] == 4 * size
    assert "what a reward in Python holds is not known" in found.notes
    assert "of rewards that are models of their own the weights are counted alone" in found.notes
    assert not [note for note in on_base.notes if "reward" in note]
    assert "no reward was named" in planned(llama, []).notes
    missing = planned(llama, ["runs/nowhere", length])
    assert "runs/nowhere: its weights are not at hand, and not counted" in missing.notes
    with pytest.raises(RecipeError, match=r"--reward no\.such:f: cannot be imported"):
        planned(llama, "no.such:f")


def test_code_of_an_earlier_run_is_not_counted_again(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = []
    for code in (0, machine.KEPT_KERNELS):
        monkeypatch.setattr(machine, "_with_code", code)
        record = run_ppo(llama, tmp_path / str(code), adapter=LORA, bf16=True, total_episodes=8)
        counted.append(record["forecast"]["stages_mb"]["learning"].get(memory.KERNELS, 0))
    assert counted[0] > 0 and counted[1] == 0


def test_a_run_says_what_was_forecast_and_is_the_same_with_it(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record = run_ppo(llama, tmp_path / "with", adapter=LORA)
    said = record["forecast"]
    assert said["steps"] == 20 and said["stages_mb"]["learning"]["activations"] > 0
    assert "forecast: peak memory" in capsys.readouterr().out

    def broken(*_: Any) -> None:
        raise ValueError("cannot be counted")

    monkeypatch.setattr(forecasting, "_count", broken)
    record = run_ppo(llama, tmp_path / "without", adapter=LORA)
    assert record["forecast"] is None
    assert "no forecast of memory: ValueError: cannot be counted" in capsys.readouterr().err
    assert metrics(tmp_path / "with") == metrics(tmp_path / "without")
    with pytest.raises(ModelError, match=r"cannot be run without its weights.*cannot be counted"):
        planned(llama)


def test_a_policy_that_is_an_adapter_brings_its_reference(llama: Path, tmp_path: Path) -> None:
    run_ppo(llama, tmp_path / "run", adapter=LORA, total_episodes=8)
    new, further = planned(llama), planned(tmp_path / "run", adapter=None)
    assert further.stages["loading"]["weights"] > new.stages["loading"]["weights"]


def test_the_command(ptft: Ptft, llama: Path, tmp_path: Path) -> None:
    task = task_file(tmp_path)
    flags = ["--policy", llama, "--task", task]
    shown = ptft("plan", *flags, "--memory", "64GiB")
    assert shown.code == 0, shown.err
    assert "it fits in 68,719 MB" in shown.out and "of PPO there is no forecast of time" in shown.out
    found = json.loads(ptft("plan", *flags, "--reward", "tests.ppo_runs:length", "--json").out)
    assert found["seconds"] is None and found["peak_memory_mb"] > found["stages_mb"]["loading"]["baseline"]
    for wrong, message in (
        (["--task", task], "name one: --model"),
        ([*flags, "--model", llama], "name one: --model"),
        ([*flags, "--probe"], "--probe: has no effect with --policy"),
        (["--model", llama, "--task", task, "--reward", "x:y"], "--adapter: is missing"),
    ):
        refused = ptft("plan", *wrong)
        assert refused.code != 0 and message in refused.err, refused.err


def test_in_bfloat16_the_base_is_half_as_large_and_kernels_are_counted(llama: Path) -> None:
    single, half = planned(llama), planned(llama, bf16=True)
    base = numbers(llama)
    difference = single.stages["loading"]["weights"] - half.stages["loading"]["weights"]
    assert difference == pytest.approx(2 * base, rel=0.01)
    assert "kernels' code" in half.stages["learning"] and "kernels' code" not in single.stages["learning"]
    for found, constants in ((single, memory.FLOAT), (half, memory.HALF)):
        terms = found.stages["learning"]
        assert terms[memory.LIBRARIES] == constants.libraries
        held = sum(terms.get(kind, 0) for kind in ("activations", "logits", "gradients", "precision copies"))
        assert 0.1 * constants.holes * held < terms[memory.ALLOCATOR] <= round(constants.holes * held)


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "gemma"])
def test_of_other_decoders(name: str, tmp_path: Path) -> None:
    folder = make_language_model(name, tmp_path / name)
    found = planned(folder)
    assert found.stages["loading"]["weights"] > 4 * numbers(folder)
    assert found.fits and not planned(folder, limit=10**6).fits


def test_bad_settings_are_refused_before_anything_is_counted(llama: Path) -> None:
    with pytest.raises(RecipeError, match="kl_coeff"):
        planned(llama, kl_coeff=0.1)
