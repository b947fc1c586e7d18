"""Cells of a grid with given figures, as files hold them, for tests of what is concluded from them."""

from __future__ import annotations

from typing import Any

import numpy as np


def cell(
    adapter: str,
    seed: int,
    outcomes: np.ndarray,
    *,
    task: str = "t",
    size: int | None = None,
    metric: str = "accuracy",
    value: float | None = None,
    rows: int = 1000,
    **cost: float,
) -> dict[str, Any]:
    """A finished cell; the metric is the share of right outcomes unless ``value`` is given."""
    right = float(np.mean(outcomes))
    costs = {
        "trainable_parameters": 1000,
        "peak_memory_mb": 900.0,
        "seconds": 60.0,
        "bytes_on_disk": 5_000_000,
    }
    return {
        "status": "finished",
        "cell": {"model": "m", "task": {"name": task}, "adapter": {"name": adapter}, "seed": seed, "size": size},
        "metric": {"name": metric, "higher_is_better": metric != "mse"},
        "tries": [{"learning_rate": 1e-3, "validation": {metric: right}}, {"learning_rate": 3e-3, "error": "no"}],
        "learning_rate": 1e-3,
        "test": {
            "metrics": {metric: right if value is None else value},
            "report": {"per_class": [{"label": x, "f1": right, "support": 50} for x in ("neg", "pos")]},
            "outcomes": "".join(str(int(x)) for x in outcomes),
        },
        "cost": {
            **costs,
            "total_parameters": 10**6,
            "examples_per_second": 50.0,
            "tokens_per_second": 900.0,
            "load_seconds": 0.5,
            "inference_examples_per_second": {"attached": 200.0, "merged": 250.0},
            **cost,
        },
        "data": {
            "train": {"rows": size or rows, "fingerprint": f"{task}{size}{seed}"},
            "test": {"rows": len(outcomes), "fingerprint": task},
        },
        "settings": {"bf16": False, "fp16": False},
        "model": {"dtype": "float32"},
        "ptft_hf": "0.1.0",
        "versions": {"torch": "2.13.0"},
        "hardware": dict.fromkeys(("machine", "system", "python", "threads", "processes", "device"), "x"),
        "file": f"cells/{adapter.replace('/', '-')}-{seed}.json",
    }  # fmt: skip


def failed(adapter: str, seed: int, error: str, task: str = "t") -> dict[str, Any]:
    return {
        "status": "failed",
        "cell": {
            "model": "m",
            "task": {"name": task},
            "adapter": {"name": adapter},
            "seed": seed,
            "size": None,
        },
        "error": error,
    }


def grid(
    quality: dict[str, float],
    seeds: int = 3,
    *,
    rows: int = 400,
    spread: float = 0.01,
    sizes: tuple[int | None, ...] = (None,),
    draw: int = 0,
    **cost: float,
) -> list[dict[str, Any]]:
    """Cells whose chances to be right are the methods' own plus the seeds' noise, example by example."""
    rng = np.random.default_rng(draw)
    results = []
    for size in sizes:
        ease = rng.normal(0, 1.5, rows)
        loss = 0.0 if size is None else 3.0 * size**-0.5
        for seed in range(seeds):
            for name, chance in quality.items():
                level = np.log((chance - loss) / (1 - chance + loss)) * 1.6 + rng.normal(0, spread * 5)
                right = rng.random(rows) < 1 / (1 + np.exp(-(level + ease)))
                results.append(cell(name, seed, right, size=size, **cost))
    return results
