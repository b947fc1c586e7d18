"""DPO, KTO, GRPO and RLOO by TRL's trainers: our recipes, checkpoints, proofs and outputs around them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file

from ptft_hf import train
from ptft_hf.errors import DataError, PtftError, RecipeError
from ptft_hf.recipes import task_from_dict
from ptft_hf.recipes.algorithms import ALGORITHMS, load_algorithm
from ptft_hf.rlhf import by_trl, trl_rows
from ptft_hf.rlhf.by_trl import train_by_trl
from ptft_hf.rlhf.decoders import load_decoder
from ptft_hf.rlhf.ppo import train_ppo
from ptft_hf.tasks.prompts import Prompts
from tests.test_instruction import TALK, chat_tokenizer, checkpoint

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:trl"),
]
QUICK = {"max_steps": 2, "per_device_train_batch_size": 2, "bf16": False, "learning_rate": 0.01, "warmup_steps": 0}
QUICK |= {"gradient_checkpointing": False, "logging_steps": 1}
WRITING = {**QUICK, "algorithm.num_generations": 2, "algorithm.max_completion_length": 4}
QUESTIONS = ("What is the sea?", "And the sky?", "Be kind.", "user")


def pairs() -> datasets.DatasetDict:
    rows = [{"prompt": text, "chosen": "Water.", "rejected": "Air."} for text in QUESTIONS]
    table = datasets.Dataset.from_list(rows)
    return datasets.DatasetDict({name: table for name in ("train", "validation", "test")})


def prompts() -> datasets.DatasetDict:
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in QUESTIONS]
    table = datasets.Dataset.from_list(rows)
    return datasets.DatasetDict({name: table for name in ("train", "validation", "test")})


def length(prompts: list[str], answers: list[str]) -> list[float]:
    assert all(prompt.endswith("<|im_start|>assistant\n") for prompt in prompts)
    return [float(len(answer)) for answer in answers]


def run(algorithm: str, base: Path, folder: Path, adapter: Any = "lora/r16_all_linear", **given: Any) -> Any:
    paired = algorithm not in ("grpo", "rloo")
    family = "preference" if paired else "prompts"
    arguments = {
        "task": task_from_dict({"name": "test", "family": family}),
        "data": pairs() if paired else prompts(),
        "settings": {**(QUICK if paired else WRITING), **given.pop("settings", {})},
        **({} if paired else {"reward": length}),
        **given,
    }
    return train_by_trl(algorithm=algorithm, model=str(base), adapter=adapter, output_dir=folder, seed=1, **arguments)


@pytest.mark.parametrize(
    ("algorithm", "adapter"),
    [
        ("dpo", "lora/r16_all_linear"),
        ("dpo", "lora/pissa"),
        ("dpo", "full/default"),
        ("kto", "lora/r16_all_linear"),
        ("grpo", "lora/r16_all_linear"),
        ("rloo", "lora/r16_all_linear"),
    ],
)
def test_a_run_is_saved_and_proven(algorithm: str, adapter: str, tmp_path: Path) -> None:
    import peft
    import transformers

    base, folder = checkpoint(tmp_path / "base"), tmp_path / "run"
    found = run(algorithm, base, folder, adapter)
    assert found["proof"] == {"max_difference": 0.0, "examples": 4}
    assert found["training"]["steps"] == 2 and set(found["metrics"]) == {"validation", "test"}
    assert json.loads((folder / "run.json").read_text("utf-8")) == found
    before = transformers.AutoModelForCausalLM.from_pretrained(base)
    ids = torch.tensor([[5, 6, 7]])
    if adapter == "full/default":
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    else:
        assert not (folder / "ref").exists()
        loaded = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), folder)
    with torch.no_grad():
        assert not torch.equal(loaded(ids).logits, before(ids).logits)
    assert transformers.AutoTokenizer.from_pretrained(folder).chat_template


def test_there_is_no_optimizers_state_when_the_policy_is_loaded_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prove, left = by_trl.Run._prove, list[int]()

    def proven(self: by_trl.Run, *args: Any) -> Any:
        left.append(len(self.trainer.optimizer.state))
        return prove(self, *args)

    monkeypatch.setattr(by_trl.Run, "_prove", proven)
    run("dpo", checkpoint(tmp_path / "base"), tmp_path / "run")
    assert left == [0]


def test_the_first_loss_of_dpo_is_log_2(tmp_path: Path) -> None:
    run("dpo", checkpoint(tmp_path / "base"), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)


@pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning")  # PEFT looks beside the subfolder
def test_an_sft_adapter_is_trained_further_and_is_the_reference(tmp_path: Path) -> None:
    import ptft_hf

    # Where the base lies in its checkpoint is said in both recipes, and not true of the SFT run's folder.
    base, where = checkpoint(tmp_path / "base" / "inner").parent, {"subfolder": "inner"}
    table = datasets.Dataset.from_list([{"messages": TALK}] * 4)
    ptft_hf.train(
        model=str(base),
        task=task_from_dict({"name": "sft", "family": "instruction", "model": where}),
        adapter="lora/r16_all_linear",
        output_dir=tmp_path / "sft",
        data=datasets.DatasetDict({name: table for name in ("train", "validation", "test")}),
        settings={"max_steps": 4, "learning_rate": 0.05, "model.max_length": 100},
    )
    task = task_from_dict({"name": "test", "family": "preference", "model": where})
    run("dpo", base, tmp_path / "dpo", str(tmp_path / "sft"), task=task)
    lines = [json.loads(line) for line in (tmp_path / "dpo" / "metrics.jsonl").read_text("utf-8").splitlines()]
    # Against the base itself an SFT model's first loss would be another one.
    assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("sft", "dpo"))
    assert one.keys() == other.keys() and any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("adapter", ["lora/r16_all_linear", "lora/loraplus", "lora/pissa"])
def test_a_run_that_was_killed_goes_on_and_ends_alike(
    adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, saved = checkpoint(tmp_path / "base"), {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    run("dpo", base, tmp_path / "whole", adapter, settings=saved)

    def die(self: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(by_trl.Run, "finish", die)
        with pytest.raises(KeyboardInterrupt):
            run("dpo", base, tmp_path / "killed", adapter, settings=saved)
    places = sorted((tmp_path / "killed" / "checkpoints").glob("checkpoint-*"))
    assert len(places) == 3
    assert all((place / "manifest.json").is_file() for place in places)
    (places[-1] / "adapter_model.safetensors").write_bytes(b"")  # the newest is broken
    run("dpo", base, tmp_path / "killed", adapter, settings=saved, resume=True)
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(one[name], other[name]) for name in one)


class Seen:
    """A reward that keeps what it is asked about."""

    name = "seen"

    def __init__(self) -> None:
        self.batches: list[Any] = []

    def __call__(self, batch: Any) -> list[float]:
        self.batches.append(batch)
        return [float(i) for i in range(len(batch.answers))]


def test_rewards_are_given_the_prompts_as_the_data_has_them(tmp_path: Path) -> None:
    reward = Seen()
    run("grpo", checkpoint(tmp_path / "base"), tmp_path / "run", reward=reward)
    (messages, *_) = reward.batches[0].sources
    assert messages[0]["role"] == "user" and messages[0]["content"] in QUESTIONS
    assert reward.batches[0].pairs()[0]["prompt"] == messages  # what a reward model puts into its own template


def test_long_prompts_are_left_out_and_pairs_are_cut(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base")
    tokenizer = chat_tokenizer()
    lengths = sorted(
        len(tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"])
        for row in prompts()["train"]
    )
    found = run("grpo", base, tmp_path / "grpo", settings={"model.max_length": lengths[1]})
    assert f"train: 2 of 4 prompts are longer than {lengths[1]} tokens and are left out" in found["notes"]
    seen: list[int] = []
    original = by_trl.Run._trainer

    def kept(self: Any, *given: Any) -> Any:
        trainer = original(self, *given)
        seen.append(trainer.args.max_length)
        return trainer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(by_trl.Run, "_trainer", kept)
        run("dpo", base, tmp_path / "dpo", settings={"model.max_length": 77})
    assert seen == [77]


def test_upstream_has_no_ppo_any_more() -> None:
    """Row 19; :func:`ptft_hf.rlhf.ppo.train_ppo` has."""
    import trl

    names = ("PPOTrainer", "PPOConfig", "AutoModelForCausalLMWithValueHead")
    assert not [name for name in names if hasattr(trl, name)]
    assert not list(Path(trl.__file__).parent.glob("experimental/ppo*"))
    assert all(hasattr(trl, algorithm.trainer) for algorithm in ALGORITHMS.values())


def test_prompts_are_those_of_ppo(tmp_path: Path) -> None:
    texts = ["What is the sea? And the sky?", "Be kind."]
    table = datasets.Dataset.from_list([{"prompt": text} for text in texts])
    fields = {"prompt_tokens": 4, "ppo": {"response_length": 3, "temperature": 0.5}}
    task, reward = task_from_dict({"name": "test", "family": "prompts", **fields}), Seen()
    source = datasets.DatasetDict({name: table for name in ("train", "validation", "test")})
    base, settings = checkpoint(tmp_path / "base", None), {"algorithm.max_completion_length": 5}
    found = run("grpo", base, tmp_path / "run", task=task, data=source, reward=reward, settings=settings)
    read, _ = Prompts(task).encode(table, chat_tokenizer(None), 200)  # type: ignore[arg-type]
    assert {prompt for batch in reward.batches for prompt in batch.prompts} == {prompt.text for prompt in read}
    assert all(len(prompt.ids) <= 4 for prompt in read)
    assert all(text.startswith(prompt.text) for prompt, text in zip(read, texts, strict=True))
    assert "eval_rewards/reward/mean" in found["metrics"]["test"]
    assert found["options"]["temperature"] == 0.5 and found["options"]["max_completion_length"] == 5


@pytest.mark.parametrize("algorithm", ["grpo", "rloo"])
def test_answers_are_sampled_as_the_recipe_says(algorithm: str) -> None:
    task = {"name": "test", "family": "prompts", "ppo": {"response_length": 48, "temperature": 0.5, "kl_coef": 0.1}}
    given = load_algorithm(algorithm, task_from_dict(task), "lora/r16_all_linear")
    assert given.options == {"max_completion_length": 48, "temperature": 0.5}
    given = load_algorithm(algorithm, task_from_dict(task), "lora/r16_all_linear", ["algorithm.temperature=1.0"])
    assert given.options == {"max_completion_length": 48, "temperature": 1.0}


@pytest.mark.parametrize(
    ("fields", "settings", "said"),
    [
        ({"ppo": {"temperature": 0}}, {}, "test: ppo.temperature: expected a number greater than 0, got 0"),
        ({}, {"algorithm.max_completion_length": 256}, "algorithm.max_completion_length: 256 leaves 0 of"),
        ({"prompt_tokens": 20}, {}, "prompt_tokens: 20 would cut conversations, which TRL takes whole"),
    ],
)
def test_prompts_that_cannot_be_answered_are_told(
    fields: dict[str, Any], settings: dict[str, Any], said: str, tmp_path: Path
) -> None:
    task = task_from_dict({"name": "test", "family": "prompts", **fields})
    with pytest.raises(PtftError) as caught:
        run("grpo", checkpoint(tmp_path / "base"), tmp_path / "run", task=task, settings=settings)
    assert said in "\n".join(caught.value.problems)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("algorithm", ["dpo", "kto"])
def test_pairs_without_one_prompt_are_told(algorithm: str) -> None:
    asked, answers = [{"role": "user", "content": "What is the sea?"}], {"chosen": "Water.", "rejected": "Air."}
    turns = {name: [{"role": "assistant", "content": text}] for name, text in answers.items()}
    rows = [
        {"chosen": asked + turns["chosen"], "rejected": asked + turns["rejected"]},
        {"chosen": asked + turns["chosen"], "rejected": asked + turns["chosen"] + asked + turns["rejected"]},
        turns,
    ]
    made, notes = trl_rows.pairs_of(datasets.Dataset.from_list(rows), chat_tokenizer(), algorithm)
    assert made.to_list() == [{"prompt": asked, **turns}]
    assert notes == [
        f"1 of 3 pairs answer two prompts, which {algorithm} cannot compare, and are left out",
        "1 of 3 pairs have no prompt, which the chat template needs, and are left out",
    ]
    table = datasets.Dataset.from_list([answers] * 4)
    with pytest.raises(DataError, match="4 of 4 pairs have no prompt, which the chat template needs"):
        trl_rows.pairs_of(table, chat_tokenizer(), algorithm)
    assert trl_rows.pairs_of(table, chat_tokenizer(None), algorithm)[0][0] == {"prompt": "", **answers}


def test_ties_that_are_left_out_and_margins_without_effect_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [{"tie": True}, {"margin": 2.0}, {"margin": 1.0}, {}]
    rows = [{"tie": False, "margin": 0.0, **row, **some} for row, some in zip(pairs()["train"], more, strict=True)]
    data = datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name in ("train", "validation", "test")})
    found = run("kto", checkpoint(tmp_path / "base"), tmp_path / "run", data=data)
    told = [
        f"{split}: {what}"
        for split in ("train", "validation", "test")
        for what in (
            "1 of 4 pairs are ties, which kto cannot use, and are left out",
            "2 of 4 pairs have a margin, which kto does not use",
        )
    ]
    assert [note for note in found["notes"] if "kto" in note] == told
    said = " ".join(capsys.readouterr().err.split())
    assert all(note in said for note in told)


def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = checkpoint(tmp_path / "base")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="algorithm: dpo runs in one process; start it without torchrun"):
        run("dpo", base, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_nobody_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
    with by_trl.without_telemetry():
        assert constants.HF_HUB_DISABLE_TELEMETRY
    assert not constants.HF_HUB_DISABLE_TELEMETRY


@pytest.mark.parametrize(
    ("algorithm", "given", "said"),
    [
        ("dppo", {}, "algorithm: there is no 'dppo' (did you mean 'dpo'?)"),
        ("dpo", {"task": task_from_dict({"name": "t", "family": "prompts"})}, "dpo learns from preference"),
        ("dpo", {"reward": length}, "learns from preferences, without rewards"),
        ("grpo", {"reward": None}, "grpo needs one: --reward SOURCE"),
        ("dpo", {"settings": {"algorithm.betta": 1}}, "DPOConfig has no 'betta' of its own (did you mean 'beta'?)"),
        ("dpo", {"settings": {"learnin_rate": 1}}, "learnin_rate"),
        ("dpo", {"settings": {"output_dir": "x"}}, "--set output_dir: cannot be set here"),
        ("dpo", {"adapter": "bottleneck/pfeiffer"}, "TRL trains with a method of PEFT or in full, not bottleneck"),
        ("grpo", {"adapter": "adalora/r12_to_8"}, "do not train adalora: its ranks are cut by a schedule of its own"),
        ("dpo", {"adapter": "prefix/tokens20"}, "TRL's trainers do not train prefix: a prefix is no adapter in"),
    ],
)
def test_faults_are_told_before_anything_is_written(
    algorithm: str, given: dict[str, Any], said: str, tmp_path: Path
) -> None:
    base = checkpoint(tmp_path / "base")
    with pytest.raises(RecipeError) as caught:
        run(algorithm, base, tmp_path / "run", **given)
    assert said in "\n".join(caught.value.problems)
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")  # in checkpoints
@pytest.mark.parametrize("algorithm", ["ppo", "dpo", "grpo"])
def test_the_rows_of_added_tokens_are_trained_further(algorithm: str, tmp_path: Path) -> None:
    base, task = checkpoint(tmp_path / "base"), {"name": "sft", "family": "instruction", "add_tokens": ["Water"]}
    talks = datasets.Dataset.from_list([{"messages": TALK}] * 4)
    data = datasets.DatasetDict({name: talks for name in ("train", "validation", "test")})
    settings = {"max_steps": 2, "model.max_length": 100, "bf16": False}
    sft = train(
        model=str(base), task=task_from_dict(task), adapter="lora/r16_all_linear", output_dir=tmp_path / "sft",
        data=data, settings=settings,
    )  # fmt: skip
    folder = tmp_path / "run"
    asked = prompts().map(lambda row: {"prompt": [{**row["prompt"][0], "content": "Water"}]})
    if algorithm == "ppo":
        steps = {"total_episodes": 16, "num_mini_batches": 1, "response_length": 4, "learning_rate": 0.01}
        found = train_ppo(
            policy=tmp_path / "sft", reward=length, task=task_from_dict({"name": "test", "family": "prompts"}),
            data=asked, output_dir=folder, settings={**steps, "bf16": False, "save_steps": 0},
        )  # fmt: skip
        assert "base.resize_token_embeddings(" in (folder / "README.md").read_text("utf-8")
    else:
        given = {"data": asked} if algorithm == "grpo" else {}
        found = run(algorithm, base, folder, str(tmp_path / "sft"), **given)
    assert found["proof"] == {"max_difference": 0.0, "examples": 4}
    assert found["model"]["added_tokens"] == sft.run["model"]["added_tokens"]
    before, after = (load_file(path / "adapter_model.safetensors") for path in (tmp_path / "sft", folder))
    row = next(name for name in before if "trainable_tokens" in name)
    assert before.keys() == after.keys() and after[row].shape == (1, 32)
    assert not torch.equal(before[row], after[row])
    if algorithm == "dpo":  # the reference has the row, too
        first = json.loads((folder / "metrics.jsonl").read_text("utf-8").splitlines()[0])
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    model, tokenizer = load_decoder(str(folder), "float32", {})
    assert len(model.get_input_embeddings().weight) == len(tokenizer)
