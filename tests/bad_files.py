"""The table of :mod:`tests.test_bad_inputs`, continued: data, checkpoints, and the folders of runs."""

from __future__ import annotations

import json
from pathlib import Path

from tests.bad_inputs import TRAIN, Case, Change, append, both, cut, flip, lines, remove, replace, write

SPLITS = ("train", "dev", "test")
TWO_ROWS = '{"text": "a", "label": "pos"}\n{"text": "b", "label": "neg"}\n'
LATIN = '{"text": "a", "label": "pos"}\n{"text": "é", "label": "neg"}\n'.encode("latin-1")
ONE_FILE = "family: sequence_classification\ndata: {path: json, data_files: {train: train.jsonl}}\n"

ROWS = (
    Case("a data file that is not there", TRAIN, ("train.jsonl",), remove("train.jsonl")),
    Case(
        "data that is not UTF-8",
        TRAIN,
        ("train.jsonl, line 2", "not UTF-8"),
        write("train.jsonl", LATIN),
    ),
    Case(
        "a broken line of JSON",
        TRAIN,
        ("train.jsonl, line 49", "broken JSON"),
        append("train.jsonl", '{"text": \n'),
    ),
    Case(
        "a line that is no object",
        TRAIN,
        ("train.jsonl, line 49", "not an object"),
        append("train.jsonl", "[1, 2]\n"),
    ),
    Case("an empty file", TRAIN, ("dev.jsonl", "empty"), write("dev.jsonl", "")),
    Case(
        "no text column",
        TRAIN,
        ("'text'", "txt"),
        lines("train.jsonl", lambda _, row: {"txt": row["text"], "label": row["label"]}),
    ),
    Case(
        "no label column",
        TRAIN,
        ("'label'", "lable"),
        lines("train.jsonl", lambda _, row: {"text": row["text"], "lable": row["label"]}),
    ),
    Case(
        "only empty texts", TRAIN, ("train", "text"), lines("train.jsonl", lambda _, row: row | {"text": " "})
    ),
    Case(
        "no labels at all",
        TRAIN,
        ("train", "label"),
        lines("train.jsonl", lambda _, row: row | {"label": None}),
    ),
    Case(
        "one class only",
        TRAIN,
        ("only one class", "pos"),
        lines("train.jsonl", lambda _, row: row | {"label": "pos"}),
    ),
    Case(
        "a label only the test set has",
        TRAIN,
        ("test", "'new'", "not in the training split"),
        lines("test.jsonl", lambda i, row: row | {"label": "new"} if i == 0 else row),
    ),
    Case(
        "labels of mixed kinds",
        TRAIN,
        ("train", "label"),
        lines("train.jsonl", lambda i, row: row | {"label": [1]} if i == 0 else row),
    ),
    Case(
        "numbers for classes",
        f"{TRAIN} --set task.problem_type=single_label_classification",
        ("train", "0.5"),
        lines("train.jsonl", lambda i, row: row | {"label": 0.5}),
    ),
    Case(
        "targets that are not numbers", f"{TRAIN} --set task.problem_type=regression", ("regression", "neg")
    ),
    Case(
        "targets that are all equal",
        TRAIN,
        ("1.5",),
        both(*(lines(f"{name}.jsonl", lambda _, row: row | {"label": 1.5}) for name in SPLITS)),
    ),
    Case(
        "infinite targets",
        TRAIN,
        ("train", "label", "inf"),
        both(
            *(
                lines(f"{name}.jsonl", lambda i, row: row | {"label": 1.5 * i if i else float("inf")})
                for name in SPLITS
            )
        ),
    ),
    Case(
        "leakage that is an error",
        f"{TRAIN} --set task.leakage=error",
        ("train", "test"),
        lambda: Path("test.jsonl").write_text(Path("train.jsonl").read_text()) and None,
    ),
    Case("two rows", TRAIN, ("train",), both(write("train.jsonl", TWO_ROWS), write("task.yaml", ONE_FILE))),
)

PAIRS = "family: preference\ndata: {path: json, data_files: {train: pairs.jsonl}}\n"


def answers(**more: object) -> Change:
    """``task.yaml`` with pairs of answers, of which the second row holds ``more``; None takes a column out."""
    gone = {name for name, value in more.items() if value is None}
    whole: dict[str, object] = {"chosen": "good", "rejected": "bad", "margin": 0.0, "tie": False}
    rows = [{"prompt": f"the film {i}", **whole} for i in range(20)]
    rows = [{name: value for name, value in row.items() if name not in gone} for row in rows]
    rows[1] |= {name: value for name, value in more.items() if name not in gone}
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    return both(write("pairs.jsonl", text), write("task.yaml", PAIRS))


PREFERENCES = (
    Case("pairs without the other answer", TRAIN, ("'rejected'", "pairs.jsonl"), answers(rejected=None)),
    Case(
        "a margin below 0",
        TRAIN,
        (": row ", "'margin' is -1.5", "from 0 on"),
        answers(margin=-1.5),
    ),
    Case("a tie with a margin", TRAIN, (": row ", "a tie with a margin of 2"), answers(tie=True, margin=2.0)),
    Case(
        "nothing but ties",
        TRAIN,
        ("train", "ties", "nothing to tell apart"),
        both(answers(), lines("pairs.jsonl", lambda _, row: row | {"tie": True})),
    ),
    Case(
        "answers that are neither texts nor messages",
        TRAIN,
        ("'chosen'", "'role' and 'content'"),
        both(answers(), lines("pairs.jsonl", lambda _, row: row | {"chosen": [{"text": "good"}]})),
    ),
    Case(
        "a misspelt column of a pair",
        TRAIN,
        ("task.yaml:3", "'chosn'", "did you mean 'chosen'"),
        both(answers(), append("task.yaml", "columns: {chosn: text}\n")),
    ),
)

MODELS = (
    Case("a model that is not there", TRAIN.replace("--model model", "--model gone"), ("gone",)),
    Case(
        "a package that is not installed",
        TRAIN.replace("--model model", "--model package:no_such_package/model"),
        ("no_such_package",),
    ),
    Case("a folder without config", TRAIN, ("model", "config.json"), remove("model/config.json")),
    Case("a config without weights", TRAIN, ("model", "safetensors"), remove("model/model.safetensors")),
    Case("truncated weights", TRAIN, ("model", "SafetensorError"), cut("model/model.safetensors", 5000)),
    Case("a broken config", TRAIN, ("model", "config"), write("model/config.json", '{"model_type": "bert",')),
    Case(
        "weights of another size",
        TRAIN,
        ("model", "lacks", "config.json"),
        replace("model/config.json", '"hidden_size": 32', '"hidden_size": 64'),
    ),
    Case(
        "no tokenizer",
        TRAIN,
        ("model", "tokenizer", "no word", "tokenizer.json"),
        both(remove("model/tokenizer.json"), remove("model/tokenizer_config.json")),
    ),
    Case(
        "an architecture without the head",
        TRAIN,
        ("AutoModelForSequenceClassification", "clip_text_model"),
        write("model/config.json", '{"model_type": "clip_text_model"}'),
    ),
    Case(
        "an earlier adapter's folder without its record",
        TRAIN.replace("full/default", "lora"),
        ("run.json",),
        remove("lora/run.json"),
    ),
)

RUNS = (
    Case("predict with a folder that is not there", "predict gone text", ("gone", "no such folder")),
    Case("predict with a folder that is no run", "predict model text", ("run.json", "finished run")),
    Case(
        "a flipped byte",
        "predict full text",
        ("model.safetensors", "SHA-256"),
        flip("full/model.safetensors"),
    ),
    Case("a missing file", "predict lora text", ("tokenizer.json", "missing"), remove("lora/tokenizer.json")),
    Case(
        "a truncated file",
        "predict lora text",
        ("adapter_model.safetensors", "100 bytes instead of"),
        cut("lora/adapter_model.safetensors", 100),
    ),
    Case("no manifest", "predict full text", ("manifest.json",), remove("full/manifest.json")),
    Case(
        "a broken manifest",
        "predict full text",
        ("manifest.json", "not readable"),
        write("full/manifest.json", '{"files": []}'),
    ),
    Case("a broken record", "predict full text", ("run.json", "JSON"), write("full/run.json", "{")),
    Case("a record without its fields", "predict full text", ("run.json",), write("full/run.json", "{}")),
    Case(
        "an adapter on another base",
        "predict lora text --model other",
        ("other", "not the base", "fingerprint"),
    ),
    Case(
        "predict from a file that is not there",
        "predict full --input gone.jsonl",
        ("gone.jsonl", "No such file"),
    ),
    Case(
        "predict from a broken line",
        "predict full --input in.jsonl",
        ("in.jsonl:2", "JSON"),
        write("in.jsonl", '"a"\n{"text"\n'),
    ),
    Case(
        "predict from a file that is not UTF-8",
        "predict full --input in.jsonl",
        ("in.jsonl:1", "UTF-8"),
        write("in.jsonl", b'"\xff"\n'),
    ),
    Case(
        "predict without the key",
        "predict full --input in.jsonl",
        ("input 1", "'text'", "body"),
        write("in.jsonl", '{"body": "a"}\n'),
    ),
    Case("predict from two places", "predict full text --input in.jsonl", ("not both",)),
    Case(
        "predict into a folder that is not there",
        "predict full text --output gone/out.jsonl",
        ("gone", "does not exist"),
    ),
    Case("predict in an unknown type", "predict full text --dtype int8", ("int8", "bfloat16")),
    Case(
        "predict in batches of none",
        "predict full text --batch-size 0",
        ("--batch-size", "greater than or equal to 1"),
    ),
    Case("evaluate on an unknown split", "evaluate full --split dev", ("'dev'", "validation")),
    Case(
        "evaluate on unknown labels",
        "evaluate full --data data.jsonl",
        ("'good'", "unknown", "pos"),
        write("data.jsonl", '{"text": "a", "label": "good"}\n'),
    ),
    Case(
        "evaluate on data without labels",
        "evaluate full --data data.jsonl",
        ("label",),
        write("data.jsonl", '{"text": "a"}\n'),
    ),
    Case("evaluate on data that is not there", "evaluate full --data gone.jsonl", ("gone.jsonl",)),
    Case("evaluate on data and task", "evaluate full --data test.jsonl --task task.yaml", ("not both",)),
    Case("merge of a full model", "merge full --output new", ("full", "no adapter")),
    Case("merge into a folder with files", "merge lora --output full", ("full", "not empty")),
    Case(
        "merge of a damaged adapter",
        "merge lora --output new",
        ("SHA-256",),
        flip("lora/adapter_model.safetensors"),
    ),
    Case("push of what is no run", "push model someone/something", ("run.json",)),
)

STOPPED = (
    Case(
        "a resume with other settings",
        "RESUME --set learning_rate=0.5",
        ("training.learning_rate", "0.5", "cannot be resumed with other settings"),
    ),
    Case("a resume with another seed", "RESUME --seed 7", ("seed", "42", "7")),
    Case(
        "a resume with other data",
        "RESUME",
        ("data.train", "sha256"),
        replace("train.jsonl", "film", "movie"),
    ),
    Case("a resume with other weights", "RESUME --model other", ("model.fingerprint",)),
    Case(
        "a resume with broken settings",
        "RESUME",
        ("settings.json", "JSON"),
        write("stopped/settings.json", "{"),
    ),
    Case(
        "checkpoints of no known run",
        "RESUME",
        ("settings.json", "which run"),
        remove("stopped/settings.json"),
    ),
    Case(
        "replacing a run with a broken manifest",
        "OVERWRITE",
        ("manifest.json", "delete"),
        write("stopped/manifest.json", "{}"),
    ),
)
