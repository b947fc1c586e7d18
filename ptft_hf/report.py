"""What a person sees of a run: the sums before it, the table and curves after it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

messages = Console(stderr=True, highlight=False, soft_wrap=True)
"""Notes and progress go to stderr, so that stdout holds nothing but results."""


def results() -> Console:
    """Where results go: stdout as it is now."""
    return Console(highlight=False)


def say(text: str, style: str = "") -> None:
    messages.print(escape(text), style=style or None)


@contextmanager
def silence() -> Iterator[None]:
    """Nothing is said inside: what is done there has been done, and said, before."""
    before, messages.quiet = messages.quiet, True
    try:
        yield
    finally:
        messages.quiet = before


def bar(total: int, doing: str, unit: str, *, done: int = 0, stays: bool = True, show: bool = True) -> Any:
    """A ``tqdm`` bar on stderr. Off a terminal (a log file, a CI run) it is renewed every half minute, and one
    that would vanish at its end is not shown at all."""
    from tqdm.auto import tqdm

    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=done,
        desc=doing,
        unit=unit,
        leave=stays,
        disable=not show or not (terminal or stays),
        dynamic_ncols=True,
        mininterval=0.5 if terminal else 30,
        maxinterval=10 if terminal else 60,
        delay=0 if stays else 1,
    )


def before_training(notes: Sequence[str], sums: Mapping[str, str], groups: Mapping[str, int]) -> None:
    """Sums of the run, and trained parameters by module."""
    for note in notes:
        say(f"- {note}")
    lines = {**sums, "trained": ", ".join(f"{name} {count:,}" for name, count in groups.items())}
    width = max(map(len, lines))
    for name, value in lines.items():
        messages.print(f"[bold]{name:<{width}}[/bold]  {escape(value)}")


def after_training(run: Mapping[str, Any]) -> None:
    """One table: validation and test metrics; a second for the classes, where there are any."""
    console = results()
    console.print(f"\n{escape(run['task']['name'])} · {escape(run['adapter']['name'])}", soft_wrap=True)
    console.print(metric_table(run["metrics"]))
    classes = run["report"].get("test", {}).get("per_class", [])
    if 0 < len(classes) <= 20:
        print_classes(console, classes, "test")
    facts, parameters, proof = run["training"], run["parameters"], run["proof"]
    console.print(
        f"{parameters['trainable']:,} of {parameters['total']:,} parameters trained in "
        f"{facts['seconds']:.1f} s ({facts['rows_per_second']:.0f} rows/s); peak memory "
        f"{facts['peak_memory_mb']:,.0f} MB, {size(facts['bytes_on_disk'])} on disk\n"
        f"{beside_forecast(run.get('forecast'), facts)}"
        f"saved in {escape(run['output_dir'])} and proven: loaded back, its logits on {proof['examples']} "
        f"examples differ by {proof['max_difference']} from those of the trained model",
        soft_wrap=True,
    )


def beside_forecast(forecast: Mapping[str, Any] | None, facts: Mapping[str, Any]) -> str:
    """A line with what was forecast of a run's peak and time, and how far that was off; none without a forecast."""
    told = []
    for name, key, form in (("peak memory", "peak_memory_mb", "{:,.0f} MB"), ("training", "seconds", "{:,.1f} s")):
        said, was = (forecast or {}).get(key), facts[key]
        if said is not None and was:
            told.append(f"{name} {form.format(said)} (off by {(said - was) / was:+.0%})")
    return f"forecast: {', '.join(told)}\n" if told else ""


def size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"


def metric_table(splits: Mapping[str, Mapping[str, float]]) -> Table:
    """Metrics down, splits across."""
    table = Table("metric")
    for split in splits:
        table.add_column(split, justify="right")
    for name in next(iter(splits.values())):
        table.add_row(name, *(f"{values[name]:.4f}" for values in splits.values()))
    return table


def print_classes(console: Console, classes: Sequence[Mapping[str, Any]], split: str) -> None:
    table = Table()
    table.add_column("class", overflow="fold")
    for name in ("precision", "recall", "f1", "support"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in classes:
        figures = (f"{row[name]:.4f}" for name in ("precision", "recall", "f1"))
        table.add_row(escape(str(row["label"])), *figures, f"{row['support']:,}")
    console.print(f"{split}, by class")
    console.print(table)


def evaluation(result: Mapping[str, Any], split: str) -> None:
    """Metrics of one split, and a table of its classes."""
    console = results()
    console.print(metric_table({split: {name: value for name, value in result.items() if name != "report"}}))
    if classes := result["report"].get("per_class"):
        print_classes(console, classes, split)


def curves(metrics: Path, picture: Path, metric: str | None) -> None:
    """``curves.png``: training and validation loss over steps, and beside it the validation metric."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    entries = [json.loads(line) for line in metrics.read_text("utf-8").splitlines()]
    name = f"eval_{str(metric).removeprefix('eval_')}"

    def points(key: str) -> list[tuple[int, float]]:
        return [(entry["step"], entry[key]) for entry in entries if entry.get(key) is not None]

    panels = {"loss": {"training": points("loss"), "validation": points("eval_loss")}}
    if name != "eval_loss" and points(name):
        panels[f"validation {name.removeprefix('eval_')}"] = {"validation": points(name)}
    figure = Figure(figsize=(4.5 * len(panels), 3.4), layout="constrained")
    axes = figure.subplots(1, len(panels), sharex=True, squeeze=False)[0]
    for axis, (title, series) in zip(axes, panels.items(), strict=True):
        for label, line in series.items():
            color = "tab:blue" if label == "training" else "tab:orange"
            marker = "o" if label == "validation" or len(line) == 1 else None
            if line:
                axis.plot(*zip(*line, strict=True), marker=marker, color=color, label=label)
        axis.set_title(title)
        axis.set_xlabel("optimizer step")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    if axes[0].lines:
        axes[0].legend()
    figure.savefig(picture, dpi=120)
