"""Pre-training from nothing on novels, and what it is worth.

1. A small BERT with its tokenizer, both objectives (MLM and NSP): figures on the held-out book, against chance.
2. That checkpoint, and the same architecture with random weights, fine-tuned on sentence polarity over three seeds.
3. A small Llama likewise: perplexity on the held-out book before and after, and what it writes.

Each part is one ``ptft train`` in a process of its own. Finished parts are skipped, so a stopped run goes on. Writes
``results.json`` and ``REPORT.md`` beside this file, or into ``--output``.

    PTFT_TEST_DATA=... python benchmarks/pretraining/run.py [--only masked polarity causal] [--work DIR]

``--smoke`` runs every part for some steps on some rows, to see that it works; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PARTS = ("masked", "polarity", "causal")
SEEDS = (0, 1, 2)
METHODS = {"full/default": "", "partial/top_2_layers": "top-"}
"""Of fine-tuning: in full, and both layers and the pooler on embeddings that stay as they are."""
RATES = (5e-4, 1e-3, 2e-3)
"""Of fine-tuning: tried with the first seed, the best one on validation is kept; for either model by itself."""
BERT: dict[str, Any] = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT |= {"intermediate_size": 512, "initializer_range": 0.05}
"""The size of BERT-Tiny (Turc et al. 2019). With BERT's dropout of 0.1 it learns more slowly than without (a
perplexity of 56 against 49 on the validation book), and what it has learnt is worth more: fine-tuned with the first
seed, it tells 76.0 % of the validation sentences against 75.0 % (the run without dropout was not kept)."""
LLAMA: dict[str, Any] = {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 3}
LLAMA |= {"intermediate_size": 768, "num_key_value_heads": 3}
LLAMA |= {"tie_word_embeddings": True, "max_position_embeddings": 256}
VOCABULARY = 6000
EPOCHS = 3
TEXTS = ("She opened the door and", "“I do not know,” said", "It was late in the evening when")
MASKS = ("She opened the [MASK] and looked out.", "He took her [MASK] in his own.")
OPTIMIZER: dict[str, dict[str, Any]] = {
    "short": {
        "max_steps": 4500,
        "learning_rate": 2e-3,
        "weight_decay": 0.1,
        "adam_beta2": 0.98,
        "per_device_train_batch_size": 128,
    },
    "masked": {
        "max_steps": 1500,
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "adam_beta2": 0.98,
        "per_device_train_batch_size": 64,
    },
    "causal": {"max_steps": 1200, "learning_rate": 1e-3, "per_device_train_batch_size": 32},
}
LENGTH = {"short": 32, "masked": 64, "causal": 128}
"""BERT, too, had 128 of its 512 positions in the first 90 % of its steps. Here, in 32 pairs of 128 tokens
(0.15 masked) this model stood at a validation perplexity of 335 after 1,500 steps; in 128 pairs of 32 (0.3 masked) it
has 88 after 1,250, and 0.4 masked did not help the longer ones (runs that were not kept). The later, longer pairs
teach positions: a text that stands alone is longer than the first texts of short pairs."""
MASK_FRACTION = 0.3
"""Twice BERT's: more is learnt of each step (Wettig et al. 2022 found 0.4 best)."""


class Place:
    """Where the data, the runs and the results are."""

    def __init__(self, data: Path, work: Path, output: Path, smoke: bool) -> None:
        self.work, self.output, self.smoke = work.resolve(), output, smoke
        self.work.mkdir(parents=True, exist_ok=True)
        self.data = self._some(data) if smoke else data.resolve()

    def _some(self, data: Path) -> Path:
        for name, rows in (("novels", 300), ("sentence_polarity", 64)):
            (self.work / name).mkdir(exist_ok=True)
            for split in ("train", "validation", "test"):
                lines = (data / name / f"{split}.jsonl").read_text("utf-8").splitlines(keepends=True)
                some = lines[:: max(1, len(lines) // rows)][:rows]
                (self.work / name / f"{split}.jsonl").write_text("".join(some), encoding="utf-8")
        return self.work

    def task(self, name: str, data_set: str, **recipe: Any) -> Path:
        splits = ("train", "validation", "test")
        files = {split: str(self.data / data_set / f"{split}.jsonl") for split in splits}
        path = self.work / f"{name}.yaml"
        source = {"path": "json", "data_files": files}
        path.write_text(json.dumps({"data": source, **recipe}), encoding="utf-8")  # JSON is YAML
        return path

    def train(
        self, name: str, model: str, task: Path, seed: int, settings: dict[str, Any], adapter: str = "full/default"
    ) -> dict[str, Any]:
        """The record of a run, which is trained unless it is there already."""
        folder = self.work / name
        if not (folder / "run.json").exists():
            command = ["--model", model, "--task", str(task), "--adapter", adapter, "--seed", str(seed)]
            sets = [part for key, value in settings.items() for part in ("--set", f"{key}={json.dumps(value)}")]
            where = ["--output", str(folder), "--resume"]
            subprocess.run([sys.executable, "-m", "ptft_hf", "train", *command, *sets, *where], check=True)
        record: dict[str, Any] = json.loads((folder / "run.json").read_text("utf-8"))
        return record

    def predict(self, name: str, texts: tuple[str, ...]) -> list[dict[str, Any]]:
        command = [sys.executable, "-m", "ptft_hf", "predict", str(self.work / name), *texts]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return [json.loads(line) for line in done.stdout.splitlines()]


def pretraining(place: Place, part: str, fields: dict[str, Any]) -> dict[str, Any]:
    """``TrainingArguments`` and the model's fields of parts 1 and 3."""
    steps = 6 if place.smoke else int(OPTIMIZER[part]["max_steps"])
    return {
        **{f"model.{name}": value for name, value in fields.items()},
        **OPTIMIZER[part],
        "max_steps": steps,
        "eval_strategy": "steps",
        "eval_steps": steps // 4 if steps > 6 else 3,
        "eval_on_start": True,
    }


def figures(record: dict[str, Any], folder: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    curve = [{k: v for k, v in line.items() if k == "step" or k.startswith("eval_")} for line in lines]
    curve = [
        {k: v for k, v in entry.items() if not k.endswith(("runtime", "per_second"))}
        for entry in curve
        if "eval_loss" in entry
    ]
    return {
        "validation": record["metrics"]["validation"],
        "test": record["metrics"]["test"],
        "report": record["report"]["test"],
        "steps": record["training"]["steps"],
        "parameters": record["parameters"]["total"],
        "curve": curve,
        "versions": record["versions"],
    }


def masked(place: Place) -> dict[str, Any]:
    """Short pairs from nothing, then longer ones from there."""
    found = {}
    for part, name, begin in (("short", "bert-short", "config:bert"), ("masked", "bert", "bert-short")):
        recipe: dict[str, Any] = {"model": {"max_length": LENGTH[part]}}
        if part == "short":
            recipe["tokenizer"] = {"kind": "wordpiece", "vocab_size": VOCABULARY, "lowercase": True}
        task = place.task(
            part,
            "novels",
            family="masked_lm",
            columns={"document": "book"},
            next_sentence=True,
            mask_fraction=MASK_FRACTION,
            **recipe,
        )
        model = begin if part == "short" else str(place.work / begin)
        settings = pretraining(place, part, BERT if part == "short" else {})
        found[part] = figures(place.train(name, model, task, 0, settings), place.work / name)
    first, last = found["short"], found["masked"]
    return {**last, "short": first, "samples": place.predict("bert", MASKS)}


def random_bert(place: Place, seed: int) -> str:
    """The architecture and tokenizer of part 1 with other weights: random ones, of this seed."""
    import torch
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    folder = place.work / f"random-{seed}"
    if not (folder / "tokenizer.json").exists():
        torch.manual_seed(seed)
        auto: Any = AutoModel
        auto.from_config(AutoConfig.from_pretrained(place.work / "bert")).save_pretrained(folder)
        AutoTokenizer.from_pretrained(place.work / "bert").save_pretrained(folder)
    return str(folder)


def polarity(place: Place) -> dict[str, Any]:
    """By method and kind of weights, one cell a run."""
    task = place.task("polarity", "sentence_polarity", family="sequence_classification", model={"max_length": 64})
    cells: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for adapter, short in METHODS.items():
        cells[adapter] = {"pretrained": [], "random": []}
        for kind, found in cells[adapter].items():
            for seed in SEEDS[:2] if place.smoke else SEEDS:
                model = str(place.work / "bert") if kind == "pretrained" else random_bert(place, seed)
                for rate in RATES if seed == SEEDS[0] else (chosen(found)[0]["learning_rate"],):
                    name = f"polarity-{short}{kind}-{seed}-{rate:g}"
                    steps = {"max_steps": 3} if place.smoke else {"num_train_epochs": EPOCHS}
                    record = place.train(name, model, task, seed, {"learning_rate": rate, **steps}, adapter)
                    metrics = {split: record["metrics"][split] for split in ("validation", "test")}
                    found.append({"seed": seed, "learning_rate": rate, **metrics})
    return cells


def chosen(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One cell a seed, all of the rate that the first seed's validation chose."""
    first = [cell for cell in cells if cell["seed"] == SEEDS[0]]
    rate = max(first, key=lambda cell: cell["validation"]["accuracy"])["learning_rate"]
    return [cell for cell in cells if cell["learning_rate"] == rate]


def causal(place: Place) -> dict[str, Any]:
    task = place.task(
        "causal",
        "novels",
        family="causal_lm",
        columns={"document": "book"},
        tokenizer={"kind": "byte_bpe", "vocab_size": VOCABULARY},
        generation={"max_new_tokens": 40, "do_sample": False, "repetition_penalty": 1.2},
        model={"max_length": LENGTH["causal"]},
    )
    record = place.train("llama", "config:llama", task, 0, pretraining(place, "causal", LLAMA))
    return {**figures(record, place.work / "llama"), "samples": place.predict("llama", TEXTS)}


# ---- the report ----


def report(results: dict[str, Any], smoke: bool) -> str:
    lines = ["# Pre-training from nothing", "", "`PTFT_TEST_DATA=... python benchmarks/pretraining/run.py`", ""]
    if smoke:
        lines += ["A smoke test: these figures mean nothing.", ""]
    makers = {"masked": _masked, "polarity": _polarity, "causal": _causal}
    for part in PARTS:
        if part in results:
            lines += makers[part](results[part])
    return "\n".join(lines) + "\n"


def _masked(found: dict[str, Any]) -> list[str]:
    test, start, chance = found["test"], found["short"]["curve"][0], found["report"]["chance"]
    stages = " and then ".join(
        f"{steps:,} steps of {OPTIMIZER[part]['per_device_train_batch_size']} pairs of {LENGTH[part]} tokens"
        for part, steps in (("short", found["short"]["steps"]), ("masked", found["steps"]))
    )
    rows = [
        ("loss (MLM + NSP)", start["eval_loss"], found["validation"]["loss"], test["loss"], None),
        ("perplexity", start["eval_perplexity"], found["validation"]["perplexity"], test["perplexity"], None),
    ]
    for name in ("masked_accuracy", "nsp_accuracy"):
        rows.append((name, start[f"eval_{name}"], found["validation"][name], test[name], chance[name]))
    return [
        "## MLM and NSP",
        "",
        f"A BERT of {found['parameters']:,} parameters and a WordPiece of at most {VOCABULARY:,} tokens from nothing "
        f"on 14 novels, {stages}, {MASK_FRACTION:.0%} of them masked; `test` is a book that it has not "
        "seen. Chance is always the most frequent token, and always the same answer. *Before* is told on the first "
        "stage's pairs, the other columns on the second's.",
        "",
        "| | validation, before | validation | test | chance on test |",
        "|---|---:|---:|---:|---:|",
        *(
            f"| {name} | {a:.3f} | {b:.3f} | {c:.3f} | {'' if d is None else f'{d:.3f}'} |"
            for name, a, b, c, d in rows
        ),
        "",
        *(f"- {sample['text']}" for sample in found["samples"]),
        "",
    ]


def _polarity(cells: dict[str, dict[str, list[dict[str, Any]]]]) -> list[str]:
    lines = [
        "## The checkpoint, fine-tuned",
        "",
        f"Sentence polarity, {EPOCHS} epochs; `partial/top_2_layers` trains all but the embeddings; the rate that "
        "the first seed's validation chose among "
        f"{', '.join(f'{rate:g}' for rate in RATES)}, for each by itself. Accuracy on test; chance is 0.5.",
        "",
        "| method | from | rate | by seed | mean | standard deviation |",
        "|---|---|---:|---|---:|---:|",
    ]
    for adapter, kind, found in ((a, kind, found) for a, kinds in cells.items() for kind, found in kinds.items()):
        kept = chosen(found)
        values = [cell["test"]["accuracy"] for cell in kept]
        spread = f"{statistics.stdev(values):.4f}" if len(values) > 1 else ""
        shown = ", ".join(f"{value:.4f}" for value in values)
        rate = f"{kept[0]['learning_rate']:g}"
        lines.append(f"| {adapter} | {kind} | {rate} | {shown} | {statistics.mean(values):.4f} | {spread} |")
    return [*lines, ""]


def _causal(found: dict[str, Any]) -> list[str]:
    start, chance = found["curve"][0], found["report"]["chance"]["token_accuracy"]
    names = ("loss", "perplexity", "token_accuracy")
    table = [
        f"| {name} | {start[f'eval_{name}']:.3f} | {found['validation'][name]:.3f} | {found['test'][name]:.3f} | "
        f"{f'{chance:.3f}' if name == 'token_accuracy' else ''} |"
        for name in names
    ]
    return [
        "## Causal",
        "",
        f"A Llama of {found['parameters']:,} parameters and a byte-level BPE of at most {VOCABULARY:,} tokens from "
        f"nothing, {found['steps']:,} steps of 32 blocks of {LENGTH['causal']} tokens.",
        "",
        "| | validation, before | validation | test | chance on test |",
        "|---|---:|---:|---:|---:|",
        *table,
        "",
        *(f"- {s['text']} **{' '.join(s['continuation'].split())}**" for s in found["samples"]),
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", default=list(PARTS), choices=PARTS)
    parser.add_argument("--work", type=Path, default=Path("pretraining-runs"))
    parser.add_argument("--output", type=Path, default=HERE)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    if "PTFT_TEST_DATA" not in os.environ:
        sys.exit("set PTFT_TEST_DATA to the folder of real data")
    if args.smoke and args.output == HERE:
        sys.exit("--smoke: say where its results go with --output; they are none to be kept")
    if "polarity" in args.only and "masked" not in args.only and not (args.work / "bert" / "run.json").exists():
        sys.exit("polarity: fine-tunes the checkpoint of the part masked, which has not been trained yet")
    args.output.mkdir(parents=True, exist_ok=True)
    place = Place(Path(os.environ["PTFT_TEST_DATA"]), args.work, args.output, args.smoke)
    path = args.output / "results.json"
    results = json.loads(path.read_text("utf-8")) if path.exists() else {}
    for part in (part for part in PARTS if part in args.only):
        if part not in results:
            results[part] = {"masked": masked, "polarity": polarity, "causal": causal}[part](place)
            path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            (args.output / "REPORT.md").write_text(report(results, args.smoke), encoding="utf-8")
        print(part, "is done", flush=True)


if __name__ == "__main__":
    main()
