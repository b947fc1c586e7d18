"""What a person sees of a PPO run: sums before it, curves, a page of samples, and the table at its end."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ptft_hf import report
from ptft_hf.card import PPO_FIGURES, figures_of_policy

PANELS = (
    ("score", ("objective/scores", "objective/judge")),
    ("KL from the reference (nats an answer)", ("objective/kl",)),
    ("entropy (nats a token)", ("policy/entropy_avg",)),
    ("answer length (tokens)", ("val/answer_length",)),
    ("critic: explained variance", ("val/explained_variance",)),
    ("clipped ratios", ("policy/clipfrac_avg",)),
)


def curves(history: Sequence[Mapping[str, Any]], picture: Path) -> None:
    """``curves.png``: six panels over updates."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(12, 6), layout="constrained")
    for axis, (title, names) in zip(figure.subplots(2, 3, sharex=True).flat, PANELS, strict=True):
        for name in names:
            points = [(line["update"], line[name]) for line in history if line.get(name) is not None]
            if points:
                marker = "o" if len(points) == 1 else None
                axis.plot(*zip(*points, strict=True), marker=marker, label=PPO_FIGURES[name])
        if len(axis.lines) > 1:
            axis.legend()
        axis.set_title(title, fontsize=10)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    figure.supxlabel("update", fontsize=10)
    figure.savefig(picture, dpi=120)


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Samples</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 1.5rem auto; max-width: 60rem; padding: 0 1rem; }}
section {{ border-top: 1px solid #aaa; padding: .5rem 0 1rem; }} pre {{ white-space: pre-wrap; margin: .2rem 0; }}
table {{ border-collapse: collapse; width: 100%; }}
td, th {{ vertical-align: top; text-align: left; padding: .3rem; }} td pre {{ margin: 0; }}
td.n, th.n {{ white-space: nowrap; text-align: right; width: 1%; }} tr + tr {{ border-top: 1px solid #ddd; }}
</style></head><body><h1>Samples through training</h1>
<p>Held-out prompts, answered with the same random numbers each time. Scores: {names}.</p>
{sections}</body></html>
"""


def samples_page(lines: Sequence[Mapping[str, Any]]) -> str:
    """``samples.html``: for each prompt its reference and the policy's answers through training. Text is text: markup
    in an answer is shown, not obeyed."""
    names = ", ".join(html.escape(name) for name in (lines[0]["scores"] if lines else ()))
    prompts = dict.fromkeys(line["prompt"] for line in lines)
    sections = []
    for prompt in prompts:
        own = [line for line in lines if line["prompt"] == prompt]
        reference = (
            f"<p>Reference:</p><pre>{html.escape(own[0]['reference'])}</pre>" if own[0]["reference"] else ""
        )
        rows = "".join(
            f"<tr><td class=n>{line['update']}</td><td><pre>{html.escape(line['answer'])}</pre></td><td class=n>"
            f"{'<br>'.join(f'{score:.3f}' for score in line['scores'].values())}</td></tr>"
            for line in own
        )
        sections.append(
            f"<section><pre><b>{html.escape(prompt)}</b></pre>{reference}<table>"
            "<tr><th class=n>update</th><th>answer</th>"
            f"<th class=n>score</th></tr>{rows}</table></section>"
        )
    return PAGE.format(names=names, sections="\n".join(sections))


def ends(history: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Means of the figures over the first and the last tenth of the updates (at least one)."""
    size = max(1, len(history) // 10)
    found: dict[str, dict[str, float | None]] = {}
    for name, part in (("first", history[:size]), ("last", history[-size:])):
        keys = [
            key for key, value in part[0].items() if isinstance(value, float | None) and "time/" not in key
        ]
        values = {key: [line[key] for line in part if line.get(key) is not None] for key in keys}
        found[name] = {key: sum(some) / len(some) if some else None for key, some in values.items()}
    return found


def final_table(run: Mapping[str, Any]) -> None:
    """First and last updates beside each other, then what was saved."""
    console = Console(highlight=False)
    facts, proof = run["training"], run["proof"]
    table = Table("", title=None)
    for name in ("first updates", "last updates"):
        table.add_column(name, justify="right")
    for row in figures_of_policy(run):
        table.add_row(*row)
    console.print(
        f"\n{escape(run['task']['name'])} · {escape(run['adapter']['name'])} · {escape(run['reward'])}"
    )
    console.print(table)
    parameters = run["parameters"]
    console.print(
        f"{facts['updates']:,} updates of {facts['answers_per_update']:,} answers in {facts['seconds']:.1f} s; "
        f"{parameters['trainable']:,} of {parameters['total']:,} parameters trained; peak memory "
        f"{facts['peak_memory_mb']:,.0f} MB, {report.size(facts['bytes_on_disk'])} on disk\n"
        f"{report.beside_forecast(run.get('forecast'), facts)}"
        f"saved in {escape(run['output_dir'])} and proven: loaded back, the policy's logits on {proof['examples']} "
        f"prompts differ by {proof['max_difference']} from those of the trained one",
        soft_wrap=True,
    )
    for finding in run["findings"]:
        console.print(
            f"[yellow]doctor, update {finding['update']}: {escape(finding['text'])}[/yellow]", soft_wrap=True
        )


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; none if it is not there."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.is_file() else []
