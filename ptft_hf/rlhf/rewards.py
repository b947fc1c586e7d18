"""What says how good an answer is: classifiers, functions, reward models on the policy's base, and sums of these.

How they are written :mod:`ptft_hf.rlhf.reward_names` says.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from ptft_hf import card, checkpoints, inference, models, recipes, tasks
from ptft_hf.errors import ModelError, RecipeError, did_you_mean
from ptft_hf.rlhf import rollouts
from ptft_hf.rlhf.reward_names import Function, Spec, import_function, names_function, parse, sources
from ptft_hf.rlhf.roles import Role
from ptft_hf.rlhf.rollouts import Rollouts
from ptft_hf.tasks.preference import Preference


class Answered(NamedTuple):
    """Prompts with their answers: as text, without special tokens, and as the policy's own ids."""

    prompts: list[str]
    answers: list[str]
    rollouts: Rollouts
    sources: list[Any] | None = None
    """The prompts as the data has them, texts or messages; None where they are the same as ``prompts``."""

    def take(self, rows: torch.Tensor) -> Answered:
        """Some of them."""
        prompts, answers = ([texts[i] for i in rows] for texts in (self.prompts, self.answers))
        sources = None if self.sources is None else [self.sources[i] for i in rows]
        return Answered(prompts, answers, self.rollouts.take(rows), sources)

    def pairs(self) -> list[dict[str, Any]]:
        """Prompts and answers as a reward model of the family ``preference`` takes them."""
        sources = self.prompts if self.sources is None else self.sources
        return [{"prompt": p, "answer": a} for p, a in zip(sources, self.answers, strict=True)]


class Reward(Protocol):
    """A score for each answer; higher is better."""

    name: str

    def __call__(self, batch: Answered) -> list[float]:
        """``N`` scores."""


LARGEST = torch.finfo(torch.float32).max


class WeightedSum:
    """The sum of rewards, each times its weight; what each said is kept for the log.

    Args:
        rewards: At least one.
        weights: One for each.
    """

    def __init__(self, rewards: Sequence[Reward], weights: Sequence[float]) -> None:
        self.rewards, self.weights = list(rewards), list(weights)
        self.name = " + ".join(
            r.name if w == 1 else f"{w:g} * {r.name}" for r, w in zip(self.rewards, self.weights, strict=True)
        )

    def parts(self, batch: Answered) -> dict[str, list[float]]:
        """Scores of each reward, without its weight, by its name."""
        return {reward.name: checked(reward, batch) for reward in self.rewards}

    def total(self, parts: dict[str, list[float]]) -> list[float]:
        """The weighted sum of what :meth:`parts` gave."""
        columns = [[w * s for s in parts[r.name]] for r, w in zip(self.rewards, self.weights, strict=True)]
        return [sum(row) for row in zip(*columns, strict=True)]

    def __call__(self, batch: Answered) -> list[float]:
        return self.total(self.parts(batch))


def checked(reward: Reward, batch: Answered) -> list[float]:
    """The reward's scores, one finite number for each answer.

    Raises:
        ModelError: It gave something else.
    """
    given: Any = reward(batch)
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise ModelError(f"reward {reward.name}: gave {given!r}, not a list with one score for each answer")
    scores = [score.tolist() if hasattr(score, "tolist") else score for score in given]
    if len(scores) != len(batch.answers):
        raise ModelError(f"reward {reward.name}: {len(scores)} scores for {len(batch.answers)} answers")
    for score, answer in zip(scores, batch.answers, strict=True):
        if not isinstance(score, int | float) or not abs(score) <= LARGEST:
            raise ModelError(
                f"reward {reward.name}: {score!r} is no finite number in float32; it is of the answer {answer[:80]!r}"
            )
    return [float(score) for score in scores]


# ---- kinds of rewards ----


class FunctionReward:
    """A Python function of prompts and answers."""

    def __init__(self, function: Function, name: str | None = None) -> None:
        self.function = function
        self.name = str(name or getattr(function, "__name__", type(function).__name__))

    def __call__(self, batch: Answered) -> Any:
        try:
            scores = self.function(list(batch.prompts), list(batch.answers))
        except Exception as error:  # it is the user's own code that runs
            *_, place = traceback.extract_tb(error.__traceback__)
            what = f"{type(error).__name__}: {error} ({place.filename}, line {place.lineno})"
            raise ModelError(f"reward {self.name}: {what}") from error
        return scores.tolist() if hasattr(scores, "tolist") else scores


class Form(NamedTuple):
    """How a reward model of the family ``preference`` reads prompt and answer: as when it was trained, whatever the
    policy's own prompts look like. An answer that was cut off is read as if it had ended there."""

    task: Preference
    tokenizer: Any
    max_length: int

    def rollouts(self, batch: Answered) -> Rollouts:
        """Each answer behind its prompt; for the last token alone, where the score stands, the mask is 1."""
        import datasets

        rows = datasets.Dataset.from_list([self.task.input_row(pair, ()) for pair in batch.pairs()])
        read = self.task.encode(rows, self.tokenizer, self.max_length)[0]["input_ids"][:]
        return rollouts.collate(
            [ids[:-1] for ids in read], [ids[-1:] for ids in read], frozenset(), 0, batch.rollouts.ids.device
        )


def form_of(folder: Path) -> Form | None:
    """That of a run's folder, if it trained a reward model of the family ``preference``."""
    if not (folder / "run.json").is_file():
        return None
    run = checkpoints.read_json(folder / "run.json")
    if run["task"]["family"] != "preference" or card.is_policy(run):
        return None
    task = tasks.build(recipes.task_from_dict(run["task"]))
    assert isinstance(task, Preference)
    task.restore(run["task_state"])
    return Form(task, models.load_tokenizer(str(folder)), run["model"]["max_length"])


class AdapterReward:
    """A reward model that is an adapter on the policy's own base.

    Args:
        role: Plays it.
        name: Its folder.
        batch_size: Answers that it reads together.
        form: What it reads; None reads the policy's ids.
    """

    def __init__(self, role: Role, name: str, batch_size: int, form: Form | None = None) -> None:
        self.role, self.name, self.batch_size, self.form = role, name, batch_size, form

    @torch.no_grad()
    def __call__(self, batch: Answered) -> list[float]:
        read = batch.rollouts if self.form is None else self.form.rollouts(batch)
        scores: list[float] = []
        with self.role.playing():
            for rows in torch.arange(len(batch.answers)).split(self.batch_size):  # type: ignore[no-untyped-call]
                scores += self.role.scores(read.take(rows)).tolist()
        return scores


class PreferenceReward:
    """A run of the family ``preference`` as a model of its own: it reads prompt and answer as when it was trained."""

    def __init__(self, trained: inference.TrainedModel, name: str, batch_size: int) -> None:
        self.trained, self.name, self.batch_size = trained, name, batch_size

    def __call__(self, batch: Answered) -> list[float]:
        return [found["score"] for found in self.trained.predict(batch.pairs(), batch_size=self.batch_size)]


class ClassifierReward:
    """A classifier with a tokenizer of its own, which reads prompt and answer as one text, or the answer only.

    Args:
        model: The classifier.
        tokenizer: Its own.
        column: Which output counts.
        spec: Whether its logit counts, or its probability (with one output the logit is the score), and whether the
            answer alone is read.
        max_length: Tokens; of longer texts the end is read, where the answer stands.
        fingerprint: Of a checkpoint's weights; None of a run's folder.
    """

    def __init__(
        self, model: Any, tokenizer: Any, column: int, spec: Spec, max_length: int, name: str, batch_size: int,
        fingerprint: str | None,
    ) -> None:  # fmt: skip
        self.fingerprint = fingerprint
        self.model, self.tokenizer, self.column, self.spec = model, tokenizer, column, spec
        self.max_length, self.name, self.batch_size = max_length, name, batch_size
        tokenizer.truncation_side = "left"

    @torch.no_grad()
    def __call__(self, batch: Answered) -> list[float]:
        if self.spec.answer:
            texts = [answer.strip() for answer in batch.answers]
        else:
            texts = [prompt + answer for prompt, answer in zip(batch.prompts, batch.answers, strict=True)]
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
        scores = [0.0] * len(texts)
        device = next(self.model.parameters()).device
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            options = {"padding": True, "truncation": True, "max_length": self.max_length}
            inputs = self.tokenizer([texts[i] for i in rows], return_tensors="pt", **options).to(device)
            logits = self.model(**inputs).logits.float()
            wanted = logits if self.spec.logit or logits.shape[1] == 1 else self._chances(logits)
            for row, score in zip(rows, wanted[:, self.column].tolist(), strict=True):
                scores[row] = score
        return scores

    def _chances(self, logits: torch.Tensor) -> torch.Tensor:
        """``[B, labels]`` probabilities: of labels that exclude each other, or of each for itself."""
        kind = models.plain_model(self.model).config.problem_type
        return torch.sigmoid(logits) if kind == "multi_label_classification" else torch.softmax(logits, 1)


# ---- from what was given ----


def build(
    given: Sequence[Any], on_base: Callable[[Path], Role | None], batch_size: int, prefix: str = "--reward"
) -> WeightedSum:
    """Rewards from strings (:func:`parse`), functions, or objects that are rewards already.

    Args:
        given: At least one.
        on_base: The part that plays a folder's reward model, if it is one on the policy's own base.
        batch_size: Answers that classifiers read together.
        prefix: What error messages call them.

    Raises:
        RecipeError: A name cannot be read or imported, or a label is not known.
        ModelError: A classifier cannot be loaded.
    """
    rewards: list[Reward] = []
    weights = []
    for item in given:
        spec = parse(item) if isinstance(item, str | Path) and (item := str(item)) else None
        weights.append(1.0 if spec is None else spec.weight)
        rewards.append(_reward(item if spec is None else spec, on_base, batch_size, prefix))
    names = [reward.name for reward in rewards]
    for i, reward in enumerate(rewards):
        if names.count(reward.name) > 1:
            reward.name = f"{reward.name} ({i + 1})"
    return WeightedSum(rewards, weights)


def contents(given: Iterable[Any], *others: str | Path) -> dict[str, str]:
    """As :func:`ptft_hf.checkpoints.contents`, of what rewards are from, and of ``others``; and of functions the file
    that they stand in.

    Raises:
        RecipeError: As :func:`ptft_hf.rlhf.reward_names.parse`, or a function cannot be imported.
        CheckpointError: A file cannot be read.
    """
    named = sources(given)
    found = checkpoints.contents([*others, *named])
    for source in filter(names_function, named):
        import_function(source, "--reward")
        file = getattr(sys.modules[source.partition(":")[0]], "__file__", None)
        if file is not None and Path(file).is_file():
            found[source] = f"sha256:{checkpoints.sha256(Path(file))}"
    return found


def check_named(text: str, prefix: str) -> None:
    """Refuse a reward that PPO could not use; a folder of the family ``preference`` is believed, for its base is
    large, and all else is loaded.

    Args:
        text: As :func:`parse` takes it.
        prefix: What error messages call it.

    Raises:
        PtftError: As :func:`build`.
    """
    spec = parse(text)
    if spec.end or form_of(Path(spec.source)) is None:
        build([text], lambda _: None, 1, prefix)


def _reward(item: Any, on_base: Callable[[Path], Role | None], batch_size: int, prefix: str) -> Reward:
    if not isinstance(item, Spec):
        if not callable(item):
            raise RecipeError(f"{prefix}: {item!r} is neither a text, nor a function, nor a reward")
        reward: Reward = item if hasattr(item, "name") else FunctionReward(item)
        return reward
    path = Path(item.source)
    if names_function(item.source):
        if item.end:
            raise RecipeError(f"{prefix} {item.source}: a function has no labels; leave {item.end} out")
        return FunctionReward(import_function(item.source, prefix), item.source)
    role = on_base(path) if path.is_dir() and not item.end else None
    if role is not None:
        return AdapterReward(role, str(path), batch_size, form_of(path))
    return load_classifier(item, batch_size, prefix)


def load_classifier(spec: Spec, batch_size: int, prefix: str) -> ClassifierReward | PreferenceReward:
    """Any sequence-classification checkpoint, or the folder of a run that trained one, or a reward model.

    Raises:
        ModelError: It cannot be loaded, or has no head for sequence classification of its own.
        CheckpointError: The folder of a run is damaged, or needs code of its own, which no flag allows here.
        RecipeError: It has several labels and none, or an unknown one, was named.
    """
    if (Path(spec.source) / "run.json").is_file():
        trained = inference.load(spec.source)
        if isinstance(trained.task, Preference):
            if spec.end:
                raise RecipeError(f"{prefix} {spec.source}: a reward model has no labels; leave {spec.end} out")
            return PreferenceReward(trained, spec.source, batch_size)
        model, tokenizer = trained.model, trained.tokenizer
        length, digest = trained.run["model"]["max_length"], None
    else:
        loaded = models.load_model(spec.source, "AutoModelForSequenceClassification", config={})
        if loaded.new:
            raise ModelError(
                f"{prefix} {spec.source}: no sequence classifier: {sorted(loaded.new)[:3]} are not in the checkpoint"
            )
        model, tokenizer, digest = loaded.model, models.load_tokenizer(spec.source), loaded.fingerprint
        models.ensure_padding(model, tokenizer)
        length = models.longest_input(model, tokenizer, None, 0)
    plain = models.plain_model(model)
    if not hasattr(plain.config, "id2label") or "SequenceClassification" not in type(plain).__name__:
        raise ModelError(f"{prefix} {spec.source}: {type(plain).__name__} is no sequence classifier")
    labels = [str(plain.config.id2label[i]) for i in range(plain.config.num_labels)]
    column = _column(labels, spec, prefix)
    name = spec.source + spec.end
    return ClassifierReward(model.eval(), tokenizer, column, spec, length, name, batch_size, digest)


def _column(labels: list[str], spec: Spec, prefix: str) -> int:
    if spec.label in labels:
        return labels.index(spec.label)
    if spec.label is None and len(labels) == 1:
        return 0
    known = f"it has {', '.join(labels[:20])}"
    if spec.label is None:
        raise RecipeError(f"{prefix} {spec.source}: say which label is the reward: {spec.source}#LABEL; {known}")
    near = did_you_mean(spec.label, labels)
    raise RecipeError(f"{prefix} {spec.source}: has no label {spec.label!r}{near}; {known}")
