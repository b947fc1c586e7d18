"""Folders of policies, by PPO and by TRL's algorithms, in the hands of the verbs on finished runs."""

# ruff: noqa: F811 - fixtures are imported, and then named as parameters

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from ptft_hf import checkpoints, hub
from ptft_hf.errors import CheckpointError
from ptft_hf.rlhf import merging
from ptft_hf.rlhf.decoders import load_decoder
from tests import hub_stand_in
from tests.commands import Ptft, ptft  # noqa: F401
from tests.ppo_runs import make_language_model, run_ppo, task_file
from tests.test_by_trl import run as run_trl
from tests.test_instruction import checkpoint
from tests.test_model_card import card_of, code_of
from tests.test_push import server  # noqa: F401

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:trl"),
]
IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Finished runs: of PPO with LoRA, of DPO with LoRA and in full, of GRPO with LoRA."""
    root = tmp_path_factory.mktemp("policies")
    bases = {"ppo": make_language_model("llama", root / "base"), "trl": checkpoint(root / "chat")}
    run_ppo(bases["ppo"], root / "ppo", adapter="lora/r16_all_linear", total_episodes=16)
    run_trl("dpo", bases["trl"], root / "dpo")
    run_trl("dpo", bases["trl"], root / "full", "full/default")
    run_trl("grpo", bases["trl"], root / "grpo")
    return {name: root / name for name in ("ppo", "dpo", "full", "grpo")}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(IDS).logits
    return found


@pytest.mark.parametrize("name", ["ppo", "dpo", "grpo"])
def test_verbs_of_tasks_say_what_a_policy_is_and_what_takes_it(
    name: str, policies: dict[str, Path], ptft: Ptft, tmp_path: Path
) -> None:
    folder, out = policies[name], tmp_path / "out"
    prompts = task_file(tmp_path)
    judged = ["--task", prompts, "--judge", folder]
    commands: list[list[Any]] = [
        ["predict", folder, "a text"],
        ["evaluate", folder],
        ["evaluate", folder, "--task", prompts],
        ["export", folder, "--output", out],
        ["export", folder, "--to", "onnx", "--output", out],
        ["ppo", "--policy", folder, "--reward", folder, "--task", prompts, "--output", out],
        ["evaluate", folder, "--against", folder, *judged],
    ]
    for command in commands:
        done = ptft(*command)
        assert (done.code, done.out) == (2, ""), command
        assert f"error: {folder}: is a policy that {name} trained" in done.err
        for way in ("evaluate {} --against DIR --judge SOURCE --task PROMPTS", "merge {}", "ppo --policy {} ..."):
            assert f"`ptft {way.format(folder)}`" in done.err
    assert not out.exists()


def test_what_is_said_of_a_whole_policy_and_of_no_model_at_all_is_so(
    policies: dict[str, Path], ptft: Ptft, tmp_path: Path
) -> None:
    said = ptft("predict", policies["full"], "a text").err
    assert "is a policy that dpo trained" in said and "ptft merge" not in said and "peft" not in said
    done = ptft("merge", policies["full"], "--output", tmp_path / "merged")
    assert done.code == 2 and "this is no adapter but a whole model already" in done.err
    (tmp_path / "run.json").write_text('{"stage": "evaluation", "task": {"family": "prompts"}}', encoding="utf-8")
    for verb in (["predict", tmp_path, "a text"], ["merge", tmp_path, "--output", tmp_path / "merged"]):
        done = ptft(*verb)
        assert done.code == 2
        assert f"error: {tmp_path}: is no run that trained a model for a task" in done.err


@pytest.mark.parametrize("name", ["ppo", "dpo", "full", "grpo"])
def test_the_card_loads_the_policy_by_upstreams_libraries_alone(name: str, policies: dict[str, Path]) -> None:
    folder = policies[name]
    run = checkpoints.read_json(folder / "run.json")
    header, tokens = card_of(folder)
    assert header["library_name"] == ("transformers" if name == "full" else "peft")
    assert header["tags"] == ["ptft_hf", run["stage"]]
    (code,) = code_of(tokens)
    assert "ptft_hf" not in code
    found: dict[str, Any] = {}
    exec(code, found)
    assert torch.equal(logits(found["model"]), logits(load_decoder(str(folder), "float32", {})[0]))
    assert found["tokenizer"]("the film")["input_ids"]
    cells = [tokens[i + 1].content for i, t in enumerate(tokens) if t.type in ("th_open", "td_open")]
    rows = {cells[i]: cells[i + 1 : i + 3] for i in range(0, len(cells), 3)}
    metrics = run["metrics"]
    if name == "ppo":
        assert rows[""] == ["first updates", "last updates"]
        assert rows["score"] == [f"{metrics[end]['objective/scores']:.4f}" for end in ("first", "last")]
    else:
        assert rows[""] == ["validation", "test"] and "runtime" not in rows and "entropy" in rows
        assert rows["loss"] == [f"{metrics[split]['loss']:.4f}" for split in ("validation", "test")]
    assert checkpoints.damage(folder) == []


def test_a_card_names_the_base_as_the_hub_has_it(policies: dict[str, Path]) -> None:
    from ptft_hf.card import model_card

    run = checkpoints.read_json(policies["ppo"] / "run.json")
    run["model"] |= {"reference": "owner/name@v2", "options": {"trust_remote_code": True}, "dtype": "bfloat16"}
    text = model_card(run, "peft")
    assert "base_model: owner/name\n" in text
    assert (
        "from_pretrained('owner/name', config=config, dtype=torch.bfloat16, revision='v2', trust_remote_code=True)"
        ".float()  #"
    ) in text


@pytest.mark.parametrize("name", ["ppo", "dpo"])
def test_a_merged_policy_is_the_policy_and_is_taken_as_one(
    name: str, policies: dict[str, Path], ptft: Ptft, tmp_path: Path
) -> None:
    folder, merged = policies[name], tmp_path / "merged"
    done = ptft("merge", folder, "--output", merged)
    assert done.code == 0, done.err
    assert "merged against adapter on 8 rows of random tokens: logits differ by at most " in done.err
    plain = transformers.AutoModelForCausalLM.from_pretrained(merged)
    policy = load_decoder(str(folder), "float32", {})[0]
    with policy.disable_adapter():
        before = logits(policy)
    assert (logits(plain) - logits(policy)).abs().max() < 1e-4 < (logits(plain) - before).abs().max()
    header, tokens = card_of(merged)
    text = (merged / "README.md").read_text("utf-8")
    assert header["library_name"] == "transformers" and "`critic/`" not in text
    assert "The adapter is merged into its base" in text and (merged / "curves.png").is_file()
    assert checkpoints.damage(merged) == []
    found: dict[str, Any] = {}
    exec(code_of(tokens)[0], found)
    taken = load_decoder(str(merged), "float32", {})[0]
    assert torch.equal(logits(found["model"]), logits(taken))
    again = ptft("merge", folder, "--output", merged)
    assert again.code == 2 and "exists and is not empty" in again.err


def test_the_base_of_a_policy_that_is_merged_may_have_moved(
    policies: dict[str, Path], ptft: Ptft, tmp_path: Path
) -> None:
    folder, base = shutil.copytree(policies["ppo"], tmp_path / "run"), tmp_path / "moved"
    shutil.copytree(policies["ppo"].parent / "base", base)
    run = checkpoints.read_json(folder / "run.json")
    run["model"]["reference"] = str(tmp_path / "gone")
    (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")
    checkpoints.write_manifest(folder)
    done = ptft("merge", folder, "--output", tmp_path / "merged")
    assert done.code == 2 and "say where it is (--model" in done.err
    done = ptft("merge", folder, "--model", base, "--output", tmp_path / "merged")
    assert done.code == 0, done.err
    assert checkpoints.read_json(tmp_path / "merged" / "run.json")["model"]["reference"] == str(base)


def test_a_merge_that_changes_the_policy_writes_nothing(
    policies: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge = merging.inference.TrainedModel.merge

    def wrong(self: Any, base: str) -> Any:
        merged = merge(self, base)
        with torch.no_grad():
            merged.model.lm_head.weight += 0.1
        return merged

    monkeypatch.setattr(merging.inference.TrainedModel, "merge", wrong)
    with pytest.raises(CheckpointError, match="in their logits; nothing was written"):
        merging.merge_policy(policies["ppo"], tmp_path / "merged")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["ppo", "dpo", "full"])
def test_a_policy_is_pushed_with_a_card_that_loads_it_from_the_hub(
    name: str, policies: dict[str, Path], server: hub_stand_in.Hub, tmp_path: Path
) -> None:
    folder = policies[name]
    hub.push(folder, "owner/name")
    uploaded = server.files["owner/name", "main"]
    manifest = checkpoints.read_json(folder / "manifest.json")["files"]
    assert set(uploaded) == {*manifest, "manifest.json"}
    own, card = (folder / "README.md").read_text("utf-8"), uploaded["README.md"].decode()
    assert card == own.replace(f"folder = {str(folder)!r}  #", "folder = 'owner/name'  #") != own
    for file, content in uploaded.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(content)
    assert checkpoints.damage(tmp_path) == []


def test_a_policy_of_before_there_were_cards_is_pushed_with_one(
    policies: dict[str, Path], server: hub_stand_in.Hub, tmp_path: Path
) -> None:
    folder = shutil.copytree(policies["dpo"], tmp_path / "run")
    (folder / "README.md").unlink()
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    checkpoints.write_manifest(folder)
    hub.push(folder, "owner/name")
    card = server.files["owner/name", "main"]["README.md"].decode()
    assert "trained by DPO" in card
    assert "README.md" in json.loads(server.files["owner/name", "main"]["manifest.json"])["files"]


def test_prompts_are_refused_where_answers_are_needed_and_it_is_said_what_takes_them(
    policies: dict[str, Path], ptft: Ptft, tmp_path: Path
) -> None:
    base, prompts, out = policies["ppo"].parent / "base", task_file(tmp_path), tmp_path / "out"
    asked = ["--model", base, "--task", prompts]
    for command in (
        ["inspect", *asked],
        ["plan", *asked, "--adapter", "full/default"],
        ["train", *asked, "--adapter", "full/default", "--output", out],
    ):
        done = ptft(*command)
        assert (done.code, done.out) == (2, ""), command
        assert "prompts have no answers to learn from or to be scored by; they are for `ptft ppo`" in done.err
    assert not out.exists()
