"""Recipes of pre-training: what they may say, and their faults."""

from __future__ import annotations

from pathlib import Path

import pytest

from ptft_hf.errors import RecipeError
from ptft_hf.recipes import (
    CausalLMRecipe,
    Cleaning,
    MaskedLMRecipe,
    TokenizerRecipe,
    load_task,
    task_from_dict,
    to_yaml,
)

NAMES = (
    "masked_lm/wikitext103",
    "masked_lm/wikitext103_nsp",
    "causal_lm/wikitext103",
    "causal_lm/tinystories",
)


def faults(folder: Path, text: str) -> str:
    path = folder / "task.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_task(str(path))
    return str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_the_catalogues_recipes_come_back_from_a_record_and_from_yaml(name: str, tmp_path: Path) -> None:
    recipe = load_task(name)
    assert isinstance(recipe, MaskedLMRecipe | CausalLMRecipe)
    assert task_from_dict(recipe.model_dump(mode="json")) == recipe
    (tmp_path / "copy.yaml").write_text(to_yaml(recipe), encoding="utf-8")
    again = load_task(str(tmp_path / "copy.yaml"))
    assert again.model_dump(exclude={"name"}) == recipe.model_dump(exclude={"name"})


def test_all_that_may_be_said(tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text(
        "family: masked_lm\ncolumns: {document: book}\nwhole_word: true\nmask_fraction: 0.3\n"
        "tokenizer: {kind: byte_bpe, vocab_size: 500}\n"
        "cleaning: {unicode: NFC, duplicate_texts: true, min_characters: 3}\n"
    )
    recipe = load_task(str(tmp_path / "task.yaml"))
    assert isinstance(recipe, MaskedLMRecipe)
    assert recipe.tokenizer == TokenizerRecipe(kind="byte_bpe", vocab_size=500)
    assert recipe.cleaning == Cleaning(unicode="NFC", duplicate_texts=True, min_characters=3)
    assert task_from_dict(recipe.model_dump(mode="json")) == recipe
    (tmp_path / "task.yaml").write_text("family: causal_lm\ntokenizer: some/model\n")
    assert load_task(str(tmp_path / "task.yaml")).tokenizer == "some/model"


def test_every_fault_is_told_at_once_with_its_line(tmp_path: Path) -> None:
    said = faults(
        tmp_path,
        "family: masked_lm\n"
        "tokenizer: {kind: bpe, vocab_size: 10}\n"
        "cleaning: {unicode: NFD, lines: true, min_characters: 10, max_characters: 5}\n"
        "mask_fraction: 1.5\n"
        "next_sentence: true\n"
        "pack: false\n"
        "columns: {txt: a}\n"
        'document_begins: "("\n',
    )
    for part in (
        "task.yaml:2: tokenizer.kind: expected 'wordpiece' or 'byte_bpe', got 'bpe'",
        "task.yaml:2: tokenizer.vocab_size: expected a number of at least 300, got 10",
        "task.yaml:3: cleaning.lines: unknown key 'lines'; known: duplicate_lines, duplicate_texts",
        "task.yaml:3: cleaning.unicode: expected 'NFC' or 'NFKC', got 'NFD'",
        "task.yaml:3: cleaning.min_characters: 10 is more than max_characters, 5",
        "task.yaml:4: mask_fraction: expected a number less than 1, got 1.5",
        "task.yaml:6: pack: has no meaning beside next_sentence",
        "task.yaml:7: columns.txt: unknown column 'txt' (did you mean 'text'?)",
        "task.yaml:8: document_begins: '(' is not a regular expression",
    ):
        assert part in said
    assert "9 problems" in said


def test_faults_of_causal_recipes(tmp_path: Path) -> None:
    said = faults(
        tmp_path,
        "family: causal_lm\nnext_sentence: true\ngeneration: {eos_token_id: 3, num_return_sequences: 2,"
        " num_beam: 2}\n"
        "separate_document: true\n",
    )
    assert "next_sentence: unknown key 'next_sentence'" in said
    assert "generation.eos_token_id: cannot be set here: it is the tokenizer's" in said
    assert "generation.num_return_sequences: cannot be set here: a text has one continuation" in said
    assert "generation.num_beam: unknown GenerationConfig name 'num_beam' (did you mean 'num_beams'?)" in said
    assert "(did you mean 'separate_documents'?)" in said
