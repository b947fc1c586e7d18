"""The command line run in this process, for tests that look at its streams and exit code."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from ptft_hf import cli


class Done(NamedTuple):
    code: int
    out: str
    err: str


Ptft = Callable[..., Done]


class Stdin(io.TextIOWrapper):
    """Standard input with these bytes in it; a terminal if there are none."""

    def __init__(self, content: bytes | None) -> None:
        super().__init__(io.BytesIO(content or b""))
        self.terminal = content is None

    def isatty(self) -> bool:
        return self.terminal


@pytest.fixture
def ptft(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Ptft:
    """``ptft("ls", "tasks")`` runs the command in this process, as its entry point does."""

    def run(*arguments: object, stdin: bytes | None = None) -> Done:
        monkeypatch.setattr(sys, "argv", ["ptft", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", Stdin(stdin))
        capfd.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Done(code, *capfd.readouterr())

    return run


def answers(done: Done) -> list[dict[str, Any]]:
    assert done.code == 0, done.err
    return [json.loads(line) for line in done.out.splitlines()]
