"""Full or PEFT? Grids of runs, what they show, and how sure that is.

The rooms behind it, each importing only those before: ``statistics``, ``grids``, ``cells`` (one cell, in its own
process, whose entry is ``__main__``), ``running`` (all of them), ``verdicts``, ``curves``, ``words``, ``groups``,
``figures``, ``pages`` (Markdown and HTML), ``provenance``, ``findings``. What is imported here needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ptft_hf.comparing.grids import Cell, Grid, numbers, read_grid, split_commas
from ptft_hf.comparing.running import run_grid

__all__ = ["Cell", "Grid", "numbers", "read_grid", "run_grid", "show", "split_commas", "write_report"]

TITLE = "Full fine-tuning and PEFT, compared"


def write_report(
    results: Sequence[Mapping[str, Any]],
    output_dir: str | Path,
    *,
    margin: float = 0.01,
    reference: str | None = None,
    command: str = "",
) -> tuple[Path, Path]:
    """Write ``report.md`` and ``report.html``: intervals, verdicts, costs, learning curves, and their sources.

    Args:
        results: What :func:`run_grid` returned.
        output_dir: The folder of the grid.
        margin: Differences below it count as none, in units of the metric; 0.01 is one point of a share.
        reference: The method that all others are compared with; None compares all with all, and with more pairs
            each needs more seeds to be told apart.
        command: What was run, to be quoted.

    Returns:
        Both files.
    """
    from ptft_hf.comparing import findings, pages

    sections = findings.findings(results, margin, command, reference)
    folder = Path(output_dir)
    files = (folder / "report.md", folder / "report.html")
    for file, text in zip(files, (pages.markdown(TITLE, sections), pages.html(TITLE, sections)), strict=True):
        file.write_text(text, encoding="utf-8")
    return files


def show(results: Sequence[Mapping[str, Any]], margin: float = 0.01) -> None:
    """Print one table a task: quality with intervals, and the recommendations."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from ptft_hf.comparing import findings, groups

    console = Console(highlight=False)
    for group in groups.groups_of(results):
        found = findings.quality_table(group)
        table = Table(title=escape(group.where), caption=found.caption)
        for i, name in enumerate(found.head):
            table.add_column(escape(name), justify="right" if i else "left", overflow="fold")
        for row in found.rows:
            table.add_row(*map(escape, row))
        console.print(table)
        for line in findings.recommendations(group, margin):
            console.print(f"- {escape(line)}", soft_wrap=True)
    if failed := sum(result["status"] == "failed" for result in results):
        console.print(f"{failed} of {len(results)} cells failed; see the report, and --retry-failed")
