"""``ptft predict``: texts from arguments, files and stdin; JSON lines and nothing else on stdout."""

# ruff: noqa: F811 - fixtures are imported, and then named as parameters

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from ptft_hf import inference
from ptft_hf.cli import using
from ptft_hf.errors import DataError
from tests.commands import Done, Ptft, Stdin, answers, ptft  # noqa: F401
from tests.finished import Finished, lora  # noqa: F401


def test_predict_prints_json_lines_and_nothing_else_on_stdout(ptft: Ptft, lora: Finished):
    done = ptft("predict", lora.folder, "a good film", "a bad film")
    for answer in answers(done):
        assert set(answer) == {"label", "scores"}
        assert set(answer["scores"]) == {"neg", "pos"}
        assert sum(answer["scores"].values()) == pytest.approx(1)
        assert answer["label"] == max(answer["scores"], key=answer["scores"].get)


def test_predict_gives_the_same_for_arguments_a_file_and_stdin(ptft: Ptft, lora: Finished, tmp_path: Path):
    texts = lora.texts[:5]
    expected = answers(ptft("predict", lora.folder, *texts))
    lines = "".join(json.dumps(line) + "\n" for line in (*({"text": t} for t in texts[:2]), *texts[2:]))
    file = tmp_path / "texts.jsonl"
    file.write_text(lines, encoding="utf-8")
    assert answers(ptft("predict", lora.folder, "--input", file)) == expected
    assert answers(ptft("predict", lora.folder, "--input", "-", stdin=lines.encode())) == expected
    assert answers(ptft("predict", lora.folder, stdin=("\n\n".join(texts)).encode())) == expected


def test_predict_writes_to_a_file_what_it_would_print(ptft: Ptft, lora: Finished, tmp_path: Path):
    file = tmp_path / "answers.jsonl"
    printed = ptft("predict", lora.folder, "a good film")
    written = ptft("predict", lora.folder, "a good film", "--output", file)
    assert written.code == 0
    assert written.out == ""
    assert file.read_text("utf-8") == printed.out
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"text": "a"}', {"text": "a"}),
        ('"a \\u00e9"', "a é"),
        ("plain words", "plain words"),
        ("5", "5"),  # str(json) would do as well here, but ...
        ("1e5", "1e5"),  # ... not here: it would give 100000.0
        ("true", "true"),  # and here True
        ("[sic] it said", "[sic] it said"),
        ('"Go," she said', '"Go," she said'),
    ],
)
def test_a_line_on_stdin_is_an_object_a_string_or_text_as_it_stands(line: str, expected: object):
    assert using.read_line(line, bare=True) == expected


def test_a_text_with_a_line_separator_inside_stays_one_line(monkeypatch: pytest.MonkeyPatch):
    text = "one\u2028two\x85three\x0bfour"
    raw = json.dumps({"text": text}, ensure_ascii=False)
    assert len(raw.splitlines()) == 3  # the trap: \x0b is escaped in JSON, the other two are not
    monkeypatch.setattr(sys, "stdin", Stdin(f"{raw}\r\nlast\r\n".encode()))
    assert using.read_inputs(None) == [{"text": text}, "last"]


def test_predict_without_any_text_says_where_texts_come_from(ptft: Ptft, lora: Finished):
    done = ptft("predict", lora.folder)  # stdin is a terminal
    assert done.code == 2
    assert done.err == "error: nothing to predict: give texts as arguments, --input FILE, or lines on stdin\n"
    assert ptft("predict", lora.folder, stdin=b"") == Done(0, "", "")  # nothing in, nothing out


def test_every_broken_input_line_is_named(ptft: Ptft, tmp_path: Path):
    file = tmp_path / "in.jsonl"
    file.write_text('{"text": "fine"}\n{"text": \nbare words\n7\n', encoding="utf-8")
    done = ptft("predict", tmp_path, "--input", file)
    assert done.code == 2
    assert done.out == ""
    assert [f"{file}:{n}: not a line of JSON" in done.err for n in (1, 2, 3, 4)] == [False, True, True, True]
    assert "stdin:1: not a line of JSON" in ptft("predict", tmp_path, stdin=b'{"text": ').err


def test_more_than_twenty_broken_lines_are_counted(tmp_path: Path):
    file = tmp_path / "in.jsonl"
    file.write_text("x\n" * 25)
    with pytest.raises(DataError) as caught:
        using.read_inputs(file)
    assert len(caught.value.problems) == 21
    assert caught.value.problems[-1] == "and 5 more"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["a text", "--input", "x.jsonl"], "give texts as arguments or in --input, not both"),
        (["--input", "none.jsonl"], "none.jsonl: No such file or directory"),
        (["--input", "latin.jsonl"], "latin.jsonl:2: not UTF-8; convert the file"),
        (["a text", "--output", "none/out.jsonl"], "none/out.jsonl: its folder does not exist"),
        (["a text", "--output", "."], ".: a folder"),
        (["a text", "--dtype", "int8"], "'int8' is no dtype"),
        (["a text", "--model", "/none"], "/none: no such folder here"),
        (["--input", "keys.jsonl"], "input 2: 'text' must be given, as text"),
        (["--input", "half.jsonl"], "input 1: 'text' has half of a surrogate pair"),
    ],
)  # fmt: skip
def test_predict_refuses_in_one_line(
    ptft: Ptft,
    lora: Finished,
    flags: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    (tmp_path / "latin.jsonl").write_bytes('"fine"\n"caf\xe9"\n'.encode("latin-1"))
    (tmp_path / "keys.jsonl").write_text('{"text": "a"}\n{"body": "a"}\n')
    (tmp_path / "half.jsonl").write_text('"\\ud800"\n')
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    done = ptft("predict", lora.folder, *flags)
    assert done.code == 2
    assert done.out == ""
    assert done.err.startswith("error: ")
    assert message in done.err
    assert sorted(tmp_path.iterdir()) == before


def test_predict_of_no_run_says_so(ptft: Ptft, tmp_path: Path):
    assert ptft("predict", tmp_path / "none", "a").err == f"error: {tmp_path / 'none'}: no such folder\n"
    assert "is this the folder of a finished run?" in ptft("predict", tmp_path, "a").err


def test_stdout_is_utf8_whatever_the_terminal(ptft: Ptft, lora: Finished, monkeypatch: pytest.MonkeyPatch):
    model = inference.load(lora.folder)
    model.task.labels[0] = "négatif"
    monkeypatch.setattr(inference, "load", lambda *_, **__: model)
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", ascii_only)
    assert ptft("predict", lora.folder, "a").code == 0
    assert set(json.loads(ascii_only.buffer.getvalue().decode("utf-8"))["scores"]) == {"négatif", "pos"}
