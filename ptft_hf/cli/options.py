"""What the verbs of ``ptft`` share: the app, options, and how long work is stopped."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="ptft",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fine-tune Hugging Face checkpoints, in full or with PEFT, and prove what was saved.",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Folder = Annotated[Path, typer.Argument(help="Output folder of a finished run.", show_default=False)]
Base = Annotated[
    str | None, typer.Option("--model", help="Where an adapter's base model is now, if it has moved.")
]
OfQuantized = Annotated[
    str,
    typer.Option(
        "--base", help="Of an adapter on a quantized base: full_precision, or dequantized (the rounded values)."
    ),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let Python code run that came with the run's checkpoint.")
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="A TrainingArguments name, or task.*, adapter.*, model.* for a recipe's field. "
        "May be given many times.",
    ),
]
Model = Annotated[
    str,
    typer.Option(
        help="Hub id, name@revision, or folder of the pretrained checkpoint; config:TYPE for random weights."
    ),
]
Task = Annotated[str, typer.Option(help="Task recipe: a name from `ptft ls tasks`, or a YAML file.")]
Adapter = Annotated[
    str,
    typer.Option(
        help="Adapter recipe: a name from `ptft ls adapters`, a YAML file, or the folder of an earlier run."
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the newest intact checkpoint.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the run that is in --output.")]


@contextmanager
def stoppable(how_to_go_on: str, checkpoints: Path | None = None) -> Iterator[None]:
    """Long work, which Ctrl-C ends with exit code 130 and a line on how to go on; where there are no ``checkpoints``
    yet, without it."""
    try:
        yield
    except KeyboardInterrupt as stop:
        if checkpoints is None or checkpoints.is_dir():
            print(f"\nstopped; {how_to_go_on}", file=sys.stderr)
        raise typer.Exit(130) from stop
