"""Grids carried out on tiny checkpoints: cells, failures, what is skipped, what is killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from ptft_hf import recipes
from ptft_hf.comparing import Grid, cells, read_grid, run_grid, write_report
from ptft_hf.comparing.grids import Cell
from ptft_hf.comparing.running import Job, alone_in
from ptft_hf.data import fingerprint
from ptft_hf.data.subsets import nested_order
from ptft_hf.errors import DataError, ModelError, OutputError, RecipeError
from tests.commands import Ptft, ptft  # noqa: F401
from tests.runs import learner

FAST = ["num_train_epochs=1", "per_device_train_batch_size=8", "bf16=false", "metric_for_best_model=accuracy"]


def inline(jobs: Sequence[Job], at_a_time: int) -> Iterator[Job]:
    """An executor in this process, which has imported everything already."""
    for job in jobs:
        cells.write_cell(job.file, cells.run_cell(job.cell, job.runs, keep_weights=job.keep_weights))
        yield job


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return learner(tmp_path_factory.mktemp("bert"))


def make(base: Path, task: Path, **fields: Any) -> Grid:
    given = {"adapters": ["full/default", "lora/r8_attention"], "sizes": [24], "learning_rates": 2, **fields}
    return Grid(models=[str(base)], tasks=[str(task)], **{"settings": FAST, **given})


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, base: Path) -> tuple[Path, list[dict[str, Any]]]:
    """Two methods, three seeds, two tries: the folder and its cells."""
    from tests.conftest import rows, write_rows

    root = tmp_path_factory.mktemp("grid")
    for name, count, seed in (("train", 48, 1), ("dev", 16, 2), ("test", 16, 3)):
        write_rows(root / f"{name}.jsonl", rows(count, seed))
    files = "{train: train.jsonl, validation: dev.jsonl, test: test.jsonl}"
    task = root / "task.yaml"
    task.write_text(f"family: sequence_classification\ndata: {{path: json, data_files: {files}}}\n")
    return root, run_grid(make(base, task), root / "out", executor=inline)


def test_a_cell_says_all_of_itself(ran):
    root, results = ran
    assert [(r["cell"]["adapter"]["name"], r["cell"]["seed"]) for r in results] == [
        (name, seed) for seed in range(3) for name in ("full/default", "lora/r8_attention")
    ]
    for result in results:
        assert json.loads((root / "out" / result["file"]).read_text("utf-8")) == {
            name: value for name, value in result.items() if name != "file"
        }
        outcomes = result["test"]["outcomes"]
        assert len(outcomes) == 16 and set(outcomes) <= {"0", "1"}
        assert outcomes.count("1") / 16 == result["test"]["metrics"]["accuracy"]
        assert result["data"]["train"]["rows"] == 24
        tries = [one["validation"]["accuracy"] for one in result["tries"]]
        best = [one["learning_rate"] for one in result["tries"]][int(np.argmax(tries))]
        assert result["learning_rate"] == best == result["settings"]["learning_rate"]
        assert result["cost"]["peak_memory_mb"] > 50 and result["cost"]["bytes_on_disk"] > 1000
        assert result["cost"]["tokens_per_second"] > result["cost"]["examples_per_second"] > 0
    full, lora = results[:2]
    assert (
        full["data"] == lora["data"] and full["data"] != results[2]["data"]
    )  # the seed's rows, for all methods
    assert [one["learning_rate"] for one in full["tries"]] == [5e-5, 1.5e-4]
    assert full["cost"]["inference_examples_per_second"]["merged"] is None
    assert lora["cost"]["inference_examples_per_second"]["merged"] > 0
    assert lora["cost"]["trainable_parameters"] < full["cost"]["trainable_parameters"]
    assert not (root / "out" / "runs").exists()  # no weights are left
    assert str(root) not in json.dumps([{**r, "cell": None} for r in results])


def test_finished_cells_are_not_run_again_and_an_edited_recipe_is(ran, base: Path):
    root, results = ran
    grid = make(base, root / "task.yaml")

    def nothing(jobs: Sequence[Job], at_a_time: int) -> Iterator[Job]:
        assert jobs == []
        yield from ()

    assert run_grid(grid, root / "out", executor=nothing) == results
    keys = {cell.key for cell in grid.cells()}
    edited = make(base, root / "task.yaml", settings=[*FAST, "adapter.layerwise_lr_decay=0.9"])
    assert not keys & {cell.key for cell in edited.cells()}
    assert all(Cell.from_dict(json.loads(json.dumps(cell.to_dict()))) == cell for cell in grid.cells())


def test_a_part_of_test_is_the_same_for_every_seed_and_method(ran, base: Path, tmp_path: Path):
    root, whole = ran
    results = run_grid(make(base, root / "task.yaml", seeds=[0, 1], learning_rates=1, test_size=10),
                       tmp_path, executor=inline)  # fmt: skip
    rows = [json.loads(line) for line in (root / "test.jsonl").read_text("utf-8").splitlines()]
    labels = [row["label"] for row in rows]
    kept = sorted(nested_order(labels, 0)[:10])
    assert {result["data"]["test"]["fingerprint"] for result in results} == {
        fingerprint(datasets.Dataset.from_list([rows[row] for row in kept]))
    }
    for label in set(labels):
        assert [labels[row] for row in kept].count(label) == pytest.approx(labels.count(label) * 10 / 16, abs=1)
    for result in results:
        assert len(result["test"]["outcomes"]) == result["data"]["test"]["rows"] == 10
    assert results[0]["data"]["train"] == whole[0]["data"]["train"]  # which rows train has is untouched
    page = Path(write_report(results, tmp_path, command="ptft compare")[0]).read_text("utf-8")
    assert "Of test 10 rows are read" in page
    (one, *_) = make(base, root / "task.yaml").cells()
    assert "test_size" not in one.to_dict() and one._replace(test_size=10).key != one.key
    (failed, *_) = make(base, root / "task.yaml", test_size=17).cells()
    with pytest.raises(DataError, match="test: 17 rows are asked for, and there are 16"):
        cells.run_cell(failed, tmp_path / "failed")


def test_a_cell_has_one_name_wherever_its_folder_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    keys = []
    for name in ("here", "there", "there/within"):
        folder = tmp_path / name / "tasks"
        folder.mkdir(parents=True)
        (folder / "task.yaml").write_text(
            "family: sequence_classification\ndata: {path: json, data_files: {train: ../train.jsonl}}\n"
        )
        monkeypatch.chdir(tmp_path / name)
        grid = make(Path("bert"), Path("tasks/task.yaml"))
        keys.append([cell.key for cell in grid.cells()])
    assert keys[0] == keys[1] == keys[2]
    monkeypatch.chdir(tmp_path)
    assert [cell.key for cell in make(Path("bert"), Path("here/tasks/task.yaml")).cells()] != keys[0]


def test_a_cells_file_names_files_below_the_working_folder_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    data = {"train": str(tmp_path / "data" / "train.jsonl"), "test": ["/elsewhere/test.jsonl"]}
    cells.write_cell(tmp_path / "cells" / "one.json", {"status": "failed", "cell": {"data_files": data}})
    written = json.loads((tmp_path / "cells" / "one.json").read_text("utf-8"))
    assert written["cell"]["data_files"] == {"train": "data/train.jsonl", "test": ["/elsewhere/test.jsonl"]}


def test_a_try_does_not_look_at_the_test_set(ran, base: Path, tmp_path: Path):
    root, _ = ran
    cell = make(base, root / "task.yaml").cells()[0]
    _, record = cells.run_try(cell, 1e-4, tmp_path / "run")
    assert list(record["metrics"]) == list(record["report"]) == ["validation"]
    assert "test (" not in (tmp_path / "run" / "README.md").read_text("utf-8")


def test_a_rate_with_which_training_diverges_is_a_try_that_failed(
    ran, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    root, _ = ran
    rates = {"full/default": [1e30, 1e-4]}
    grid = make(
        base, root / "task.yaml", adapters=["full/default"], seeds=[0], learning_rates=rates,
        settings=[*FAST, "max_grad_norm=1e30"],
    )  # fmt: skip
    (result,) = run_grid(grid, tmp_path / "out", executor=inline, keep_weights=True)
    assert "diverged" in result["tries"][0]["error"] and result["learning_rate"] == 1e-4
    (kept,) = (tmp_path / "out" / "runs").glob("*/*")
    assert kept.name == "learning_rate-0.0001" and (kept / "model.safetensors").is_file()
    run_grid(grid, tmp_path / "out", executor=inline, keep_weights=True)
    assert "no weights" not in capsys.readouterr().err
    shutil.rmtree(kept.parent)
    run_grid(grid, tmp_path / "out", executor=inline, keep_weights=True)
    place = tmp_path / "out" / "cells"
    assert f"1 of these have no weights; delete their files in {place}" in capsys.readouterr().err


def test_what_every_rate_fails_by_is_said_once(ran, tmp_path: Path):
    root, _ = ran
    (cell,) = make(tmp_path / "none", root / "task.yaml", adapters=["full/default"], seeds=[0]).cells()
    with pytest.raises(ModelError, match=r"learning rates 5e-05, 1\.67e-05: ") as caught:
        cells.run_cell(cell, tmp_path / "runs")
    assert len(caught.value.problems) == 1


def test_methods_that_would_be_chosen_by_unlike_metrics_are_refused(tmp_path: Path):
    own = tmp_path / "own.yaml"
    own.write_text("family: lora\nr: 4\ntraining: {metric_for_best_model: accuracy}\n")
    task = "sequence_classification/aclsum_roles"
    grid = Grid(models=["m"], tasks=[task], adapters=["full/default", str(own)], seeds=[0])
    with pytest.raises(RecipeError) as caught:
        grid.cells()
    (problem,) = caught.value.problems
    assert problem.startswith(f"{task}: metric_for_best_model differs (full/default: ")
    assert len(grid.model_copy(update={"settings": ["metric_for_best_model=accuracy"]}).cells()) == 2


def test_rates_lie_around_the_methods_own():
    assert cells.rates_around(1e-3, 1) == [1e-3]
    assert cells.rates_around(1e-3, 3) == [1e-3, 3e-3, 3.33e-4]
    assert cells.rates_around(5e-5, 5) == [5e-5, 1.5e-4, 1.67e-5, 4.5e-4, 5.56e-6]


def test_a_search_climbs_towards_the_better_rates():
    def path(score: Callable[[float], float | None], tries: int = 4) -> list[float]:
        tried: list[tuple[float, float | None]] = []
        while len(tried) < tries:
            rate = cells.climb(1e-3, tried)
            tried.append((rate, score(rate)))
        return [rate for rate, _ in tried]

    assert path(lambda rate: rate) == [1e-3, 3e-3, 9e-3, 2.7e-2]
    assert path(lambda rate: -rate) == [1e-3, 3e-3, 3.33e-4, 1.11e-4]
    assert path(lambda rate: 0.0, 3) == [1e-3, 3e-3, 9e-3]  # nothing learns yet
    assert path(lambda rate: rate if rate < 5e-3 else None) == [1e-3, 3e-3, 9e-3, 1.73e-3]  # it breaks at 9e-3
    assert path(lambda rate: None if rate > 5e-4 else rate, 3) == [1e-3, 3.33e-4, 1.11e-4]
    inside = {1e-3: 0.8, 3e-3: 0.7, 3.33e-4: 0.1, 1.73e-3: 0.9}
    assert path(inside.get, 5) == [1e-3, 3e-3, 3.33e-4, 1.73e-3, 1.32e-3]


def test_a_cell_tries_what_the_search_finds(ran, base: Path, tmp_path: Path):
    root, _ = ran
    (climbing,) = make(
        base, root / "task.yaml", adapters=["full/default"], seeds=[0], learning_rates=3
    ).cells()
    result = cells.run_cell(climbing, tmp_path / "climb")
    tried = [(one["learning_rate"], one["validation"]["accuracy"]) for one in result["tries"]]
    assert [rate for rate, _ in tried] == [cells.climb(5e-5, tried[:count]) for count in range(3)]
    assert result["learning_rate"] == max(tried, key=lambda one: one[1])[0]
    assert result["cell"]["search"] == "climb"
    around = climbing._replace(search="around")
    assert "search" not in around.to_dict() and around.key != climbing.key
    assert Cell.from_dict(around.to_dict()) == around  # as in cells from before there was a search
    assert [one["learning_rate"] for one in cells.run_cell(around, tmp_path / "around")["tries"]] == [
        5e-5, 1.5e-4, 1.67e-5,
    ]  # fmt: skip


def test_given_rates_are_tried_as_they_are(ran, base: Path):
    root, _ = ran
    (cell,) = make(base, root / "task.yaml", adapters=["full/default"], seeds=[0], learning_rates={
        "full/default": [1e-3, 1e-5]}).cells()  # fmt: skip
    assert cell.search == "around" and cells.learning_rates(cell) == [1e-3, 1e-5]


def test_the_committed_cells_are_those_of_their_grids(monkeypatch: pytest.MonkeyPatch):
    root = Path(__file__).resolve().parents[1]
    monkeypatch.chdir(root)
    for name in ("clinc_imbalanced", "clinc_rates", "sentence_polarity", "wnut17"):
        keys = {cell.key for cell in read_grid(f"benchmarks/grids/{name}.yaml", {}).cells()}
        files = {path.stem for path in Path(f"benchmarks/grids/results/{name}/cells").glob("*.json")}
        assert files and files <= keys, name


# ---- processes ----


def test_cells_run_in_processes_of_their_own_and_a_failure_is_a_result(
    ptft: Ptft, base: Path, task_file: Path, tmp_path: Path  # noqa: F811
):  # fmt: skip
    broken = tmp_path / "broken.yaml"
    broken.write_text("family: lora\nr: 4\ntarget_modules: [no_such_module]\n")
    flags = [
        "--model",
        base,
        "--task",
        task_file,
        "--output",
        tmp_path / "out",
        "--seeds",
        "0",
        "--jobs",
        "2",
    ]
    flags += ["--adapters", f"partial/head_only,{broken}", "--learning-rates", "1", "--sizes", "24"]
    flags += ["--test-size", "8"]
    flags += [part for setting in FAST for part in ("--set", setting)]
    done = ptft("compare", *flags)
    assert done.code == 0, done.err
    assert "[2/2]" in done.err and "FAILED" in done.err
    assert "partial/head_only" in done.out and "report.html" in done.out and "1 of 2 cells failed" in done.out
    results = [json.loads(file.read_text("utf-8")) for file in (tmp_path / "out" / "cells").iterdir()]
    (good,) = (result for result in results if result["status"] == "finished")
    assert len(good["test"]["outcomes"]) == 8
    (bad,) = (result for result in results if result["status"] == "failed")
    assert "PEFT cannot put LORA" in bad["error"] and "Traceback" not in bad["error"]
    assert len(list((tmp_path / "out" / "logs").iterdir())) == 1  # the failed one's
    assert "PEFT cannot put LORA" in (tmp_path / "out" / "report.md").read_text("utf-8")
    again = ptft("compare", *flags)
    assert "2 of 2 cells are there already" in again.err and "[1/" not in again.err


@pytest.mark.slow
def test_a_grid_that_is_killed_and_run_again_gives_the_same_files(
    base: Path, task_file: Path, tmp_path: Path
):
    command = [sys.executable, "-m", "ptft_hf", "compare", "--model", str(base), "--task", str(task_file)]
    command += ["--adapters", "lora/r8_attention", "--seeds", "0,1,2", "--learning-rates", "1"]
    command += [part for setting in FAST for part in ("--set", setting)]

    def start(name: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*command, "--output", str(tmp_path / name)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    assert start("whole").wait() == 0
    expected = sorted(p.name for p in (tmp_path / "whole" / "cells").iterdir())
    for wanted in (0, 1, 2):  # in each of the three cells
        process = start("killed")
        limit = time.monotonic() + 200
        folder = tmp_path / "killed"
        while not (any(folder.glob("runs/*/*")) and len(list(folder.glob("cells/*.json"))) >= wanted):
            assert process.poll() is None and time.monotonic() < limit
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        time.sleep(1.0)
        with alone_in(folder):  # nothing of it is still at work
            assert len(list(folder.glob("cells/*.json"))) < len(expected)
    assert start("killed").wait() == 0
    assert sorted(p.name for p in tmp_path.glob("killed/*")) == sorted(
        p.name for p in tmp_path.glob("whole/*")
    )
    assert sorted(p.name for p in (tmp_path / "killed" / "cells").iterdir()) == expected
    for name in expected:
        one, other = (untimed(tmp_path / folder / "cells" / name) for folder in ("whole", "killed"))
        assert one == other


def untimed(file: Path) -> dict[str, Any]:
    """A cell without what was measured."""
    result = json.loads(file.read_text("utf-8"))
    for one in result["tries"]:
        del one["seconds"]
    counted = {name: result["cost"][name] for name in ("trainable_parameters", "total_parameters")}
    return {name: value for name, value in result.items() if name not in cells.MEASURED} | {"counted": counted}


def test_a_damaged_cell_is_found_before_anything_is_run(ran, base: Path, tmp_path: Path):
    root, _ = ran
    grid = make(base, root / "task.yaml")
    for number, content in enumerate(("{", '{"status": "finished", "cell": {"model": "m"}}')):
        job = Job(grid.cells()[3], tmp_path / str(number), False, None)
        job.file.parent.mkdir(parents=True)
        job.file.write_text(content)
        with pytest.raises(OutputError, match="not readable as a cell; delete it"):
            run_grid(grid, job.output, executor=never)


def never(jobs: Sequence[Job], at_a_time: int) -> Iterator[Job]:
    raise AssertionError("something was run")


@pytest.mark.parametrize("metric", ["loss", "eval_perplexity", "mae"])
def test_a_metric_that_is_an_error_is_better_when_lower(metric: str):
    validation = dict.fromkeys(("loss", "perplexity", "mae", "accuracy"), 1.0)
    record = {"settings": {"metric_for_best_model": metric}, "metrics": {"validation": validation}}
    assert cells.metric_of(record, "accuracy") == (metric.removeprefix("eval_"), True)


def test_one_comparison_at_a_time_in_a_folder(tmp_path: Path):
    with (
        alone_in(tmp_path),
        pytest.raises(OutputError, match="another comparison is running in it"),
        alone_in(tmp_path),
    ):
        pass
    with alone_in(tmp_path):
        pass


# ---- grids ----


def test_a_grid_from_yaml_and_flags(tmp_path: Path, task_file: Path):
    file = tmp_path / "grid.yaml"
    file.write_text(
        "models: [m]\ntasks: [task.yaml]\nadapters: [full/default]\nsizes: [500, all]\nseeds: [3]\n"
    )
    grid = read_grid(file, {"seeds": [1, 2]})
    assert (grid.seeds, grid.sizes, grid.tasks) == ([1, 2], [500, "all"], [str(task_file)])
    assert [(cell.size, cell.seed) for cell in grid.cells()] == [(500, 1), (500, 2), (None, 1), (None, 2)]


def test_every_fault_of_a_grid_is_reported_at_once(tmp_path: Path):
    file = tmp_path / "grid.yaml"
    file.write_text("modles: [m]\ntasks: []\nadapters: [full/default]\nsizes: [-1]\n")
    with pytest.raises(RecipeError) as caught:
        read_grid(file, {"seeds": ["one"]})
    text = str(caught.value)
    for part in (
        "modles: unknown key (did you mean 'models'?)",
        "models: is missing",
        "tasks:",
        "sizes:",
        "seeds:",
    ):
        assert part in text
    grid = Grid(
        models=["m", "m"], tasks=["sequence_classification/sst2"], adapters=["full/default", "lora/r8_attention"],
        sizes=["most"], learning_rates={"full/defualt": [1e-4]}, settings=["learning_rate=1"],
    )  # fmt: skip
    with pytest.raises(RecipeError) as caught:
        grid.cells()
    text = str(caught.value)
    for part in (
        "models: m is given twice",
        "'most' is neither a number of rows nor 'all'",
        "give learning_rates",
        "'full/defualt' is none of the adapters (did you mean 'full/default'?)",
        "'lora/r8_attention' has none",
    ):
        assert part in text
    bad = Grid(models=["m"], tasks=["no/task"], adapters=["no/adapter"])
    with pytest.raises(RecipeError, match=r"(?s)no/task.*no/adapter"):
        bad.cells()
    with pytest.raises(RecipeError, match="executor: 'moon' is none of local"):
        run_grid(bad, tmp_path / "out", executor="moon")


def test_what_is_one_under_two_names_is_refused_since_its_cells_would_count_as_more_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    (tmp_path / "mine.yaml").write_text("family: lora\nr: 4\n")
    shipped = Path(recipes.__file__).resolve().parents[2] / "adapters" / "lora" / "r8_attention.yaml"
    task = "sequence_classification/sst2"
    grid = Grid(models=["m", str(tmp_path / "m")], tasks=[task], adapters=["lora/r8_attention", str(shipped)])
    with pytest.raises(RecipeError) as caught:
        grid.cells()
    assert caught.value.problems == (
        f"models: m and {tmp_path / 'm'} are the same",
        f"adapters: lora/r8_attention and {shipped} are the same",
    )
    with pytest.raises(RecipeError, match=r"adapters: mine.yaml and \./mine.yaml are the same"):
        Grid(models=["m"], tasks=[task], adapters=["mine.yaml", "./mine.yaml"]).cells()
    grid = Grid(models=["m"], tasks=[task], adapters=["mine.yaml"], learning_rates={"mine.yaml": [1e-3, 0.001]})
    with pytest.raises(RecipeError, match=r"'mine\.yaml' has 0\.001 twice"):
        grid.cells()


def test_a_reference_may_be_named_as_in_the_grid_or_as_in_the_report():
    shipped = str(Path(recipes.__file__).resolve().parents[2] / "adapters" / "full" / "default.yaml")
    grid = Grid(models=["m"], tasks=["sequence_classification/sst2"], adapters=["lora/dora", shipped])
    assert {cell.adapter.name for cell in grid.cells()} == {"lora/dora", "full/default"}
    assert [grid.name_of_reference(name) for name in (shipped, "full/default", "lora/dora")] == [
        "full/default", "full/default", "lora/dora",
    ]  # fmt: skip
    with pytest.raises(RecipeError, match=r"'lora/dara' is none of the adapters \(did you mean 'lora/dora'\?\)"):
        grid.name_of_reference("lora/dara")


def test_a_recipe_written_into_a_grid_is_told_where_recipes_belong(tmp_path: Path):
    file = tmp_path / "grid.yaml"
    file.write_text("models: [m]\ntasks: [3]\nadapters: [full/default, {family: lora, r: 4}]\n")
    with pytest.raises(RecipeError) as caught:
        read_grid(file, {})
    assert caught.value.problems == (
        f"{file}: tasks: number 1 is no name of a recipe; give a catalogue name or a file",
        f"{file}: adapters: number 2 is no name of a recipe; give a catalogue name or a file",
    )


def test_the_command_refuses_without_a_traceback(ptft: Ptft, tmp_path: Path):  # noqa: F811
    done = ptft("compare", "--model", "m", "--output", tmp_path / "out", "--seeds", ",")
    assert done.code == 2 and "seeds: ',' names none" in done.err and "Traceback" not in done.err
    flags = ["--model", "m", "--task", "t.yaml", "--adapters", "full/default", "--test-size", "0"]
    done = ptft("compare", *flags, "--output", tmp_path / "out")
    assert done.code == 2 and "test_size: input should be greater than or equal to 1, not 0" in done.err
    done = ptft("compare", tmp_path / "none.yaml", "--output", tmp_path / "out")
    assert done.code == 2 and "there is no such file" in done.err
    assert not (tmp_path / "out").exists()


def test_a_data_path_may_begin_with_a_variable(monkeypatch: pytest.MonkeyPatch, base: Path, task_file: Path):
    text = task_file.read_text("utf-8")
    for name in ("train", "dev", "test"):
        text = text.replace(f" {name}.jsonl", f" $PLACE/{name}.jsonl")
    task_file.write_text(text, encoding="utf-8")
    monkeypatch.delenv("PLACE", raising=False)
    with pytest.raises(RecipeError, match=r"\$PLACE/train.jsonl: the environment variable is not set"):
        make(base, task_file).cells()
    monkeypatch.setenv("PLACE", str(task_file.parent))
    (cell, *_) = make(base, task_file).cells()
    assert cell.to_dict()["task"]["data"]["data_files"]["train"] == "$PLACE/train.jsonl"
    _, record = cells.run_try(cell, 1e-4, task_file.parent / "run")
    assert record["data"]["train"]["rows"] == 24


# ---- subsets ----


def test_smaller_sets_are_nested_stratified_and_hold_every_label():
    labels = ["a"] * 700 + ["b"] * 250 + ["c"] * 49 + ["d"]
    order = nested_order(labels, 0)
    assert sorted(order) == list(range(1000)) and order == nested_order(labels, 0) != nested_order(labels, 1)
    for size in (4, 50, 200, 500):
        counts = {label: sum(labels[row] == label for row in order[:size]) for label in "abcd"}
        assert counts["d"] == 1
        for label, share in (("a", 0.7), ("b", 0.25), ("c", 0.049)):
            assert counts[label] >= 1 and abs(counts[label] - share * size) <= 4


def test_rows_of_many_labels_are_covered_too():
    tags = [["O"] * 5] * 90 + [["O", "B-x", "I-x"]] * 8 + [["O", "B-y"]] * 2
    first = nested_order(tags, 3)[:10]
    assert {tag for row in first for tag in tags[row]} == {"O", "B-x", "I-x", "B-y"}
    assert sum(len(set(tags[row])) == 1 for row in first) >= 6
    assert sorted(nested_order([0.5, 1.0, 2.5], 0)) == [0, 1, 2]
    assert nested_order([[], ["a"]], 0)[0] == 1
