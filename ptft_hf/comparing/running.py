"""A grid carried out: every cell in a process of its own, its file written at once, what is finished skipped.

No torch is imported here: the cells' processes do the work.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from ptft_hf import report
from ptft_hf.comparing.grids import Cell, Grid
from ptft_hf.errors import OutputError, RecipeError

Result = dict[str, Any]


class Job(NamedTuple):
    """A cell and where its results go."""

    cell: Cell
    output: Path
    keep_weights: bool
    threads: int | None
    """For torch; None leaves it to torch."""

    @property
    def file(self) -> Path:
        return self.output / "cells" / f"{self.cell.key}.json"

    @property
    def runs(self) -> Path:
        """The folder of the cell's runs."""
        return self.output / "runs" / self.cell.key

    @property
    def log(self) -> Path:
        """What the cell's process said; kept if it failed."""
        return self.output / "logs" / f"{self.cell.key}.log"


FINISHED = {"metric", "tries", "learning_rate", "test", "cost", "data"}
"""What the file of a finished cell has, among others."""
Executor = Callable[[Sequence[Job], int], Iterator[Job]]
"""Carries jobs out, so many at a time, and yields each when its file is there."""


def run_grid(
    grid: Grid,
    output_dir: str | Path,
    *,
    jobs: int = 1,
    executor: str | Executor = "local",
    retry_failed: bool = False,
    keep_weights: bool = False,
) -> list[Result]:
    """Run the cells of a grid that are not finished yet, each in a process of its own.

    A cell that fails is a result as well: its file holds the error. A grid that was stopped, by whatever, goes on
    when it is run again.

    Args:
        grid: What to compare.
        output_dir: Its ``cells/`` gets one JSON file a cell.
        jobs: Cells at a time; the processor's threads are shared out among them.
        executor: One of :data:`EXECUTORS`, or a function like them.
        retry_failed: Run the cells again that failed.
        keep_weights: Keep each cell's chosen run under ``runs/``.

    Returns:
        The content of every cell's file, with its name as ``file``, in the grid's order.

    Raises:
        RecipeError: Every fault of the grid and its recipes, or no such executor; nothing has been run.
        OutputError: The folder cannot be used, or another process is at work in it.
    """
    carry_out = EXECUTORS.get(executor) if isinstance(executor, str) else executor
    if carry_out is None:
        raise RecipeError(f"executor: {executor!r} is none of {', '.join(EXECUTORS)}")
    cells = grid.cells()
    folder = Path(output_dir)
    threads = max(1, (os.cpu_count() or 1) // jobs) if jobs > 1 else None
    every = [Job(cell, folder, keep_weights, threads) for cell in cells]
    with alone_in(folder):
        there = {job.file: read_cell(job.file) for job in every if job.file.is_file()}
        waiting = [job for job in every if not is_done(there.get(job.file), retry_failed)]
        if len(waiting) < len(every):
            report.say(f"{len(every) - len(waiting)} of {len(every)} cells are there already")
            lost = [job for job in every if keep_weights and job not in waiting and not job.runs.is_dir()]
            if lost:
                where = folder / "cells"
                report.say(f"{len(lost)} of these have no weights; delete their files in {where} to run them anew")
        for number, job in enumerate(carry_out(waiting, jobs), 1):
            which = f"{job.cell.label}, {job.cell.model}" if len(grid.models) > 1 else job.cell.label
            report.say(f"[{number}/{len(waiting)}] {which}: {told(read_cell(job.file))}")
        for name in ("runs", "logs"):
            with suppress(OSError):
                (folder / name).rmdir()  # unless something was kept
    return [{**read_cell(job.file), "file": str(job.file.relative_to(folder))} for job in every]


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold the folder; the lock ends with the process, however that ends.

    Raises:
        OutputError: It cannot be made, or another process holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise OutputError(f"{folder}: {error.strerror}; choose another output folder") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OutputError(f"{folder}: another comparison is running in it; wait for its end") from error
        yield


def is_done(result: Result | None, retry_failed: bool) -> bool:
    return result is not None and not (retry_failed and result["status"] == "failed")


def read_cell(file: Path) -> Result:
    """The content of a cell's file.

    Raises:
        OutputError: It is damaged.
    """
    try:
        result: Result = json.loads(file.read_text("utf-8"))
        assert result["status"] in ("finished", "failed") and result["cell"]["adapter"]["name"]
        assert result["status"] == "failed" or result.keys() >= FINISHED
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise OutputError(f"{file}: not readable as a cell; delete it, and it will be run again") from error
    return result


def told(result: Mapping[str, Any]) -> str:
    """A cell in one line."""
    if result["status"] == "failed":
        return f"FAILED: {first_fault(result)}"
    name = result["metric"]["name"]
    return (
        f"{name} {result['test']['metrics'][name]:.4f}, learning rate {result['learning_rate']:g}, "
        f"{result['cost']['seconds_of_all_tries']:.0f} s of training in {len(result['tries'])} tries"
    )


def first_fault(result: Mapping[str, Any]) -> str:
    """Of a cell that failed, in one line: ``2 problems: - the first of them``; the file holds all."""
    first, *more = str(result["error"]).strip().splitlines() or ["for no reason that was told"]
    return f"{first} {more[0].strip()}" if first.endswith(" problems:") and more else first


# ---- executors ----


def run_locally(jobs: Sequence[Job], at_a_time: int) -> Iterator[Job]:
    """Processes of this machine."""
    stop = threading.Event()
    pool = ThreadPoolExecutor(at_a_time)
    try:
        futures = {pool.submit(run_process, job, stop): job for job in jobs}
        for future in as_completed(futures):
            future.result()
            yield futures[future]
    finally:  # also when the user interrupts: nothing more is begun, and what runs is ended
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


def run_by_ray(jobs: Sequence[Job], at_a_time: int) -> Iterator[Job]:
    """See :func:`ptft_hf.comparing.by_ray.run_by_ray`."""
    from ptft_hf.comparing import by_ray

    return by_ray.run_by_ray(jobs, at_a_time)


EXECUTORS: dict[str, Executor] = {"local": run_locally, "ray": run_by_ray}


def run_process(job: Job, stop: threading.Event) -> None:
    """Run a cell to its file, also if its process crashes; leave no file if it was stopped.

    The process gets the cell on its standard input and ends when that is closed, so that none outlives a parent
    that was killed, to write beside its successor.
    """
    job.log.parent.mkdir(parents=True, exist_ok=True)
    job.file.unlink(missing_ok=True)
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": os.environ.get("TOKENIZERS_PARALLELISM", "false")}
    if job.threads is not None:
        environment["OMP_NUM_THREADS"] = str(job.threads)
    order = {
        "cell": job.cell.to_dict(),
        "file": str(job.file),
        "runs": str(job.runs),
        "keep": job.keep_weights,
    }
    with (
        job.log.open("wb") as log,
        subprocess.Popen(
            [sys.executable, "-m", "ptft_hf.comparing"],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # an interrupt at the keyboard is for the parent to handle
        ) as process,
    ):
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # it crashed at once
            process.stdin.write(json.dumps(order).encode() + b"\n")
            process.stdin.flush()
        while process.poll() is None and not stop.wait(0.05):
            pass
    if not job.file.is_file() and not stop.is_set():
        write_crash(job, process.returncode)
    finished = job.file.is_file() and read_cell(job.file)["status"] == "finished"
    if finished or stop.is_set():
        job.log.unlink()
    if not (finished and job.keep_weights):
        shutil.rmtree(job.runs, ignore_errors=True)


def write_crash(job: Job, code: int) -> None:
    """The cell of a process that ended without a word."""
    from ptft_hf.comparing.cells import write_cell

    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    hint = "; it may have run out of memory" if code == -9 else ""
    tail = job.log.read_text("utf-8", errors="replace")[-2_000:].strip()
    error = "\n".join(filter(None, [f"the cell's process {how}{hint}", tail]))
    write_cell(job.file, {"status": "failed", "cell": job.cell.to_dict(), "error": error})
