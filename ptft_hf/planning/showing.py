"""A forecast on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from ptft_hf import report
from ptft_hf.planning.forecasts import Forecast


def show(console: Console, found: Forecast) -> None:
    """Terms down, stages across; then peak, time and disk, and what to change."""
    terms = list(dict.fromkeys(term for stage in found.stages.values() for term, size in stage.items() if size))
    table = Table("MB")
    for stage in found.stages:
        table.add_column(stage, justify="right", no_wrap=True)
    for term in terms:
        sizes = (stage.get(term, 0) for stage in found.stages.values())
        table.add_row(term, *(f"{size / 1e6:,.0f}" if size else "" for size in sizes))
    table.add_section()
    table.add_row("in all", *(f"{sum(stage.values()) / 1e6:,.0f}" for stage in found.stages.values()))
    console.print(table)
    rows, width = found.longest
    seconds = "" if found.seconds is None else f"{time(found)} of training in {found.steps:,} steps, "
    console.print(
        f"peak memory {megabytes(found.peak)} (with the proof of what was saved {megabytes(found.peak_in_all)}), "
        f"{seconds}up to {megabytes(sum(found.disk.values()))} on disk; the longest batch is {rows} x {width}",
        soft_wrap=True,
    )
    for note in found.notes:
        console.print(f"- {note}", soft_wrap=True)
    if found.limit is None:
        return
    close = ", by less than a forecast may be wrong: it may not" if found.is_close else ""
    console.print(f"it {'fits' if found.fits else 'does NOT fit'} in {megabytes(found.limit)}{close}", soft_wrap=True)
    if found.advice:
        table = Table("change", "peak memory", "fits")
        for one in found.advice:
            table.add_row(one.change, megabytes(one.peak), "yes" if one.fits else "no")
        console.print(table)


CHANGES = "`ptft plan` with the same arguments says what to change"


def before_training(found: Forecast, changes: str = CHANGES) -> None:
    """One line, and where the run will not fit a warning, with what is said of changes."""
    seconds = "" if found.seconds is None else f", {time(found)} of training"
    report.say(f"forecast  peak memory {megabytes(found.peak)}{seconds}")
    if not found.fits and found.limit is not None:
        report.say(
            f"this run will probably NOT FIT: it is forecast to hold {megabytes(found.peak_in_all)}, and "
            f"{megabytes(found.limit)} are to be had; {changes}",
            style="yellow",
        )


def time(found: Forecast) -> str:
    """How long it trains; only a probe knows this machine."""
    said = duration(found.seconds or 0.0)
    return said if found.probed else f"roughly {said}"


def megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
