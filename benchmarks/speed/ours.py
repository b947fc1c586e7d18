"""``ptft_hf.train`` on the same job, with the library's defaults for all that the job does not set."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from itertools import islice
from pathlib import Path

import common
import yaml

from ptft_hf import train

METHODS = {False: "lora/r8_attention", True: "bottleneck/pfeiffer"}


def write_task(folder: Path, rows: int) -> Path:
    """A task recipe in ``folder`` over the first ``rows`` rows of train and the whole of the other splits."""
    with common.data_file("train").open(encoding="utf-8") as file:
        (folder / "train.jsonl").write_text("".join(islice(file, rows)), encoding="utf-8")
    files = {
        "train": "train.jsonl",
        **{s: str(common.data_file(s).resolve()) for s in ("validation", "test")},
    }
    recipe = {
        "family": "sequence_classification",
        "data": {"path": "json", "data_files": files},
        "columns": {"text": "text", "label": "label"},
        "model": {"max_length": common.MAX_LENGTH},
    }
    path = folder / "polarity.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--trunk-dropout", action="store_true", help="dropout in the frozen trunk, too")
    parser.add_argument("--fp32", action="store_true", help="no bf16 autocast")
    args = parser.parse_args()
    settings: dict[str, object] = {
        "num_train_epochs": args.epochs,
        "per_device_train_batch_size": args.batch_size,
    }
    if args.trunk_dropout:
        settings["adapter.trunk_dropout"] = True
    if args.fp32:
        settings["bf16"] = False
    if args.lr is not None:
        settings["learning_rate"] = args.lr
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        result = train(
            model=str(common.model_folder(args)),
            task=str(write_task(Path(folder), args.rows)),
            adapter="full/default" if args.full else METHODS[args.pfeiffer],
            output_dir=str(Path(folder) / "output"),
            seed=args.seed,
            settings=settings,
        )
        lines = (Path(folder) / "output" / "metrics.jsonl").read_text("utf-8").splitlines()
    losses = [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]
    training = result.run["training"]
    common.report(
        "ours",
        args,
        rows=round(training["rows_per_second"] * training["seconds"] / args.epochs),
        seconds=training["seconds"],
        peak_memory=training["peak_memory_mb"],  # when training ends, as the loop reads its own
        final_loss=losses[-1],
        test_accuracy=result.run["metrics"]["test"]["accuracy"],
    )


if __name__ == "__main__":
    main()
