"""Answers sampled from one model or several, for people to compare."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ptft_hf import models, recipes, report
from ptft_hf.errors import DataError, ModelError, OutputError, RecipeError
from ptft_hf.feedback.store import Answer, Store, check_place
from ptft_hf.recipes.ppo import config_of
from ptft_hf.recipes.prompts import PromptsRecipe
from ptft_hf.rlhf.decoders import load_decoder
from ptft_hf.rlhf.rollouts import answer_text
from ptft_hf.tasks import generation
from ptft_hf.tasks.prompts import Prompt, Prompts

AT_ONCE = 32
"""Answers that are written together, and prompts between two commits."""


class Generated(NamedTuple):
    """What a call has added."""

    prompts: int
    """Prompts that got answers."""
    answers: int
    cut_off: int
    """Answers without an end within ``max_new_tokens``."""
    pairs: int


class Sampling(NamedTuple):
    """How answers are drawn; one database holds answers drawn alike."""

    task: str
    split: str
    temperature: float
    max_new_tokens: int
    seed: int


def generate(
    model: str | Path | Sequence[str | Path],
    task: str | Path | PromptsRecipe,
    database: str | Path,
    *,
    data: Any = None,
    answers: int = 2,
    split: str = "train",
    prompts: int | None = None,
    temperature: float | None = None,
    max_new_tokens: int | None = None,
    seed: int = 42,
    dtype: str = "float32",
) -> Generated:
    """Sample answers to prompts and store them, and all pairs of a prompt's answers (Ouyang et al. 2022 had all pairs
    judged, too). Answers that are there already are not drawn again, so one that was stopped goes on; more models,
    prompts and answers can be added later.

    Args:
        model: One decoder or several: Hub ids, checkpoints, or folders of runs, adapters among them.
        task: A catalogue name, a file, or a recipe of the family ``prompts``.
        database: Made if it is not there.
        data: Instead of the recipe's own; what :func:`ptft_hf.train` takes.
        answers: To each prompt, by the models in turn.
        split: ``train``, ``validation`` or ``test``.
        prompts: The first so many, those that stand there twice once; None: all.
        temperature: Of the distribution that is sampled from, which is not cut. None: the recipe's ``ppo`` one, else
            PPO's default, so that people judge what PPO would be trained on.
        max_new_tokens: The longest answer. None: the recipe's ``response_length``, else PPO's default.
        seed: Of answers, and of splits that are made.
        dtype: Computed in; ``float32``, ``bfloat16`` or ``float16``.

    Raises:
        RecipeError: The task is none of prompts, or its ``ppo`` options mean nothing.
        DataError: Options mean nothing, or the prompts cannot be read.
        ModelError: A model cannot be loaded, or is no decoder.
        OutputError: The database holds answers that were drawn otherwise, or cannot be written.
    """
    recipe = check_task(task)
    defaults, problems = config_of(recipe.ppo, recipe.name, {})
    if defaults is None:
        raise RecipeError(*problems)
    sampling = Sampling(
        *(recipe.name, split, defaults.temperature if temperature is None else temperature),
        *(defaults.response_length if max_new_tokens is None else max_new_tokens, seed),
    )
    sources = [str(one) for one in ([model] if isinstance(model, str | Path) else model)]
    check_options(sampling, sources, answers, prompts)
    source = recipe.data if data is None else data
    if source is None:
        raise DataError(f"{recipe.name}: names no data; add data: to the recipe, or pass data in Python")
    splits = Prompts(recipe).load_splits(source, seed)
    for note in splits.notes:
        report.say(f"- {note}")
    rows = distinct(getattr(splits, split), prompts)
    check_database(database, sampling)
    options = recipe.model_options
    added, read = [], set[str]()
    for place, name in enumerate(sources):
        decoder = load_decoder(name, dtype, options)
        found = read_prompts(recipe, name, decoder, rows)
        texts = {prompt.text for prompt in found}
        if read and read.isdisjoint(texts):
            raise ModelError(
                f"{name}: reads the prompts otherwise than {sources[0]} (by another tokenizer or chat template), so "
                "that no two answers are to the same text; give the prompts as whole texts, or models of one kind"
            )
        read = read or texts
        with Store(database, create=True) as store:
            check_same(store, sampling)
            each = len(range(place, answers, len(sources)))
            added.append(write(store, name, decoder, each, found, sampling))
    answered = {text for one in added for text in one[0]}
    return Generated(len(answered), *(sum(counts) for counts in list(zip(*added, strict=True))[1:]))


def distinct(rows: Any, count: int | None) -> Any:
    """The first so many rows whose prompts differ."""
    first: dict[str, int] = {}
    for place, prompt in enumerate(rows["prompt"]):
        first.setdefault(json.dumps(prompt), place)
    return rows.select(list(first.values())[:count])


def check_task(task: str | Path | PromptsRecipe) -> PromptsRecipe:
    """The recipe.

    Raises:
        RecipeError: It is none of prompts.
    """
    recipe = recipes.load_task(str(task)) if isinstance(task, str | Path) else task
    if not isinstance(recipe, PromptsRecipe):
        raise RecipeError(f"{recipe.name}: a recipe of the family prompts is needed, not of {recipe.family}")
    return recipe


def check_options(sampling: Sampling, sources: Sequence[str], answers: int, prompts: int | None) -> None:
    """Refuse values that mean nothing.

    Raises:
        DataError: With every fault.
    """
    faults = []
    if not sources or len(set(sources)) < len(sources):
        faults.append(f"models: {', '.join(sources) or 'none'}: name at least one, and each once")
    if answers < max(2, len(sources)):
        faults.append(f"answers: {answers} is not at least 2, and one of each model")
    if sampling.split not in ("train", "validation", "test"):
        faults.append(f"split: {sampling.split!r} is none of train, validation, test")
    if not 0 < sampling.temperature < float("inf"):
        faults.append(f"temperature: {sampling.temperature} is not above 0, and at 0 all answers are the same")
    if sampling.max_new_tokens < 1:
        faults.append(f"max_new_tokens: {sampling.max_new_tokens} is not at least 1")
    if prompts is not None and prompts < 1:
        faults.append(f"prompts: {prompts} is not at least 1")
    if not 0 <= sampling.seed < 2**32:
        faults.append(f"seed: {sampling.seed} is not a number from 0 to 2**32 - 1")
    if faults:
        raise DataError(*faults)


def check_database(database: str | Path, sampling: Sampling) -> None:
    """Refuse what could not be written, before models are loaded; makes nothing.

    Raises:
        OutputError: See :func:`generate`.
        DataError: A file of another kind is there.
    """
    check_place(Path(database))
    if Path(database).exists():
        with Store(database) as store:
            check_same(store, sampling)


def check_same(store: Store, sampling: Sampling) -> None:
    """Note how answers are drawn, or compare it with what was noted when the first were.

    Raises:
        OutputError: They were drawn otherwise.
    """
    noted = store.setting("sampling")
    if noted is None:
        store.set_setting("sampling", json.dumps(sampling._asdict()))
        return
    before = json.loads(noted)
    other = [
        f"{store.path}: its answers were drawn with {name} {before.get(name)!r}, not {value!r}; choose another file"
        for name, value in sampling._asdict().items()
        if before.get(name) != value
    ]
    if other:
        raise OutputError(*other)


def read_prompts(recipe: PromptsRecipe, source: str, decoder: tuple[Any, Any], rows: Any) -> list[Prompt]:
    """The prompts as a model reads them, without those that are too long for it, which are counted aloud."""
    model, tokenizer = decoder
    longest = models.longest_input(model, tokenizer, recipe.model.get("max_length"))
    found, notes = Prompts(recipe).encode(rows, tokenizer, longest)
    for note in notes:
        report.say(f"- {source}: {note}")
    return found


def write(
    store: Store,
    source: str,
    decoder: tuple[Any, Any],
    each: int,
    prompts: Sequence[Prompt],
    sampling: Sampling,
) -> tuple[set[str], int, int, int]:
    """Draw and store ``each`` answers of one model to every prompt that has fewer.

    Returns:
        Prompts that got answers, and numbers of answers, of those that were cut off, and of new pairs.
    """
    model, tokenizer = decoder
    note_sources(store, prompts)
    there = store.answered()
    wanted = [prompt for prompt in prompts if there.get((prompt.text, source), 0) < each]
    report.say(f"- {source}: {len(wanted):,} of {len(prompts):,} prompts are to be answered")
    fields = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}
    fields |= {"max_new_tokens": sampling.max_new_tokens, "num_beams": 1}
    ends = generation.settle(model, tokenizer, tokenizer.eos_token_id, fields)
    answers = cut = pairs = 0
    with report.bar(len(wanted), "Writing", "prompt", stays=False) as bar:
        for start in range(0, len(wanted), AT_ONCE):
            some = wanted[start : start + AT_ONCE]
            written, ended = _draw(model, tokenizer, some, each, ends, source, sampling)
            answers, cut = answers + len(ended), cut + ended.count(False)
            pairs += store.add(
                [(p.text, [Answer(source, i, text) for i, text in enumerate(texts)])
                 for p, texts in zip(some, written, strict=True)],
                [p.source for p in some],
            )  # fmt: skip
            bar.update(len(some))
    return {prompt.text for prompt in wanted}, answers, cut, pairs


def note_sources(store: Store, prompts: Sequence[Prompt]) -> None:
    """Note how the data has those prompts of which an earlier version stored only what the model read, and forget
    scores of a reward model that has read that instead of messages."""
    unknown = store.without_given()
    found = [prompt for prompt in prompts if prompt.text in unknown]
    store.add([(prompt.text, []) for prompt in found], [prompt.source for prompt in found])
    if any(prompt.source != prompt.text for prompt in found):
        store.forget_scores()


def _draw(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    each: int,
    ends: Sequence[int],
    source: str,
    sampling: Sampling,
) -> tuple[list[list[str]], list[bool]]:
    """Texts of each prompt's answers, and whether each answer has an end. The seed follows from the prompts, so that
    one that was stopped goes on with the answers that it would have drawn, and from the model's name without the
    folders above it, so that they are the same wherever it lies."""
    given = json.dumps([sampling.seed, Path(source).name, [prompt.text for prompt in prompts]])
    torch.manual_seed(int.from_bytes(hashlib.sha256(given.encode()).digest()[:4], "big"))
    ids = [prompt.ids for prompt in prompts for _ in range(each)]
    options: dict[str, Any] = {"pad_token_id": tokenizer.pad_token_id, "ends": ends, "has_encoder": False}
    written = generation.generate(model, ids, batch_size=AT_ONCE, **options)
    texts = [answer_text(tokenizer, prompt, answer) for prompt, (answer, _) in zip(ids, written, strict=True)]
    return [texts[i : i + each] for i in range(0, len(texts), each)], [ended for _, ended in written]


# ---- models ----

CAUSAL = "AutoModelForCausalLM"
