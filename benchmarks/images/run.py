"""scikit-learn's digits: a small ViT and a small ResNet from nothing, then LoRA on that ViT for rotated digits.

    python benchmarks/images/run.py [--seeds 0 1 2] [--work DIR]

The splits are the task's own: 1,797 images of 8 x 8, of which a tenth is cut for validation and a tenth for test. The
rotated digits are the same images in the same splits, each turned by 90 degrees. Nothing is downloaded. Finished runs
are skipped. Writes ``results.json`` and ``REPORT.md`` beside this file.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import ptft_hf
from ptft_hf import preparing, recipes

HERE = Path(__file__).parent
IMAGE = {"image_size": 8, "num_channels": 1}
VIT = {**IMAGE, "patch_size": 2, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
MODELS: dict[str, dict[str, Any]] = {
    "vit": {**VIT, "intermediate_size": 128},
    "resnet": {"num_channels": 1, "embedding_size": 16, "hidden_sizes": [16, 32], "depths": [2, 2]},
}
MODELS["resnet"]["layer_type"] = "basic"  # as in ResNet-18
FROM_NOTHING = {"num_train_epochs": 30, "learning_rate": 1e-3, "per_device_train_batch_size": 32}
LORA = {"num_train_epochs": 10, "learning_rate": 3e-3, "per_device_train_batch_size": 32}


def rotated(splits: Any) -> Any:
    """Every image turned by 90 degrees; the rows stay in their splits."""
    import datasets

    def turned(row: dict[str, Any]) -> dict[str, Any]:
        return {"image": row["image"].rotate(90), "label": row["label"]}

    names = ("train", "validation", "test")
    tables = {name: getattr(splits, name).cast_column("image", datasets.Image()) for name in names}
    return datasets.DatasetDict({name: table.map(turned) for name, table in tables.items()})


def run(folder: Path, **given: Any) -> ptft_hf.TrainedModel:
    if not (folder / "run.json").exists():
        return ptft_hf.train(output_dir=folder, overwrite=True, **given)
    return ptft_hf.load(folder)


def figures(trained: ptft_hf.TrainedModel) -> dict[str, Any]:
    record = trained.run
    return {
        "validation": record["metrics"]["validation"]["accuracy"],
        "test": record["metrics"]["test"]["accuracy"],
        "trainable": record["parameters"]["trainable"],
        "total": record["parameters"]["total"],
        "seconds": record["training"]["seconds"],
    }


def of_seed(seed: int, work: Path) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name, fields in MODELS.items():
        settings = {**FROM_NOTHING, **{f"model.{key}": value for key, value in fields.items()}}
        given = {"model": f"config:{name}", "task": "image_classification/digits", "adapter": "full/default"}
        found[f"{name} from nothing"] = figures(
            run(work / f"{name}-{seed}", **given, seed=seed, settings=settings)
        )
    vit = work / f"vit-{seed}"
    plan = preparing.make_plan(str(vit), "image_classification/digits", "full/default", {})
    turned = rotated(preparing.prepare(plan, None, seed).splits)
    before = ptft_hf.load(vit).evaluate(turned["test"])
    found["that ViT on rotated digits"] = {"test": before["accuracy"]}
    task = recipes.load_task("image_classification/digits").model_copy(update={"data": None})
    found["with LoRA on rotated digits"] = figures(
        run(
            work / f"rotated-{seed}",
            model=str(vit),
            task=task,
            adapter="lora/r16_all_linear",
            data=turned,
            seed=seed,
            settings=LORA,
        )
    )
    return found


def report(results: dict[str, dict[str, Any]]) -> str:
    data = " ".join((__doc__ or "").split("\n\n")[2].split())
    lines = [
        "# Images: digits from nothing, and LoRA",
        "",
        f"`python benchmarks/images/run.py`: {data.partition(' Finished')[0]}",
        "",
        "| run | test accuracy by seed | mean | trained | of | training, s |",
        "|---|---|---:|---:|---:|---:|",
    ]
    first = next(iter(results.values()))
    for name, one in first.items():
        values = [found[name]["test"] for found in results.values()]
        shown = ", ".join(f"{value:.3f}" for value in values)
        rest = [
            f"{statistics.mean(found[name][key] for found in results.values()):,.0f}" if key in one else ""
            for key in ("trainable", "total", "seconds")
        ]
        lines.append(f"| {name} | {shown} | {statistics.mean(values):.3f} | {' | '.join(rest)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=Path("image-runs"))
    args = parser.parse_args()
    path = HERE / "results.json"
    results = json.loads(path.read_text("utf-8")) if path.exists() else {}
    for seed in args.seeds:
        if str(seed) not in results:
            results[str(seed)] = of_seed(seed, args.work)
            path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        (HERE / "REPORT.md").write_text(report(results), encoding="utf-8")
        print(seed, {name: found["test"] for name, found in results[str(seed)].items()}, flush=True)


if __name__ == "__main__":
    main()
