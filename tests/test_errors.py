"""The error tree and its messages."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from ptft_hf import errors
from ptft_hf.errors import CheckpointError, PtftError, RoundTripError, did_you_mean


def test_one_problem_is_the_message_and_several_are_listed() -> None:
    assert str(PtftError("a is missing")) == "a is missing"
    several = PtftError("a is missing", "b is 3")
    assert several.problems == ("a is missing", "b is 3")
    assert str(several) == "2 problems:\n  - a is missing\n  - b is 3"


def test_an_error_without_a_problem_is_refused() -> None:
    with pytest.raises(TypeError, match="CheckpointError needs at least one problem"):
        CheckpointError()


def test_every_error_of_the_module_is_in_the_tree_that_its_docstring_draws() -> None:
    classes = [value for value in vars(errors).values() if isinstance(value, type) and value is not Iterable]
    assert len(classes) == 8
    for value in classes:
        assert issubclass(value, PtftError)
        assert f" {value.__name__} " in f" {errors.__doc__} ".replace("\n", " ")
    assert issubclass(RoundTripError, CheckpointError)


@pytest.mark.parametrize(
    ("name", "names", "expected"),
    [
        ("learning_rte", ["learning_rate", "seed"], " (did you mean 'learning_rate'?)"),
        ("lora", ["LORA", "LOHA"], " (did you mean 'LORA'?)"),
        ("sst2", ["a/sst2", "a/stsb"], " (did you mean 'a/sst2'?)"),
        (
            "lora/r8",
            ["lora/r8_attention_and_more", "full/default"],
            " (did you mean 'lora/r8_attention_and_more'?)",
        ),
        ("default", ["full/default", "head/default"], " (did you mean 'full/default' or 'head/default'?)"),
        ("zzz", ["learning_rate"], ""),
        ("x", [], ""),
    ],
)
def test_did_you_mean(name: str, names: list[str], expected: str) -> None:
    assert did_you_mean(name, names) == expected
