"""What a person sees of a run: the sums before it, the table and curves after it, the model card."""

from __future__ import annotations

import json
import re
import sys
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


def bar(total: int, doing: str, unit: str, *, done: int = 0, stays: bool = True, show: bool = True) -> Any:
    """A ``tqdm`` bar on stderr. Off a terminal (a log file, a CI run) it is renewed every half minute, and one
    that would vanish at its end is not shown at all."""
    from tqdm.auto import tqdm

    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=done,
        desc=doing,
        unit=unit,
        leave=stays,
        disable=not show or not (terminal or stays),
        dynamic_ncols=True,
        mininterval=0.5 if terminal else 30,
        maxinterval=10 if terminal else 60,
        delay=0 if stays else 1,
    )


def before_training(
    notes: Sequence[str], sums: Mapping[str, str], groups: Mapping[str, int], examples: Sequence[str]
) -> None:
    """Sums of the run, trained parameters by module, and decoded examples with their labels."""
    for note in notes:
        say(f"- {note}")
    lines = {**sums, "trained": ", ".join(f"{name} {count:,}" for name, count in groups.items())}
    width = max(map(len, lines))
    for name, value in lines.items():
        messages.print(f"[bold]{name:<{width}}[/bold]  {escape(value)}")
    if examples:
        say("the first training rows, label <- text as the model reads it:")
    for example in examples:
        say(f"  {example}", style="dim")


def after_training(run: Mapping[str, Any]) -> None:
    """One table: validation and test metrics; a second for the classes, where there are any."""
    console = Console(highlight=False)
    console.print(f"\n{escape(run['task']['name'])} · {escape(run['adapter']['name'])}", soft_wrap=True)
    console.print(metric_table(run["metrics"]))
    classes = run["report"].get("test", {}).get("per_class", [])
    if 0 < len(classes) <= 20:
        print_classes(console, classes, "test")
    facts, parameters, proof = run["training"], run["parameters"], run["proof"]
    console.print(
        f"{parameters['trainable']:,} of {parameters['total']:,} parameters trained in "
        f"{facts['seconds']:.1f} s ({facts['rows_per_second']:.0f} rows/s); peak memory "
        f"{facts['peak_memory_mb']:,.0f} MB, {size(facts['bytes_on_disk'])} on disk\n"
        f"saved in {escape(run['output_dir'])} and proven: loaded back, its logits on {proof['examples']} "
        f"examples differ by {proof['max_difference']} from those of the trained model",
        soft_wrap=True,
    )


def size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"


def metric_table(splits: Mapping[str, Mapping[str, float]]) -> Table:
    """Metrics down, splits across."""
    table = Table("metric")
    for split in splits:
        table.add_column(split, justify="right")
    for name in next(iter(splits.values())):
        table.add_row(name, *(f"{values[name]:.4f}" for values in splits.values()))
    return table


def print_classes(console: Console, classes: Sequence[Mapping[str, Any]], split: str) -> None:
    table = Table()
    table.add_column("class", overflow="fold")
    for name in ("precision", "recall", "f1", "support"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in classes:
        figures = (f"{row[name]:.4f}" for name in ("precision", "recall", "f1"))
        table.add_row(escape(str(row["label"])), *figures, f"{row['support']:,}")
    console.print(f"{split}, by class")
    console.print(table)


def evaluation(result: Mapping[str, Any], split: str) -> None:
    """Metrics of one split, and a table of its classes."""
    console = Console(highlight=False)
    console.print(metric_table({split: {name: value for name, value in result.items() if name != "report"}}))
    if classes := result["report"].get("per_class"):
        print_classes(console, classes, split)


def curves(metrics: Path, picture: Path, metric: str | None) -> None:
    """``curves.png``: training and validation loss over steps, and beside it the validation metric."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    entries = [json.loads(line) for line in metrics.read_text("utf-8").splitlines()]
    name = f"eval_{str(metric).removeprefix('eval_')}"

    def points(key: str) -> list[tuple[int, float]]:
        return [(entry["step"], entry[key]) for entry in entries if entry.get(key) is not None]

    panels = {"loss": {"training": points("loss"), "validation": points("eval_loss")}}
    if name != "eval_loss" and points(name):
        panels[f"validation {name.removeprefix('eval_')}"] = {"validation": points(name)}
    figure = Figure(figsize=(4.5 * len(panels), 3.4), layout="constrained")
    axes = figure.subplots(1, len(panels), sharex=True, squeeze=False)[0]
    for axis, (title, series) in zip(axes, panels.items(), strict=True):
        for label, line in series.items():
            color = "tab:blue" if label == "training" else "tab:orange"
            marker = "o" if label == "validation" or len(line) == 1 else None
            if line:
                axis.plot(*zip(*line, strict=True), marker=marker, color=color, label=label)
        axis.set_title(title)
        axis.set_xlabel("optimizer step")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    if axes[0].lines:
        axes[0].legend()
    figure.savefig(picture, dpi=120)


# ---- the model card ----

CARD = """---
{header}---
# {title}

{what}

{figures}

{facts}

## Use it

{upstream}With `ptft_hf`, which also checks the files{and_base}:

```python
{load}
print(model.predict([{example}]))
```
"""

UPSTREAM = """With plain {plain}:

```python
{code}
```

"""

OURS_ALONE = """Plain `peft` has no bottleneck adapters and cannot load this one.

"""

FULL_CODE = """import torch
from transformers import {auto}, AutoTokenizer

folder = {folder!r}  # where this card is
model = {auto}.from_pretrained(folder, {calls}).eval()
"""

PEFT_CODE = """import torch
from peft import PeftModel
from transformers import {auto}, AutoConfig, AutoTokenizer

folder = {folder!r}  # where this card is
config = AutoConfig.from_pretrained(folder)  # labels and padding token stand beside the adapter
base = {auto}.from_pretrained({base!r}, config=config, {calls}){in_float32}
model = PeftModel.from_pretrained(base, folder).eval()
"""

SHARED_CODE = """tokenizer = AutoTokenizer.from_pretrained(folder)
inputs = tokenizer({inputs}, padding=True, truncation=True, max_length={max_length}, return_tensors="pt")
with torch.no_grad():
    logits = model(**inputs).logits
print(logits)"""

WITH_WHOLE_MODELS = ("trust_remote_code", "attn_implementation")
"""Options of the base that a whole model, saved with all its weights, still needs."""


LOAD = """from ptft_hf import load

model = load({folder!r})"""

LOAD_FROM_HUB = """from huggingface_hub import snapshot_download
from ptft_hf import load

model = load(snapshot_download({folder!r}))"""


def model_card(run: Mapping[str, Any], kind: str | None, repository: str | None = None) -> str:
    """README.md of an output folder, with the lines that load it by upstream's libraries alone, where they can;
    from the Hub, where it stands in a ``repository`` there. ``kind`` is as :func:`ptft_hf.models.adapter_kind`'s."""
    facts, pair = run["model"], "text_pair" in run["data"]["columns"]
    folder = repository or run["output_dir"]
    text, other = '"A sentence to classify."', '"Another one."'
    return CARD.format(
        header=_header(run, kind),
        title=f"{_short(facts)}, {run['task']['name'].removesuffix('.yaml')}",
        what=_what(run),
        figures=_figures(run),
        facts=_facts(run),
        upstream=OURS_ALONE
        if kind == "bottleneck"
        else UPSTREAM.format(
            plain="`peft` and `transformers`" if kind else "`transformers`",
            code=_code(facts, folder, bool(kind), f"[{text}], [{other}]" if pair else f"[{text}]"),
        ),
        and_base=" and the base" if kind else "",
        load=(LOAD_FROM_HUB if repository else LOAD).format(folder=folder),
        example=f'{{"text": {text}, "text_pair": {other}}}' if pair else text,
    )


LIBRARY = {None: "transformers", "bottleneck": "ptft_hf"}


def _header(run: Mapping[str, Any], kind: str | None) -> str:
    """YAML front matter. The Hub takes as ``base_model`` nothing but the name of a model that it has."""
    import yaml

    source = run["model"]["source"]
    header: dict[str, Any] = {"library_name": LIBRARY.get(kind, kind)}
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) and not Path(source).exists():
        header["base_model"] = source
    return yaml.safe_dump({**header, "tags": ["ptft_hf", run["task"]["family"]]}, sort_keys=False)


def _short(facts: Mapping[str, Any]) -> str:
    """The base's name without the folders above it."""
    reference = str(facts["reference"])
    if reference.startswith("package:"):
        return reference.removeprefix("package:")
    return Path(reference).resolve().name if Path(facts["source"]).exists() else reference


def _what(run: Mapping[str, Any]) -> str:
    parts = []
    for recipe in (run["adapter"], run["task"]):
        description = f" ({str(recipe['description']).rstrip('.')})" if recipe.get("description") else ""
        parts.append(f"`{recipe['name']}`{description}")
    text = f"`{_short(run['model'])}`, fine-tuned with {parts[0]} on {parts[1]}."
    if "merged_from" in run:
        text += " The adapter is merged into its base: this is a whole model."
    return text


def _figures(run: Mapping[str, Any]) -> str:
    """Metrics down, and the splits that the run was scored on across."""
    splits = run["metrics"]
    heads = "".join(f" {split} ({run['data'][split]['rows']:,} rows) |" for split in splits)
    lines = [f"| |{heads}", f"|---|{'---:|' * len(splits)}"]
    for name in next(iter(splits.values())):
        lines.append(f"| {name} |" + "".join(f" {values[name]:.4f} |" for values in splits.values()))
    return "\n".join(lines)


def _facts(run: Mapping[str, Any]) -> str:
    labels = ", ".join(f"`{' '.join(label.split())}`" for label in run["labels"][:20])
    more = f", and {len(run['labels']) - 20} more" if len(run["labels"]) > 20 else ""
    training, parameters, versions = run["training"], run["parameters"], run["versions"]
    stack = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "peft"))
    return (
        f"It predicts {'a label among ' + labels + more if labels else 'a number'}. "
        f"{parameters['trainable']:,} of {parameters['total']:,} parameters were trained on "
        f"{run['data']['train']['rows']:,} rows (seed {run['seed']}, {training['steps']:,} steps, the best of "
        f"them step {training['best_step']:,}) with {stack}. Every setting is in `run.json`, the curves are in "
        "`curves.png`."
    )


def _code(facts: Mapping[str, Any], folder: str, is_peft: bool, inputs: str) -> str:
    """Lines that give the same logits as :func:`ptft_hf.load`."""
    options = {name: value for name, value in facts["options"].items() if name != "dtype"}
    dtype = facts["dtype"] if is_peft else "float32"
    if not is_peft:
        options = {name: value for name, value in options.items() if name in WITH_WHOLE_MODELS}
    calls = ", ".join([f"dtype=torch.{dtype}", *(f"{name}={value!r}" for name, value in options.items())])
    return (PEFT_CODE if is_peft else FULL_CODE).format(
        auto=facts["auto_class"],
        folder=folder,
        base=facts["source"],
        calls=calls,
        in_float32="" if dtype == "float32" else ".float()  # the head was trained in float32",
    ) + SHARED_CODE.format(inputs=inputs, max_length=facts["max_length"])
