"""Verbs on a finished run: predict, evaluate, merge, export, push."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ptft_hf.cli.options import Base, Folder, OfQuantized, TrustRemoteCode, app
from ptft_hf.errors import DataError, OutputError, RecipeError


@app.command()
def predict(
    folder: Folder,
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="[TEXT ...]", help="Texts, or paths of images.", show_default=False)
    ] = None,
    input_: Annotated[
        Path | None,
        typer.Option(
            "--input",
            help="JSON lines, strings or objects with `text` (`tokens`, `document`, `image`); `-` is stdin.",
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="JSON lines; stdout by default.")] = None,
    model: Base = None,
    trust_remote_code: TrustRemoteCode = False,
    dtype: Annotated[
        str | None, typer.Option(help="Compute in bfloat16 or float16; float32 by default.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts that run together.")] = 32,
) -> None:
    """What the model says of each text: JSON lines (labels and scores, entities, or a summary)."""
    if texts and input_:
        raise DataError("give texts as arguments or in --input, not both")
    if output is not None and (output.is_dir() or not output.resolve().parent.is_dir()):
        raise OutputError(f"{output}: {'a folder' if output.is_dir() else 'its folder does not exist'}")
    rows = list(texts) if texts else read_inputs(input_)
    from ptft_hf import checkpoints, inference

    loaded = inference.load(folder, model=model, dtype=dtype, trust_remote_code=trust_remote_code)
    results = loaded.predict(rows, batch_size=batch_size, progress=True)
    lines = "".join(json.dumps(result, ensure_ascii=False) + "\n" for result in results)
    if output is None:
        sys.stdout.buffer.write(lines.encode())  # JSON is UTF-8, whatever the terminal's encoding
        sys.stdout.flush()
        return
    try:
        checkpoints.write_text(output, lines)
    except OSError as error:
        raise OutputError(f"{output}: {error.strerror}") from error


def read_inputs(path: Path | None) -> list[Any]:
    """JSON lines, objects or strings; from stdin also bare lines of text. Blank lines are passed over.

    Raises:
        DataError: Missing file, not UTF-8, or lines that are not JSON, all of them named.
    """
    if path is None and sys.stdin.isatty():
        raise DataError("nothing to predict: give texts as arguments, --input FILE, or lines on stdin")
    stdin = path is None or str(path) == "-"
    name = "stdin" if stdin else str(path)
    raw = b""
    try:
        raw = sys.stdin.buffer.read() if path is None or stdin else path.read_bytes()
        # Not splitlines(), which also splits at characters that stand inside JSON strings, such as U+2028.
        lines = raw.decode("utf-8-sig").replace("\r\n", "\n").split("\n")
    except OSError as error:
        raise DataError(f"{name}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DataError(f"{name}:{line}: not UTF-8; convert the file") from error
    problems: list[str] = []
    rows: list[Any] = []
    for number, line in enumerate(lines, 1):
        try:
            rows += [read_line(line, bare=stdin)] if line.strip() else []
        except ValueError as error:
            problems.append(f"{name}:{number}: not a line of JSON: {error}")
    if problems:
        more = [f"and {len(problems) - 20} more"] if len(problems) > 20 else []
        raise DataError(*problems[:20], *more)
    return rows


def read_line(line: str, *, bare: bool) -> Any:
    """A JSON object or string; with ``bare`` anything else is text as it stands, be it ``5`` or ``[sic]``.

    Raises:
        ValueError: It is neither, or a broken object.
    """
    try:
        value = json.loads(line)
    except ValueError:
        if bare and not line.lstrip().startswith("{"):
            return line
        raise
    if isinstance(value, dict | str):
        return value
    if bare:
        return line
    raise ValueError(f"an object or a string was expected, not {line.strip()[:80]}")


@app.command()
def evaluate(
    folder: Folder,
    data: Annotated[
        str | None, typer.Option(help="A labelled file, folder or hub id; the run's own data by default.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="A task recipe that names the data instead.")] = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    model: Base = None,
    trust_remote_code: TrustRemoteCode = False,
    against: Annotated[
        str | None,
        typer.Option(help="Of a policy: another, such as the run of SFT, that answers the --task's prompts, too."),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(metavar="SOURCE[#LABEL]", help="A reward, as of ptft ppo, that says which answers are better."),
    ] = None,
    prompts: Annotated[
        int | None, typer.Option(min=1, help="With --against: how many are answered at most; 200 by default.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="With --against: of the answers; 42 by default.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="With --against: of the answers, response_length=53, ..."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="With --against: a folder for the comparison's run.json.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Metrics of a finished run on labelled data; with --against how often a judge prefers a policy's answers."""
    if data is not None and task is not None:
        raise DataError("give --data or --task, not both")
    if against is not None or judge is not None:
        if against is None or judge is None or task is None:
            raise RecipeError("--against, --judge and --task belong together: a policy, who compares, on what")
        if model is not None or split != "test":
            raise RecipeError("--model and --split have no effect with --against")
        if trust_remote_code:
            raise RecipeError(
                "--trust-remote-code has no effect with --against; use --set model.trust_remote_code=true"
            )
        from ptft_hf.recipes.ppo import load_ppo

        load_ppo(task, "full/default", set_ or [])  # every fault, before torch is imported
        from ptft_hf.rlhf.evaluating import evaluate_policy

        found = evaluate_policy(
            policy=folder,
            against=against,
            task=task,
            judge=judge,
            output_dir=output,
            prompts=200 if prompts is None else prompts,
            seed=42 if seed is None else seed,
            settings=set_ or [],
        )
        if as_json:
            print(json.dumps(found["metrics"]))
        return
    of_answers = {"--prompts": prompts, "--seed": seed, "--set": set_ or None, "--output": output}
    if idle := [name for name, value in of_answers.items() if value is not None]:
        raise RecipeError(*(f"{name}: has no effect without --against" for name in idle))
    from ptft_hf import inference, report

    loaded = inference.load(folder, model=model, trust_remote_code=trust_remote_code)
    result = loaded.evaluate(data, task=task, split=split, progress=True)
    if as_json:
        print(json.dumps(result))
    else:
        report.evaluation(result, split)


@app.command()
def merge(
    folder: Folder,
    output: Annotated[Path, typer.Option(help="A new folder for the merged model.")],
    model: Base = None,
    trust_remote_code: TrustRemoteCode = False,
    base: OfQuantized = "full_precision",
) -> None:
    """Add an adapter into its base, compare the two, and write a plain transformers model."""
    from ptft_hf import inference, report
    from ptft_hf.rlhf.merging import is_policy, merge_policy

    if is_policy(folder):
        found = merge_policy(folder, output, model=model, base=base, trust_remote_code=trust_remote_code)
        report.say(
            f"merged against adapter on {found['examples']} rows of random tokens: logits differ by at most "
            f"{found['max_logit_difference']:.3g}"
        )
        report.say(f"written to {output}")
        return
    merged, comparison = inference.merge(
        folder, output, model=model, base=base, trust_remote_code=trust_remote_code
    )
    report.say(
        f"merged against adapter on {comparison['examples']} examples: logits differ by at most "
        f"{comparison['max_logit_difference']:.3g}, {comparison['label_changes']} labels change"
    )
    report.say(f"written to {merged.path}")


@app.command()
def export(
    folder: Folder,
    output: Annotated[Path, typer.Option(help="A new folder for the exported model.")],
    to: Annotated[str, typer.Option("--to", help="safetensors or onnx.")] = "safetensors",
    model: Base = None,
    trust_remote_code: TrustRemoteCode = False,
    base: OfQuantized = "full_precision",
) -> None:
    """Write a run as one plain model, after comparing its logits and its metric with the run's."""
    from ptft_hf import exporting, report

    found = exporting.export(
        folder, output, to=to, model=model, base=base, trust_remote_code=trust_remote_code
    )
    report.say(
        f"exported against run on {found['probe_examples']} examples: logits differ by at most "
        f"{found['max_logit_difference']:.3g}"
    )
    if metric := found["metric"]:
        report.say(
            f"on {found['examples']:,} validation examples: {metric['name']} {metric['exported']:.4f}, and "
            f"{metric['run']:.4f} of the run: a gap of {abs(metric['exported'] - metric['run']):.3g}"
        )
    report.say(f"written to {output}")


@app.command()
def push(
    folder: Folder,
    repository: Annotated[str, typer.Argument(metavar="REPO", help="owner/name on the Hub.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to; made if it is not there.")] = None,
) -> None:
    """Upload a finished run to the Hub: the model, its card and run.json; no checkpoints."""
    from ptft_hf import hub

    print(hub.push(folder, repository, private=private, revision=revision))
