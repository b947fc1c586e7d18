"""What a person sees of a run: the sums before it, the table and curves after it, the model card."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

messages = Console(stderr=True, highlight=False, soft_wrap=True)
"""Notes and progress go to stderr, so that stdout holds nothing but results."""


def say(text: str, style: str = "") -> None:
    messages.print(escape(text), style=style or None)


def before_training(
    notes: Sequence[str], sums: Mapping[str, str], groups: Mapping[str, int], examples: Sequence[str]
) -> None:
    """Sums of the run, trained parameters by module, and decoded examples with their labels."""
    for note in notes:
        say(f"- {note}")
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in sums.items():
        table.add_row(f"[bold]{name}[/bold]", escape(value))
    messages.print(table)
    shown = ", ".join(f"{name} {count:,}" for name, count in groups.items())
    say(f"trained: {shown}")
    for example in examples:
        say(f"  {example}", style="dim")


def after_training(run: Mapping[str, Any]) -> None:
    """One table: validation and test metrics; a second for the classes, where there are any."""
    console = Console(highlight=False)
    table = Table(title=f"{run['task']['name']} · {run['adapter']['name']}", title_justify="left")
    table.add_column("metric")
    for split in run["metrics"]:
        table.add_column(split, justify="right")
    for name in next(iter(run["metrics"].values())):
        table.add_row(name, *(f"{values[name]:.4f}" for values in run["metrics"].values()))
    console.print(table)
    classes = run["report"].get("test", {}).get("per_class", [])
    if 0 < len(classes) <= 20:
        console.print(class_table(classes, "test"))
    facts = run["training"]
    console.print(
        f"{run['parameters']['trainable']:,} of {run['parameters']['total']:,} parameters trained in "
        f"{facts['seconds']:.1f} s ({facts['rows_per_second']:.0f} rows/s), peak memory "
        f"{facts['peak_memory_mb']:,.0f} MB, {facts['bytes_on_disk'] / 1e6:.1f} MB on disk\n"
        f"saved and proven in {escape(run['output_dir'])}: reloaded, its logits on {run['proof']['examples']} "
        f"examples differ by {run['proof']['max_difference']}",
        soft_wrap=True,
    )


def class_table(classes: Sequence[Mapping[str, Any]], split: str) -> Table:
    table = Table(
        "class", "precision", "recall", "f1", "support", title=f"{split}, by class", title_justify="left"
    )
    for row in classes:
        table.add_row(
            escape(str(row["label"])),
            *(f"{row[c]:.4f}" for c in ("precision", "recall", "f1")),
            str(row["support"]),
        )
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def evaluation(result: Mapping[str, Any], split: str) -> None:
    """Metrics of one split, and a table of its classes."""
    console = Console(highlight=False)
    table = Table("metric", split)
    table.columns[1].justify = "right"
    for name, value in result.items():
        if name != "report":
            table.add_row(name, f"{value:.4f}")
    console.print(table)
    if classes := result["report"].get("per_class"):
        console.print(class_table(classes, split))


def curves(metrics: Path, picture: Path, metric: str | None) -> None:
    """``curves.png``: training and validation loss over steps, and beside it the validation metric."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib.figure import Figure

    entries = [json.loads(line) for line in metrics.read_text("utf-8").splitlines()]
    name = f"eval_{str(metric).removeprefix('eval_')}"
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axis, series in ((left, ("loss", "eval_loss")), (right, (name,))):
        for key in series:
            points = [(e["step"], e[key]) for e in entries if e.get(key) is not None]
            label = {"loss": "training", "eval_loss": "validation"}.get(key, key.removeprefix("eval_"))
            marker = "o" if key.startswith("eval_") else None
            axis.plot([p[0] for p in points], [p[1] for p in points], marker=marker, label=label)
        axis.set_xlabel("optimizer step")
        axis.grid(alpha=0.3)
    left.set_ylabel("loss")
    left.legend()
    right.set_ylabel(f"validation {name.removeprefix('eval_')}")
    figure.savefig(picture, dpi=120)


CARD = """---
library_name: {library}
base_model: {base}
tags: [ptft_hf, {family}]
---
# {title}

{what}

| | validation | test |
|---|---|---|
{rows}

Trained on {train:,} rows (seed {seed}); labels: {labels}. Every setting is in `run.json`, the curves in
`curves.png`.

## Use it

With plain {plain}:

```python
{code}
```

With `ptft_hf`, which also checks the files and the base:

```python
from ptft_hf import load

print(load({path!r}).predict(["A sentence to classify."]))
```
"""

FULL_CODE = """import torch
from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained({path!r}, dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained({path!r})
texts = ["A sentence to classify."]
inputs = tokenizer(texts, padding=True, truncation=True, max_length={max_length}, return_tensors="pt")
with torch.no_grad():
    print(model(**inputs).logits)"""

PEFT_CODE = """import torch
from peft import PeftModel
from transformers import {auto}, AutoConfig, AutoTokenizer

config = AutoConfig.from_pretrained({path!r})  # labels and padding token stand beside the adapter
base = {auto}.from_pretrained({base!r}, config=config, {options})
model = PeftModel.from_pretrained(base, {path!r}).eval()
tokenizer = AutoTokenizer.from_pretrained({path!r})
texts = ["A sentence to classify."]
inputs = tokenizer(texts, padding=True, truncation=True, max_length={max_length}, return_tensors="pt")
with torch.no_grad():
    print(model(**inputs).logits)"""


def model_card(run: Mapping[str, Any], is_peft: bool) -> str:
    """README.md of an output folder, with the lines that load it by upstream's libraries alone."""
    facts = run["model"]
    options = {k: v for k, v in facts["options"].items() if k != "dtype"}
    calls = ", ".join([f"dtype=torch.{facts['dtype']}", *(f"{k}={v!r}" for k, v in options.items())])
    code = (PEFT_CODE if is_peft else FULL_CODE).format(
        auto=facts["auto_class"],
        path=run["output_dir"],
        base=facts["source"],
        options=calls,
        max_length=facts["max_length"],
    )
    validation, test = run["metrics"]["validation"], run["metrics"]["test"]
    labels = ", ".join(run["labels"][:20]) + (" ..." if len(run["labels"]) > 20 else "")
    return CARD.format(
        library="peft" if is_peft else "transformers",
        base=facts["source"],
        family=run["task"]["family"],
        title=f"{Path(facts['source']).name}, {run['task']['name']}",
        what=f"{facts['reference']} fine-tuned with `{run['adapter']['name']}` on `{run['task']['name']}`: "
        f"{run['parameters']['trainable']:,} of {run['parameters']['total']:,} parameters trained.",
        rows="\n".join(f"| {name} | {validation[name]:.4f} | {test[name]:.4f} |" for name in test),
        train=run["data"]["train"]["rows"],
        seed=run["seed"],
        labels=labels or "a number",
        plain="`peft` and `transformers`" if is_peft else "`transformers`",
        code=code,
        path=run["output_dir"],
    )
