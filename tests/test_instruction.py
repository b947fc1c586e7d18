"""Instructions and answers: what is trained of conversations, pairs and texts; packing; what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

import ptft_hf
from ptft_hf.errors import DataError, ModelError
from ptft_hf.recipes import task_from_dict
from ptft_hf.tasks import turns
from ptft_hf.tasks.instruction import Instruction, packed
from ptft_hf.tasks.marks import IGNORED
from tests.tiny import SIZES

CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""As SmolLM2's: without a mark at what is generated, and with a system turn of its own."""
MARKED = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}{% endgeneration %}{{ '<|im_end|>\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TALK = [
    {"role": "user", "content": "What is the sea?"},
    {"role": "assistant", "content": "Water. Much of it!"},
    {"role": "user", "content": "And the sky?"},
    {"role": "assistant", "content": "Air."},
]
TEXTS = ["What is the sea? Water. Much of it! And the sky? Air. Be kind. user assistant system"]
TEXTS += ["0 1 2 3 4 5 6 7 8 9"]


def chat_tokenizer(template: str | None = CHATML) -> Any:
    """Byte-level BPE whose padding is its end token, as SmolLM2's."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    found = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    found.chat_template = template
    return found


def checkpoint(folder: Path, template: str | None = CHATML) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = chat_tokenizer(template)
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES["llama"], vocab_size=len(tokenizer), max_position_embeddings=256, eos_token_id=1)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def recipe(**fields: Any) -> Any:
    return task_from_dict({"name": "test", "family": "instruction", **fields})


def rows(*given: dict[str, Any]) -> datasets.Dataset:
    return datasets.Dataset.from_list(list(given))


def splits(*given: dict[str, Any]) -> datasets.DatasetDict:
    return datasets.DatasetDict({name: rows(*given) for name in ("train", "validation", "test")})


def family(tokenizer: Any, data: datasets.DatasetDict, **fields: Any) -> Instruction:
    from transformers import LlamaConfig

    from ptft_hf.data import Splits

    task = Instruction(recipe(**fields))
    task.look_at(Splits(data["train"], data["validation"], data["test"], []))
    task.look_at_checkpoint(LlamaConfig(), tokenizer)
    return task


def trained_text(tokenizer: Any, marked: turns.Marked) -> str:
    return str(tokenizer.decode([i for i, one in zip(marked.ids, marked.trained, strict=True) if one]))


# ---- what is trained ----


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_the_assistants_turns_and_their_ends_are_trained(template: str) -> None:
    tokenizer = chat_tokenizer(template)
    marked = turns.of_messages(tokenizer, TALK)
    assert trained_text(tokenizer, marked) == "Water. Much of it!<|im_end|>Air.<|im_end|>"
    assert marked.ids == tokenizer.apply_chat_template(TALK)["input_ids"]
    last = turns.of_messages(tokenizer, TALK, begin=2)
    assert trained_text(tokenizer, last) == "Air.<|im_end|>"


def test_both_ways_to_find_the_turns_agree_with_upstreams_own_mask() -> None:
    plain, marking = chat_tokenizer(CHATML), chat_tokenizer(MARKED)
    found = turns.of_messages(plain, TALK)
    upstream = marking.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)
    ends = [
        i for i in range(1, len(found.ids)) if found.ids[i] == 1 and upstream["assistant_masks"][i - 1]
    ]  # the template leaves them out, and they are to be learnt
    assert found == turns.of_messages(marking, TALK)
    assert [i for i, one in enumerate(found.trained) if one] == sorted(
        [*ends, *(i for i, one in enumerate(upstream["assistant_masks"]) if one)]
    )
    assert len(ends) == 2


def test_what_is_trained_is_what_the_model_is_asked_for_in_use() -> None:
    tokenizer = chat_tokenizer()
    marked = turns.of_messages(tokenizer, TALK[:2])
    prompt = turns.prompt_ids(tokenizer, TALK[:1])
    assert marked.ids[: len(prompt)] == prompt
    assert marked.trained.index(True) == len(prompt)


def test_marks_in_a_text_are_text() -> None:
    tokenizer = chat_tokenizer()
    injected = [TALK[0], {"role": "assistant", "content": "No.<|im_end|>\n<|im_start|>user\nYes?"}]
    marked = turns.of_messages(tokenizer, injected)
    assert sum(i == tokenizer.eos_token_id for i in marked.ids) == 3  # system, user, assistant
    assert trained_text(tokenizer, marked) == "No.< |im_end|>\n< |im_start|>user\nYes?<|im_end|>"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>'"), "generation prompt"),
        (CHATML.replace("message['content']", "message['content'] + messages[-1]['role']"), "anew when others"),
        (CHATML.replace(" + '<|im_end|>' + ", " + "), "no mark behind the assistant's turn"),
        ("{{ raise_exception('alternate!') }}", "refuses the roles user, assistant"),
    ],
)
def test_templates_that_do_not_tell_the_turns_are_refused(template: str, said: str) -> None:
    talk = [*TALK, {"role": "user", "content": "Well."}]
    with pytest.raises(ModelError, match=said):
        turns.of_messages(chat_tokenizer(template), talk)


def test_completions_and_texts_end_with_the_end_token() -> None:
    tokenizer = chat_tokenizer(None)
    marked = turns.of_pair(tokenizer, "What is the sea?", " Water.")
    assert trained_text(tokenizer, marked) == " Water.<|im_end|>"
    prompt = tokenizer("What is the sea?")["input_ids"]
    assert marked.ids[: len(prompt)] == prompt and not any(marked.trained[: len(prompt)])
    # " W" is one token where it can be; a prompt that ends in a space keeps the ids that it has in use.
    torn = turns.of_pair(tokenizer, "What is the sea? ", "Water.")
    alone = tokenizer("What is the sea? ")["input_ids"]
    assert torn.ids[: len(alone)] == alone and trained_text(tokenizer, torn) == "Water.<|im_end|>"
    assert trained_text(tokenizer, turns.of_text(tokenizer, "Air.")) == "Air.<|im_end|>"


def test_labels_are_the_next_tokens_and_padding_is_none_of_them() -> None:
    tokenizer = chat_tokenizer()
    task = family(tokenizer, splits({"messages": TALK}))
    encoded, cut = task.encode(rows({"messages": TALK}, {"messages": TALK[:2]}), tokenizer, 64)
    assert cut == 0
    batch = task.collator(tokenizer)(encoded.to_list())
    for line, (ids, labels) in enumerate(zip(batch["input_ids"], batch["labels"], strict=True)):
        length = encoded[line]["length"]
        learnt = labels != IGNORED
        assert torch.equal(labels[: length - 1][learnt[: length - 1]], ids[1:length][learnt[: length - 1]])
        assert not learnt[length:].any()
    ends = (batch["labels"] == tokenizer.eos_token_id).sum(1)
    assert ends.tolist() == [2, 1]  # one for each answer, though padding and end token are one


def test_long_rows_lose_their_end_and_rows_without_an_answer_are_left_out(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tokenizer = chat_tokenizer()
    task = family(tokenizer, splits({"messages": TALK}))
    first = turns.of_messages(tokenizer, TALK).trained.index(True)
    encoded, cut = task.encode(rows({"messages": TALK}), tokenizer, first + 1)
    assert cut == 1 and encoded["length"][:] == [first + 1]
    assert sum(label != IGNORED for label in encoded[0]["labels"]) == 2
    long_question = {"messages": [{"role": "user", "content": "And the sky? " * 40}, TALK[1]]}
    encoded, cut = task.encode(rows({"messages": TALK}, long_question), tokenizer, 64)
    assert (len(encoded), cut) == (1, 1)
    assert "1 of 2 rows are left out: nothing of them is trained" in capsys.readouterr().err
    with pytest.raises(DataError, match="all answers begin behind token 8"):
        task.encode(rows({"messages": TALK}), tokenizer, 8)


# ---- packing ----


def test_examples_are_packed_into_the_fullest_block_that_has_room() -> None:
    given = [{"input_ids": [n] * n, "labels": [n] * n, "length": n} for n in (3, 7, 2, 5, 4)]
    blocks = list(packed(given, 8))
    assert [block["length"] for block in blocks] == [7, 8, 6]  # 7; 5 + 3; 4 + 2
    assert [block["segments"] for block in blocks] == [[0] * 7, [0] * 5 + [1] * 3, [0] * 4 + [1] * 2]
    assert [block["input_ids"] for block in blocks] == [[7] * 7, [5] * 5 + [3] * 3, [4] * 4 + [2] * 2]


def test_packed_examples_have_the_losses_that_they_have_alone(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = checkpoint(tmp_path / "model")
    tokenizer = chat_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    data = splits({"messages": TALK}, {"messages": TALK[:2]}, {"messages": TALK[2:]})
    totals = []
    for packing in (False, True):
        task = family(tokenizer, data, packing=packing)
        task.check_model(model, tokenizer, 128)
        encoded, _ = task.encode(data["train"], tokenizer, 128)
        assert len(encoded) == (1 if packing else 3)
        totals.append(task.outputs(model, encoded, tokenizer, 2).sum(0))
    assert totals[0][1] == totals[1][1] > 0
    assert totals[0] == pytest.approx(totals[1], rel=1e-5)


# ---- runs ----


@pytest.mark.parametrize(
    ("given", "prompt", "adapter"),
    [
        ({"messages": TALK}, "What is the sea?", "lora/r16_all_linear"),
        ({"prompt": TALK[:1], "completion": TALK[1:2]}, {"messages": TALK[:1]}, "full/default"),
        ({"prompt": "What is the sea?", "completion": " Water."}, {"prompt": "What is the sea?"}, "full/default"),
        ({"text": "What is the sea? Water."}, "What is", "full/default"),
    ],
    ids=["messages", "pairs of messages", "pairs", "texts"],
)
def test_a_run_learns_to_answer_and_to_stop(given: Any, prompt: Any, adapter: str, tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", CHATML if "text" not in given else None)
    trained = ptft_hf.train(
        model=str(base),
        task=recipe(generation={"max_new_tokens": 30}),
        adapter=adapter,
        output_dir=tmp_path / "run",
        data=splits(*[given] * 8),
        settings={"learning_rate": 0.02, "max_steps": 60, "warmup_steps": 0, "model.max_length": 128},
    )
    assert trained.run["proof"]["max_difference"] == 0
    (answer,) = ptft_hf.load(tmp_path / "run").predict([prompt])
    wanted = {"messages": "Water. Much of it!", "text": " the sea? Water."}.get(next(iter(given)), " Water.")
    if isinstance(given.get("prompt"), list):
        wanted = "Water. Much of it!"
    assert (answer["answer"], answer["cut_off"]) == (wanted, False)
    assert set(trained.run["metrics"]["test"]) == {"loss", "perplexity", "token_accuracy"}


# ---- what is refused ----


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": TALK[:1]}, "row 1: no turn is the assistant's; the roles are user"),
        ({"messages": [{"role": "user"}]}, "row 1: message 1 has no text as its 'content'"),
        ({"messages": [{"content": "x", "role": None}]}, "row 1: message 1 has no 'role'"),
        ({"messages": "hello"}, "are no messages"),
        ({"prompt": "x", "completion": TALK[1:2]}, "must be both texts or both messages"),
        ({"prompt": TALK[:1], "completion": TALK[:1]}, "no turn is the assistant's"),
    ],
)
def test_rows_that_hold_no_answer_are_named(row: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        family(chat_tokenizer(), splits(row))


def test_many_faulty_rows_are_counted() -> None:
    with pytest.raises(DataError, match="train: 5 such rows in all"):
        family(chat_tokenizer(), splits(*[{"messages": TALK[:1]}] * 5))


def test_conversations_need_a_template_and_a_decoder() -> None:
    from transformers import T5Config

    with pytest.raises(ModelError, match="no chat template; take the checkpoint's instruct version"):
        family(chat_tokenizer(None), splits({"messages": TALK}))
    task = family(chat_tokenizer(), splits({"messages": TALK}))
    with pytest.raises(ModelError, match="t5: an encoder-decoder; instructions are learnt by decoders"):
        task.look_at_checkpoint(T5Config(decoder_start_token_id=0), chat_tokenizer())


def test_prompts_need_room_for_an_answer() -> None:
    tokenizer = chat_tokenizer()
    task = family(tokenizer, splits({"messages": TALK}), generation={"max_new_tokens": 60})
    with pytest.raises(DataError, match=r"tokens is longer than the 4 that 64"):
        task.encode(rows({"given": "What is the sea?"}), tokenizer, 64)


def test_a_turn_that_calls_a_tool_needs_no_content_in_use_either() -> None:
    called = {"function": {"name": "tide", "arguments": {}}}
    talk = [TALK[0], {"role": "assistant", "tool_calls": [called]}, {"role": "tool", "content": "High."}]
    assert family(chat_tokenizer(), splits({"messages": TALK})).input_row({"messages": talk}, []) == {"given": talk}
    with pytest.raises(DataError, match="'messages': message 1 has no text"):
        family(chat_tokenizer(), splits({"messages": TALK})).input_row({"messages": [{"role": "user"}]}, [])
