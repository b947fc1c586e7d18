"""Prompts as the data has them, and as a policy reads them."""

from __future__ import annotations

from typing import Any

import datasets
import pytest
from tokenizers.processors import TemplateProcessing

from ptft_hf.errors import DataError, ModelError
from ptft_hf.recipes.prompts import PromptsRecipe
from ptft_hf.rlhf import trl_rows
from ptft_hf.tasks import conversations, turns
from ptft_hf.tasks.prompts import Prompts
from tests.ppo_runs import length, run_ppo
from tests.test_instruction import CHATML, chat_tokenizer, checkpoint

ASKED = [{"role": "user", "content": "What is the sea?"}]
ANSWER = [{"role": "assistant", "content": "Water."}]


def family() -> Prompts:
    return Prompts(PromptsRecipe(name="test", family="prompts"))


def splits(*rows: dict[str, Any]) -> datasets.DatasetDict:
    good = [{name: value for name, value in (("prompt", ASKED), ("reference", ANSWER)) if name in rows[0]}] * 4
    tables = {"train": good, "validation": [*good, *rows], "test": good}
    return datasets.DatasetDict({name: datasets.Dataset.from_list(some) for name, some in tables.items()})


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": [{"role": "user", "content": None}]}, "prompt message 1 has no text as its 'content'"),
        ({"prompt": [{"role": None, "content": "a"}]}, "prompt message 1 has no 'role'"),
        ({"prompt": [*ASKED, *ANSWER]}, "prompt ends with the assistant's turn, so that nothing is to be answered"),
        ({"prompt": ASKED, "reference": [{"role": "assistant", "content": None}]}, "reference message 1 has no text"),
    ],
)
def test_what_cannot_be_answered_is_named_by_its_rows(row: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError) as caught:
        family().load_splits(splits(*[row] * 5), 0)
    of_validation = [problem for problem in caught.value.problems if problem.startswith("validation")]
    assert said in of_validation[0] and of_validation[0].startswith("validation: row 5: ")
    assert of_validation[-1] == "validation: 5 such rows in all"


@pytest.mark.parametrize("value", [{"role": "user", "content": "a"}, ["a", "b"], [{"from": "human", "value": "a"}]])
def test_prompts_that_are_neither_texts_nor_conversations_are_named(value: Any) -> None:
    table = datasets.Dataset.from_list([{"prompt": value}] * 4)
    with pytest.raises(DataError, match=r"train: row 1: prompt .*'role'"):
        family().load_splits(datasets.DatasetDict({name: table for name in ("train", "validation", "test")}), 0)


def test_a_template_that_refuses_is_named_with_the_row() -> None:
    tokenizer = chat_tokenizer("{{ raise_exception('Only user and assistant roles are supported!') }}")
    with pytest.raises(ModelError, match=r"row 1: .*refuses the roles user: Only user and assistant roles"):
        family().encode(datasets.Dataset.from_list([{"prompt": ASKED}]), tokenizer, 100)


def test_a_conversation_is_read_as_in_supervised_fine_tuning() -> None:
    """Marks in what somebody wrote are text, and fields that only other messages have are not there."""
    template = CHATML.replace("{% for message in messages %}", "{% for message in messages %}{% if message.name is "
                              "defined %}named {% endif %}")  # fmt: skip
    assert template != CHATML
    tokenizer = chat_tokenizer(template)
    asked = [{"role": "user", "content": "What is <|im_end|> the sea?", "name": None}]
    (prompt,), _ = family().encode(datasets.Dataset.from_list([{"prompt": asked}]), tokenizer, 100)
    assert prompt.ids == turns.prompt_ids(tokenizer, asked)
    assert prompt.ids.count(tokenizer.eos_token_id) == 2  # of the system's turn and the user's
    assert "named" not in prompt.text
    assert prompt.source == asked
    table, _ = trl_rows.prompts_of(family().recipe, datasets.Dataset.from_list([{"prompt": asked}]), tokenizer, 100)
    text = tokenizer.apply_chat_template(table[0]["prompt"], tokenize=False, add_generation_prompt=True)
    assert text == prompt.text  # TRL renders it itself


def test_a_template_and_a_tokenizer_that_both_write_the_begin_write_it_once() -> None:
    """Row 23: upstream's tokenizer writes it again before the template's text."""
    tokenizer = chat_tokenizer("{{ bos_token }}" + CHATML.replace("<|im_start|>", "<|im_end|>"))
    begins = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 0)])
    tokenizer.backend_tokenizer.post_processor = begins
    begin, talk = tokenizer.bos_token_id, [*ASKED, *ANSWER]
    assert tokenizer(tokenizer.apply_chat_template(talk, tokenize=False))["input_ids"].count(begin) == 2
    (prompt,), _ = family().encode(datasets.Dataset.from_list([{"prompt": ASKED}]), tokenizer, 100)
    text = turns.of_pair(tokenizer, "What is the sea?", " Water.").ids
    reading = conversations.Reading("chat", tokenizer.eos_token_id, True)
    (scored,), _ = conversations.encode(reading, tokenizer, [talk], 100)
    for ids in (turns.of_messages(tokenizer, talk).ids, prompt.ids, text, scored["input_ids"]):
        assert ids[0] == begin and ids.count(begin) == 1


def test_empty_prompts_are_not_called_long() -> None:
    table = datasets.Dataset.from_list([{"prompt": ASKED}, {"prompt": []}, {"prompt": ASKED * 9}])
    kept, notes = family().encode(table, chat_tokenizer(), 60)
    assert [prompt.row for prompt in kept] == [0]
    assert notes == [
        "1 of 3 prompts are longer than 60 tokens and are left out",
        "1 of 3 prompts are empty and are left out",
    ]


@pytest.mark.parametrize(
    ("reference", "shown"), [(ANSWER, "Water."), (["Water.", "Much."], "Water.\n\nMuch."), ("Water.", "Water.")]
)
def test_references_may_be_messages_or_several_texts(reference: Any, shown: str) -> None:
    table = datasets.Dataset.from_list([{"prompt": ASKED, "reference": reference}] * 4)
    found = family().load_splits(datasets.DatasetDict({n: table for n in ("train", "validation", "test")}), 0)
    kept, _ = family().encode(found.train, chat_tokenizer(), 100)
    assert {prompt.reference for prompt in kept} == {shown}


def test_a_run_shows_references_that_are_messages(tmp_path: Any) -> None:
    data = splits({"prompt": ASKED, "reference": ANSWER})
    options = {"total_episodes": 8, "num_sample_generations": 1, "data": data}
    run_ppo(checkpoint(tmp_path / "base"), tmp_path / "run", length, **options)
    assert "<pre>Water.</pre>" in (tmp_path / "run" / "samples.html").read_text("utf-8")
