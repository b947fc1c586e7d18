"""The table of :mod:`tests.test_bad_inputs`: what is done to good inputs, the command, and what must be said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

TRAIN = "train --model model --task task.yaml --adapter full/default --output new"
LORA = "train --model model --task task.yaml --adapter lora/r8_attention --output new"
Change = Callable[[], None]


class Case(NamedTuple):
    """One bad input: a command, the words that its message must hold, and what is done before.

    The command runs in a folder with ``model`` (a checkpoint), ``other`` (another of its kind), ``task.yaml``
    with ``train.jsonl``, ``dev.jsonl`` and ``test.jsonl``, and the finished runs ``full`` and ``lora``.
    """

    name: str
    command: str
    words: tuple[str, ...]
    change: Change = lambda: None


def write(path: str, content: str | bytes) -> Change:
    return lambda: (
        (Path(path).write_bytes(content) if isinstance(content, bytes) else Path(path).write_text(content))
        and None
    )


def append(path: str, content: str) -> Change:
    return lambda: Path(path).write_text(Path(path).read_text() + content) and None


def lines(path: str, change: Callable[[int, dict[str, object]], object]) -> Change:
    """Each row of a JSON-lines file as ``change(number, row)`` gives it."""

    def apply() -> None:
        rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
        Path(path).write_text("".join(json.dumps(change(i, row)) + "\n" for i, row in enumerate(rows)))

    return apply


def remove(path: str) -> Change:
    return lambda: Path(path).unlink()


def cut(path: str, size: int) -> Change:
    return lambda: Path(path).write_bytes(Path(path).read_bytes()[:size]) and None


def flip(path: str) -> Change:
    """One bit of the last byte changed."""

    def apply() -> None:
        content = bytearray(Path(path).read_bytes())
        content[-1] ^= 1
        Path(path).write_bytes(content)

    return apply


def replace(path: str, old: str, new: str) -> Change:
    def apply() -> None:
        text = Path(path).read_text()
        assert old in text
        Path(path).write_text(text.replace(old, new))

    return apply


def both(*changes: Change) -> Change:
    return lambda: [change() for change in changes] and None


RECIPES = (
    Case(
        "a misspelt task", TRAIN.replace("task.yaml", "sequence_classification/sst"), ("sst2", "did you mean")
    ),
    Case("a task file that is not there", TRAIN.replace("task.yaml", "gone.yaml"), ("gone.yaml",)),
    Case(
        "a misspelt adapter",
        TRAIN.replace("full/default", "lora/r8_atention"),
        ("lora/r8_attention", "did you mean"),
    ),
    Case(
        "an unknown key",
        TRAIN,
        ("task.yaml:6", "'leakege'", "did you mean 'leakage'"),
        append("task.yaml", "leakege: drop\n"),
    ),
    Case(
        "every fault at once",
        TRAIN,
        ("'leakege'", "'colums'"),
        append("task.yaml", "leakege: drop\ncolums: {}\n"),
    ),
    Case(
        "a wrong value",
        TRAIN,
        ("task.yaml:6", "leakage", "'ignore'"),
        append("task.yaml", "leakage: ignore\n"),
    ),
    Case("a key given twice", TRAIN, ("task.yaml:6", "family"), append("task.yaml", "family: x\n")),
    Case("broken YAML", TRAIN, ("task.yaml:7", "not YAML"), append("task.yaml", "columns: {text: [\n")),
    Case("a recipe that is not UTF-8", TRAIN, ("task.yaml", "UTF-8"), write("task.yaml", b"family: \xff\n")),
    Case("an empty recipe", TRAIN, ("task.yaml", "empty"), write("task.yaml", "")),
    Case(
        "an unknown family",
        TRAIN,
        ("'sequence_lassification'", "did you mean 'sequence_classification'"),
        replace("task.yaml", "sequence_c", "sequence_"),
    ),
    Case(
        "a family that cannot be imported",
        TRAIN,
        ("no_such_module:Task",),
        replace("task.yaml", "sequence_classification", "'no_such_module:Task'"),
    ),
    Case(
        "includes in a circle", TRAIN, ("task.yaml", "include"), append("task.yaml", "include: task.yaml\n")
    ),
    Case(
        "an unknown field of TrainingArguments",
        TRAIN,
        ("learning_rat", "did you mean 'learning_rate'"),
        replace("task.yaml", "training: {", "training: {learning_rat: 1, "),
    ),
    Case(
        "an unknown field of a PEFT config",
        LORA.replace("lora/r8_attention", "mine.yaml"),
        ("mine.yaml:2", "'rank'"),
        write("mine.yaml", "family: lora\nrank: 8\n"),
    ),
    Case(
        "a wrong type in a PEFT config",
        LORA.replace("lora/r8_attention", "mine.yaml"),
        ("mine", "'eight'"),
        write("mine.yaml", "family: lora\nr: eight\n"),
    ),
    Case(
        "validate finds faults",
        "validate task.yaml bad.yaml",
        ("bad.yaml:2", "'x'"),
        write("bad.yaml", "family: full\nx: 1\n"),
    ),
    Case("show of an unknown name", "show lora/r9", ("lora/r9",)),
    Case("ls of an unknown kind", "ls models", ("'models'", "tasks", "adapters")),
)

FLAGS = (
    Case(
        "a number in words",
        f"{TRAIN} --set num_train_epochs=three",
        ("num_train_epochs", "'three'", "number"),
    ),
    Case("a negative learning rate", f"{TRAIN} --set learning_rate=-1", ("learning_rate", "-1", "above 0")),
    Case(
        "no batch", f"{TRAIN} --set per_device_train_batch_size=0", ("per_device_train_batch_size", "above 0")
    ),
    Case(
        "an unknown setting",
        f"{TRAIN} --set lerning_rate=1e-3",
        ("'lerning_rate'", "did you mean 'learning_rate'"),
    ),
    Case("a setting without a value", f"{TRAIN} --set learning_rate", ("learning_rate", "=")),
    Case("an unknown field of the adapter", f"{LORA} --set adapter.rank=8", ("adapter.rank",)),
    Case(
        "an unknown strategy",
        f"{TRAIN} --set eval_strategy=sometimes",
        ("eval_strategy='sometimes'", "epoch"),
    ),
    Case(
        "every faulty setting at once",
        f"{TRAIN} --set learning_rate=-1 --set num_train_epochs=-1",
        ("learning_rate", "num_train_epochs"),
    ),
    Case("a setting with its own flag", f"{TRAIN} --set seed=3", ("seed", "--seed")),
    Case("FSDP on a CPU", f"{TRAIN} --set fsdp=full_shard", ("fsdp", "leave it out")),
    Case("an unknown optimizer", f"{TRAIN} --set optim=adamv", ("optim='adamv'", "adamw_torch")),
    Case(
        "saves that miss the best step",
        f"{TRAIN} --set eval_strategy=steps --set eval_steps=2 --set save_steps=3",
        ("save_steps", "eval_steps"),
    ),
    Case(
        "early stopping without evaluation",
        f"{TRAIN} --set eval_strategy=no --set task.early_stopping_patience=2",
        ("early_stopping_patience",),
    ),
    Case(
        "a metric that is not computed",
        f"{TRAIN} --set metric_for_best_model=f1",
        ("metric_for_best_model", "'f1'", "macro_f1"),
    ),
    Case("a negative seed", f"{TRAIN} --seed -1", ("seed: -1",)),
    Case("more tokens than positions", f"{TRAIN} --set model.max_length=4096", ("max_length", "4096", "72")),
    Case("no tokens", f"{TRAIN} --set model.max_length=0", ("max_length", "0")),
    Case("an unknown dtype", f"{TRAIN} --set model.dtype=float33", ("dtype", "'float33'", "bfloat16")),
    Case(
        "an unknown attention",
        f"{TRAIN} --set model.attn_implementation=fast",
        ("attn_implementation", "fast"),
    ),
    Case("resume and overwrite", f"{TRAIN} --resume --overwrite", ("resume", "overwrite", "exclude")),
    Case("an output folder with other files", TRAIN.replace("new", "model"), ("model", "holds other files")),
    Case(
        "an output folder with another run",
        TRAIN.replace("new", "full"),
        ("full", "holds another run", "--overwrite"),
    ),
    Case(
        "an output that is a file",
        TRAIN.replace("new", "task.yaml"),
        ("task.yaml", "a file of this name exists"),
    ),
    Case("an output below a file", TRAIN.replace("new", "task.yaml/new"), ("task.yaml is a file",)),
    Case(
        "replacing the model that is trained",
        "train --model full --task task.yaml --adapter full/default --output full --overwrite",
        ("full: holds what the run starts from", "choose another"),
    ),
    Case(
        "class weights of unknown labels",
        f"{TRAIN} --set 'task.class_weights={{good: 2.0}}'",
        ("class_weights", "'good'"),
    ),
    Case(
        "an adapter that targets nothing",
        f"{LORA} --set adapter.target_modules=[nothing]",
        ("target_modules", "BertForSequenceClassification"),
    ),
    Case(
        "too many layers",
        f"{TRAIN.replace('full/default', 'partial/top_2_layers')} --set adapter.top_layers=99",
        ("top_layers", "99"),
    ),
)
