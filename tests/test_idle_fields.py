"""Fields of recipes that TRL's trainers and PPO know nothing of are refused where they are set."""
# ruff: noqa: F811 - a fixture is imported, and then named as a parameter

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from ptft_hf.errors import RecipeError
from ptft_hf.recipes import PeftRecipe, catalogue, load_adapter
from ptft_hf.recipes.algorithms import ALGORITHMS, METHODS, load_algorithm
from ptft_hf.recipes.ppo import load_ppo
from tests.commands import Ptft, ptft  # noqa: F401

LORA = "lora/r8_attention"
EVERYWHERE = (
    ("adapter.head_learning_rate=0.1", "0.1"),
    ("adapter.gradual_unfreezing=true", "true"),
    ("adapter.frozen_cache_gb=8.0", "8.0"),
    ("task.max_truncated=0.5", "0.5"),
    ("task.add_tokens=[x]", "['x']"),
    ("task.early_stopping_patience=2", "2"),
)
DROPOUT = (("adapter.trunk_dropout=true", "true"), ("adapter.lora_dropout=0.1", "0.1"))


def task_of(algorithm: str) -> str:
    paired = algorithm in ALGORITHMS and ALGORITHMS[algorithm].family == "preference"
    return "preference/hh_rlhf" if paired else "prompts/tldr"


def problems(
    algorithm: str, sets: Sequence[str] = (), adapter: str | PeftRecipe = LORA, further: bool = False
) -> list[str]:
    task = task_of(algorithm)
    try:
        if algorithm == "ppo":
            load_ppo(task, adapter, sets, further=further)
        else:
            load_algorithm(algorithm, task, adapter, sets, further=further)
    except RecipeError as error:
        return list(error.problems)
    return []


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, "ppo"])
def test_all_fields_without_effect_are_told_at_once_with_all_other_faults(algorithm: str) -> None:
    pairs = [*EVERYWHERE, *(() if algorithm in ("grpo", "rloo") else DROPOUT)]
    found = problems(algorithm, [pair for pair, _ in pairs], "lora/r16_all_linear")
    run = "PPO" if algorithm == "ppo" else f"--algorithm {algorithm}"
    assert len(found) == len(pairs)
    for pair, value in pairs:
        place = pair.partition("=")[0]
        assert any(fault.startswith(f"--set {place}: {value} has no effect with {run}") for fault in found), pair
    of_another = problems(algorithm, ["adapter.gradual_unfreezing=true"], "bottleneck/pfeiffer")
    assert any("gradual_unfreezing" in fault for fault in of_another)
    assert any("not bottleneck" in fault or "not with bottleneck" in fault for fault in of_another)


def test_rates_by_depth_have_no_effect_in_ppo_and_loraplus_is_named_by_its_recipe() -> None:
    said = "--set adapter.layerwise_lr_decay: 0.9 has no effect with PPO; leave it out"
    assert problems("ppo", ["adapter.layerwise_lr_decay=0.9"]) == [said]
    said = "lora/loraplus: loraplus_lr_ratio: 16.0 has no effect with PPO; leave it out"
    assert problems("ppo", (), "lora/loraplus") == [said]
    assert "--set adapter.training: has no effect" in problems("ppo", ["adapter.training.learning_rate=1"])[0]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_rates_and_dropout_that_have_an_effect_are_taken(algorithm: str) -> None:
    assert problems(algorithm, ["adapter.layerwise_lr_decay=0.9"]) == []
    off = ["algorithm.disable_dropout=false"]
    assert problems(algorithm, [*off, "adapter.trunk_dropout=true", "adapter.lora_dropout=0.1"]) == []


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_ppos_options_are_refused_of_other_algorithms_where_set_names_them(algorithm: str) -> None:
    sets = ["task.ppo.kl_coef=0.1", "task.ppo.temperature=0.5"]
    said = f"--set task.ppo.kl_coef: 0.1 has no effect with --algorithm {algorithm}; leave it out"
    assert problems(algorithm, sets) == [said]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_label_smoothing_is_not_that_of_trls_losses(algorithm: str) -> None:
    said = f"training.label_smoothing_factor: 0.1 has no effect with --algorithm {algorithm}; leave it out"
    assert problems(algorithm, ["label_smoothing_factor=0.1"]) == [said]


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, "ppo"])
def test_recipes_of_the_catalogue_are_taken_where_they_can_be(algorithm: str) -> None:
    refused = {name for name in catalogue("adapters") if problems(algorithm, (), name)}
    others = {name for name in catalogue("adapters") if name.partition("/")[0] in ("bottleneck", "partial")}
    quantized = {"lora/qlora_int8", "lora/qlora_nf4"}  # which need a package
    recipes = {name: load_adapter(name) for name in catalogue("adapters")}
    methods = {n for n, recipe in recipes.items() if isinstance(recipe, PeftRecipe) and recipe.peft_type in METHODS}
    of_ppo = {"lora/loraplus", "lora/pissa", "p_tuning/tokens20", "prompt/tokens20"}
    assert refused - quantized == others | methods | (of_ppo if algorithm == "ppo" else set())
    family = task_of(algorithm).partition("/")[0]
    for task in [name for name in catalogue("tasks") if name.startswith(f"{family}/")]:
        if algorithm == "ppo":
            load_ppo(task, LORA)
        else:
            load_algorithm(algorithm, task, LORA)


def test_methods_of_which_ppo_cannot_put_several_on_one_base_are_told_with_all_other_faults() -> None:
    import peft

    refused, prompts = set(), set()
    for method, config in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items():
        if (name := method.value) == "XLORA":  # of which there are no recipes
            continue
        recipe = PeftRecipe(name="mine", family=name.lower(), peft_type=name, frozen_cache_gb=8.0)
        *found, idle = problems("ppo", (), recipe)
        assert idle.startswith("mine: frozen_cache_gb: 8.0 has no effect")
        assert problems("ppo", (), recipe, further=True) == found
        refused |= {name for fault in found if f"mine: {name} cannot play several parts" in fault}
        prompts |= {name} if issubclass(config, peft.PromptLearningConfig) else set()
    assert refused == prompts | {"ADALORA", "ADAPTION_PROMPT"}


def test_a_lora_that_begins_by_changing_the_base_is_refused_unless_it_has_begun() -> None:
    recipe = PeftRecipe(name="mine", family="lora", peft_type="LORA", config={"init_lora_weights": "pissa"})
    (fault,) = problems("ppo", (), recipe)
    assert fault.startswith("mine: init_lora_weights: 'pissa' changes the base, which all parts of PPO share")
    assert problems("ppo", (), recipe, further=True) == []
    assert problems("ppo", (), recipe.model_copy(update={"config": {"init_lora_weights": "gaussian"}})) == []


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, "ppo"])
def test_how_an_adapter_was_trained_before_is_no_fault_of_the_run_that_trains_it_further(algorithm: str) -> None:
    fields = {"loraplus_lr_ratio": 4.0, "gradual_unfreezing": True, "trunk_dropout": True}
    recipe = PeftRecipe(name="sft", family="lora", peft_type="LORA", config={"lora_dropout": 0.1}, **fields)
    assert len(problems(algorithm, (), recipe)) == {"ppo": 4, "dpo": 3, "kto": 3}.get(algorithm, 1)
    assert problems(algorithm, (), recipe, further=True) == []
    (fault,) = problems(algorithm, ["adapter.frozen_cache_gb=1.0"], recipe, further=True)
    assert fault.startswith("--set adapter.frozen_cache_gb: 1.0 has no effect")


def test_the_folder_of_an_adapter_is_an_earlier_run(tmp_path: Path) -> None:
    from ptft_hf.rlhf.by_trl import train_by_trl
    from ptft_hf.rlhf.preparing import make_plan
    from tests.ppo_runs import length, recipe

    adapter = PeftRecipe(name="sft", family="lora", peft_type="LORA", gradual_unfreezing=True).model_dump(mode="json")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}', encoding="utf-8")
    run = {"adapter": adapter, "model": {"reference": "base"}}
    (tmp_path / "run.json").write_text(json.dumps(run), encoding="utf-8")
    assert make_plan(tmp_path, length, recipe(), None, None, 1, {}).adapter.gradual_unfreezing
    cut = {**run, "adapter": load_adapter("adalora/r12_to_8").model_dump(mode="json")}
    (tmp_path / "run.json").write_text(json.dumps(cut), encoding="utf-8")
    with pytest.raises(RecipeError, match="ADALORA cannot play several parts"):
        make_plan(tmp_path, length, recipe(), None, None, 1, {})
    (tmp_path / "run.json").write_text(json.dumps(run), encoding="utf-8")
    asked = {"model": "base", "task": "preference/hh_rlhf", "output_dir": tmp_path / "out", "reward": length}
    with pytest.raises(RecipeError) as caught:
        train_by_trl(algorithm="dpo", adapter=str(tmp_path), **asked)
    assert caught.value.problems == ("reward: dpo learns from preferences, without rewards; leave it out",)


@pytest.mark.parametrize("algorithm", [None, "dpo"])
def test_the_command_line_names_them_and_writes_nothing(algorithm: str | None, ptft: Ptft, tmp_path: Path) -> None:
    sets = ("--set", "adapter.frozen_cache_gb=8.0", "--set", "task.early_stopping_patience=2")
    output = ("--output", tmp_path / "out", *sets)
    if algorithm is None:
        done = ptft("ppo", "--policy", "m", "--reward", "r", "--task", "prompts/tldr", *output)
    else:
        trained = ("--model", "m", "--task", "preference/hh_rlhf", "--adapter", LORA)
        done = ptft("train", "--algorithm", algorithm, *trained, *output)
    assert (done.code, done.out) == (2, "")
    said = " ".join(done.err.split())
    for place in ("adapter.frozen_cache_gb: 8.0", "task.early_stopping_patience: 2"):
        assert f"--set {place} has no effect with {'--algorithm dpo' if algorithm else 'PPO'}; leave it out" in said
    assert not list(tmp_path.iterdir())
