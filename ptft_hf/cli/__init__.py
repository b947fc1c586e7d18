"""The ``ptft`` command. torch and transformers are imported when a verb needs them, not before.

The verbs stand in ``training``, ``using``, ``looking`` and ``feedback``, what they share in ``options``.
"""

from __future__ import annotations

import os
import sys
from typing import TextIO

from ptft_hf.cli.options import app
from ptft_hf.errors import PtftError

# The help lists the verbs in this order.
# isort: off
from ptft_hf.cli import training, using, looking, feedback  # noqa: F401
# isort: on

__all__ = ["app", "main", "print_error"]


def print_error(error: PtftError, stream: TextIO) -> None:
    mark = "\033[31merror:\033[0m" if stream.isatty() and "NO_COLOR" not in os.environ else "error:"
    print(f"{mark} {error}", file=stream)


def main() -> None:
    """Run the command; a :class:`PtftError` ends it with its message and exit code 2."""
    try:
        try:
            app(prog_name="ptft")
        finally:
            sys.stdout.flush()
    except PtftError as error:
        if os.environ.get("RANK", "0") == "0":
            print_error(error, sys.stderr)
        sys.exit(2)
    except (
        BrokenPipeError
    ):  # the reader, such as `head`, has had enough; the flush at exit must not fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
