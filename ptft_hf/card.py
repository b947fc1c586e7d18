"""The model card: what a run made, and the lines that load it by upstream's libraries alone."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ptft_hf import models, recipes, tasks
from ptft_hf.recipes import from_nothing
from ptft_hf.recipes.algorithms import ALGORITHMS

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

POLICY_CARD = """---
{header}---
# {title}

{what}

{figures}

{files}

## Use it

{upstream}
"""

OURS_ALONE = {
    "bottleneck": "Plain `peft` has no bottleneck adapters and cannot load this one.\n\n",
    "prefix": "Plain `peft` puts no prefixes into attention layers and cannot load these.\n\n",
}
"""Why a kind of adapter has no lines of upstream's libraries."""

FULL_CODE = """import torch
from transformers import {auto}, {reader}

folder = {folder!r}  # where this card is
model = {auto}.from_pretrained(folder, {calls}).eval()
"""

ONNX_CARD = """# {title} (ONNX)

{what}

Converted by `torch.onnx.export`, in float32, for any number of rows and tokens. Its logits differ from the run's by
at most {difference:.2g} on {probe} examples{metric}.

```python
import onnxruntime
from transformers import AutoTokenizer

folder = {folder!r}  # where this card is
tokenizer = AutoTokenizer.from_pretrained(folder)
session = onnxruntime.InferenceSession(f"{{folder}}/model.onnx")
inputs = tokenizer({example!r}, padding=True, truncation=True, max_length={max_length}, return_tensors="np")
(logits,) = session.run(None, {{value.name: inputs[value.name] for value in session.get_inputs()}})
```

`config.json` holds the labels (`id2label`), `export.json` what was compared and how it was trained.
"""

PEFT_CODE = """import torch
from peft import PeftModel
from transformers import {auto}, AutoConfig, {reader}{also}

folder = {folder!r}  # where this card is
config = AutoConfig.from_pretrained(folder)  # {beside} beside the adapter
base = {auto}.from_pretrained({base!r}, config=config, {calls}){in_float32}
{grown}{learning}{generating}model = PeftModel.from_pretrained(base, folder).eval()
"""

GROWN = """base.resize_token_embeddings({rows}, mean_resizing=False)  # the adapter holds the added tokens' rows
"""
OUTPUT_ROWS = """for values in base.get_output_embeddings().parameters():  # where it is not tied to the input's
    values.data[{ids}] = values.data[:{known}].float().mean(0).to(values)
"""
WRITERS = ("AutoModelForSeq2SeqLM", "AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForPreTraining")
"""Models with output embeddings."""

ONE_LAYOUT = """for module in base.modules():  # else bitsandbytes repacks weights on some CPUs and rounds more
    if hasattr(module, "support_avx512bf16_for_cpu"):
        module.support_avx512bf16_for_cpu = False
"""

GENERATING = """base.generation_config = base.generation_config.from_pretrained(folder)  # beside the adapter, too
"""

READERS = {
    "AutoTokenizer": "tokenizer = AutoTokenizer.from_pretrained(folder)\n",
    "AutoImageProcessor": 'processor = AutoImageProcessor.from_pretrained(folder, backend="pil")\n',
}

WITH_WHOLE_MODELS = ("trust_remote_code", "attn_implementation")
"""Options of the base that a whole model, saved with all its weights, still needs."""


class Verbatim(str):
    """Code, which stands for itself."""

    def __repr__(self) -> str:
        return str(self)


PPO_FIGURES = {
    "objective/scores": "score",
    "objective/judge": "held-out judge",
    "objective/kl": "KL from the reference, nats an answer",
    "objective/rlhf_reward": "score less KL penalty",
    "policy/entropy_avg": "entropy, nats a token",
    "val/answer_length": "answer length, tokens",
    "val/ended": "answers that end by themselves",
    "val/explained_variance": "critic's explained variance",
    "policy/clipfrac_avg": "clipped ratios",
}
"""What is shown of PPO's metrics, and how it is called."""

NOT_SHOWN = ("runtime", "samples_per_second", "steps_per_second", "epoch", "eval_num_tokens")
"""What is not shown of TRL's metrics."""

LOAD = """from ptft_hf import load

model = load({folder!r}{trusted})"""

LOAD_FROM_HUB = """from huggingface_hub import snapshot_download
from ptft_hf import load

model = load(snapshot_download({folder!r}){trusted})"""


def model_card(run: Mapping[str, Any], kind: str | None, repository: str | None = None) -> str:
    """README.md of an output folder, with the lines that load it by upstream's libraries alone, where they can;
    from the Hub, where it stands in a ``repository`` there. ``kind`` is as :func:`ptft_hf.models.adapter_kind`'s."""
    folder = repository or run["output_dir"]
    if is_policy(run):
        return _policy_card(run, kind, folder)
    facts, usage = run["model"], usage_of(run)
    return CARD.format(
        header=_header(facts["source"], kind, run["task"]["family"]),
        title=f"{_short(facts)}, {run['task']['name'].removesuffix('.yaml')}",
        what=_what(run),
        figures=_figures(run),
        facts=_facts(run, usage),
        upstream=OURS_ALONE[kind]
        if kind in OURS_ALONE
        else UPSTREAM.format(
            plain="`peft` and `transformers`" if kind else "`transformers`",
            code=_code(facts, folder, bool(kind), usage.reader) + usage.code,
        ),
        and_base=" and the base" if kind else "",
        load=(LOAD_FROM_HUB if repository else LOAD).format(
            folder=folder, trusted=", trust_remote_code=True" if facts["options"].get("trust_remote_code") else ""
        ),
        example=json.dumps(usage.inputs[0], ensure_ascii=False),
    )


def onnx_card(run: Mapping[str, Any], folder: str, compared: Mapping[str, Any]) -> str:
    """README.md of an exported ONNX model."""
    metric, example = compared["metric"], usage_of(run).inputs[0]
    texts = [example] if isinstance(example, str) else [[value] for value in example.values()]
    return ONNX_CARD.format(
        title=f"{_short(run['model'])}, {run['task']['name'].removesuffix('.yaml')}",
        what=_what(run),
        probe=compared["probe_examples"],
        difference=compared["max_logit_difference"],
        metric=f"; on {compared['examples']:,} its {metric['name']} is {metric['exported']:.4f}, and the run's "
        f"{metric['run']:.4f}"
        if metric
        else "",
        folder=folder,
        example=texts if isinstance(example, str) else Verbatim(", ".join(map(repr, texts))),
        max_length=run["model"]["max_length"],
    )


def is_policy(run: Mapping[str, Any]) -> bool:
    """Whether a run trained a language model for rewards or on preferences, by PPO or by TRL: it has no task whose
    inputs it answers."""
    return run.get("stage") in ("ppo", *ALGORITHMS)


def without_task(folder: Path, run: Mapping[str, Any]) -> str:
    """What a folder is whose run has no task, and what may be done with it."""
    if not is_policy(run):
        return f"{folder}: is no run that trained a model for a task: its run.json has no task_state"
    by, merge = "transformers", ""
    if recipes.saved_adapter_kind(folder) is not None:
        by, merge = "transformers and peft", f", `ptft merge {folder}` makes a whole model of it"
    return (
        f"{folder}: is a policy that {run['stage']} trained, not a model of a task, whose inputs it could predict or "
        f"be scored on, and no reward: load it by {by}, as its model card shows; `ptft evaluate {folder} --against "
        f"DIR --judge SOURCE --task PROMPTS` compares its answers with another's{merge}, and `ptft ppo --policy "
        f"{folder} ...` trains it further"
    )


def _policy_card(run: Mapping[str, Any], kind: str | None, folder: str) -> str:
    facts, by, training = run["model"], run["stage"].upper(), run["training"]
    source, options = models.located(facts["reference"], facts["options"])
    dtype = str(options.get("dtype", facts["dtype"])).removeprefix("torch.")
    of_base = {"source": source, "options": options, "dtype": dtype, "auto_class": "AutoModelForCausalLM", "head": ()}
    name, ppo = Path(facts["policy"]).name, run["stage"] == "ppo"
    reward = f" for the reward `{run['reward']}`" if run["reward"] else ""
    length = (
        f"{training['updates']:,} updates of {training['answers_per_update']:,} answers"
        if ppo
        else f"{training['steps']:,} steps of TRL {run['trl']}"
    )
    merged = " The adapter is merged into its base: this is a whole model." if "merged_from" in run else ""
    heads = ("first updates", "last updates") if ppo else tuple(run["metrics"])
    table = [("", *heads), ("---", *("---:" for _ in heads)), *figures_of_policy(run)]
    return POLICY_CARD.format(
        header=_header(source, kind, run["stage"]),
        title=f"{name}, {by} on {run['task']['name'].removesuffix('.yaml')}",
        what=f"`{name}`, trained by {by} with `{run['adapter']['name']}` on `{run['task']['name']}`{reward}, over "
        f"{length} (seed {run['seed']}).{merged}",
        figures="\n".join(f"| {' | '.join(row)} |" for row in table),
        files="The critic is in `critic/`; every setting is in `run.json`, the curves are in `curves.png`, answers "
        "through training in `samples.html`."
        if ppo and not merged
        else "Every setting is in `run.json`, the curves are in `curves.png`.",
        upstream=UPSTREAM.format(
            plain="`peft` and `transformers`" if kind else "`transformers`",
            code=_code({**facts, **of_base}, folder, bool(kind), "AutoTokenizer", own_generation=False).rstrip(),
        ).rstrip(),
    )


def figures_of_policy(run: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Title of each figure, and its values over the first and the last updates of PPO, or on TRL's splits; ``-``
    where it could not be computed, as the explained variance of returns that are all the same."""
    columns = list(run["metrics"].values())
    named = {name: name.removeprefix("eval_") for values in columns for name in values if name not in NOT_SHOWN}
    found: list[tuple[str, ...]] = []
    for name, title in (PPO_FIGURES if run["stage"] == "ppo" else named).items():
        values = [column.get(name) for column in columns]
        if any(value is not None for value in values):
            found.append((title, *("-" if value is None else f"{value:.4f}" for value in values)))
    return found


def usage_of(run: Mapping[str, Any]) -> tasks.Usage:
    """The family's own lines of the card."""
    task = tasks.build(recipes.task_from_dict(run["task"]))
    task.restore(run["task_state"])
    return task.usage(run["data"]["columns"], run["model"]["max_length"])


LIBRARY = {None: "transformers", "bottleneck": "ptft_hf", "prefix": "ptft_hf"}


def _header(source: str, kind: str | None, tag: str) -> str:
    """YAML front matter. The Hub takes as ``base_model`` nothing but the name of a model that it has."""
    import yaml

    header: dict[str, Any] = {"library_name": LIBRARY.get(kind, kind)}
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) and not Path(source).exists():
        header["base_model"] = source
    return yaml.safe_dump({**header, "tags": ["ptft_hf", tag]}, sort_keys=False)


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
    made = "trained from random weights" if from_nothing(run["model"]["reference"]) else "fine-tuned"
    text = f"`{_short(run['model'])}`, {made} with {parts[0]} on {parts[1]}."
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


def _facts(run: Mapping[str, Any], usage: tasks.Usage) -> str:
    labels = ", ".join(f"`{' '.join(label.split())}`" for label in run["labels"][:20])
    more = f", and {len(run['labels']) - 20} more" if len(run["labels"]) > 20 else ""
    training, parameters, versions = run["training"], run["parameters"], run["versions"]
    stack = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "peft"))
    return (
        f"It {usage.answers + ' ' + labels + more if labels else usage.without_labels}. "
        f"{parameters['trainable']:,} of {parameters['total']:,} parameters were trained on "
        f"{run['data']['train']['rows']:,} rows (seed {run['seed']}, {training['steps']:,} steps, the best of "
        f"them step {training['best_step']:,}) with {stack}. Every setting is in `run.json`, the curves are in "
        "`curves.png`."
    )


def _grown(facts: Mapping[str, Any]) -> str:
    """The lines that make room for added tokens, as :func:`ptft_hf.models.give_rows` does."""
    added = facts.get("added_tokens")
    lines = GROWN + (OUTPUT_ROWS if facts["auto_class"] in WRITERS else "")
    return lines.format(**added) if added else ""


def _code(
    facts: Mapping[str, Any], folder: str, is_peft: bool, reader: str, *, own_generation: bool = True
) -> str:
    """Lines that give the same logits as :func:`ptft_hf.load`; with ``own_generation`` an adapter that writes has a
    ``generation_config.json``."""
    options = {name: value for name, value in facts["options"].items() if name != "dtype"}
    dtype = facts["dtype"] if is_peft else "float32"
    if not is_peft:
        options = {name: value for name, value in options.items() if name in WITH_WHOLE_MODELS}
    quantization = facts.get("quantization") if is_peft else None
    if quantization:
        skipped = sorted({*facts["head"], *(quantization.get("llm_int8_skip_modules") or ())})
        # Without a list transformers itself keeps the output embeddings of a model that writes.
        fields = {**quantization, **({"llm_int8_skip_modules": skipped} if skipped else {})}
        given = ", ".join(f"{name}={value!r}" for name, value in fields.items())
        options["quantization_config"] = Verbatim(f"BitsAndBytesConfig({given})")
    calls = ", ".join([f"dtype=torch.{dtype}", *(f"{name}={value!r}" for name, value in options.items())])
    return (PEFT_CODE if is_peft else FULL_CODE).format(
        auto=facts["auto_class"],
        reader=reader,
        beside="labels and padding token stand" if reader == "AutoTokenizer" else "labels stand",
        folder=folder,
        base=facts["source"],
        calls=calls,
        grown=_grown(facts),
        also=", BitsAndBytesConfig" if quantization else "",
        generating=GENERATING
        if own_generation and facts["auto_class"] in ("AutoModelForSeq2SeqLM", "AutoModelForCausalLM")
        else "",
        learning=ONE_LAYOUT if quantization and quantization.get("load_in_4bit") else "",
        in_float32=""
        if dtype == "float32" or quantization
        else ".float()  # what was trained is in float32",
    ) + READERS[reader]
