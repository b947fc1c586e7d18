"""Tag schemes, worked by hand; and the two kinds of matches."""

from __future__ import annotations

import pytest
from seqeval.metrics.sequence_labeling import get_entities

from ptft_hf.tasks import spans
from ptft_hf.tasks.tags import Entity, entities, iob2, misfits, scheme_of

# John Smith met Ann Lee in New York : two persons, one place; "x y" are two places that touch.
WANTED = [Entity("P", 0, 2), Entity("P", 3, 5), Entity("X", 6, 8)]
IOB2 = ["B-P", "I-P", "O", "B-P", "I-P", "O", "B-X", "I-X"]
SCHEMES = {
    "IOB2": IOB2,
    "I- only": ["I-P", "I-P", "O", "I-P", "I-P", "O", "I-X", "I-X"],
    "BIOES": ["B-P", "E-P", "O", "B-P", "E-P", "O", "B-X", "E-X"],
    "BILOU": ["B-P", "L-P", "O", "B-P", "L-P", "O", "B-X", "L-X"],
    "types only": ["P", "P", "O", "P", "P", "O", "X", "X"],
}
TOUCHING = [Entity("X", 0, 1), Entity("X", 1, 3)]
TOUCH = {
    "IOB2": ["B-X", "B-X", "I-X"],
    "IOB1": ["I-X", "B-X", "I-X"],
    "BIOES": ["S-X", "B-X", "E-X"],
    "BILOU": ["U-X", "B-X", "L-X"],
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_is_told_and_read_as_the_same_entities(scheme: str) -> None:
    tags = SCHEMES[scheme]
    assert scheme_of([tags, ["O"]]) == scheme
    assert entities(tags) == WANTED
    assert iob2(entities(tags), len(tags)) == IOB2
    assert misfits(tags, scheme) == 0


@pytest.mark.parametrize("scheme", TOUCH)
def test_entities_that_touch_are_two_where_the_scheme_can_say_so(scheme: str) -> None:
    assert scheme_of([TOUCH[scheme]]) == scheme
    assert entities(TOUCH[scheme]) == TOUCHING
    assert misfits(TOUCH[scheme], scheme) == 0
    # Two of different types need no mark.
    assert entities(["I-X", "I-P"]) == [Entity("X", 0, 1), Entity("P", 1, 2)]


def test_iob1_is_told_from_a_broken_iob2() -> None:
    assert scheme_of([["I-P", "O"], ["I-P", "B-P"]]) == "IOB1"  # B- only between two that touch
    assert scheme_of([["I-P", "O"], ["B-P", "O"]]) == "IOB2"  # a B- after O: the I- was a mistake
    assert scheme_of([["B-P", "B-P"]]) == "IOB2"
    assert scheme_of([["O", "O"], []]) == "IOB2"


@pytest.mark.parametrize(
    ("tags", "scheme", "count", "found"),
    [
        (["O", "I-P", "I-P"], "IOB2", 1, [Entity("P", 1, 3)]),
        (["B-P", "I-X", "I-X"], "IOB2", 1, [Entity("P", 0, 1), Entity("X", 1, 3)]),
        (["I-P", "O", "I-P"], "IOB2", 2, [Entity("P", 0, 1), Entity("P", 2, 3)]),
        (["B-P", "O", "S-P"], "BIOES", 1, [Entity("P", 0, 1), Entity("P", 2, 3)]),  # never ended
        (["E-P", "O"], "BIOES", 1, [Entity("P", 0, 1)]),  # never begun
        (["B-P", "I-P"], "BIOES", 1, [Entity("P", 0, 2)]),
        (["B-P", "E-X"], "BIOES", 1, [Entity("P", 0, 1), Entity("X", 1, 2)]),
        (["I-P", "B-P"], "IOB1", 0, [Entity("P", 0, 1), Entity("P", 1, 2)]),
    ],
)
def test_broken_sequences_are_counted_and_no_tag_is_lost(
    tags: list[str], scheme: str, count: int, found: list[Entity]
) -> None:
    assert misfits(tags, scheme) == count
    assert entities(tags) == found
    assert {i for e in found for i in range(e.start, e.end)} == {i for i, t in enumerate(tags) if t != "O"}


def test_types_with_hyphens_and_tags_without_types() -> None:
    assert entities(["B-creative-work", "I-creative-work", "event-attack"]) == [
        Entity("creative-work", 0, 2),
        Entity("event-attack", 2, 3),
    ]
    assert entities(["B", "I", "O"]) == [Entity("entity", 0, 2)]


@pytest.mark.parametrize("rows", [[["B-P"], ["X"]], [["B-P", "P"]], [["B", "B-P"]], [["", "O"]]])
def test_mixed_schemes_are_refused(rows: list[list[str]]) -> None:
    with pytest.raises(ValueError, match="tags of several schemes"):
        scheme_of(rows)


def test_entities_are_those_that_seqeval_finds() -> None:
    """An independent reading, on every sequence of four tags."""
    import itertools

    for tags in itertools.product(["O", "B-P", "I-P", "B-X", "I-X"], repeat=4):
        expected = [Entity(kind, first, last + 1) for kind, first, last in get_entities(list(tags))]
        assert entities(tags) == expected, tags
        assert entities(iob2(expected, 4)) == expected


# --- matches ----------------------------------------------------------------------------------------------

GOLD = [["B-P", "I-P", "O", "B-X", "O"], ["B-P", "O", "B-X", "I-X", "O"]]
SAID = [["B-P", "I-P", "O", "B-P", "O"], ["B-P", "I-P", "O", "B-X", "B-X"]]
# Right: John Smith. A wrong type at word 3. Half right: P of one word taken for two, and L's second word.
# Spurious: the last L, and the P at word 3; missed: the L at word 3.


def test_whole_matches_by_hand() -> None:
    found = spans.strict(GOLD, SAID)
    # One of five said is right, one of four true ones found.
    assert (found["micro avg"]["precision"], found["micro avg"]["recall"]) == (1 / 5, 1 / 4)
    person, place, other = spans.by_type(found, ["P", "X", "Y"])
    assert person == {"label": "P", "precision": 1 / 3, "recall": 1 / 2, "f1": 0.4, "support": 2}
    assert (place["f1"], place["support"]) == (0, 2)
    assert other == {"label": "Y", "precision": 0, "recall": 0, "f1": 0, "support": 0}


def test_matches_in_part_by_hand() -> None:
    found = spans.partial(GOLD, SAID)
    assert [found[name] for name in ("exact", "partial", "missed", "spurious")] == [1, 2, 1, 2]
    assert (found["precision"], found["recall"]) == (2 / 5, 2 / 4)
    assert found["f1"] == pytest.approx(2 * 0.4 * 0.5 / 0.9)


def test_one_said_entity_matches_one_true_one_alone() -> None:
    found = spans.partial([["B-P", "O", "B-P"]], [["B-P", "I-P", "I-P"]])
    assert (found["partial"], found["missed"], found["spurious"]) == (1, 1, 0)


def test_no_entity_anywhere_is_zero_and_not_a_warning() -> None:
    assert spans.strict([["O"]], [["O"]]) == {}
    assert spans.partial([["O"]], [["O"]])["f1"] == 0
    assert spans.strict([["B-P"]], [["O"]])["micro avg"]["f1-score"] == 0
