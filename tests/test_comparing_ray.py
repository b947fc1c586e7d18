"""Cells on a Ray cluster of two nodes on this machine, against the same cells without it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ptft_hf.comparing import by_ray, run_grid
from ptft_hf.comparing.running import Job, run_by_ray
from ptft_hf.errors import RecipeError
from tests.test_comparing_grid import base, make, untimed  # noqa: F401


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    pytest.importorskip("ray", reason="needs the extra ray")
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        made.add_node(num_cpus=1)
        monkeypatch.setenv("RAY_ADDRESS", made.address)
        yield made
    finally:
        made.shutdown()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_cells_on_two_nodes_are_those_of_one_machine(
    cluster: Any, base: Path, task_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:  # fmt: skip
    broken = tmp_path / "broken.yaml"
    broken.write_text("family: lora\nr: 4\ntarget_modules: [no_such_module]\n")
    grid = make(base, task_file, adapters=["lora/r8_attention", str(broken)], seeds=[0, 1], learning_rates=1)
    there = run_grid(grid, tmp_path / "ray", executor="ray", jobs=2)
    assert "Ray: 2 machines with 2 processors; 1 for a cell" in capsys.readouterr().err
    run_grid(grid, tmp_path / "local", jobs=2)
    assert [one["status"] for one in there].count("failed") == 2
    names = sorted(file.name for file in (tmp_path / "local" / "cells").iterdir())
    assert sorted(file.name for file in (tmp_path / "ray" / "cells").iterdir()) == names
    for name in names:
        one, other = (tmp_path / folder / "cells" / name for folder in ("ray", "local"))
        if "error" not in one.read_text("utf-8"):
            assert untimed(one) == untimed(other)
    logs = [sorted(file.name for file in tmp_path.glob(f"{folder}/logs/*")) for folder in ("ray", "local")]
    assert logs[0] == logs[1] and len(logs[0]) == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_a_node_that_is_lost_costs_its_cells_another_run(
    cluster: Any, base: Path, task_file: Path, tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    grid = make(base, task_file, adapters=["lora/r8_attention"], seeds=[0, 1, 2], learning_rates=1)
    job = [Job(cell, tmp_path / "out", False, None) for cell in grid.cells()]
    carried = run_by_ray(job, 2)
    first = next(carried)  # another is being run, on one of the nodes
    lost = next(node for node in cluster.list_all_nodes() if node is not cluster.head_node)
    cluster.remove_node(lost, allow_graceful=False)
    assert {one.cell.seed for one in (first, *carried)} == {0, 1, 2}
    assert all(one.file.is_file() for one in job)


def crash(*order: Any) -> None:
    os._exit(1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_a_cell_that_no_machine_brings_to_an_end_is_a_result(
    cluster: Any, base: Path, task_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    monkeypatch.setattr(by_ray, "run_there", crash)
    monkeypatch.setattr(by_ray, "RETRIES", 0)
    (found,) = run_grid(make(base, task_file, adapters=["full/default"], seeds=[0]), tmp_path / "out", executor="ray")
    assert found["status"] == "failed" and "Ray lost the cell" in found["error"]


def test_an_address_at_which_nobody_listens_is_refused_before_ray_tries_for_minutes(
    base: Path, task_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    ray = pytest.importorskip("ray", reason="needs the extra ray")

    def init(**options: Any) -> None:
        raise AssertionError("Ray was asked")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    (cell, *_) = make(base, task_file, seeds=[0]).cells()
    with pytest.raises(RecipeError, match=r"no Ray cluster can be reached at 127\.0\.0\.1:1 \(RAY_ADDRESS\)"):
        next(run_by_ray([Job(cell, tmp_path, False, None)], 1))


def test_weights_stay_where_they_are_and_a_missing_ray_is_named(
    base: Path, task_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    (cell, *_) = make(base, task_file, seeds=[0]).cells()
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RecipeError, match=r"needs the package ray: pip install 'ptft_hf\[ray\]'"):
        next(run_by_ray([Job(cell, tmp_path, False, None)], 1))
    monkeypatch.setitem(sys.modules, "ray", sys)
    with pytest.raises(RecipeError, match="leaves weights on the machines"):
        next(run_by_ray([Job(cell, tmp_path, True, None)], 1))
