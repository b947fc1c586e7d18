"""From answers that people compare to a reward model: it is trained on what PPO will give it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import LlamaConfig

from ptft_hf import feedback, tasks
from ptft_hf.feedback.store import Store
from ptft_hf.recipes import DataSource
from ptft_hf.recipes.prompts import PromptsRecipe
from ptft_hf.rlhf import rollouts
from ptft_hf.rlhf.rewards import Answered, Form
from ptft_hf.tasks.preference import Preference
from ptft_hf.tasks.prompts import Prompts
from tests import preferences
from tests.feedback import as_of_version_1, judge_all
from tests.test_feedback_files import lines
from tests.test_instruction import TALK, chat_tokenizer, checkpoint

CONVERSATIONS = [
    [{"role": "user", "content": "What is the sea?"}],
    [{"role": "system", "content": "Say <|im_end|>."}, {"role": "user", "content": "What is air?\n"}],
    TALK[:3],
]
TEXTS = ["The sea is", "What is <|im_start|>?\n\nTL;DR:", " Air "]
RECIPE = PromptsRecipe(name="p", family="prompts", ppo={"response_length": 6})


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("policy") / "one")


def generate(policy: Path, prompts: list[Any], database: Path) -> None:
    rows = datasets.Dataset.from_list([{"prompt": prompt} for prompt in prompts])
    data = datasets.DatasetDict({split: rows for split in ("train", "validation", "test")})
    feedback.generate(policy, RECIPE, database, data=data, answers=3)


def trained_on(file: Path) -> tuple[Preference, Any, list[list[int]]]:
    """The family that learns from a file, its tokenizer, and the ids of each answer behind its prompt."""
    recipe = preferences.recipe()
    task, tokenizer = Preference(recipe), chat_tokenizer()
    source = DataSource(path="json", data_files={split: str(file) for split in ("train", "validation", "test")})
    splits = tasks.load_splits(tasks.build(recipe), source, recipe, 0)
    task.look_at(splits)
    task.look_at_checkpoint(LlamaConfig(), tokenizer)
    found = []
    for row in task.encode(splits.train, tokenizer, 256)[0]:
        first = row["parts"][0]
        found += [row["input_ids"][:first], row["input_ids"][first:]]
    return task, tokenizer, found


def read_in_ppo(task: Preference, tokenizer: Any, prompts: list[Any], database: Path) -> list[list[int]]:
    """What the reward reads in PPO of the same prompts and answers."""
    rows = datasets.Dataset.from_list([{"prompt": prompt} for prompt in prompts])
    asked = {prompt.text: prompt for prompt in Prompts(RECIPE).encode(rows, chat_tokenizer(), 256)[0]}
    with Store(database) as store:
        pairs = "SELECT first FROM pairs UNION SELECT second FROM pairs"
        query = f"SELECT p.text, a.text FROM answers a JOIN prompts p ON p.id = a.prompt WHERE a.id IN ({pairs})"
        texts, answers = map(list, zip(*store.rows(query), strict=True))
    ids = [asked[text].ids for text in texts]
    made = rollouts.collate(ids, [[5]] * len(ids), frozenset(), 0)
    batch = Answered(texts, answers, made, [asked[text].source for text in texts])
    read = Form(task, tokenizer, 256).rollouts(batch)
    return [row[kept.bool()].tolist() for row, kept in zip(read.ids, read.attention, strict=True)]


@pytest.mark.parametrize("prompts", [CONVERSATIONS, TEXTS], ids=["conversations", "texts"])
def test_a_reward_model_is_trained_on_the_ids_that_it_reads_in_ppo(
    policy: Path, tmp_path: Path, prompts: list[Any]
) -> None:
    database, file = tmp_path / "f.sqlite", tmp_path / "preferences.jsonl"
    generate(policy, prompts, database)
    with Store(database) as store:
        assert judge_all(store, "anna") >= 6
    feedback.export_preferences(database, file)
    task, tokenizer, trained = trained_on(file)
    read = read_in_ppo(task, tokenizer, prompts, database)
    assert {tuple(ids) for ids in trained} == {tuple(ids) for ids in read}
    assert {json.dumps(row["prompt"]) for row in lines(file)} == set(map(json.dumps, prompts))


def test_answers_are_the_same_wherever_the_model_lies(policy: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(policy, tmp_path / "elsewhere" / policy.name)
    texts = []
    for number, place in enumerate((policy, moved)):
        generate(place, TEXTS, tmp_path / f"{number}.sqlite")
        with Store(tmp_path / f"{number}.sqlite") as store:
            texts.append(store.rows("SELECT text FROM answers ORDER BY id"))
    assert len(texts[0]) == 9 and texts[0] == texts[1]


class Reader:
    """A reward that keeps what it is given."""

    name = "reader"

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.pairs: list[dict[str, Any]] = []

    def __call__(self, batch: Answered) -> list[float]:
        self.texts += batch.prompts
        self.pairs += batch.pairs()
        return [0.0] * len(batch.answers)


def test_uncertain_pairs_are_told_by_what_the_reward_reads_in_ppo(policy: Path, tmp_path: Path) -> None:
    generate(policy, CONVERSATIONS, tmp_path / "f.sqlite")
    reader = Reader()
    assert feedback.score(tmp_path / "f.sqlite", reader) == len(reader.pairs) >= 6
    assert {json.dumps(pair["prompt"]) for pair in reader.pairs} == set(map(json.dumps, CONVERSATIONS))
    assert all(text.endswith("<|im_start|>assistant\n") for text in reader.texts)  # as functions are given it there


def test_what_version_1_has_stored_is_kept_and_its_messages_are_noted_later(
    policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    database, file = tmp_path / "f.sqlite", tmp_path / "preferences.jsonl"
    generate(policy, CONVERSATIONS, database)
    feedback.score(database, Reader())
    with Store(database) as store:
        judged = judge_all(store, "anna")
        answers = store.answered()
    feedback.export_preferences(database, file)
    expected = file.read_text("utf-8")
    assert "an earlier ptft_hf" not in capsys.readouterr().err
    as_of_version_1(database)

    feedback.export_preferences(database, file)
    assert all(row["prompt"].startswith("<|im_start|>") for row in lines(file))
    assert "an earlier ptft_hf has stored 3 prompts as the model reads them" in capsys.readouterr().err
    generate(policy, CONVERSATIONS, database)
    with Store(database) as store:
        assert (len(store.judgements()), store.answered()) == (judged, answers)
        assert store.unscored()  # it has scored what the policy reads
    feedback.export_preferences(database, file)
    assert file.read_text("utf-8") == expected
    assert "an earlier ptft_hf" not in capsys.readouterr().err
