"""The command line: verbs, streams and exit codes, as a script meets them."""

# ruff: noqa: F811 - fixtures are imported, and then named as parameters

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ptft_hf import cli
from ptft_hf.errors import DataError
from tests.commands import Done, Ptft, answers, ptft  # noqa: F401
from tests.conftest import rows, write_rows
from tests.finished import Finished, full, lora  # noqa: F401

VERBS = (
    *("train", "plan", "predict", "evaluate", "inspect", "merge", "export", "compare", "tune", "ppo", "rlhf", "push"),
    *("ls", "show", "validate"),
)


# ---- help and recipes ----


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_and_every_option(ptft: Ptft, verb: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "100")
    done = ptft(verb, "--help")
    assert done.code == 0
    assert f"Usage: ptft {verb}" in done.out
    (command,) = [c for c in cli.app.registered_commands if (c.name or c.callback.__name__) == verb]
    assert " ".join(command.callback.__doc__.split()[:4]) in done.out
    bare = [
        line for line in done.out.splitlines() if line.startswith("│ ") and line.rstrip("│ ").endswith(">")
    ]
    assert not bare, "without a word of help"


def test_the_help_lists_exactly_these_verbs(ptft: Ptft):
    names = {command.name or command.callback.__name__ for command in cli.app.registered_commands}
    assert names == set(VERBS)
    assert all(f"│ {verb} " in ptft("-h").out for verb in VERBS)


def test_python_m_is_the_same_command():
    done = subprocess.run([sys.executable, "-m", "ptft_hf", "ls"], capture_output=True, text=True, check=True)
    assert "  lora/r8_attention " in done.stdout
    assert done.stderr == ""


def test_ls_lists_one_kind_or_both(ptft: Ptft):
    both, tasks, adapters = ptft("ls"), ptft("ls", "tasks"), ptft("ls", "adapters")
    assert both.out == tasks.out + adapters.out
    assert tasks.out.startswith("tasks:\n  causal_lm/")
    assert adapters.out.startswith("adapters:\n  adalora/r12_to_8 ")
    assert (wrong := ptft("ls", "models")).code == 2
    assert wrong.err == "error: 'models' is neither tasks nor adapters\n"


def test_show_prints_a_recipe_that_validates(ptft: Ptft, tmp_path: Path):
    file = tmp_path / "shown.yaml"
    file.write_text(ptft("show", "lora/r16_all_linear").out, encoding="utf-8")
    assert ptft("validate", file) == Done(0, f"{file}: fine\n", "")
    near = ptft("show", "lora/r16_all_linea")
    assert near.code == 2
    assert "did you mean 'lora/r16_all_linear'?" in near.err


def test_validate_reports_the_faults_of_all_files_and_still_passes_the_good_ones(ptft: Ptft, tmp_path: Path):
    good, one, two = (tmp_path / f"{name}.yaml" for name in ("good", "one", "two"))
    good.write_text("family: full\n")
    one.write_text("family: lora\nrr: 8\n")
    two.write_text("family: sequence_classification\nleakage: 5\nlos: focal\n")
    done = ptft("validate", one, good, two)
    assert done.code == 2
    assert done.out == f"{good}: fine\n"
    assert done.err.startswith("error: 3 problems:\n")
    assert all(word in done.err for word in (f"{one}:2: rr", f"{two}:2: leakage", f"{two}:3: "))


@pytest.mark.parametrize(
    "arguments", [["fly"], ["train", "--modle", "x"], ["show"], ["predict", "d", "--batch-size", "0"]]
)
def test_wrong_usage_is_exit_code_2(ptft: Ptft, arguments: list[str]):
    done = ptft(*arguments)
    assert done.code == 2
    assert done.out == ""
    assert "Usage: ptft" in done.err


# ---- train ----


def test_train_says_what_it_does_on_stderr_and_the_result_on_stdout(
    ptft: Ptft, task_file: Path, checkpoint: Callable[[str], Path], tmp_path: Path
):
    flags = ["--model", checkpoint("bert"), "--task", task_file, "--adapter", "full/default"]
    folder = tmp_path / "out"
    done = ptft("train", *flags, "--output", folder, "--seed", 3, "--set", "num_train_epochs=1")
    assert done.code == 0, done.err
    assert "2 labels in 48 training rows: neg 24 (50%), pos 24 (50%)\n" in done.err
    assert "\nrows     train 48, validation 16, test 16\n" in done.err
    assert "  1  [[neg]] <- <s> " in done.err
    assert "Training: 100%" in done.err
    lines = done.out.splitlines()
    assert lines[1] == f"{task_file} · full/default"
    assert any(line.startswith("│ macro_f1 ") for line in lines)
    assert lines[-1].startswith(f"saved in {folder} and proven: ")
    run = json.loads((folder / "run.json").read_text("utf-8"))
    assert run["seed"] == 3
    assert run["settings"]["num_train_epochs"] == 1

    again = ptft("train", *flags, "--output", folder)
    assert again.code == 2
    assert "holds another run; resume it (--resume), replace it (--overwrite)" in again.err


def test_all_faults_of_a_run_are_named_at_once_and_nothing_is_written(ptft: Ptft, tmp_path: Path):
    done = ptft(
        *(
            "train",
            "--model",
            "m",
            "--task",
            "sequence_classification/sst3",
            "--adapter",
            "lora/r8_attentoin",
        ),
        *("--output", tmp_path / "out", "--set", "learning_rat=1", "--set", "adapter.rr=4"),
    )
    assert done.code == 2
    assert done.out == ""
    for word in ("'sst2'", "'lora/r8_attention'", "'learning_rate'"):
        assert word.strip("'") in done.err
    assert not list(tmp_path.iterdir())


# ---- evaluate and merge ----


def test_evaluate_prints_tables_or_one_json_object(ptft: Ptft, lora: Finished):
    done = ptft("evaluate", lora.folder)
    assert done.code == 0, done.err
    expected = lora.run["metrics"]["test"]
    table = {line.split()[1]: line.split()[3] for line in done.out.splitlines() if line.startswith("│ ")}
    assert table["accuracy"] == f"{expected['accuracy']:.4f}"
    assert table["neg"] == f"{lora.run['report']['test']['per_class'][0]['precision']:.4f}"
    result = json.loads(ptft("evaluate", lora.folder, "--json", "--split", "validation").out)
    assert {name: result[name] for name in expected} == lora.run["metrics"]["validation"]


def test_evaluate_takes_other_data_from_a_file_or_a_recipe(ptft: Ptft, lora: Finished, tmp_path: Path):
    file = write_rows(tmp_path / "other.jsonl", rows(10, seed=9))
    recipe = tmp_path / "other.yaml"
    recipe.write_text(
        "family: sequence_classification\n"
        "data: {path: json, data_files: {train: other.jsonl, validation: other.jsonl, test: other.jsonl}}\n"
    )
    by_file = json.loads(ptft("evaluate", lora.folder, "--json", "--data", file).out)
    by_recipe = json.loads(ptft("evaluate", lora.folder, "--json", "--task", recipe).out)
    assert by_file == by_recipe
    assert sum(row["support"] for row in by_file["report"]["per_class"]) == 10
    both = ptft("evaluate", lora.folder, "--data", file, "--task", recipe)
    assert (both.code, both.err) == (2, "error: give --data or --task, not both\n")
    assert (
        "split: 'dev' is none of train, validation, test"
        in ptft("evaluate", lora.folder, "--split", "dev").err
    )


def test_merge_writes_a_model_that_answers_alike(ptft: Ptft, lora: Finished, tmp_path: Path):
    folder = tmp_path / "merged"
    done = ptft("merge", lora.folder, "--output", folder)
    assert (done.code, done.out) == (0, "")
    assert "merged against adapter on 16 examples: logits differ by at most " in done.err
    assert "0 labels change" in done.err
    one, other = (answers(ptft("predict", f, *lora.texts)) for f in (lora.folder, folder))
    assert [a["label"] for a in one] == [a["label"] for a in other]
    full_up = ptft("merge", lora.folder, "--output", folder)
    assert (full_up.code, full_up.err) == (
        2,
        f"error: {folder}: exists and is not empty; choose another folder\n",
    )


def test_a_whole_model_has_nothing_to_merge(ptft: Ptft, full: Finished, tmp_path: Path):
    done = ptft("merge", full.folder, "--output", tmp_path / "merged")
    assert done.code == 2
    assert "this is no adapter but a whole model already" in done.err
    assert not list(tmp_path.iterdir())


# ---- streams and signals ----


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_had_enough_is_no_error(unbuffered: str):
    """A pipe whose other end is closed, as `head` leaves it: met at the first line, or at the flush at exit."""
    read, write = os.pipe()
    os.close(read)
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    command = [sys.executable, "-m", "ptft_hf", "ls"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.slow
def test_ctrl_c_ends_a_run_with_130_and_says_how_to_go_on(
    task_file: Path, checkpoint: Callable[[str], Path], tmp_path: Path
):
    folder = tmp_path / "out"
    flags = ["--model", str(checkpoint("bert")), "--task", str(task_file), "--adapter", "full/default"]
    command = [sys.executable, "-m", "ptft_hf", "train", *flags, "--output", str(folder)]
    process = subprocess.Popen(
        [*command, "--set", "num_train_epochs=1000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Tests that run in the background ignore the signal, and what they start would, too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        give_up = time.monotonic() + 120
        while not list(folder.glob("checkpoints/checkpoint-*")) and time.monotonic() < give_up:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130, err
    assert "\nstopped; --resume goes on from the newest checkpoint\n" in err
    assert "Traceback" not in err
    assert not (folder / "run.json").exists()


def test_only_the_first_of_several_processes_says_what_is_wrong(ptft: Ptft, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "1")
    assert ptft("ls", "models") == Done(2, "", "")
    monkeypatch.setenv("RANK", "0")
    assert ptft("ls", "models").err.startswith("error: ")


def test_an_error_is_red_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    shown = {}
    for name, stream in (("terminal", Terminal()), ("file", io.StringIO())):
        cli.print_error(DataError("wrong"), stream)
        shown[name] = stream.getvalue()
    assert shown == {"terminal": "\033[31merror:\033[0m wrong\n", "file": "error: wrong\n"}
    monkeypatch.setenv("NO_COLOR", "1")
    cli.print_error(DataError("wrong"), plain := Terminal())
    assert plain.getvalue() == "error: wrong\n"
