"""README.md of an output folder: its lines give the trained model, run as they are shown."""

# ruff: noqa: F811 - fixtures are imported, and then named as parameters

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from markdown_it import MarkdownIt

import ptft_hf
from ptft_hf import card as cards
from ptft_hf import report
from tests.finished import Finished, full, lora  # noqa: F401

MARKDOWN = MarkdownIt("commonmark").enable("table")


def card_of(folder: Path) -> tuple[dict[str, Any], list[Any]]:
    """The front matter and the Markdown tokens of a folder's card."""
    _, header, body = (folder / "README.md").read_text("utf-8").split("---\n", 2)
    return yaml.safe_load(header), MARKDOWN.parse(body)


def code_of(tokens: list[Any]) -> list[str]:
    return [token.content for token in tokens if token.type == "fence" and token.info == "python"]


def result_of(code: str, expression: str, cwd: Path) -> Any:
    """Run a card's lines in a fresh interpreter, and fetch the value of an expression."""
    path = cwd / "value.pt"
    script = f"{code}\nimport torch\ntorch.save({expression}, {str(path)!r})\n"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return torch.load(path)


@pytest.mark.parametrize(("name", "library"), [("full", "transformers"), ("lora", "peft")])
def test_the_lines_for_upstreams_libraries_give_the_same_logits_as_load(
    name: str, library: str, request: pytest.FixtureRequest, tmp_path: Path
):
    run = request.getfixturevalue(name)
    header, tokens = card_of(run.folder)
    assert header["library_name"] == library
    upstream, _ = code_of(tokens)
    assert "ptft_hf" not in upstream
    model = ptft_hf.load(run.folder)
    with torch.no_grad():
        expected = model.model(**model.tokenizer(["A sentence to classify."], return_tensors="pt")).logits
    logits, labels = result_of(upstream, "(logits, model.config.id2label)", tmp_path)
    assert torch.equal(logits, expected)
    assert labels == {0: "neg", 1: "pos"}


def test_the_lines_for_ptft_hf_give_the_same_answer_as_load(lora: Finished, tmp_path: Path):
    _, tokens = card_of(lora.folder)
    own = code_of(tokens)[1].replace("print(model.predict(", "answers = (model.predict(")
    expected = ptft_hf.load(lora.folder).predict(["A sentence to classify."])
    assert result_of(own, "answers", tmp_path) == expected


@pytest.mark.parametrize("name", ["full", "lora"])
def test_the_card_is_markdown_with_the_runs_figures_in_a_table(name: str, request: pytest.FixtureRequest):
    run = request.getfixturevalue(name)
    header, tokens = card_of(run.folder)
    assert header["tags"] == ["ptft_hf", "sequence_classification"]
    cells = [tokens[i + 1].content for i, t in enumerate(tokens) if t.type in ("th_open", "td_open")]
    assert cells[:3] == ["", "validation (16 rows)", "test (16 rows)"]
    figures = {cells[i]: cells[i + 1 : i + 3] for i in range(3, len(cells), 3)}
    metrics = run.run["metrics"]
    assert figures == {
        metric: [f"{metrics[split][metric]:.4f}" for split in ("validation", "test")]
        for metric in metrics["test"]
    }
    headings = [tokens[i + 1].content for i, t in enumerate(tokens) if t.type == "heading_open"]
    assert headings == ["bert, " + run.run["task"]["name"].removesuffix(".yaml"), "Use it"]
    text = (run.folder / "README.md").read_text("utf-8")
    assert "`neg`, `pos`" in text
    assert not re.search(r"\b(None|nan)\b|\{|\}", text)


def record(run: Finished, **facts: Any) -> dict[str, Any]:
    """The run's record with other facts of the model."""
    changed = copy.deepcopy(run.run)
    changed["model"].update(facts)
    return changed


def test_only_a_model_of_the_hub_is_named_as_base_model(lora: Finished):
    """The Hub refuses a card whose base_model is no name on the Hub, such as a path."""
    for source, named in (("google-bert/bert-base-uncased", True), ("gpt2", True), (str(lora.base), False)):
        card = cards.model_card(record(lora, source=source, reference=source), kind="peft")
        header = yaml.safe_load(card.split("---\n")[1])
        assert header.get("base_model") == (source if named else None)


def test_a_base_with_a_revision_and_options_is_loaded_with_them(lora: Finished):
    facts = {"reference": "owner/name@v2", "source": "owner/name", "dtype": "bfloat16"}
    options = {
        "revision": "v2",
        "dtype": "bfloat16",
        "trust_remote_code": True,
        "attn_implementation": "eager",
    }
    card = cards.model_card(record(lora, **facts, options=options), kind="peft")
    assert (
        "from_pretrained('owner/name', config=config, dtype=torch.bfloat16, revision='v2', "
        "trust_remote_code=True, attn_implementation='eager').float()  #"
    ) in card
    assert card.partition("model = load(")[2].splitlines()[0].endswith(", trust_remote_code=True)")
    whole = cards.model_card(record(lora, **facts, options=options), kind=None)
    assert "from_pretrained(folder, dtype=torch.float32, trust_remote_code=True, attn_impl" in whole
    assert "v2'" not in whole


def test_strange_labels_do_not_break_the_card(lora: Finished):
    run = record(lora)
    run["labels"] = [f"line one\nline {i} | two" for i in range(30)]
    tokens = MARKDOWN.parse(cards.model_card(run, kind="peft").split("---\n", 2)[2])
    (paragraph,) = [t.content for t in tokens if t.type == "inline" and t.content.startswith("It predicts")]
    assert "`line one line 19 | two`, and 10 more." in paragraph
    run["labels"] = run["task_state"]["labels"] = []
    assert "It predicts a number." in cards.model_card(run, kind="peft")


def test_the_merged_models_card_says_so_and_loads_without_peft(lora: Finished, tmp_path: Path):
    ptft_hf.load(lora.folder).merge().save(tmp_path / "merged")
    header, tokens = card_of(tmp_path / "merged")
    assert header["library_name"] == "transformers"
    assert "peft" not in code_of(tokens)[0].lower()
    assert "The adapter is merged into its base" in (tmp_path / "merged" / "README.md").read_text("utf-8")


# ---- curves ----


@pytest.mark.parametrize(
    ("entries", "panels"),
    [
        (
            [
                {"step": 1, "loss": 2.0},
                {"step": 2, "loss": 1.0},
                {"step": 2, "eval_loss": 1.5, "eval_f1": 0.5},
            ],
            2,
        ),
        ([{"step": 1, "loss": 2.0}], 1),  # eval_strategy: no
        ([{"step": 1, "loss": None}, {"step": 2, "eval_loss": 1.5}], 1),  # a loss that was no number
        ([], 1),
    ],
)
def test_curves_are_drawn_of_whatever_was_logged(entries: list[dict[str, Any]], panels: int, tmp_path: Path):
    from matplotlib.image import imread

    log, picture = tmp_path / "metrics.jsonl", tmp_path / "curves.png"
    log.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    report.curves(log, picture, "eval_f1")
    height, width, _ = imread(picture).shape
    assert (width, height) == (540 * panels, 408)


def test_drawing_leaves_the_users_matplotlib_backend_alone(tmp_path: Path):
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 1, "loss": 1.0}\n')
    script = (
        "import matplotlib, pathlib; matplotlib.use('svg'); from ptft_hf import report; "
        f"report.curves(pathlib.Path({str(log)!r}), pathlib.Path({str(tmp_path / 'c.png')!r}), None); "
        "assert matplotlib.get_backend() == 'svg'"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", script], check=True)
