"""Finished cells by model and task, and what must be known of their likeness before they are compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ptft_hf.comparing import verdicts, words
from ptft_hf.comparing.verdicts import Method, condition_of
from ptft_hf.comparing.words import POINTS, RAW, Unit

Result = Mapping[str, Any]


class Group(NamedTuple):
    """One task on one model: its methods by training-set size."""

    model: str
    task: str
    metric: str
    unit: Unit
    by_size: dict[int | None, list[Method]]
    rows: dict[int | None, int]
    """Training rows, also where all were taken."""
    results: list[Result]

    @property
    def largest(self) -> int | None:
        return max(self.rows, key=self.rows.__getitem__)

    @property
    def where(self) -> str:
        return f"{self.task} on {self.model}"


def groups_of(results: Sequence[Result]) -> list[Group]:
    """Finished cells by model and task."""
    found: dict[tuple[str, str], Group] = {}
    conditions = verdicts.methods_of(results)
    for condition, methods in conditions.items():
        mine = [
            result for result in results if result["status"] == "finished" and condition_of(result) == condition
        ]
        metric = mine[0]["metric"]
        inside = metric["higher_is_better"] and all(np.abs(m.quality).max() <= 1 for m in methods)
        start = Group(condition.model, condition.task, metric["name"], POINTS if inside else RAW, {}, {}, [])
        group = found.setdefault((condition.model, condition.task), start)
        group.by_size[condition.size] = methods
        group.rows[condition.size] = mine[0]["data"]["train"]["rows"]
        group.results.extend(mine)
    return list(found.values())


def is_of(result: Result, adapter: str, size: int | None) -> bool:
    cell = result["cell"]
    return bool(cell["adapter"]["name"] == adapter and cell["size"] == size)


def at_the_edge(group: Group) -> list[str]:
    """For each size of training set a sentence on the methods for which validation mostly chose the highest or the
    lowest rate of those tried: the best may lie beyond. None where there are none."""
    sentences = []
    for size in sorted(group.rows, key=group.rows.__getitem__, reverse=True):
        found: dict[str, list[str]] = {"highest": [], "lowest": []}
        for method in group.by_size[size]:
            own = [r for r in group.results if is_of(r, method.name, size) and len(r["tries"]) > 1]
            for name, end in (("highest", max), ("lowest", min)):
                ends = [r["learning_rate"] == end(one["learning_rate"] for one in r["tries"]) for r in own]
                if 2 * sum(ends) > len(own):
                    found[name].append(method.name)
        said = [f"the {name} learning rate that was tried for {', '.join(of)}" for name, of in found.items() if of]
        where = f"With {group.rows[size]:,} rows validation" if len(group.rows) > 1 else "Validation"
        if said:
            sentences.append(f"{where} chose {' and '.join(said)}: beyond it they may do better.")
    return sentences


def precision_of(result: Result) -> str:
    """In what a cell was computed: a processor without bfloat16 takes float32 for the same recipe."""
    settings = result["settings"]
    if settings["bf16"] or settings["fp16"]:
        return "bfloat16" if settings["bf16"] else "float16"
    return str(result["model"]["dtype"])


def same_precision(group: Group) -> bool:
    """Whether all cells with the largest training set were computed alike, so that seconds and memory compare."""
    return len({precision_of(r) for r in group.results if r["cell"]["size"] == group.largest}) == 1


def mixed_precision(group: Group) -> list[str]:
    """A sentence on what was computed in which precision, where not all was in the same."""
    found: dict[str, dict[str, dict[int | None, list[int]]]] = {}
    for result in group.results:
        cell = result["cell"]
        of = found.setdefault(precision_of(result), {}).setdefault(cell["adapter"]["name"], {})
        of.setdefault(cell["size"], []).append(cell["seed"])
    if len(found) == 1:
        return []
    parts = []
    for precision, methods in found.items():
        places: dict[str, list[str]] = {}
        for name, sizes in methods.items():
            rows = [f"{group.rows[size]:,} rows{_some(group, name, size, seeds)}" for size, seeds in sizes.items()]
            places.setdefault(words.listed(rows), []).append(name)
        said = "; ".join(f"{words.listed(names)} with {rows}" for rows, names in places.items())
        parts.append(f"In {precision}: {said}.")
    return [
        "Not all cells were computed in the same precision, as when a grid goes on on a machine without bfloat16. "
        f"{' '.join(parts)} What sets these apart may be the precision, and their seconds and memory do not compare."
    ]


def _some(group: Group, adapter: str, size: int | None, seeds: Sequence[int]) -> str:
    """Which seeds, if not all of the method's."""
    (method,) = [one for one in group.by_size[size] if one.name == adapter]
    numbers = words.listed([str(seed) for seed in seeds])
    return "" if len(seeds) == len(method.seeds) else f" (seed{'' if len(seeds) == 1 else 's'} {numbers})"
