"""Names read by ``ast`` are the names that the imported classes accept."""

from __future__ import annotations

import dataclasses
import inspect

import pytest

from ptft_hf.errors import RecipeError
from ptft_hf.recipes.upstream import (
    class_fields,
    importable,
    installed_folders,
    peft_config_names,
    peft_types,
    quantization_names,
    training_argument_names,
)


def _arguments(cls: type) -> set[str]:
    return {field.name for field in dataclasses.fields(cls) if field.init}


def test_training_arguments_are_those_of_the_class() -> None:
    from transformers import TrainingArguments

    assert training_argument_names() == _arguments(TrainingArguments)


def test_quantization_names_are_the_arguments_of_the_class() -> None:
    from transformers import BitsAndBytesConfig

    parameters = inspect.signature(BitsAndBytesConfig.__init__).parameters.values()
    assert quantization_names() == {p.name for p in parameters if p.kind is not p.VAR_KEYWORD} - {"self"}


def test_every_peft_method_has_the_fields_of_its_class() -> None:
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    classes = {kind.value: cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    assert {"LORA", "ADALORA", "PREFIX_TUNING", "IA3"} <= set(classes)
    assert set(classes) <= peft_types()  # a method that needs a newer torch is registered only with it
    assert {name: peft_config_names(name) for name in classes} == {
        name: _arguments(cls) for name, cls in classes.items()
    }


def test_what_is_not_there_is_named() -> None:
    with pytest.raises(
        RecipeError, match="NoSuchClass is not in transformers/training_args of the installed"
    ):
        class_fields("transformers", "training_args", "NoSuchClass")
    with pytest.raises(RecipeError, match="'no_such_package' is not installed: pip install no_such_package"):
        class_fields("no_such_package", "config", "Config")
    with pytest.raises(KeyError):
        peft_config_names("NO_SUCH_METHOD")
    assert installed_folders("no_such_package") == []
    assert installed_folders("no_such_package.inner") == []
    assert [importable(name) for name in ("peft", "__main__", "no_such_package")] == [True, True, False]
