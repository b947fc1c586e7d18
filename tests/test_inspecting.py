"""The label inspector: what it shows of each kind of row, and what it refuses, each refusal beside a run that is
right."""

from __future__ import annotations

import io
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from rich.console import Console
from tokenizers import decoders

import ptft_hf
from ptft_hf import inspecting, models, recipes
from ptft_hf.errors import DataError, ModelError
from ptft_hf.inspecting import checks, showing
from ptft_hf.models.skeleton import skeleton
from ptft_hf.tasks import build
from ptft_hf.tasks.marks import Segment, of_batch, pieces
from ptft_hf.tasks.sequence_classification import SequenceClassification
from ptft_hf.tasks.token_classification import TokenClassification
from tests.commands import Ptft, ptft  # noqa: F401
from tests.corpus import write_corpus
from tests.tiny import make_checkpoint, make_tokenizer

# ---- what is shown ----


def printed(rows: list[list[Segment]], *, width: int = 60, limit: int = 200, **options: Any) -> str:
    file = io.StringIO()
    showing.show(Console(file=file, width=width, **options), rows, limit=limit, title="rows")
    return file.getvalue()


def encoded(kind: str, rows: list[dict[str, Any]], architecture: str, max_length: int = 64) -> Any:
    """A family that has looked at these rows, the rows encoded, and the tokenizer."""
    family = {"text": "sequence_classification", "tokens": "token_classification"}[kind]
    task = build(recipes.task_from_dict({"name": "test", "family": family}))
    table = datasets.Dataset.from_list(rows)
    task.look_at(datasets_of(table))
    tokenizer = make_tokenizer(architecture)
    tokenizer.backend_tokenizer.decoder = decoders.WordPiece()
    return task, task.encode(table, tokenizer, max_length)[0], table, tokenizer


def datasets_of(table: datasets.Dataset) -> Any:
    from ptft_hf.data import Splits

    return Splits(table, table, table, [])


TEXTS = [{"text": "the film was good", "label": "pos"}, {"text": "a bad, dull plot", "label": "neg"}]
ENTITIES = [
    {"tokens": ["the", "story", "of", "lovely", "film"], "tags": ["O", "O", "O", "B-name", "I-name"]},
    {"tokens": ["so", "bad"], "tags": ["O", "O"]},
]


def test_a_class_stands_before_its_text_and_the_tokenizers_marks_are_seen() -> None:
    task, rows, table, tokenizer = encoded("text", TEXTS, "bert")
    shown = printed(inspecting.rows_of(task, table, rows, tokenizer, 2))
    assert shown.splitlines() == [
        "rows; what is trained is [[so]]",
        "  1  [[pos]] <- <s> the film was good </s>",
        "  2  [[neg]] <- <s> a bad, dull plot </s>",
    ]


def test_tags_stand_under_their_words() -> None:
    task, rows, table, tokenizer = encoded("tokens", ENTITIES, "bert")
    shown = printed(inspecting.rows_of(task, table, rows, tokenizer, 1))
    assert shown.splitlines()[1:] == [
        "  1  <s> the story of lovely  film    </s>",
        "         O   O     O  B-name  I-name",
    ]


def test_words_of_another_window_have_no_tag() -> None:
    words = ["the", "a", "this", "film", "story", "plot", "actor", "scene", "was", "is", "very", "quite"]
    task, rows, table, tokenizer = encoded(
        "tokens", [{"tokens": words, "tags": ["B-x", *["O"] * 11]}], "bert", max_length=8
    )
    windows = inspecting.rows_of(task, table, rows, tokenizer, len(rows))
    tagged = [[s.text.strip() for s in window if s.label] for window in windows]
    read = [[s.text.strip() for s in window if s.mark != "special"] for window in windows]
    assert [word for window in tagged for word in window] == words
    assert tagged[0] == read[0]
    assert all(set(some) < set(window) for some, window in zip(tagged[1:], read[1:], strict=True))


def test_a_long_word_is_one_piece_and_lines_keep_to_the_width() -> None:
    task, rows, table, tokenizer = encoded(
        "tokens", [{"tokens": ["xylophones"] * 6, "tags": ["B-thing"] * 6}], "bert"
    )
    row = inspecting.rows_of(task, table, rows, tokenizer, 1)[0]
    assert [s.label for s in row if s.text.strip() == "xylophones"] == ["B-thing"] * 6
    lines = printed([row], width=40).splitlines()[1:]
    assert len(lines) >= 4
    assert all(len(line) <= 40 for line in lines)


def test_tails_that_are_cut_are_shown_and_counted() -> None:
    task, rows, table, tokenizer = encoded(
        "text", [*TEXTS, {"text": "the a this film story plot actor scene", "label": "pos"}], "bert", 6
    )
    first, last = inspecting.rows_of(task, table, rows, tokenizer, 3)[1:]
    assert last[-1] == Segment(" ... 4 tokens cut: story plot actor scene", "cut")
    assert first[-1] == Segment(" ... 1 tokens cut: plot", "cut")
    assert inspecting.rows_of(task, table, rows, tokenizer, 1) == [
        inspecting.rows_of(task, table, rows, tokenizer, 3)[0]
    ]


def test_colours_need_a_terminal_and_no_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    row = [Segment("pos", "trained"), Segment(" <- "), Segment("<s>", "special"), Segment(" a film")]
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = printed([row], force_terminal=True, color_system="standard")
    assert "\x1b[1;32mpos\x1b[0m <- \x1b[36m<s>\x1b[0m a film" in coloured
    assert "[[" not in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    for options in ({"force_terminal": True, "color_system": "standard"}, {}):
        assert "[[pos]] <- <s> a film" in printed([row], **options)
        assert "\x1b[3" not in printed([row], **options)


def test_long_texts_lose_their_middle_and_not_what_is_learnt() -> None:
    row = [Segment("word " * 100), Segment("an answer", "trained"), Segment("</s>", "trained")]
    shown = printed([row], limit=40)
    assert " ".join(shown.split()).endswith("characters ... word word word [[an answer]][[</s>]]")
    assert len(shown) < 200
    words = [Segment("word ", "trained", "O") for _ in range(100)]
    assert printed([words], limit=40).count("word") == 8


def batch_of(**columns: Any) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([values]) for name, values in columns.items()}


@pytest.mark.parametrize("is_shifted", [True, False])
def test_a_decoders_answer_is_marked_whether_labels_are_shifted_or_not(is_shifted: bool) -> None:
    """And padding, here the end token, is never shown as text."""
    tokenizer = make_tokenizer("gpt2")
    film, good = tokenizer.convert_ids_to_tokens, tokenizer.convert_tokens_to_ids(["film", "good", "</s>"])
    assert film(good) == ["film", "good", "</s>"]
    ids = [1, *good, 2, 2]
    labels = [-100, good[1], 2, -100, -100, -100] if is_shifted else [-100, -100, good[1], 2, -100, -100]
    found = of_batch(
        batch_of(input_ids=ids, attention_mask=[1, 1, 1, 1, 0, 0], labels=labels), tokenizer, None
    )
    assert found == [
        Segment("<s>", "special"),
        Segment(" film"),
        Segment(" good </s>", "trained"),
    ]


def test_the_words_behind_masks_stand_under_them() -> None:
    tokenizer = make_tokenizer("bert")
    collate = transformers.DataCollatorForLanguageModeling(
        tokenizer, mlm_probability=0.5, mask_replace_prob=1.0, random_replace_prob=0.0, seed=1
    )
    batch = collate([tokenizer("the film was good and the plot was bad")])
    found = of_batch(dict(batch), tokenizer, None)
    assert found is not None
    masked = [s for s in found if s.mark == "trained"]
    assert [s.text.strip() for s in masked] == ["<mask>"] * len(masked)
    assert [s.label for s in masked] == [tokenizer.decode([i]) for i in batch["labels"][0] if i != -100]
    assert len(masked) > 1


def test_an_encoder_decoders_input_and_target_are_shown() -> None:
    tokenizer = make_tokenizer("t5")
    ids = tokenizer("the film was good")["input_ids"]
    target = [*tokenizer("so good", add_special_tokens=False)["input_ids"], 2, -100, -100]
    found = of_batch(batch_of(input_ids=ids, labels=target), tokenizer, None)
    assert found is not None
    assert [s.text.strip() for s in found if s.mark == "trained"] == ["so good </s>"]
    assert "the film was good" in "".join(s.text for s in found if s.mark == "input")


def test_a_target_as_long_as_its_input_is_still_the_decoders() -> None:
    """Whose labels may stand where the shorter input has padding."""
    tokenizer = make_tokenizer("t5")
    good, film = tokenizer.convert_tokens_to_ids(["good", "film"])
    batch = batch_of(input_ids=[1, film, 2, 0], attention_mask=[1, 1, 1, 0], labels=[good, good, good, 2])
    seq2seq = "AutoModelForSeq2SeqLM"
    found = of_batch(batch, tokenizer, None, seq2seq)
    assert found is not None
    assert [s.text.strip() for s in found if s.mark == "trained"] == ["good good good </s>"]
    for auto_class, padding in ((seq2seq, 0), ("AutoModelForCausalLM", 1)):
        seen = checks._Seen()
        checks._look_into(batch, {2}, tokenizer, seen, auto_class)
        assert seen.padding == padding


def test_pieces_are_what_the_text_grows_by() -> None:
    for name in ("bert", "gpt2"):
        tokenizer = make_tokenizer(name)
        ids = tokenizer("the film, was good.")["input_ids"]
        marks: Any = [("trained" if n % 2 else "input", str(n)) for n in range(len(ids))]
        assert "".join(s.text for s in pieces(tokenizer, ids, marks)) == tokenizer.decode(ids)


def test_a_family_without_segments_is_shown_by_its_label_and_its_tokens() -> None:
    class Own:
        def config(self) -> dict[str, Any]:
            return {}

        def collator(self, tokenizer: Any) -> Any:
            return lambda rows: {"labels": torch.tensor([row["labels"] for row in rows])}

    tokenizer = make_tokenizer("bert")
    row = {"labels": 3, "input_ids": tokenizer("a good film")["input_ids"]}
    shown = inspecting.segments_of(Own(), row, tokenizer)
    pieces_ = [("3 <-", "input"), ("<s>", "special"), ("a good film", "input"), ("</s>", "special")]
    assert [(piece.text.strip(), piece.mark) for piece in shown] == pieces_


# ---- what is refused ----

QUESTIONS = [
    {"prompt": f"the {word} film", "answer": f"so {word}{' very' * (n % 3)}"}
    for n, word in enumerate(("good", "bad", "fine", "dull", "great", "poor", "lovely", "awful"))
]


def answering(base: Path, *, family: str = "Answering", max_length: int = 32, **options: Any) -> Any:
    """What the inspector finds in the questions, as a run of this family would have them."""
    task = build(
        recipes.task_from_dict(
            {"name": "own", "family": f"tests.answering:{family}", "options": options}
        )
    )
    bare = skeleton(str(base), task.auto_class, {})
    tokenizer = models.load_tokenizer(str(base))
    models.fit_inputs("text", tokenizer, bare, {})
    table = datasets.Dataset.from_list(QUESTIONS)
    rows, cut = task.encode(table, tokenizer, max_length)
    return inspecting.check(task, rows, bare, tokenizer, cut, len(table), "base")


@pytest.mark.parametrize("architecture", ["gpt2", "mistral"])
@pytest.mark.parametrize("family", ["Answering", "Shifted"])
def test_rows_that_are_right_are_not_refused(
    architecture: str, family: str, checkpoint: Callable[[str], Path]
) -> None:
    """GPT-2's tokenizer has no padding token, so the end token pads; Mistral's has one."""
    assert answering(checkpoint(architecture), family=family) == ([], [], [])


def test_padding_confused_with_the_end_token_is_refused(checkpoint: Callable[[str], Path]) -> None:
    """transformers' own collator masks labels by the padding token's number."""
    base = checkpoint("gpt2")
    tokenizer = make_tokenizer("gpt2")
    tokenizer.pad_token = tokenizer.eos_token
    upstream = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    batch = upstream([tokenizer("so good"), tokenizer("so very good")])
    assert not (batch["labels"] == tokenizer.eos_token_id).any()
    for family in ("Answering", "Shifted"):
        found = answering(base, mask="pad", family=family)
        assert found.model == [
            "padding is confused with the end token: both are '</s>', and labels are masked by its number, so that "
            "the model never learns to stop; mask them by the attention mask"
        ]
    assert answering(checkpoint("mistral"), mask="pad") == ([], [], [])


def test_trained_padding_is_refused(checkpoint: Callable[[str], Path]) -> None:
    for name in ("gpt2", "mistral"):
        (problem,) = answering(checkpoint(name), mask="none").model
        assert "padding is trained: " in problem


def test_an_end_token_that_is_never_trained_is_refused(checkpoint: Callable[[str], Path]) -> None:
    (problem,) = answering(checkpoint("mistral"), end=False).model
    assert problem.startswith("the end token ('</s>') is never trained in the 8 rows looked into")
    (problem,) = answering(checkpoint("gpt2"), end=False).model
    assert problem.startswith("the end token ('</s>') is never trained")


def test_targets_that_are_all_cut_off_train_nothing_and_are_refused(checkpoint: Callable[[str], Path]) -> None:
    found = answering(checkpoint("mistral"), max_length=4)
    assert found.data == [
        "nothing is trained: all labels of the 8 training rows looked into are -100; does the part that is to be "
        "learnt stand within model.max_length, and does the mask find it?"
    ]
    some = answering(checkpoint("mistral"), max_length=6)
    assert not some.data
    assert some.model and "are all targets cut off" in some.model[0]
    # Nor is it padding's fault where turns of the prompt end with the token that pads.
    ended = answering(checkpoint("gpt2"), max_length=8, marker="</s> so")
    assert not ended.data
    assert ended.model and "are all targets cut off" in ended.model[0]


@pytest.mark.parametrize("architecture", ["gpt2", "mistral"])
def test_a_template_that_adds_the_begin_token_again_is_refused(
    architecture: str, checkpoint: Callable[[str], Path]
) -> None:
    found = answering(checkpoint(architecture), template="twice")
    assert len(found.model) == 1
    assert found.model[0].startswith("inputs begin with '<s>' twice (in 8 of 8 rows looked into)")


def train(base: Path, task: Any, rows: list[dict[str, Any]], output: Path, **settings: Any) -> Any:
    table = datasets.Dataset.from_list(rows)
    return ptft_hf.train(
        model=str(base),
        task=task,
        adapter="full/default",
        output_dir=output,
        data=datasets.DatasetDict(train=table, validation=table, test=table),
        settings={"max_steps": 1, **settings},
    )


def test_a_run_is_refused_before_anything_is_written(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    own = {"name": "own", "family": "tests.answering:Answering", "options": {"template": "twice"}}
    with pytest.raises(ModelError, match="begin with '<s>' twice"):
        train(checkpoint("gpt2"), recipes.task_from_dict(own), QUESTIONS, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_texts_that_bring_their_own_begin_token_are_refused(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """In most rows it is a template; in a few it is their text, which is said aloud."""
    doubled = [{**row, "text": f"<s>{row['text']}"} for row in TEXTS]
    recipe = recipes.task_from_dict({"name": "t", "family": "sequence_classification"})
    with pytest.raises(ModelError, match=r"begin with '<s>' twice \(in 4 of 4"):
        train(checkpoint("bert"), recipe, doubled * 2, tmp_path / "run")
    task, rows, table, tokenizer = encoded("text", [*TEXTS * 3, doubled[0]], "bert")
    bare = skeleton(str(checkpoint("bert")), task.auto_class, task.config())
    assert inspecting.check(task, rows, bare, tokenizer, 0, len(table), "base") == (
        [],
        [],
        ["train: 1 of 7 rows looked into begin with '<s>' twice"],
    )


class MoreTypes(TokenClassification):
    """A family whose types are given and not learnt from the data."""

    def __init__(self, recipe: Any) -> None:
        super().__init__(recipes.TokenClassificationRecipe(name="own", family="token_classification"))

    def look_at(self, splits: Any) -> list[str]:
        notes = super().look_at(splits)
        self.labels = ["name", "place"]
        return notes


class FixedClasses(SequenceClassification):
    """A family whose classes are given and not learnt from the data."""

    def __init__(self, recipe: Any) -> None:
        super().__init__(recipes.SequenceClassificationRecipe(name="own", family="sequence_classification"))

    def look_at(self, splits: Any) -> list[str]:
        self.labels = ["neg", "pos"]
        return []


def test_a_tag_that_no_word_carries_is_refused(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    task = recipes.task_from_dict({"name": "own", "family": f"{__name__}:MoreTypes"})
    with pytest.raises(DataError, match="no word carries 'B-place' or 'I-place': the model would have a label"):
        train(checkpoint("bert"), task, ENTITIES, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_type_of_single_words_has_no_inner_tag_and_is_no_fault(checkpoint: Callable[[str], Path]) -> None:
    task, rows, table, tokenizer = encoded(
        "tokens", [*ENTITIES, {"tokens": ["a", "plot"], "tags": ["O", "B-thing"]}], "bert"
    )
    bare = skeleton(str(checkpoint("bert")), task.auto_class, task.config())
    found = inspecting.check(task, rows, bare, tokenizer, 0, len(table), "base")
    assert found == ([], [], ["train: no word carries 'I-thing'"])


def test_rows_of_one_class_are_refused(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    own = recipes.task_from_dict({"name": "own", "family": f"{__name__}:FixedClasses"})
    plain = recipes.SequenceClassificationRecipe(name="plain", family="sequence_classification")
    same = [{**row, "label": "pos"} for row in TEXTS]
    with pytest.raises(DataError, match="train: all 2 rows are of the class 'pos': there is nothing to tell"):
        train(checkpoint("bert"), own, same, tmp_path / "run")
    with pytest.raises(DataError, match="only one class"):
        train(checkpoint("bert"), plain, same, tmp_path / "run")


def test_more_truncated_inputs_than_the_recipe_allows_are_refused(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe = recipes.SequenceClassificationRecipe(
        name="t", family="sequence_classification", model={"max_length": 6}, max_truncated=0.4
    )
    message = r"train: 1 of 2 inputs \(50%\) lose their end, and max_truncated allows 40%; raise model.max_length"
    with pytest.raises(DataError, match=message):
        train(checkpoint("bert"), recipe, TEXTS, tmp_path / "run")
    for share in (0.5, 1.0):
        task = build(recipe.model_copy(update={"max_truncated": share}))
        found = inspecting.Findings([], [], [])
        checks._truncated(task, 1, 2, found)
        assert found == ([], [], [])


def test_windows_lose_nothing_and_are_not_counted_as_truncated() -> None:
    task = build(recipes.TokenClassificationRecipe(name="t", family="token_classification", max_truncated=0.0))
    found = inspecting.Findings([], [], [])
    checks._truncated(task, 2, 2, found)
    assert found.data == []


def test_random_numbers_that_a_collator_draws_are_not_missed_by_the_run() -> None:
    tokenizer = make_tokenizer("bert")

    class Masked:
        def collator(self, tokenizer: Any) -> Any:
            upstream = transformers.DataCollatorForLanguageModeling(tokenizer)
            return lambda rows: (random.random(), upstream([{"input_ids": r["input_ids"]} for r in rows]))[1]

    rows = datasets.Dataset.from_list([dict(tokenizer("the film was good"))] * 40)
    before = (random.getstate(), torch.random.get_rng_state())
    assert sum(len(batch["input_ids"]) for batch in checks.batches(Masked(), rows, tokenizer)) == 40
    assert random.getstate() == before[0]
    assert torch.equal(torch.random.get_rng_state(), before[1])


def test_end_tokens_of_all_configurations_count(tmp_path: Path) -> None:
    base = make_checkpoint("llama", tmp_path / "llama", eos_token_id=[2, 7])
    bare = skeleton(str(base), "AutoModelForCausalLM", {})
    assert checks.end_tokens(bare, make_tokenizer("llama")) == {2, 7}


# ---- the command ----


def test_the_command_needs_no_weights(ptft: Ptft, task_file: Path, checkpoint: Callable[[str], Path]) -> None:  # noqa: F811
    bare = task_file.parent / "bare"
    shutil.copytree(checkpoint("bert"), bare, ignore=shutil.ignore_patterns("*.safetensors"))
    done = ptft("inspect", "--model", bare, "--task", task_file, "--rows", 3)
    assert done.code == 0, done.err
    assert "2 labels in 48 training rows" in done.err
    first, *rows = done.out.splitlines()
    assert first.startswith("train, 48 rows, 48 inputs of up to ")
    assert [line[:5] for line in rows if line[:5].strip()] == ["  1  ", "  2  ", "  3  "]
    assert rows[0].startswith("  1  [[neg]] <- <s> ")
    other = ptft("inspect", "--model", bare, "--task", task_file, "--split", "test", "--rows", 1)
    assert other.out.startswith("test, 16 rows, 16 inputs")


def test_the_command_shows_rows_and_then_what_is_wrong_with_them(
    ptft: Ptft,  # noqa: F811
    task_file: Path,
    checkpoint: Callable[[str], Path],
) -> None:
    sets = ["--set", "model.max_length=8", "--set", "task.max_truncated=0.1"]
    done = ptft("inspect", "--model", checkpoint("bert"), "--task", task_file, *sets)
    assert done.code == 2
    assert "tokens cut: " in done.out
    assert "max_truncated allows 10%" in done.err
    assert "Traceback" not in done.err
    for flags, message in (
        (["--split", "dev"], "'dev' is none of train, validation, test"),
        (["--set", "model.max_length=4000"], "model.max_length: 4000 is more than the 72 positions"),
    ):
        done = ptft("inspect", "--model", checkpoint("bert"), "--task", task_file, *flags)
        assert done.code == 2
        assert message in done.err


def test_a_skeleton_reads_what_the_model_reads(checkpoint: Callable[[str], Path]) -> None:
    for name in ("bert", "roberta", "xlnet", "t5", "gpt2", "deberta-v2"):
        base = str(checkpoint(name))
        found = []
        for model in (
            skeleton(base, "AutoModelForSequenceClassification", {"num_labels": 2}),
            models.load_model(base, "AutoModelForSequenceClassification", config={"num_labels": 2}).model,
        ):
            tokenizer = models.load_tokenizer(base)
            length, notes = models.fit_inputs("text", tokenizer, model, {})
            found.append((tokenizer.pad_token, tokenizer.padding_side, length, notes))
        assert found[0] == found[1]


def test_a_run_shows_the_same_rows_before_its_first_step(
    ptft: Ptft,  # noqa: F811
    task_file: Path,
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    base = ["--model", checkpoint("bert"), "--task", task_file]
    done = ptft("train", *base, "--adapter", "full/default", "--output", tmp_path / "run", "--set", "max_steps=1")
    assert done.code == 0, done.err
    shown = ptft("inspect", *base, "--rows", 3).out.splitlines()[1:]
    assert all(line in done.err.splitlines() for line in shown if len(line) < 70)


def test_what_begins_from_nothing_is_shown_by_a_tokenizer_of_its_corpus(
    ptft: Ptft,  # noqa: F811
    tmp_path: Path,
) -> None:
    files = json.dumps(write_corpus(tmp_path))
    source = f"data: {{path: json, data_files: {files}}}\nmodel: {{max_length: 32}}\n"
    (tmp_path / "words.yaml").write_text(f"family: masked_lm\n{source}tokenizer: {{vocab_size: 300}}\n")
    done = ptft("inspect", "--model", "config:bert", "--task", tmp_path / "words.yaml", "--rows", 2)
    assert done.code == 0, done.err
    assert "[MASK]" in done.out and "[SEP]" in done.out
    assert "tokenizer" in done.err and "trained" in done.err
    digits = ("inspect", "--model", "config:vit", "--task", "image_classification/digits")
    done = ptft(*digits, "--set", "model.image_size=8", "--set", "model.num_channels=1", "--rows", 1)
    assert done.code == 0, done.err
    assert "image of 8 x 8 pixels (L), read as 1 x 8 x 8" in done.out
    (tmp_path / "labels.yaml").write_text(f"family: sequence_classification\n{source}columns: {{label: document}}\n")
    done = ptft("inspect", "--model", "config:bert", "--task", tmp_path / "labels.yaml")
    assert done.code == 2
    assert "random weights know nothing that" in done.err
