"""``ptft feedback`` from the command line: generate, import, serve, stats, export, and bad inputs to each."""

# ruff: noqa: F811 - fixtures are imported, and then named as parameters

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from ptft_hf import checkpoints, feedback, models
from ptft_hf.cli.feedback import feedback as group
from ptft_hf.feedback import generating
from ptft_hf.feedback.choosing import Policy
from ptft_hf.feedback.store import Store
from tests.commands import Ptft, ptft  # noqa: F401
from tests.conftest import write_rows
from tests.feedback import collection, judge_all, needs_server
from tests.ppo_runs import TEXTS, make_language_model, run_ppo
from tests.tiny import make_checkpoint

VERBS = ("generate", "import", "serve", "stats", "export")


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_language_model("llama", tmp_path_factory.mktemp("policy") / "one")


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """A recipe of 40 prompts for training, and a few others."""
    for name, count in (("train", 40), ("dev", 2), ("test", 2)):
        rows = [{"prompt": f"{TEXTS[i % 8]} {name} {i}"} for i in range(count)]
        write_rows(tmp_path / f"{name}.jsonl", [rows[0], *rows])  # one prompt stands there twice
    path = tmp_path / "prompts.yaml"
    path.write_text(
        "family: prompts\n"
        "data:\n"
        "  path: json\n"
        "  data_files: {train: train.jsonl, validation: dev.jsonl, test: test.jsonl}\n"
        "ppo: {response_length: 5, temperature: 1.0}\n",
        encoding="utf-8",
    )
    return path


def texts(path: Path) -> list[Any]:
    with Store(path) as store:
        return store.rows(
            "SELECT p.text, source, number, a.text FROM answers a JOIN prompts p ON p.id = a.prompt ORDER BY 1, 2, 3"
        )


# ---- help ----


def test_the_verbs_explain_themselves_and_every_option(ptft: Ptft, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert [command.name or command.callback.__name__ for command in group.registered_commands] == list(VERBS)
    assert "│ feedback " in ptft("--help").out
    for verb in VERBS:
        done = ptft("feedback", verb, "--help")
        assert done.code == 0
        assert f"Usage: ptft feedback {verb}" in done.out
        lines = [line for line in done.out.splitlines() if line.startswith("│ ")]
        assert not [line for line in lines if line.rstrip("│ ").endswith(">")], "without a word of help"


@needs_server
def test_the_names_from_python_are_these():
    for name in feedback.__all__:
        assert getattr(feedback, name).__doc__
    with pytest.raises(AttributeError, match="has no attribute 'srve'"):
        feedback.srve  # noqa: B018


# ---- generate ----


def test_generate_samples_pairs_and_goes_on_where_it_was(
    ptft: Ptft, policy: Path, task: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    flags = ["--model", policy, "--task", task, "--answers", 3, "--seed", 5]
    whole, parts = tmp_path / "whole.sqlite", tmp_path / "parts.sqlite"
    done = ptft("feedback", "generate", *flags, "--output", whole)
    assert done.code == 0, done.err
    assert "120 answers to 40 prompts, " in done.err
    with Store(whole) as store:
        counts = store.counts()
    assert (counts["prompts"], counts["answers"]) == (40, 120)
    assert 100 < counts["pairs"] <= 120
    assert len({row[3] for row in texts(whole)}) > 100  # they are drawn

    draw, calls = generating._draw, []

    def stopped(*given: Any) -> Any:
        calls.append(given)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return draw(*given)

    monkeypatch.setattr(generating, "_draw", stopped)
    done = ptft("feedback", "generate", *flags, "--output", parts)
    assert done.code == 130
    assert "stopped; the same command goes on with the prompts that are left" in done.err
    assert len(texts(parts)) == 3 * generating.AT_ONCE
    monkeypatch.setattr(generating, "_draw", draw)
    assert "24 answers to 8 prompts" in ptft("feedback", "generate", *flags, "--output", parts).err
    assert texts(parts) == texts(whole)
    assert "0 answers to 0 prompts" in ptft("feedback", "generate", *flags, "--output", parts).err


def test_two_models_answer_in_turn_and_another_temperature_is_refused(
    ptft: Ptft, policy: Path, task: Path, tmp_path: Path
):
    other, database = make_language_model("gpt2", tmp_path / "gpt2"), tmp_path / "f.sqlite"
    flags = ["--model", policy, "--model", other, "--task", task, "--prompts", 4, "--output", database]
    assert ptft("feedback", "generate", *flags).code == 0
    assert sorted(row[1:3] for row in texts(database)) == sorted([(str(policy), 0), (str(other), 0)] * 4)
    refused = ptft("feedback", "generate", *flags, "--temperature", 0.5)
    assert refused.code == 2
    assert "its answers were drawn with temperature 1.0, not 0.5" in refused.err


def test_models_that_read_other_prompts_are_refused(ptft: Ptft, policy: Path, task: Path, tmp_path: Path):
    from transformers import AutoTokenizer

    one, other = (shutil.copytree(policy, tmp_path / name) for name in ("one", "other"))
    for folder, template in ((one, "{{ messages[0].content }}"), (other, "User: {{ messages[0].content }}")):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
    rows = [{"messages": [{"role": "user", "content": text}]} for text in TEXTS]
    for name in ("train", "dev", "test"):
        write_rows(tmp_path / f"{name}.jsonl", rows)
    flags = ["--model", one, "--model", other, "--task", task, "--output", tmp_path / "f.sqlite"]
    done = ptft("feedback", "generate", *flags)
    assert done.code == 2
    assert f"{other}: reads the prompts otherwise than {one} " in done.err


@pytest.mark.slow
def test_an_adapter_and_its_base(ptft: Ptft, policy: Path, task: Path, tmp_path: Path):
    import peft
    import transformers

    with models.quiet():
        base = transformers.AutoModelForCausalLM.from_pretrained(policy)
        config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
        peft.get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    given = ["--model", policy, "--model", tmp_path / "adapter"]
    flags = ["--task", task, "--prompts", 3, "--output", tmp_path / "f.sqlite"]
    done = ptft("feedback", "generate", *given, *flags)
    assert done.code == 0, done.err
    assert len({row[3] for row in texts(tmp_path / "f.sqlite")}) == 6


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["lora/r16_all_linear", "full/default"])
def test_the_folder_of_a_finished_ppo_run_answers(
    ptft: Ptft, policy: Path, task: Path, tmp_path: Path, adapter: str
):
    run_ppo(policy, tmp_path / "run", adapter=adapter, total_episodes=8)
    flags = ["--task", task, "--prompts", 3, "--output", tmp_path / "f.sqlite"]
    done = ptft("feedback", "generate", "--model", policy, "--model", tmp_path / "run", *flags)
    assert done.code == 0, done.err
    assert len(texts(tmp_path / "f.sqlite")) == 6


# ---- import, stats, export ----


def test_import_judge_stats_export(ptft: Ptft, tmp_path: Path):
    rows = [{"prompt": f"p{i}", "chosen": f"short {i}", "rejected": f"a longer one {i}"} for i in range(8)]
    file, database, out = write_rows(tmp_path / "in.jsonl", rows), tmp_path / "f.sqlite", tmp_path / "out.jsonl"
    done = ptft("feedback", "import", file, "--output", database)
    assert (done.code, done.out) == (0, "")
    assert done.err.startswith("8 pairs to judge; left out: 0 rows")
    with Store(database) as store:
        judge_all(store, "anna", "alpha", Policy(overlap=1))
        judge_all(store, "ben", "left", Policy(overlap=1))
    shown = ptft("feedback", "stats", database)
    assert shown.code == 0
    assert "16 judgements of 8 of 8 pairs (8 prompts, 16 answers); 0 skipped" in shown.out
    figures = json.loads(ptft("feedback", "stats", database, "--json").out)
    assert figures["wins"][0]["first"] == "chosen"
    assert figures["agreement"]["method"] == "Cohen's kappa"
    assert f"│ {figures['left']['value']:.3f} │" in re.sub(" +", " ", shown.out)
    agreeing = round(figures["agreement"]["raw"]["value"] * 8)
    done = ptft("feedback", "export", database, "--to", out)
    assert f"{agreeing} rows in {out}; left out: {8 - agreeing} without a majority, 0 ties, 0 both bad" in done.err
    assert all(json.loads(line)["chosen"].startswith("short") for line in out.read_text().splitlines())


def test_a_reward_model_says_which_pairs_are_uncertain(tmp_path: Path):
    classifier = make_checkpoint("bert", tmp_path / "bert", auto="AutoModelForSequenceClassification")
    path = collection(tmp_path / "f.sqlite", 4)
    assert feedback.score(path, "tests.ppo_runs:length") == 8
    assert feedback.score(path, "tests.ppo_runs:length") == 0
    with Store(path) as store:
        assert {row[0] for row in store.rows("SELECT score FROM answers WHERE source = 'alpha'")} == {2 / 6}
    assert feedback.score(path, f"{classifier}#LABEL_1") == 8
    with Store(path) as store:
        assert store.setting("reward") == f"{classifier}#LABEL_1"
        assert all(0 < row[0] < 1 for row in store.rows("SELECT score FROM answers"))


# ---- bad inputs ----

GENERATE = "generate --model policy --task prompts.yaml --output new.sqlite"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (GENERATE.replace("prompts.yaml", "prompts/tdlr"), ("prompts/tldr", "did you mean")),
        (GENERATE.replace("prompts.yaml", "sequence_classification/sst2"), ("the family prompts is needed",)),
        (GENERATE.replace("prompts.yaml", "bad.yaml"),
         ("2 problems", "bad.yaml: ppo.response_length: expected a whole number", "bad.yaml: ppo.temperature")),
        (GENERATE.replace("policy", "gone"), ("gone",)),
        (GENERATE.replace("policy", "classifier"), ("trained for sst2, and does not go on from a prompt",)),
        (GENERATE.replace("new.sqlite", "no/new.sqlite"), ("its folder does not exist",)),
        (GENERATE.replace("new.sqlite", "prompts.yaml"), ("no database",)),
        (f"{GENERATE} --answers 1 --temperature 0 --split dev --prompts 0 --max-new-tokens 0 --seed -1",
         ("6 problems", "answers: 1", "temperature: 0", "split: 'dev'", "prompts: 0", "max_new_tokens: 0",
          "seed: -1")),
        (f"{GENERATE} --model policy", ("name at least one, and each once",)),
        (f"{GENERATE} --dtype int8", ("'int8' is no dtype",)),
        ("import gone.jsonl --output new.sqlite", ("gone.jsonl: cannot be read",)),
        ("import train.jsonl --output new.sqlite", ("row 1: has no 'chosen'", "and 77 more")),
        ("serve gone.sqlite", ("gone.sqlite: does not exist",)),
        ("serve prompts.yaml", ("no database",)),
        ("serve f.sqlite --next best --overlap 2 --annotators 1 --token short --port 99999",
         ("5 problems", "next: there is no order 'best'", "overlap: 2", "annotators: 1", "port: 99999", "token: ")),
        ("serve f.sqlite --next uncertain", ("4 answers have no score", "--reward")),
        ("serve f.sqlite --next uncertain --reward gone", ("gone",)),
        ("serve f.sqlite --reward no.module:f", ("cannot be imported",)),
        ("stats gone.sqlite", ("does not exist",)),
        ("stats train.jsonl", ("no database",)),
        ("export f.sqlite --to no/out.jsonl", ("no/out.jsonl: cannot be written",)),
        ("export gone.sqlite --to out.jsonl", ("does not exist",)),
        ("export f.sqlite --to f.sqlite", ("f.sqlite: is a database, of judgements maybe; choose another file",)),
    ],
)  # fmt: skip
def test_bad_inputs_end_in_one_clear_message(
    ptft: Ptft, command: str, words: tuple[str, ...], policy: Path, task: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    if command.startswith("serve"):
        pytest.importorskip("uvicorn", reason="uvicorn is not installed (extra feedback)")
    collection(tmp_path / "f.sqlite", 2)
    (tmp_path / "policy").symlink_to(policy)
    (tmp_path / "classifier").mkdir()
    (tmp_path / "classifier" / "run.json").write_text(
        json.dumps({"model": {"auto_class": "AutoModelForSequenceClassification"}, "task": {"name": "sst2"}})
    )
    checkpoints.write_manifest(tmp_path / "classifier")
    bad = task.read_text("utf-8").replace("length: 5, temperature: 1.0", "length: many, temperature: 0")
    (tmp_path / "bad.yaml").write_text(bad, "utf-8")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    done = ptft("feedback", *command.split())
    assert done.code == 2, done.err
    assert done.out == ""
    assert "error: " in done.err and "Traceback" not in done.err
    for word in words:
        assert word in done.err
    assert sorted(tmp_path.iterdir()) == before


@needs_server
def test_serve_prints_its_link_once_and_ends_at_ctrl_c(ptft: Ptft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import uvicorn

    def interrupted(self: Any, sockets: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(uvicorn.Server, "run", interrupted)
    done = ptft("feedback", "serve", collection(tmp_path / "f.sqlite", 2), "--port", 0)
    assert done.code == 130
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/\?token=[A-Za-z0-9_-]{43}\n", done.out)
    assert "everything judged is kept" in done.err


@needs_server
def test_serving_leaves_other_peoples_logging_alone(
    ptft: Ptft, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import logging

    import uvicorn

    closed: list[bool] = []

    class Handler(logging.NullHandler):
        def close(self) -> None:
            closed.append(True)

    handler = Handler()
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: None)
    assert ptft("feedback", "serve", collection(tmp_path / "f.sqlite", 2), "--port", 0).code == 0
    assert not closed and handler is not None
