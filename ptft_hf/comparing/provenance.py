"""How each number of the report was obtained, and what is missing from it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ptft_hf.comparing.pages import Code, Section, Table
from ptft_hf.comparing.running import first_fault
from ptft_hf.comparing.statistics import BOOTSTRAP_SEEDS

Result = Mapping[str, Any]


def sections(results: Sequence[Result], margin: float, command: str) -> Iterator[Section]:
    """Failures, methods, every cell, versions and machines."""
    finished = [result for result in results if result["status"] == "finished"]
    failed = [result for result in results if result["status"] == "failed"]
    place = _Place(len({result["cell"]["model"] for result in results}) > 1)
    if failed:
        yield Section("Cells that failed", 2, [_failures(failed, place)])
    yield Section("How each number was obtained", 2, [Code(command), _methods_used(results, margin)])
    if not finished:
        return
    yield Section(
        "Every cell",
        3,
        [
            Table(
                "Learning rates tried, the one that validation chose, and its test figure; the file holds the rest: "
                "recipes, settings, fingerprints of data and weights, outcomes of every test example",
                [*place.head, "tried", "chosen", "test", "file"],
                [
                    [
                        *place.of(result["cell"]),
                        ", ".join(_tried(one) for one in result["tries"]),
                        f"{result['learning_rate']:g}",
                        f"{result['test']['metrics'][result['metric']['name']]:.4f}",
                        result.get("file", "-"),
                    ]
                    for result in finished
                ],
                left=len(place.head) + 4,
            )
        ],
    )
    stacks = {_stack(result): None for result in finished}
    machines = {_machine(result): None for result in finished}
    yield Section("Versions and machines", 3, [[*stacks, *machines]])


class _Place(NamedTuple):
    """Where a cell stands in its grid; the model is named where there are several."""

    with_model: bool

    @property
    def head(self) -> list[str]:
        return ["method", "task", *(["model"] if self.with_model else []), "rows", "seed"]

    def of(self, cell: Mapping[str, Any]) -> list[str]:
        size = "all" if cell["size"] is None else f"{cell['size']:,}"
        model = [cell["model"]] if self.with_model else []
        return [cell["adapter"]["name"], cell["task"]["name"], *model, size, str(cell["seed"])]


def _failures(failed: Sequence[Result], place: _Place) -> Table:
    return Table(
        "A failure is a result: these are missing above",
        [*place.head, "error"],
        [[*place.of(result["cell"]), first_fault(result)] for result in failed],
        left=len(place.head) + 1,
    )


def _tried(one: Mapping[str, Any]) -> str:
    return f"{one['learning_rate']:g}" + (" (failed)" if "error" in one else "")


def _stack(result: Result) -> str:
    return ", ".join(
        f"{name} {version}" for name, version in {"ptft_hf": result["ptft_hf"], **result["versions"]}.items()
    )


def _machine(result: Result) -> str:
    hardware = result["hardware"]
    kind = f" ({hardware['cpu_capability']})" if "cpu_capability" in hardware else ""
    return (
        f"{hardware['device']}, {hardware['machine']}{kind}, {hardware['threads']} threads, {hardware['processes']} "
        f"process(es), Python {hardware['python']}, {hardware['system']}"
    )


def _methods_used(results: Sequence[Result], margin: float) -> list[str]:
    parts = sorted({size for result in results if (size := result["cell"].get("test_size")) is not None})
    return [
        "A cell is one method, on one task, with one seed and one training set, in a process of its own. Each "
        "method tries as many learning rates, about its own default (where a cell's file has search: climb, a higher "
        "one next while the highest is the best; else the same for all seeds); validation chooses, for every seed "
        "anew, and the test set is read once, by the chosen run.",
        "Smaller training sets are stratified, and parts of the larger ones; at a seed all methods get the same "
        "rows.",
        *(
            f"Of test {size:,} rows are read, stratified where rows have classes: the same for all methods, and for "
            "all seeds unless test was cut from train."
            for size in parts
        ),
        f"Intervals are Student's t over seeds (from {BOOTSTRAP_SEEDS} seeds on a symmetric bootstrap-t); those "
        "of differences are over differences at the same seed. They tell how runs scatter on this test set, and "
        "are not corrected for their number.",
        "A method is called better if p is at most 0.05 after Holm's correction over the pairs of the same task, "
        "model and training-set size that stand in the table; p is the larger of the paired t test's over seeds and "
        "McNemar's over test examples (for several runs its clustered form, Durkalski et al. 2003).",
        f"Equivalent within the margin of {margin:g}: two one-sided tests, corrected likewise.",
        "The test examples, or seeds, that would be needed are those that find a difference as large as the one "
        "seen with a chance of 80% at the corrected level: an estimate from an estimate.",
        "Training time leaves out evaluation and saving. Inference is timed on validation rows.",
    ]
