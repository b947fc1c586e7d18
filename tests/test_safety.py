"""What strangers' checkpoints, adapters and run folders may not do: run code, or have pickles read."""

# ruff: noqa: F811 - fixtures are imported, and then named as parameters

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
import transformers.dynamic_module_utils
from safetensors.torch import load_file

import ptft_hf
from ptft_hf import adapters, exporting, inference, models, recipes
from ptft_hf.errors import CheckpointError, ModelError, PtftError, RecipeError
from ptft_hf.rlhf import rewards
from ptft_hf.rlhf.decoders import load_decoder
from tests.commands import Ptft, ptft  # noqa: F401
from tests.finished import Finished, lora  # noqa: F401
from tests.ppo_runs import make_language_model, run_ppo, sft_adapter
from tests.runs import short_run
from tests.tiny import make_checkpoint

# PEFT asks a transformers model for an attribute that was renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
TRUSTED = {"model.trust_remote_code": True}
METHODS = {"full": "full/default", "lora": "lora/r8_attention"}
CODE = """
from pathlib import Path

from transformers import BertConfig, BertForSequenceClassification

Path({trace!r}).touch()


class OwnConfig(BertConfig):
    model_type = "own"


class OwnClassifier(BertForSequenceClassification):
    config_class = OwnConfig
"""
SEQ_CLS = "AutoModelForSequenceClassification"


@pytest.fixture(scope="module", autouse=True)
def modules(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Upstream copies the code that it runs here, and not into the home folder."""
    with pytest.MonkeyPatch.context() as patch:
        place = str(tmp_path_factory.mktemp("modules"))
        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", place)
        yield


def own_code(folder: Path, trace: Path) -> Path:
    """Code in a checkpoint that leaves a trace when it is run."""
    (folder / "own.py").write_text(CODE.format(trace=str(trace)), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose architecture is its own Python code."""
    root = tmp_path_factory.mktemp("own")
    folder = own_code(make_checkpoint("bert", root / "own"), root / "trace")
    classes = {"AutoConfig": "own.OwnConfig", SEQ_CLS: "own.OwnClassifier"}
    change(folder / "config.json", model_type="own", auto_map=classes)
    return folder


@pytest.fixture(scope="module")
def runs(own: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs on it, trained with its code trusted."""
    root = tmp_path_factory.mktemp("runs")
    for name, adapter in METHODS.items():
        assert short_run(own, adapter, root / name, **TRUSTED).run["proof"]["max_difference"] == 0.0
    return {name: root / name for name in METHODS}


def change(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), **fields}), encoding="utf-8")


def with_options(folder: Path, **options: Any) -> Path:
    """A run whose ``run.json`` says more of ``from_pretrained``'s options; no manifest holds it to what it was."""
    facts = json.loads((folder / "run.json").read_text("utf-8"))["model"]
    change(folder / "run.json", model={**facts, "options": {**facts["options"], **options}})
    (folder / "manifest.json").unlink(missing_ok=True)
    return folder


# ---- code ----


@pytest.mark.parametrize("name", METHODS)
def test_a_run_is_loaded_with_its_checkpoints_code_where_that_is_trusted_alone(name: str, runs: dict[str, Path]):
    with pytest.raises(CheckpointError) as caught:
        ptft_hf.load(runs[name])
    message = str(caught.value)
    assert message.startswith(f"{runs[name]}: its run.json turns trust_remote_code on")
    assert "--trust-remote-code; in Python trust_remote_code=True" in message
    base = json.loads((runs[name] / "run.json").read_text("utf-8"))["model"]["reference"]
    assert (base in message) == (name == "lora")  # a whole model's code is its own
    (answer,) = ptft_hf.load(runs[name], trust_remote_code=True).predict(["a good film"])
    assert answer["label"] in ("neg", "pos")


def test_a_strangers_run_does_not_run_its_code(runs: dict[str, Path], tmp_path: Path):
    folder = shutil.copytree(runs["full"], tmp_path / "stranger")
    own_code(folder, tmp_path / "trace")
    with pytest.raises(CheckpointError, match=f"so that Python code of {folder} would run"):
        ptft_hf.load(folder, verify=False)
    assert not (tmp_path / "trace").exists()
    ptft_hf.load(folder, verify=False, trust_remote_code=True)
    assert (tmp_path / "trace").exists()


def test_kernels_from_anywhere_are_code_too(lora: Finished, tmp_path: Path):
    folder = with_options(shutil.copytree(lora.folder, tmp_path / "run"), allow_all_kernels=True)
    with pytest.raises(CheckpointError, match="turns allow_all_kernels on"):
        ptft_hf.load(folder, verify=False)


def test_the_commands_take_the_flag(runs: dict[str, Path], tmp_path: Path, ptft: Ptft):
    text = json.dumps({"text": "a good film", "label": "pos"}) + "\n"
    (tmp_path / "test.jsonl").write_text(text, encoding="utf-8")
    run, trust = runs["lora"], "--trust-remote-code"
    commands: list[list[Any]] = [
        ["predict", run, "a good film"],
        ["evaluate", run, "--data", tmp_path / "test.jsonl"],
        ["merge", run, "--output", tmp_path / "merged"],
        ["export", run, "--output", tmp_path / "exported"],
    ]
    for command in commands:
        refused = ptft(*command)
        assert (refused.code, refused.err.count("trust_remote_code on")) == (2, 1), refused.err
        done = ptft(*command, trust)
        assert done.code == 0, done.err
    both = ptft("evaluate", run, "--against", run, "--judge", run, "--task", "prompts/tldr", trust)
    assert both.code == 2 and "--set model.trust_remote_code=true" in both.err


def test_in_python_too(runs: dict[str, Path], tmp_path: Path):
    rows = datasets.Dataset.from_list([{"text": "a good film", "label": "pos"}])
    for call in (
        lambda **given: ptft_hf.evaluate(runs["full"], rows, **given),
        lambda **given: inference.merge(runs["lora"], tmp_path / "merged", **given),
        lambda **given: exporting.export(runs["full"], tmp_path / "exported", **given),
    ):
        with pytest.raises(CheckpointError, match="trust_remote_code on"):
            call()
        assert call(trust_remote_code=True)


def test_a_finished_run_is_resumed_if_its_recipe_trusts_the_code(own: Path, runs: dict[str, Path]):
    short_run(own, METHODS["full"], runs["full"], resume=True, **TRUSTED)
    with pytest.raises(CheckpointError, match="trust_remote_code on"):
        short_run(own, METHODS["full"], runs["full"], resume=True)


def test_an_adapter_is_trained_further_if_the_new_recipe_trusts_the_code(
    own: Path, runs: dict[str, Path], tmp_path: Path
):
    with pytest.raises(ModelError, match=f"{own}: needs Python code .*--set model.trust_remote_code=true"):
        short_run(own, runs["lora"], tmp_path / "further")
    assert short_run(own, runs["lora"], tmp_path / "further", **TRUSTED).run["model"]["options"] == {
        "trust_remote_code": True
    }


def test_nobody_is_asked_whether_code_may_run(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = own_code(shutil.copytree(own, tmp_path / "other"), tmp_path / "trace")
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # such as a line of texts on stdin
    with pytest.raises(ModelError, match=f"{folder}: needs Python code that comes with it, which is not run"):
        models.from_pretrained("AutoConfig", str(folder), {})
    assert not (tmp_path / "trace").exists()
    models.from_pretrained("AutoConfig", str(folder), {"trust_remote_code": True})
    assert (tmp_path / "trace").exists()


def test_a_policy_needs_the_recipes_trust(tmp_path: Path):
    run_ppo(make_language_model("llama", tmp_path / "base"), tmp_path / "ppo", total_episodes=8, **TRUSTED)
    with pytest.raises(CheckpointError, match=f"{tmp_path / 'ppo'}: .*of a policy .*model.trust_remote_code=true"):
        load_decoder(str(tmp_path / "ppo"), "float32", {})
    assert load_decoder(str(tmp_path / "ppo"), "float32", {"trust_remote_code": True})


def test_a_reward_that_needs_code_is_given_as_a_function(runs: dict[str, Path]):
    with pytest.raises(CheckpointError, match=f"{runs['lora']}: .*--judge give a function that loads it"):
        rewards.build([f"{runs['lora']}#pos"], lambda _: None, 2)


# ---- pickles ----


@pytest.mark.parametrize("value", [False, None, "no"])
def test_a_recipe_cannot_ask_for_pickles(value: Any):
    run = ("sequence_classification/sst2", "full/default")
    with pytest.raises(RecipeError, match=r"--set model\.use_safetensors: weights are read from safetensors alone"):
        recipes.load_run(*run, [f"model.use_safetensors={json.dumps(value)}"])
    recipes.load_run(*run, ["model.use_safetensors=true"])


def pickled(folder: Path, weights: str, name: str) -> Path:
    torch.save(load_file(folder / weights), folder / name)
    (folder / weights).unlink()
    return folder


def test_no_option_has_pickles_read(tmp_path: Path):
    folder = pickled(make_checkpoint("bert", tmp_path / "bert"), "model.safetensors", "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        models.load_model(str(folder), SEQ_CLS, config={}, use_safetensors=False)


def test_nor_has_a_run_json(lora: Finished, tmp_path: Path):
    base = pickled(shutil.copytree(lora.base, tmp_path / "base"), "model.safetensors", "pytorch_model.bin")
    folder = with_options(shutil.copytree(lora.folder, tmp_path / "run"), use_safetensors=False)
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        ptft_hf.load(folder, model=str(base), verify=False)


@pytest.mark.parametrize("way", ["on its base", "as a policy", "trained further"])
def test_a_pickled_adapter_is_refused_wherever_it_comes_in(way: str, tmp_path: Path):
    base = make_language_model("llama", tmp_path / "base")
    folder = pickled(sft_adapter(base, tmp_path / "sft"), "adapter_model.safetensors", "adapter_model.bin")
    with pytest.raises(PtftError) as caught:
        if way == "on its base":
            adapters.load(models.load_model(str(base), "AutoModelForCausalLM", config={}).model, folder)
        elif way == "as a policy":
            load_decoder(str(folder), "float32", {})
        else:
            run_ppo(folder, tmp_path / "ppo", total_episodes=8)
    message = f"{folder}: has no adapter_model.safetensors, and other formats, which can run code, are not read"
    how = "where you trust adapter_model.bin, load it with PEFT and save it anew (save_pretrained)"
    assert str(caught.value) == f"{message}: {how}"


def test_an_adapter_without_weights_is_no_pickle(lora: Finished, tmp_path: Path):
    folder = shutil.copytree(lora.folder, tmp_path / "run")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has no adapter_model\.safetensors, .* are not read$"):
        ptft_hf.load(folder, verify=False)


# ---- adapters that lead to others ----


@pytest.mark.parametrize("way", ["on its base", "as a policy", "by ppo", "by train"])
def test_an_adapter_that_names_further_ones_is_refused_wherever_it_comes_in(way: str, tmp_path: Path):
    base = make_language_model("llama", tmp_path / "base")
    folder = sft_adapter(base, tmp_path / "mixed")
    others = {"adapters": {"0": str(sft_adapter(base, tmp_path / "one"))}, "hidden_size": 32}
    config = {"peft_type": "XLORA", "base_model_name_or_path": str(base), "task_type": "CAUSAL_LM", **others}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    task = "causal_lm/tinystories"
    with pytest.raises(PtftError) as caught:
        if way == "on its base":
            model = models.load_model(str(base), "AutoModelForCausalLM", config={"use_cache": False}).model
            adapters.load(model, folder)
        elif way == "as a policy":
            load_decoder(str(folder), "float32", {})
        elif way == "by ppo":
            run_ppo(folder, tmp_path / "out")
        else:
            ptft_hf.train(model=str(base), task=task, adapter=str(folder), output_dir=tmp_path / "out")
    assert str(caught.value).startswith(f"{folder}: XLORA mixes adapters of other folders, which PEFT reads")


def test_nor_can_one_be_trained(tmp_path: Path):
    (tmp_path / "mixed.yaml").write_text("family: xlora\nhidden_size: 32\nadapters: {a: owner/name}\n", "utf-8")
    with pytest.raises(RecipeError, match=r"mixed.yaml:1: family: XLORA mixes adapters of other folders"):
        recipes.load_adapter(str(tmp_path / "mixed.yaml"))
    with pytest.raises(RecipeError, match="adapter: XLORA mixes adapters of other folders"):
        adapters.recipe_of_config(peft.XLoraConfig(hidden_size=32, adapters={"a": "owner/name"}))


def test_a_checkpoint_with_an_adapter_beside_it_is_refused(tmp_path: Path):
    base = make_language_model("llama", tmp_path / "base")
    for file in sft_adapter(base, tmp_path / "sft").glob("adapter_*"):
        shutil.copy(file, base)
    with pytest.raises(ModelError, match=r"base: holds an adapter \(adapter_config.json\), and a checkpoint without"):
        models.load_model(str(base), "AutoModelForCausalLM", config={})
