"""The ``ptft`` command. torch and transformers are imported when a verb needs them, not before."""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from ptft_hf.errors import DataError, OutputError, PtftError

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
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="A TrainingArguments name, or task.*, adapter.*, model.* for a recipe's field. "
        "May be given many times.",
    ),
]


@app.command()
def train(
    model: Annotated[
        str,
        typer.Option(
            help="Hub id, name@revision, or folder of the pretrained checkpoint; config:TYPE for random weights."
        ),
    ],
    task: Annotated[str, typer.Option(help="Task recipe: a name from `ptft ls tasks`, or a YAML file.")],
    adapter: Annotated[
        str,
        typer.Option(
            help="Adapter recipe: a name from `ptft ls adapters`, a YAML file, or the folder of an earlier adapter."
        ),
    ],
    output: Annotated[Path, typer.Option(help="The folder that becomes the final model.")],
    seed: Annotated[int, typer.Option(help="Of initial weights, order of rows, dropout and splits.")] = 42,
    set_: Set = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest intact checkpoint.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run that is in --output.")
    ] = False,
) -> None:
    """Fine-tune a checkpoint, choose the best step on validation, test once, save, and prove the save."""
    from ptft_hf import recipes

    if recipes.saved_adapter_kind(adapter) is None:
        recipes.load_run(task, adapter, set_ or [])  # every fault of the recipes, before torch is imported
    from ptft_hf.training import train as run

    keep_freed_memory()
    try:
        run(
            model=model,
            task=task,
            adapter=adapter,
            output_dir=output,
            seed=seed,
            settings=set_ or [],
            resume=resume,
            overwrite=overwrite,
        )
    except KeyboardInterrupt as stop:
        if (output / "checkpoints").is_dir():
            print("\nstopped; --resume goes on from the newest checkpoint", file=sys.stderr)
        raise typer.Exit(130) from stop


def keep_freed_memory() -> None:
    """Let glibc keep the memory of freed activations instead of handing it back to the kernel and fetching it anew
    at every step: two thirds of the page faults are saved, and up to a tenth of a step on a CPU (measured)."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, at its largest
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


@app.command()
def ppo(
    policy: Annotated[str, typer.Option(help="A causal LM, or the folder of a PEFT adapter on one (an SFT run).")],
    reward: Annotated[
        list[str],
        typer.Option(
            metavar="[WEIGHT*]SOURCE[#LABEL]",
            help="A sequence classifier's folder or checkpoint, or package.module:function. Several are added up.",
        ),
    ],
    task: Annotated[str, typer.Option(help="Recipe of prompts: a name from `ptft ls tasks`, or a YAML file.")],
    output: Annotated[Path, typer.Option(help="The folder that becomes the policy.")],
    adapter: Annotated[
        str | None,
        typer.Option(help="Of a policy that is a checkpoint: lora/r16_all_linear by default, or full/default."),
    ] = None,
    judge: Annotated[
        str | None, typer.Option(help="A reward that is not trained for; the doctor looks whether it rises, too.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of new weights, order of prompts, answers and splits.")] = 42,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="An option of PPO (kl_coef=0.1), or task.*, adapter.*, model.* for a recipe's field.",
        ),
    ] = None,
    stop_on: Annotated[
        list[str] | None, typer.Option(help="A finding of the doctor that ends the run, or all.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest intact checkpoint.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run that is in --output.")
    ] = False,
) -> None:
    """Train a policy by PPO for a reward, watched by the doctor; save it with its critic, and prove the save."""
    from ptft_hf import recipes
    from ptft_hf.recipes.ppo import load_ppo

    sets = [*(set_ or []), *([f"stop_on=[{', '.join(stop_on)}]"] if stop_on else [])]
    default = "lora/r16_all_linear" if recipes.saved_adapter_kind(policy) is None else None
    if (recipe := adapter or default) is not None:
        load_ppo(task, recipe, sets)  # every fault of the recipes, before torch is imported
    from ptft_hf.rlhf.ppo import train_ppo

    keep_freed_memory()
    try:
        train_ppo(
            policy=policy,
            reward=reward,
            task=task,
            output_dir=output,
            adapter=adapter,
            judge=judge,
            seed=seed,
            settings=sets,
            resume=resume,
            overwrite=overwrite,
        )
    except KeyboardInterrupt as stop:
        if (output / "checkpoints").is_dir():
            print("\nstopped; --resume goes on from the newest checkpoint", file=sys.stderr)
        raise typer.Exit(130) from stop


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

    loaded = inference.load(folder, model=model, dtype=dtype)
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
def inspect(
    model: Annotated[str, typer.Option(help="Hub id, name@revision, or folder of the checkpoint.")],
    task: Annotated[str, typer.Option(help="Task recipe: a name from `ptft ls tasks`, or a YAML file.")],
    rows: Annotated[int, typer.Option(min=1, help="How many are shown; the longest is the last.")] = 5,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "train",
    seed: Annotated[int, typer.Option(help="Of splits that are made.")] = 42,
    set_: Set = None,
) -> None:
    """Show rows as the model reads them, with what is trained marked; refuse what a run would. Loads no weights."""
    from ptft_hf import recipes

    recipes.load_run(task, "full/default", set_ or [])
    from ptft_hf import inspecting, report

    seen = inspecting.inspect(model=model, task=task, split=split, rows=rows, seed=seed, settings=set_ or [])
    for note in seen.findings.notes:
        report.say(f"- {note}")
    inspecting.show(report.results(), seen.rows, limit=600, title=seen.title)
    seen.findings.refuse()


@app.command()
def evaluate(
    folder: Folder,
    data: Annotated[
        str | None, typer.Option(help="A labelled file, folder or hub id; the run's own data by default.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="A task recipe that names the data instead.")] = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    model: Base = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Metrics of a finished run on labelled data."""
    if data is not None and task is not None:
        raise DataError("give --data or --task, not both")
    from ptft_hf import inference, report

    result = inference.load(folder, model=model).evaluate(data, task=task, split=split, progress=True)
    if as_json:
        print(json.dumps(result))
    else:
        report.evaluation(result, split)


@app.command()
def merge(
    folder: Folder,
    output: Annotated[Path, typer.Option(help="A new folder for the merged model.")],
    model: Base = None,
    base: OfQuantized = "full_precision",
) -> None:
    """Add an adapter into its base, compare the two, and write a plain transformers model."""
    from ptft_hf import inference, report

    merged, comparison = inference.merge(folder, output, model=model, base=base)
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
    base: OfQuantized = "full_precision",
) -> None:
    """Write a run as one plain model, after comparing its logits and its metric with the run's."""
    from ptft_hf import exporting, report

    found = exporting.export(folder, output, to=to, model=model, base=base)
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
def compare(
    output: Annotated[
        Path, typer.Option(help="Folder for cells/*.json and the reports; what it holds is not run again.")
    ],
    grid: Annotated[
        Path | None,
        typer.Argument(
            metavar="[GRID]", help="YAML file with a grid; options stand over it.", show_default=False
        ),
    ] = None,
    model: Annotated[list[str] | None, typer.Option(help="A checkpoint; may be given many times.")] = None,
    task: Annotated[list[str] | None, typer.Option(help="A task recipe; may be given many times.")] = None,
    adapters: Annotated[list[str] | None, typer.Option(metavar="A,B,...", help="Adapter recipes.")] = None,
    seeds: Annotated[str | None, typer.Option(help="0,1,2 by default; no verdict under three.")] = None,
    sizes: Annotated[
        str | None, typer.Option(help="Training rows, such as 500,2000,all; all by default.")
    ] = None,
    validation_size: Annotated[int | None, typer.Option(help="Validation rows; all by default.")] = None,
    learning_rates: Annotated[
        int | None, typer.Option(help="Tries for each method, of which validation chooses; 3 by default.")
    ] = None,
    set_: Set = None,
    margin: Annotated[
        float, typer.Option(min=0.0, help="Smaller differences count as none; 0.01 is a point.")
    ] = 0.01,
    reference: Annotated[
        str | None, typer.Option(help="Compare with this adapter alone, not all with all.")
    ] = None,
    executor: Annotated[str, typer.Option(help="Where cells run: local.")] = "local",
    jobs: Annotated[int, typer.Option(min=1, help="Cells at a time.")] = 1,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run failed cells again.")] = False,
    keep_weights: Annotated[
        bool, typer.Option("--keep-weights", help="Keep each cell's chosen run.")
    ] = False,
) -> None:
    """Compare methods over seeds and training-set sizes: intervals, verdicts, costs and a report."""
    import shlex

    from ptft_hf import comparing

    given = {
        "models": model,
        "tasks": task,
        "adapters": comparing.split_commas(adapters or []),
        "seeds": comparing.numbers("seeds", seeds),
        "sizes": comparing.numbers("sizes", sizes),
        "validation_size": validation_size,
        "learning_rates": learning_rates,
        "settings": set_,
    }
    grid_ = comparing.read_grid(
        grid, {name: value for name, value in given.items() if value not in (None, [])}
    )
    grid_.check_reference(reference)
    try:
        results = comparing.run_grid(
            grid_, output, jobs=jobs, executor=executor, retry_failed=retry_failed, keep_weights=keep_weights
        )
    except KeyboardInterrupt as stop:
        print("\nstopped; the same command goes on with the cells that are left", file=sys.stderr)
        raise typer.Exit(130) from stop
    command = f"ptft {shlex.join(sys.argv[1:])}"
    files = comparing.write_report(results, output, margin=margin, reference=reference, command=command)
    comparing.show(results, margin)
    print(f"{files[0]}\n{files[1]}")
    if all(result["status"] == "failed" for result in results):
        raise typer.Exit(1)


@app.command()
def tune(
    model: Annotated[
        str, typer.Option(help="Hub id, name@revision, or folder of the pretrained checkpoint.")
    ],
    task: Annotated[str, typer.Option(help="Task recipe: a name from `ptft ls tasks`, or a YAML file.")],
    adapter: Annotated[
        str, typer.Option(help="Adapter recipe: a name from `ptft ls adapters`, or a YAML file.")
    ],
    search: Annotated[
        list[str],
        typer.Option(
            metavar="KEY=RANGE",
            help="log:1e-5:1e-2, uniform:0:0.3, int:1:4, logint:4:64 or a,b,c for a key as of --set; or a YAML file "
            "of keys. May be given many times.",
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder for the tries' figures and the winner's run.")],
    trials: Annotated[int, typer.Option(min=1, help="Tries in all.")] = 20,
    seed: Annotated[int, typer.Option(help="Of the search, and of every run in it.")] = 42,
    set_: Set = None,
) -> None:
    """Search ranges of settings by the validation metric, train the winner once, and test that."""
    from ptft_hf import recipes
    from ptft_hf.tuning import read_ranges

    ranges = read_ranges(search)
    if recipes.saved_adapter_kind(adapter) is None:
        recipes.load_run(task, adapter, set_ or [])
    from ptft_hf.tuning import searching

    keep_freed_memory()
    try:
        searching.tune(
            model=model,
            task=task,
            adapter=adapter,
            search=ranges,
            output_dir=output,
            trials=trials,
            seed=seed,
            settings=set_ or [],
        )
    except KeyboardInterrupt as stop:
        print("\nstopped; the same command goes on with the tries that are left", file=sys.stderr)
        raise typer.Exit(130) from stop


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


@app.command("ls")
def list_recipes(
    kind: Annotated[
        str | None, typer.Argument(metavar="[tasks|adapters]", help="One kind alone.", show_default=False)
    ] = None,
) -> None:
    """List the recipes of the catalogue."""
    from ptft_hf import recipes

    if kind not in (None, "tasks", "adapters"):
        raise DataError(f"{kind!r} is neither tasks nor adapters")
    for which in ("tasks", "adapters"):
        if kind in (None, which):
            names = recipes.catalogue(which)
            width = max(map(len, names), default=0)
            print(f"{which}:")
            for name in names:
                recipe = recipes.load_task(name) if which == "tasks" else recipes.load_adapter(name)
                print(f"  {name:<{width}}  {recipe.description or ''}".rstrip())


@app.command()
def show(name: Annotated[str, typer.Argument(help="A name from `ptft ls`, or a YAML file.")]) -> None:
    """Print a recipe with its includes resolved."""
    from ptft_hf import recipes

    print(recipes.to_yaml(recipes.load_recipe(name)), end="")


@app.command()
def validate(files: Annotated[list[str], typer.Argument(metavar="FILE ...", help="Recipe files.")]) -> None:
    """Check recipes without running them; every fault of every file is reported."""
    from ptft_hf import recipes
    from ptft_hf.errors import RecipeError

    problems: list[str] = []
    for file in files:
        try:
            recipes.load_recipe(file)
            print(f"{file}: fine")
        except RecipeError as error:
            problems += error.problems
    if problems:
        raise RecipeError(*problems)


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
