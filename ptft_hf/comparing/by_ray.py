"""Cells on the machines of a Ray cluster; their files come back over the network, and no folder need be shared."""

from __future__ import annotations

import json
import os
import socket
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ptft_hf import report
from ptft_hf.comparing.grids import Cell
from ptft_hf.comparing.running import Job, run_process
from ptft_hf.errors import RecipeError

RETRIES = 3
"""How often a cell is begun again whose machine is lost."""
WAIT = 10.0
"""Seconds within which a cluster must answer."""


def run_by_ray(jobs: Sequence[Job], at_a_time: int) -> Iterator[Job]:
    """Cells on the cluster at ``RAY_ADDRESS``, else on one that ``ray start`` has begun on this machine, else on this
    machine alone. All machines need this package, and models and data under the same names.

    A cell takes its share of the cluster's processors, never more than one machine has; a machine that is lost costs
    the cells that ran on it another run.

    Raises:
        RecipeError: Ray is not installed, there is no cluster at the address, or weights are to be kept, which stay
            on the machines.
    """
    try:
        import ray
    except ImportError as error:
        raise RecipeError("executor: ray needs the package ray: pip install 'ptft_hf[ray]'") from error
    from ptft_hf.checkpoints import write_text

    if any(job.keep_weights for job in jobs):
        raise RecipeError("executor: ray leaves weights on the machines; leave --keep-weights out, or use local")
    started = not ray.is_initialized()
    if started:
        _knock(os.environ.get("RAY_ADDRESS", ""))
        try:
            ray.init(log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, ValueError) as error:
            raise RecipeError(f"executor: no Ray cluster can be reached: {error}") from error
    processors = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    threads = max(1, min(max(processors), sum(processors) // at_a_time))
    report.say(f"Ray: {len(processors)} machines with {sum(processors)} processors; {threads} for a cell")
    remote = ray.remote(num_cpus=threads, max_retries=RETRIES)(run_there)
    waiting, running = list(reversed(jobs)), dict[Any, Job]()
    try:
        while waiting or running:
            while waiting and len(running) < at_a_time:
                job = waiting.pop()
                running[remote.remote(job.cell.to_dict(), threads, str(Path.cwd()))] = job
            (done,), _ = ray.wait(list(running), num_returns=1)
            job = running.pop(done)
            try:
                text, log = ray.get(done)
            except ray.exceptions.RayError as error:
                failed = {"status": "failed", "cell": job.cell.to_dict(), "error": f"Ray lost the cell: {error}"}
                text, log = json.dumps(failed), None
            for file, content in ((job.log, log), (job.file, text)):
                if content is not None:
                    file.parent.mkdir(parents=True, exist_ok=True)
                    write_text(file, content)
            yield job
    finally:  # also when the user interrupts: nothing more is begun, and what runs is ended
        for one in running:
            ray.cancel(one, force=True)
        if started:
            ray.shutdown()


def _knock(address: str) -> None:
    """Whether anyone listens at ``HOST:PORT``; Ray itself tries for many minutes.

    Raises:
        RecipeError: Nobody does.
    """
    from ray.util import get_node_ip_address

    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not (colon and port.isdecimal()):  # auto, local, or what Ray refuses at once
        return
    # For this machine Ray takes the address by which others know it.
    hosts = [host, get_node_ip_address()] if host in ("localhost", "127.0.0.1") else [host.strip("[]")]
    faults = []
    for one in hosts:
        try:
            socket.create_connection((one, int(port)), timeout=WAIT).close()
            return
        except (OSError, OverflowError) as error:
            faults.append(str(error))
    raise RecipeError(f"executor: no Ray cluster can be reached at {address} (RAY_ADDRESS): {faults[0]}")


def run_there(cell: dict[str, Any], threads: int, here: str) -> tuple[str, str | None]:
    """On a machine of the cluster: the content of a cell's file, and of its log, if the cell has failed."""
    if Path(here).is_dir():  # names of files are meant from there
        os.chdir(here)
    with tempfile.TemporaryDirectory() as folder:
        job = Job(Cell.from_dict(cell), Path(folder), False, threads)
        run_process(job, threading.Event())
        log = job.log.read_text("utf-8", errors="replace") if job.log.exists() else None
        return job.file.read_text("utf-8"), log
