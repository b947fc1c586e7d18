"""A pipeline from instructions to PPO, as its YAML file says it; checked before torch is imported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field, ValidationError

from ptft_hf.errors import RecipeError
from ptft_hf.recipes import load_run
from ptft_hf.recipes.bottleneck import BottleneckRecipe
from ptft_hf.recipes.documents import read
from ptft_hf.recipes.explaining import explain
from ptft_hf.recipes.faults import Fault
from ptft_hf.recipes.models import AdapterRecipe, PeftRecipe, _Strict
from ptft_hf.recipes.pipeline_stages import EvaluationStage, FeedbackStage, PPOStage, Stage
from ptft_hf.recipes.ppo import DEFAULT_ADAPTER, load_ppo

NO_DATA = "{}: names no data; add data: to the recipe"
_S = TypeVar("_S", Stage, FeedbackStage, PPOStage, EvaluationStage)


class PipelineRecipe(_Strict):
    """Stages that lead from a checkpoint to a policy that has been compared with where it started.

    Raises:
        pydantic.ValidationError: If a name is unknown or a value of the wrong type.
    """

    model: str
    """Hub id, ``name@revision`` or folder of the checkpoint on which all stages build."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Of every stage."""
    sft: Stage | None = None
    """Supervised fine-tuning; None starts PPO from the checkpoint itself."""
    feedback: FeedbackStage | None = None
    """People's judgements, from which ``reward`` then learns instead of its recipe's data."""
    reward: Stage | None = None
    """The reward model; None needs ``ppo.reward``."""
    ppo: PPOStage
    evaluation: EvaluationStage | None = None
    """None ends with the policy."""

    @classmethod
    def faults(cls, values: Mapping[str, Any]) -> Iterator[Fault]:
        ppo = values.get("ppo")
        given = ppo.get("reward") if isinstance(ppo, dict) else getattr(ppo, "reward", None)
        if values.get("reward") is None and not given:
            yield ("reward",), "is missing: say how a reward model is trained, or name rewards under ppo.reward"
        elif values.get("reward") is None and values.get("feedback") is not None:
            yield ("reward",), "is missing: nothing else learns from what people prefer (feedback)"


def load_pipeline(file: str | Path) -> PipelineRecipe:
    """Read a pipeline and check every stage's recipes.

    Args:
        file: YAML; recipe files, folders of models and rewards in it are looked for beside it.

    Raises:
        RecipeError: With every fault of the file, and else of all its stages.
    """
    path = Path(file)
    if not path.is_file():
        raise RecipeError(f"{path}: there is no such file")
    document = read(path)
    try:
        pipeline = PipelineRecipe.model_validate(document.values)
    except ValidationError as error:
        for key, message in explain(error, PipelineRecipe, document.values):
            document.problem(key, message)
        raise RecipeError(*document.problems) from None
    if document.problems:
        raise RecipeError(*document.problems)
    pipeline = _beside(pipeline, path.parent.absolute())
    problems = [f"{path}: {stage}: {problem}" for stage, problem in _recipe_faults(pipeline)]
    if problems:
        raise RecipeError(*problems)
    return pipeline


def _beside(pipeline: PipelineRecipe, folder: Path) -> PipelineRecipe:
    """What stands beside the file, by its whole path."""

    def found(reference: str) -> str:
        return str(folder / reference) if (folder / reference).exists() else reference

    def reward(text: str) -> str:
        weight, star, source = text.rpartition("*")
        name, mark, label = source.partition("#")
        return f"{weight}{star}{found(name)}{mark}{label}"

    def stage(given: _S) -> _S:
        changed: dict[str, Any] = {} if given.task is None else {"task": found(given.task)}
        for name in ("adapter", "model"):
            if isinstance(getattr(given, name, None), str):
                changed[name] = found(getattr(given, name))
        if isinstance(given, PPOStage):
            changed["reward"] = [reward(one) for one in given.reward]
        if judge := getattr(given, "judge", None):
            changed["judge"] = reward(str(judge))
        return given.model_copy(update=changed)

    stages = {name: getattr(pipeline, name) for name in ("sft", "feedback", "reward", "ppo", "evaluation")}
    changed = {name: stage(one) for name, one in stages.items() if one is not None}
    return pipeline.model_copy(update={"model": found(pipeline.model), **changed})


def _recipe_faults(pipeline: PipelineRecipe) -> Iterator[tuple[str, str]]:
    """Stage and fault."""
    start: AdapterRecipe | None = None
    for name, family in (("sft", "instruction"), ("reward", "preference")):
        stage: Stage | None = getattr(pipeline, name)
        if stage is None:
            continue
        try:
            task, adapter, _ = load_run(stage.task, stage.adapter, stage.set)
            if name == "sft" and isinstance(adapter, PeftRecipe | BottleneckRecipe):
                start = adapter  # which PPO trains further
            if task.family != family:
                yield name, f"{task.name}: is a recipe of the family {task.family}; this stage needs {family}"
            if task.data is None and (name == "sft" or pipeline.feedback is None):  # which is what people prefer
                yield name, NO_DATA.format(task.name)
        except RecipeError as error:
            yield from ((name, problem) for problem in error.problems)
    last, asked = pipeline.evaluation, pipeline.feedback
    for name, given, sets, earlier in (
        ("feedback", asked and asked.task, [], None),
        ("ppo", pipeline.ppo.task, pipeline.ppo.set, start),
        ("evaluation", last and (last.task or (last.set and pipeline.ppo.task)), last.set if last else [], None),
    ):
        if not given:
            continue  # there is none, or it has nothing of its own
        try:
            prompts = load_ppo(given, earlier or DEFAULT_ADAPTER, sets, further=earlier is not None)[0]
            if prompts.data is None:
                yield name, NO_DATA.format(prompts.name)
        except RecipeError as error:
            yield from ((name, problem) for problem in error.problems)
