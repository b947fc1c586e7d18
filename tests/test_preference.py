"""The family of preferences: the loss and its sums by hand, what is read of a pair, figures, and rivals."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers

from ptft_hf import inspecting, metrics, models, recipes, tasks
from ptft_hf.errors import DataError, ModelError, RecipeError
from ptft_hf.tasks import conversations, rivals
from ptft_hf.tasks.preference import Preference
from ptft_hf.tasks.scores import Targets
from ptft_hf.trainer import Trainer
from tests.preferences import SPACED, family, looked, pairs, recipe, words
from tests.tiny import make_checkpoint, make_tokenizer

ROW = {"prompt": "the film ,", "chosen": " good story", "rejected": " bad"}


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


# ---- the loss ----

SCORES = torch.tensor([2.0, 0.0, 1.0, 0.0, 0.0, 0.0, 3.0, 1.0])[:, None]
LABELS = torch.tensor([[1.0, 0.0], [1.0, 1.5], [0.5, 0.0], [0.5, 0.0]])
TERMS = [
    math.log(1 + math.exp(-2)),  # -log sigmoid(2 - 0)
    math.log(1 + math.exp(0.5)),  # -log sigmoid(1 - 0 - 1.5)
    math.log(2),  # a tie of equal scores
    math.log(1 + math.exp(-2)) + 1,  # (-log sigmoid(2) - log sigmoid(-2)) / 2
]


def test_the_loss_with_margins_and_ties_by_hand() -> None:
    task = Preference(recipe())
    assert task.loss(SCORES, LABELS).item() == pytest.approx(sum(TERMS))
    assert task.loss_weight(LABELS).item() == 4
    assert task.loss(SCORES.reshape(4, 2), LABELS).item() == pytest.approx(sum(TERMS))
    # 0.1 smoothed: 0.95 of the first term, and 0.05 of -log sigmoid(-2), which is 2 more.
    assert task.loss(SCORES[:2], LABELS[:1], 0.1).item() == pytest.approx(TERMS[0] + 0.05 * 2)


def test_a_ties_loss_is_least_where_scores_are_equal() -> None:
    scores = torch.tensor([[0.7], [-0.4]], requires_grad=True)
    (gradient,) = torch.autograd.grad(Preference(recipe()).loss(scores, LABELS[2:3]), scores)
    assert gradient[0] > 0 > gradient[1]
    equal = torch.zeros(2, 1, requires_grad=True)
    assert not torch.autograd.grad(Preference(recipe()).loss(equal, LABELS[2:3]), equal)[0].any()


def test_the_loss_of_no_pairs_is_zero_and_has_a_gradient() -> None:
    task, scores = Preference(recipe()), torch.ones(2, 1, requires_grad=True)
    loss = task.loss(scores[:0], LABELS[:0])
    loss.backward()
    assert (loss.item(), task.loss_weight(LABELS[:0]).item()) == (0, 0)
    assert not scores.grad.any()


@pytest.mark.parametrize(("process", "own"), [(0, 2), (1, 1), (2, 0)])
def test_pairs_that_fill_up_an_epochs_last_batch_are_left_out_with_both_answers(process: int, own: int) -> None:
    # 9 pairs in batches of 2 on 3 processes: the last one holds 3 pairs, and is filled up to 6.
    trainer: Any = SimpleNamespace(
        train_dataset=range(9),
        task=Preference(recipe()),
        _train_batch_size=2,
        args=SimpleNamespace(world_size=3, process_index=process),
    )
    batch = {"input_ids": torch.arange(4)[:, None], "labels": torch.ones(2, 2)}
    left = Trainer._without_repeats(trainer, batch)
    assert len(left["labels"]) == own
    assert left["input_ids"][:, 0].tolist() == list(range(2 * max(own, 1)))


# ---- what is read ----


@pytest.mark.parametrize(
    ("prompt", "answer", "expected"),
    [
        ("why", "so", turns("why", "so")),
        ("", "so", [{"role": "assistant", "content": "so"}]),
        (None, turns("why", "so"), turns("why", "so")),  # the prompt is in the answer
        (turns("a", "b", "c"), turns("", "so")[1:], turns("a", "b", "c", "so")),
        ("why", turns("why", "so"), turns("why", "so")),  # in both
        ("why", "", turns("why", "")),
        (turns("why"), [], turns("why", "")),
    ],
)
def test_prompt_and_answer_as_messages(prompt: Any, answer: Any, expected: Any) -> None:
    assert conversations.conversation(prompt, answer) == expected


def test_several_messages_as_one_text_begin_with_their_roles() -> None:
    assert conversations.parts_of(turns("why", "so")) == ("why", "so")
    assert conversations.parts_of(turns("a", "b", "c", "so")) == ("user: a\n\nassistant: b\n\nuser: c", "so")


def read(
    task: Preference, tokenizer: Any, rows: list[dict[str, Any]], limit: int = 64
) -> tuple[list[list[str]], int]:
    """What the model reads of each row's answers, and how many rows were cut."""
    encoded, cut = task.encode(datasets.Dataset.from_list(rows), tokenizer, limit)
    found = []
    for row in encoded:
        batch = task.collator(tokenizer)([row])
        read = zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)
        found.append([words(tokenizer, ids[mask].tolist()) for ids, mask in read])
    return found, cut


def test_a_decoder_reads_the_answer_behind_the_prompt_and_its_own_end() -> None:
    task, tokenizer = family("llama", [ROW])
    assert read(task, tokenizer, [ROW])[0] == [["<s> the film , good story </s>", "<s> the film , bad </s>"]]
    assert task.reading == ("text", 2, True, True)


def test_an_encoder_reads_a_pair_of_texts() -> None:
    task, tokenizer = family("bert", [ROW])
    expected = ["<s> the film , </s> good story </s>", "<s> the film , </s> bad </s>"]
    assert read(task, tokenizer, [ROW])[0] == [expected]
    encoded, _ = task.encode(datasets.Dataset.from_list([ROW]), tokenizer, 64)
    batch = task.collator(tokenizer)(encoded.to_list())
    assert batch["token_type_ids"].tolist() == [[0] * 5 + [1] * 3, [0] * 5 + [1] * 2 + [0]]
    assert batch["attention_mask"].sum(1).tolist() == [8, 7]
    assert (encoded["length"][:], encoded["parts"][:]) == ([8], [[8, 7]])


def test_without_prompts_an_encoder_reads_one_text() -> None:
    row = {name: ROW[name] for name in ("chosen", "rejected")}
    task, tokenizer = family("bert", [row])
    assert read(task, tokenizer, [row])[0] == [["<s> good story </s>", "<s> bad </s>"]]


def test_a_chat_is_read_up_to_the_mark_behind_the_answer() -> None:
    row = {"prompt": turns("the film"), "chosen": " good", "rejected": "bad </s> , user , good"}
    task, tokenizer = family("llama", [row], chat=SPACED)
    # Without the " ." that the template writes behind a turn; a mark in an answer is text.
    first, second = read(task, tokenizer, [row])[0][0]
    assert first.endswith("</s> . a ##s ##s ##i ##s ##t ##a ##n ##t , good </s>")
    assert first.startswith("<s> u ##s ##e ##r , the film </s>")
    assert second.count("</s>") == 2 and second.endswith("good </s>")


def test_long_prompts_lose_their_begin_and_answers_keep_their_end() -> None:
    long = {**ROW, "prompt": "a very " * 30 + "much so"}
    for architecture, expected in (
        ("llama", ["<s> much so good story </s>", "<s> very much so bad </s>"]),
        ("bert", ["<s> so </s> good story </s>", "<s> much so </s> bad </s>"]),
    ):
        task, tokenizer = family(architecture, [ROW])
        assert read(task, tokenizer, [ROW, long], 8)[1] == 1
        assert read(task, tokenizer, [long], 6)[0] == [expected]
    task, tokenizer = family("llama", [ROW], chat=SPACED)
    assert read(task, tokenizer, [long], 5)[0] == [["<s> , good story </s>", "<s> ##t , bad </s>"]]


def test_an_answer_that_is_too_long_by_itself_keeps_its_end() -> None:
    row = {**ROW, "chosen": " the" * 20 + " good story"}
    assert read(*family("llama", [ROW]), [row], 5)[0][0][0] == "<s> the good story </s>"
    assert read(*family("bert", [ROW]), [row], 6)[0][0][0] == "<s> </s> the good story </s>"


def test_the_end_token_is_written_where_the_tokenizer_writes_none() -> None:
    from tokenizers import processors

    task, tokenizer = family("llama", [ROW])
    template = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    tokenizer.backend_tokenizer.post_processor = template
    task.look_at_checkpoint(transformers.LlamaConfig(), tokenizer)
    assert task.reading == ("text", 2, False, True)
    long = {**ROW, "prompt": "a very " * 30 + "much so"}
    assert read(task, tokenizer, [ROW, long], 6) == (
        [
            ["<s> film , good story </s>", "<s> the film , bad </s>"],
            ["<s> much so good story </s>", "<s> very much so bad </s>"],
        ],
        2,
    )


def test_messages_need_a_chat_template_or_an_encoder() -> None:
    rows = pairs(2, messages=True)
    with pytest.raises(ModelError, match="the data has messages, and this llama's tokenizer has no chat template"):
        family("llama", rows)
    task, tokenizer = family("bert", rows)
    assert read(task, tokenizer, rows)[0][0][0].count("</s>") == 2
    assert family("llama", rows, chat=SPACED)[0].reading.kind == "chat"


def test_a_chat_template_that_refuses_is_an_error() -> None:
    refusing = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('a user first') }}{% endif %}" + SPACED
    task, tokenizer = family("llama", [ROW], chat=refusing)
    with pytest.raises(DataError, match="chat template refuses the roles assistant: a user first"):
        read(task, tokenizer, [{**ROW, "prompt": ""}])


# ---- padding that is the end token (row 23) ----


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A llama with a score on it; its tokenizer pads with the end token, as many decoders' do."""
    folder = make_checkpoint("llama", tmp_path_factory.mktemp("decoder") / "llama", initializer_range=0.2)
    with models.quiet():
        torch.manual_seed(0)
        return transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()


def alone(model: Any, ids: list[int]) -> float:
    """The score of one text by plain transformers, without any padding: at its last token."""
    states = model.model(input_ids=torch.tensor([ids])).last_hidden_state
    return float(model.score(states[0, -1]))


@torch.no_grad()
def test_elsewhere_the_score_of_a_text_is_another_one_in_a_batch(decoder: Any) -> None:
    ids = [1, 7, 8, 9, 2]
    decoder.config.pad_token_id = None
    (single,) = decoder(input_ids=torch.tensor([ids])).logits[:, 0].tolist()
    assert single == pytest.approx(alone(decoder, ids), abs=1e-6)
    decoder.config.pad_token_id = 2  # the end token, which a batch needs
    batch = torch.tensor([ids, [1, 5, 6, 7, 8]])
    found = decoder(input_ids=batch, attention_mask=torch.ones_like(batch)).logits[0].item()
    assert found == pytest.approx(alone(decoder, ids[:-1]), abs=1e-6)  # before the end
    assert abs(found - single) > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("chat", [None, SPACED])
def test_scores_are_those_of_a_row_alone_to_2e_6_whatever_the_batch_its_rows_and_the_padding_side(
    decoder: Any, side: str, chat: str | None
) -> None:
    rows = pairs(7)
    task, tokenizer = family("llama", rows, chat=chat, pad_token="</s>")
    assert task.notes == ["padding is '<unk>', and not '</s>': there the score stands"]
    models.ensure_padding(decoder, tokenizer)
    tokenizer.padding_side = side
    encoded, _ = task.encode(datasets.Dataset.from_list(rows), tokenizer, 64)
    scores = [task.outputs(decoder, encoded, tokenizer, size) for size in (2, 6, 64)]
    backwards = task.outputs(decoder, encoded.select(range(6, -1, -1)), tokenizer, 4)[::-1]
    expected = [
        [alone(decoder, row["input_ids"][:length]), alone(decoder, row["input_ids"][length:])]
        for row, (length, _) in zip(encoded, encoded["parts"], strict=True)
    ]
    for found in (*scores, backwards):
        np.testing.assert_allclose(found, expected, atol=2e-6)
    assert all(row["input_ids"][-1] == 2 for row in encoded)  # it is the end token's


def test_where_nothing_else_can_pad_answers_are_read_without_their_end(decoder: Any) -> None:
    rows = pairs(3)
    none = dict.fromkeys(("unk_token", "mask_token", "cls_token", "sep_token", "bos_token"), None)
    task, tokenizer = family("llama", rows, pad_token="</s>", **none)
    (note,) = task.notes
    assert note == "the tokenizer has no mark to pad with but '</s>', so that answers are read without it"
    encoded, _ = task.encode(datasets.Dataset.from_list(rows), tokenizer, 64)
    assert not any(2 in row["input_ids"] for row in encoded)
    models.ensure_padding(decoder, tokenizer)
    with torch.no_grad():
        found = task.outputs(decoder, encoded, tokenizer, 64)
        expected = [alone(decoder, row["input_ids"][: row["parts"][0]]) for row in encoded]
    np.testing.assert_allclose(found[:, 0], expected, atol=2e-6)


def test_an_own_padding_token_stays() -> None:
    task, tokenizer = family("llama", [ROW], pad_token="<pad>")
    assert (task.notes, tokenizer.pad_token) == ([], "<pad>")
    task, tokenizer = family("bert", [ROW])
    assert (task.notes, tokenizer.pad_token, task.reading.end) == ([], "<pad>", None)


# ---- figures ----

OUTPUTS = np.array([[2.0, 1.0], [0.0, 3.0], [1.0, 1.0], [5.0, 0.0], [9.0, 9.5]], dtype=np.float32)
TARGETS = Targets(
    np.array([[1.0, 0.0]] * 4 + [[0.5, 0.0]]),
    [["a b", "a"], ["a", "a b c"], ["a", "a"], ["good a", "bad"], ["a", "a"]],
)


def fitted() -> Preference:
    task = looked([{**ROW, "tie": False}, {**ROW, "tie": True}])
    task.rivals = rivals.Rivals(True, {"good": 1.0, "bad": -0.5})
    return task


def test_accuracy_leaves_ties_out_and_halves_equal_scores() -> None:
    task = fitted()
    assert task.metrics(OUTPUTS, TARGETS)["accuracy"] == (1 + 0 + 0.5 + 1) / 4
    assert task.outcomes(OUTPUTS, TARGETS) == [1.0, 0.0, 0.5, 1.0, 0.5]
    by_hand = [math.log(1 + math.exp(-d)) for d in (1, -3, 0, 5)]
    by_hand.append((math.log(1 + math.exp(0.5)) + math.log(1 + math.exp(-0.5))) / 2)
    assert task.metrics(OUTPUTS, TARGETS)["loss"] == pytest.approx(sum(by_hand) / 5)
    only_ties = Targets(TARGETS.labels[4:], TARGETS.answers[4:])
    assert task.metrics(OUTPUTS[4:], only_ties)["accuracy"] == 0.0
    assert task.report(OUTPUTS[4:], only_ties)["pairs"] == 0


def test_the_report_by_hand() -> None:
    report = fitted().report(OUTPUTS, TARGETS)
    assert (report["pairs"], report["ties"]) == (4, 1)
    assert report["accuracy_interval"] == pytest.approx(metrics.wilson_interval(0.625, 4))
    # Of the four, length is right on the first and the last, wrong on the second; the words tell the last alone.
    assert report["rivals"] == {"length": 0.625, "bag_of_words": 0.625, "length_prefers": "longer"}
    # Confidences .731 (right), .953 (wrong), .5 (right, by convention), .993 (right), each in a bin of its own.
    sigmoid = [1 / (1 + math.exp(-d)) for d in (1, 3, 0, 5)]
    gaps = [1 - sigmoid[0], sigmoid[1], 1 - sigmoid[2], 1 - sigmoid[3]]
    assert sigmoid[1] < 14 / 15 or sigmoid[1] > 14 / 15
    assert report["calibration_error"] == pytest.approx((gaps[0] + gaps[2] + abs(gaps[1] - gaps[3])) / 4)
    lengths = [2, 1, 1, 3, 1, 1, 2, 1, 1, 1]
    expected = np.corrcoef(lengths, OUTPUTS.reshape(-1))[0, 1]
    assert report["score_and_length"]["pearson"] == pytest.approx(expected)


def test_a_rival_that_is_not_beaten_is_named() -> None:
    task = fitted()
    equal = task.after_training(OUTPUTS, TARGETS)
    assert equal[0].startswith("validation: accuracy 0.625 (") and len(equal) == 2
    said = "the model does not beat length or a bag of words on validation: PPO would have little to follow"
    assert equal[1] == said
    better = OUTPUTS * [2, 1]  # right but in the second pair
    assert task.metrics(better, TARGETS)["accuracy"] == 0.75
    assert len(task.after_training(better, TARGETS)) == 1
    task.rivals = rivals.Rivals(True, {"good": 1.0, "b": 1.0, "c": -1.0})
    assert task.report(better, TARGETS)["rivals"]["bag_of_words"] == 0.75
    assert task.after_training(better, TARGETS)[1] == said.replace("length or ", "")


def test_wilsons_interval() -> None:
    # Newcombe 1998, table I: 81 of 263 is 0.2553 to 0.3662; 0 of 20 is 0 to 0.1611.
    assert metrics.wilson_interval(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert metrics.wilson_interval(0.0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert metrics.wilson_interval(1.0, 20)[1] == 1.0


def test_scores_that_are_no_numbers_are_an_error() -> None:
    with pytest.raises(ModelError, match="NaN or infinity in 1 of 2 rows"):
        metrics.pairwise_accuracy(np.array([np.nan, 1.0]))
    with pytest.raises(DataError, match="there is no row"):
        metrics.pairwise_accuracy(np.array([]))


def test_length_is_taken_in_its_better_direction() -> None:
    assert rivals.fit([("a b", "a"), ("a b c", "a"), ("a", "a b")]).longer
    shorter = rivals.fit([("a", "a b"), ("a", "a c"), ("a b", "a")])
    assert not shorter.longer
    assert shorter.differences([("a b c", "a")])["length"].tolist() == [-2.0]


def test_the_bag_of_words_is_plain_scikit_learns() -> None:
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    given = [(row["chosen"], row["rejected"]) for row in pairs(40)]
    vectorizer = CountVectorizer(token_pattern=r"\w+").fit([text for pair in given for text in pair])
    first, second = (vectorizer.transform([pair[i] for pair in given]) for i in (0, 1))
    table = (first - second).toarray()
    model = LogisticRegression(C=rivals.STRENGTH, fit_intercept=False, max_iter=1000)
    model.fit(np.concatenate([table, -table]), [1] * 40 + [0] * 40)
    found = rivals.fit(given)
    expected = dict(zip(vectorizer.get_feature_names_out(), model.coef_[0], strict=True))
    assert found.words == pytest.approx({w: c for w, c in expected.items() if round(c, 5)}, abs=2e-5)
    held = [(row["chosen"], row["rejected"]) for row in pairs(20, seed=1)]
    differences = found.differences(held)["bag_of_words"]
    assert differences == pytest.approx([found._score(first) - found._score(second) for first, second in held])
    assert metrics.pairwise_accuracy(differences) >= 0.8  # one word tells


def test_rivals_are_fitted_without_ties_and_kept_in_the_state() -> None:
    rows = [{**row, "tie": False} for row in pairs(30)]
    # Ties would teach the opposite, if they were looked at.
    ties = [{"prompt": r["prompt"], "chosen": r["rejected"], "rejected": r["chosen"], "tie": True} for r in rows[:25]]
    task, _ = family("bert", rows + ties)
    again = Preference(recipe())
    again.restore(json.loads(json.dumps(task.state())))
    assert again.rivals.differences([("good", "bad")])["bag_of_words"][0] > 0
    outputs = np.zeros((2, 2), dtype=np.float32)
    targets = Targets(np.array([[1.0, 0.0]] * 2), [["good", "bad"], ["lovely", "dull"]])
    assert again.report(outputs, targets) == task.report(outputs, targets)
    assert again.report(outputs, targets)["rivals"]["bag_of_words"] == 1.0


# ---- the centre, and predictions ----


def test_scores_are_centred_on_training_answers() -> None:
    task, _ = family("bert", [ROW])
    (note,) = task.look_back(np.array([[1.0, 2.0], [4.0, 5.0]], dtype=np.float32), None)
    assert task.centre == 3.0
    assert note == "scores are centred: 3 is taken off, the mean of 4 training answers"
    again = Preference(recipe())
    again.restore(json.loads(json.dumps(task.state())))
    outputs = np.array([[5.0, np.nan], [2.0, 3.0], [3.0, 3.0]], dtype=np.float32)
    single, pair, equal = again.predictions(outputs)
    assert single == {"score": 2.0}
    assert pair == {
        "scores": {"chosen": -1.0, "rejected": 0.0},
        "better": "rejected",
        "probability": pytest.approx(1 / (1 + math.e)),
    }
    assert (equal["better"], equal["probability"]) == ("tie", 0.5)
    assert again.same(pair, {**pair, "probability": 0.1}) and not again.same(pair, equal)
    assert again.same(single, {"score": 2.0 + 1e-6}) and not again.same(single, {"score": 2.1})


def test_the_centre_is_of_up_to_500_rows_spread_evenly() -> None:
    task = Preference(recipe())
    rows = datasets.Dataset.from_dict({"n": list(range(2500))})
    chosen = task.rows_to_look_back_on(rows)["n"]
    assert (len(chosen), chosen[0], chosen[1], chosen[-1]) == (500, 0, 5, 2495)
    assert len(task.rows_to_look_back_on(rows.select(range(7)))) == 7


def test_what_predict_takes() -> None:
    task, columns = Preference(recipe()), ["prompt", "chosen", "rejected"]
    given = task.input_row({"prompt": "why", "answer": "so"}, columns)
    assert given == {"conversations": [turns("why", "so")]}
    pair = task.input_row({"prompt": turns("why"), "chosen": "so", "rejected": turns("", "not")[1:]}, columns)
    assert pair == {"conversations": [turns("why", "so"), turns("why", "not")]}
    assert task.input_row("so", ["chosen", "rejected"]) == {"conversations": [turns("", "so")[1:]]}
    for value, message in (
        ("so", "'prompt' must be given, as text or messages; this model was trained on"),
        ({"prompt": "why", "chosen": "so"}, "'rejected' must be given"),
        (3, "3 is neither a text nor an object with 'answer', or 'chosen' and 'rejected'"),
        ({"prompt": "why", "answer": 3}, "'answer' is neither a text nor a list of messages but '3'"),
        ({"prompt": [{"role": "user"}], "answer": ""}, "'prompt' has a message without 'role' and 'content'"),
        ({"prompt": "\ud800", "answer": ""}, "'prompt' has half of a surrogate pair"),
    ):
        with pytest.raises(DataError, match=message):
            task.input_row(value, columns)


# ---- data ----


def test_what_is_said_of_the_pairs() -> None:
    rows = [{**ROW, "margin": 0.0, "tie": True}, {**ROW, "margin": 1.5, "tie": False}]
    expected = "2 pairs, 1 ties, 1 with a margin; answers have 2 words on average if chosen, 1 if rejected"
    assert looked(rows).notes[0] == f"train: {expected}"
    assert looked([ROW]).notes[2].startswith("test: 1 pairs; answers")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"margin": -1.0}, "train: row 2: 'margin' is -1.0; expected a number from 0 on"),
        ({"margin": "much"}, "'margin' is 'much'"),
        ({"margin": math.inf}, "'margin' is inf"),
        ({"tie": "perhaps"}, "train: row 2: 'tie' is 'perhaps'; expected true or false"),
        ({"tie": True, "margin": 1.0}, "train: row 2: a tie with a margin of 1; leave one out"),
        ({"chosen": turns("a")}, None),
    ],
)
def test_rows_that_are_no_pairs_are_an_error(more: dict[str, Any], message: str | None) -> None:
    if message is None:
        with pytest.raises(DataError, match="'chosen' has a message without 'role'"):
            looked([{**ROW, "chosen": [{"role": "user", "content": None}]}])
        return
    kind = type(more.get("margin", 0.0))
    first = {**ROW, **{name: kind() if name == "margin" else type(more[name])() for name in more}}
    with pytest.raises(DataError) as caught:
        looked([first, {**ROW, **more}])
    assert message in str(caught.value)
    assert len(caught.value.problems) == 3  # train, validation and test, each once


def test_nothing_but_ties_is_an_error() -> None:
    with pytest.raises(DataError, match="validation: all 1 pairs are ties: there is nothing to tell apart"):
        looked([{**ROW, "tie": False}], held=[{**ROW, "tie": True}])
    assert Preference(recipe()).unknown_labels(datasets.Dataset.from_list([{**ROW, "tie": True}])) == []
    with pytest.raises(DataError, match="data: row 1: 'tie' is 'x'"):
        Preference(recipe()).unknown_labels(datasets.Dataset.from_list([{**ROW, "tie": "x"}]))


def load(source: Any, **fields: Any) -> Any:
    task = Preference(recipe(**fields))
    return task, tasks.load_splits(task, source, task.recipe, 0)


def test_margins_and_ties_keep_their_types_and_csv_spells_them(tmp_path: Path) -> None:
    rows = [{**row, "margin": i / 2, "tie": i == 0} for i, row in enumerate(pairs(20))]
    task, found = load(datasets.Dataset.from_list(rows))
    assert not any("taken as text" in note for note in found.notes)
    assert {type(value) for value in found.train["margin"]} == {float}
    frame = datasets.Dataset.from_list(rows)
    frame.to_csv(str(tmp_path / "train.csv"))
    _, spelt = load(str(tmp_path / "train.csv"))
    task.look_at(spelt)
    labels = [tasks.preference.pairs.label_of(row) for row in spelt.train]
    assert labels == [tasks.preference.pairs.label_of(row) for row in found.train]
    assert sorted({margin for _, margin in labels})[-1] == max(found.train["margin"])


@pytest.mark.parametrize("messages", [False, True])
def test_pairs_with_one_prompt_stay_together_where_a_split_is_cut(messages: bool) -> None:
    rows = [{**other, "prompt": row["prompt"]} for row, other in zip(pairs(20, messages=messages) * 2,
            pairs(40, seed=1, messages=messages), strict=True)]  # fmt: skip
    _, found = load(datasets.Dataset.from_list(rows))
    prompts = [{json.dumps(prompt) for prompt in split["prompt"]} for split in found[:3]]
    assert [len(each) for each in prompts] == [16, 2, 2]
    assert not prompts[0] & prompts[1] and not prompts[0] & prompts[2] and not prompts[1] & prompts[2]
    assert any("each prompt whole" in note for note in found.notes)


def test_the_catalogue_names_what_the_family_knows() -> None:
    names = [name for name in recipes.catalogue("tasks") if name.startswith("preference/")]
    assert names == ["preference/hh_rlhf", "preference/tldr_preference", "preference/ultrafeedback"]
    for name in names:
        assert isinstance(tasks.build(recipes.load_task(name)), Preference)
    with pytest.raises(RecipeError, match=r"unknown column 'chosn' \(did you mean 'chosen'\?\)"):
        recipes.task_from_dict({"name": "x", "family": "preference", "columns": {"chosn": "a"}})


# ---- the inspector ----


def test_a_pair_is_shown_with_its_prompt_once() -> None:
    from tokenizers import decoders

    rows = [{**ROW, "margin": 0.5, "tie": False}, {**ROW, "margin": 0.0, "tie": True}]
    task, tokenizer = family("llama", rows)
    tokenizer.backend_tokenizer.decoder = decoders.WordPiece()
    table = datasets.Dataset.from_list(rows)
    encoded, _ = task.encode(table, tokenizer, 64)
    shown = inspecting.rows_of(task, table, encoded, tokenizer, 2)
    texts = ["".join(segment.text for segment in row) for row in shown]
    expected = "<s> the film, | chosen: good story </s> | rejected: bad </s>"
    verdicts = ["chosen better by 0.5", "a tie"]
    assert [" ".join(text.split()) for text in texts] == [f"{verdict} <- {expected}" for verdict in verdicts]
    assert [s.text for row in shown for s in row if s.mark == "trained"] == verdicts
    found = inspecting.check(task, encoded, SimpleNamespace(config=transformers.LlamaConfig()), tokenizer, 0, 2, "m")
    assert (found.data, found.model) == ([], [])


def test_an_inspected_run_needs_no_weights(tmp_path: Path) -> None:
    from tests.conftest import write_rows

    base = make_checkpoint("llama", tmp_path / "llama")
    (base / "model.safetensors").unlink()
    write_rows(tmp_path / "train.jsonl", pairs(20))
    source = {"path": "json", "data_files": {"train": str(tmp_path / "train.jsonl")}}
    task = recipes.task_from_dict({"name": "mine", "family": "preference", "data": source})
    found = inspecting.inspect(model=str(base), task=task, rows=2)
    assert found.title.startswith("train, 16 rows, 16 inputs of up to ")
    assert "padding is '<unk>', and not '</s>': there the score stands" in found.findings.notes
    assert not found.findings.data + found.findings.model


def test_a_tokenizer_that_knows_no_word_is_found() -> None:
    task, tokenizer = family("llama", [ROW])
    rows, _ = task.encode(datasets.Dataset.from_list([ROW]), tokenizer, 64)
    unknown = rows.map(lambda row: {"input_ids": [3] * len(row["input_ids"])})
    found = inspecting.check(task, unknown, SimpleNamespace(config=transformers.LlamaConfig()), tokenizer, 0, 1, "m")
    assert "its tokenizer knows no word" in found.model[0]


def test_make_tokenizer_has_no_padding_of_its_own() -> None:
    """What the tests above rest on."""
    assert make_tokenizer("llama").pad_token is None
