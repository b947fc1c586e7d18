"""From a checkpoint to a policy in stages, each a folder with its ``run.json``: :func:`run_pipeline`.

A stage is known by its inputs: its recipes, the data's fingerprints, the files of models and rewards that are
folders or functions, and the ``run.json`` of the stages that it builds on. One that has finished with the same inputs
is passed over, one that was stopped goes on, one whose inputs have changed is run anew, and with it all that follow.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ptft_hf import checkpoints, data, feedback, recipes, records, report, tasks
from ptft_hf.card import figures_of_policy
from ptft_hf.comparing import pages
from ptft_hf.comparing.pages import Section, Table
from ptft_hf.errors import DataError, OutputError, PtftError, RecipeError
from ptft_hf.recipes.pipeline import PipelineRecipe, load_pipeline
from ptft_hf.recipes.pipeline_stages import FeedbackStage, Stage
from ptft_hf.recipes.ppo import load_ppo
from ptft_hf.rlhf import rewards
from ptft_hf.rlhf.evaluating import evaluate_policy
from ptft_hf.rlhf.ppo import train_ppo
from ptft_hf.rlhf.reward import train_reward
from ptft_hf.rlhf.sft import train_sft
from ptft_hf.tasks.prompts import Prompts

RECORD = "pipeline.json"
REPLACED = "replaced"
TITLES = {
    "sft": "Supervised fine-tuning",
    "feedback": "What people prefer",
    "reward": "The reward model",
    "ppo": "PPO",
    "evaluation": "The policy against where it started",
}


def run_pipeline(pipeline: str | Path | PipelineRecipe, output_dir: str | Path) -> dict[str, Any]:
    """Run all stages that are not done, and write ``report.md`` and ``report.html``.

    Args:
        pipeline: A YAML file (:func:`ptft_hf.recipes.pipeline.load_pipeline`) or what it holds.
        output_dir: Folder of the stages: ``sft``, ``feedback``, ``reward``, ``ppo`` and ``evaluation``.

    Returns:
        The content of each stage's ``run.json``, by stage.

    Raises:
        DataError: People have to judge answers first; the message says how.
        PtftError: A subclass says what is wrong.
    """
    recipe = pipeline if isinstance(pipeline, PipelineRecipe) else load_pipeline(pipeline)
    stages = Stages(recipe, Path(output_dir))
    stages.check_rewards()
    if recipe.sft is not None:
        stages.train("sft", recipe.sft)
    if recipe.feedback is not None:
        stages.feedback(recipe.feedback)
    if recipe.reward is not None:
        stages.train("reward", recipe.reward)
    stages.ppo()
    if recipe.evaluation is not None:
        stages.evaluate()
    sections = findings(stages.found)
    for name, text in (("report.md", pages.markdown(TITLE, sections)), ("report.html", pages.html(TITLE, sections))):
        checkpoints.write_text(stages.folder / name, text)
    report.say(f"{stages.folder / 'report.md'}\n{stages.folder / 'report.html'}")
    return stages.found


class Stages:
    """The stages' folders, and what is known of them.

    Raises:
        OutputError: The folder holds something else.
    """

    def __init__(self, recipe: PipelineRecipe, folder: Path) -> None:
        self.recipe, self.folder = recipe, folder
        self.found: dict[str, Any] = {}
        self.contents = functools.cache(lambda reference: checkpoints.contents([reference]))
        if folder.exists() and not (folder / RECORD).is_file() and any(folder.iterdir()):
            raise OutputError(f"{folder}: holds other files; choose an empty or a new folder")
        folder.mkdir(parents=True, exist_ok=True)
        self.known = checkpoints.read_json(folder / RECORD) if (folder / RECORD).is_file() else {}

    def check_rewards(self) -> None:
        """Have what PPO and the evaluation name as rewards and judges refused now, not after hours of training.

        Raises:
            RecipeError: With all that is wrong with them.
        """
        ppo, last, problems = self.recipe.ppo, self.recipe.evaluation, list[str]()
        named = [*(("ppo", "reward", one) for one in ppo.reward), ("ppo", "judge", ppo.judge)]
        for stage, name, text in [*named, ("evaluation", "judge", last.judge if last else None)]:
            if text is None or (self.folder / stage / "run.json").is_file():
                continue  # there is none, or maybe nothing of it is to be run
            try:
                rewards.check_named(text, name)
            except PtftError as error:
                problems += [f"{stage}: {problem}" for problem in error.problems]
        if problems:
            raise RecipeError(*dict.fromkeys(problems))

    def run(
        self, name: str, inputs: Mapping[str, Any], action: Callable[..., Any], holds: bool = True
    ) -> None:
        """Run a stage, if it is not done with these inputs; ``action`` is given ``resume`` and ``overwrite``. Where
        it does not hold any more, what was done goes on."""
        place, digest, earlier = self.folder / name, _digest(inputs), self._inputs_of(name)
        same = earlier == digest
        report.say(f"\n{TITLES[name]} ({place})", style="bold")
        if same and holds and (place / "run.json").is_file():
            report.say("- finished, and nothing that it builds on has changed")
        else:
            if name in self.known and not same:
                report.say("- what it builds on has changed: it is run anew")
            begun = place.is_dir() and any(place.iterdir())
            self._note(name, digest, (earlier, _state(place)) if begun and not same else None)
            action(resume=same and begun, overwrite=begun and not same)
            self._note(name, digest, None)
            gc.collect()
        self.found[name] = checkpoints.read_json(place / "run.json")

    def _inputs_of(self, name: str) -> str | None:
        """The digest of the inputs of what is in a stage's folder. A stage that was to be run anew may have been
        refused, or stopped, before it touched what was there."""
        earlier, state = self.known.get(REPLACED, {}).get(name, (None, None))
        found: str | None = self.known.get(name) if state is None or _state(self.folder / name) != state else earlier
        return found

    def _note(self, name: str, digest: str, replaced: tuple[str | None, str | None] | None) -> None:
        """With what inputs a stage is run, and which run it is to replace, if any."""
        others = {stage: one for stage, one in self.known.get(REPLACED, {}).items() if stage != name}
        self.known |= {name: digest, REPLACED: others | ({name: replaced} if replaced else {})}
        checkpoints.write_text(self.folder / RECORD, json.dumps(self.known, indent=1))

    def before(self, *names: str) -> dict[str, str]:
        """What identifies the stages that another builds on."""
        runs = {name: self.folder / name / "run.json" for name in names if name in self.found}
        return {name: hashlib.sha256(run.read_bytes()).hexdigest() for name, run in runs.items()}

    def train(self, name: str, stage: Stage) -> None:
        task, adapter, overrides = recipes.load_run(stage.task, stage.adapter, stage.set)
        task = task.model_copy(update=self.preferred() if name == "reward" else {})
        model = stage.model or self.recipe.model
        family = tasks.build(task)
        splits = tasks.load_splits(family, task.data, task, self.recipe.seed)
        inputs = {
            "model": model,
            "contents": self.contents(model),
            "seed": self.recipe.seed,
            "task": _said(task),
            "adapter": _said(adapter),
            "training": overrides.training,
            "data": {split: data.fingerprint(getattr(splits, split)) for split in ("train", "validation", "test")},
        }

        def action(**how: bool) -> None:
            (train_sft if name == "sft" else train_reward)(
                model=model,
                task=task,
                adapter=stage.adapter,
                output_dir=self.folder / name,
                seed=self.recipe.seed,
                settings=stage.set,
                **how,
            )

        self.run(name, inputs, action)

    def preferred(self) -> dict[str, Any]:
        """The data of the reward model's recipe, if people have been asked."""
        if "feedback" not in self.found:
            return {}
        file = self.folder / "feedback" / PREFERENCES
        return {"data": recipes.DataSource(path="json", data_files={"train": str(file)})}

    def feedback(self, stage: FeedbackStage) -> None:
        place = self.folder / "feedback"
        database, run = place / ANSWERS, place / "run.json"
        policy = str(self.folder / "sft") if "sft" in self.found else self.recipe.model
        task = feedback.check_task(stage.task)
        splits = Prompts(task).load_splits(task.data, self.recipe.seed)
        inputs = {
            "model": self.recipe.model,
            "contents": self.contents(self.recipe.model),
            "seed": self.recipe.seed,
            "task": _said(task),
            "stage": stage.model_dump(mode="json", exclude={"judged"}),
            "data": data.fingerprint(splits.train),
            "before": self.before("sft"),
        }

        def action(resume: bool, overwrite: bool) -> None:
            place.mkdir(exist_ok=True)
            if overwrite:
                _put_aside(database)
                run.unlink(missing_ok=True)
            feedback.generate(
                policy, task, database, answers=stage.answers, prompts=stage.prompts, seed=self.recipe.seed
            )
            found = _judgements(database)
            wanted = found["pairs"] if stage.judged is None else min(stage.judged, found["pairs"])
            if found["judged"] < wanted:
                raise DataError(
                    f"{database}: {found['judged']:,} of {wanted:,} pairs are judged; `ptft feedback serve "
                    f"{database}` shows people the rest, and then the same command goes on"
                )
            exported = feedback.export_preferences(database, place / PREFERENCES)
            if not exported.rows:
                raise DataError(
                    f"{database}: of the {found['judged']:,} pairs that are judged none has an answer that most "
                    "prefer, so that the reward model has nothing to learn; raise feedback.judged or feedback.prompts"
                )
            figures = feedback.statistics_of(database)
            content = {**found, "exported": exported._asdict(), "statistics": figures}
            checkpoints.write_text(run, json.dumps(content, indent=1))

        done = checkpoints.read_json(run) if run.is_file() else {}
        holds = database.is_file() and done.get("digest") == _judgements(database)["digest"]
        self.run("feedback", inputs, action, holds)

    def ppo(self) -> None:
        stage, folder = self.recipe.ppo, self.folder
        policy = str(folder / "sft") if "sft" in self.found else self.recipe.model
        own = [str(folder / "reward")] if "reward" in self.found else []
        task, _, config = load_ppo(stage.task, "lora/r16_all_linear", stage.set)
        splits = Prompts(task).load_splits(task.data, self.recipe.seed)
        inputs = {
            "model": self.recipe.model,
            "seed": self.recipe.seed,
            "task": _said(task),
            "settings": config.model_dump(mode="json"),
            "reward": stage.reward,
            "judge": stage.judge,
            "contents": self.contents(self.recipe.model) | rewards.contents([*stage.reward, stage.judge]),
            "data": {split: data.fingerprint(getattr(splits, split)) for split in ("train", "validation")},
            "before": self.before("sft", "reward"),
        }

        def action(**how: bool) -> None:
            train_ppo(
                policy=policy,
                reward=[*own, *stage.reward],
                task=stage.task,
                output_dir=folder / "ppo",
                judge=stage.judge,
                seed=self.recipe.seed,
                settings=stage.set,
                **how,
            )

        self.run("ppo", inputs, action)

    def evaluate(self) -> None:
        stage, ppo = self.recipe.evaluation, self.recipe.ppo
        assert stage is not None
        sets = stage.set or [pair for pair in ppo.set if not pair.startswith("adapter.")]
        task, _, config = load_ppo(stage.task or ppo.task, "full/default", sets)
        splits = Prompts(task).load_splits(task.data, self.recipe.seed)
        inputs = {
            "task": _said(task),
            "settings": config.model_dump(mode="json"),
            "judge": stage.judge,
            "contents": rewards.contents([stage.judge]),
            "data": data.fingerprint(splits.test),
            "prompts": stage.prompts,
            "before": self.before("sft", "ppo"),
        }

        def action(resume: bool, overwrite: bool) -> None:
            evaluate_policy(
                policy=self.folder / "ppo",
                against=self.folder / "sft" if "sft" in self.found else self.recipe.model,
                task=stage.task or ppo.task,
                judge=stage.judge,
                output_dir=self.folder / "evaluation",
                prompts=stage.prompts,
                seed=self.recipe.seed,
                settings=sets,
                overwrite=resume or overwrite,
            )

        self.run("evaluation", inputs, action)


ANSWERS, PREFERENCES = "answers.sqlite", "preferences.jsonl"


def _state(place: Path) -> str | None:
    """What tells the run in a folder from another one with the same inputs; None: nothing does."""
    files = [place / name for name in (records.SETTINGS, "run.json") if (place / name).is_file()]
    return _digest({file.name: file.read_text("utf-8") for file in files}) if files else None


def _judgements(database: Path) -> dict[str, Any]:
    """How many pairs there are and have been judged, and what identifies all that was said of them."""
    with feedback.Store(database) as store:
        said = store.judgements()
        pairs, unknown = store.counts()["pairs"], sorted(store.without_given())
    found = {"said": said, **({"unknown": unknown} if unknown else {})}  # with those, answers are to be exported anew
    return {"pairs": pairs, "judged": len({one.pair for one in said}), "digest": _digest(found)}


def _put_aside(database: Path) -> None:
    """Answers to other prompts, or of another model, are kept with what people have said of them."""
    if not database.is_file():
        return
    free = next(n for n in itertools.count(1) if not database.with_stem(f"{database.stem}-{n}").exists())
    for ending in ("", "-wal", "-shm"):
        file = database.with_name(database.name + ending)
        if file.exists():
            file.rename(database.with_name(f"{database.stem}-{free}{database.suffix}{ending}"))
    report.say(f"- the answers before, and what was said of them, are in {database.stem}-{free}{database.suffix}")


def _said(recipe: Any) -> dict[str, Any]:
    return {name: value for name, value in recipe.model_dump(mode="json").items() if name != "description"}


def _digest(inputs: Mapping[str, Any]) -> str:
    text = json.dumps(inputs, sort_keys=True, default=str)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


# ---- the report ----

TITLE = "From instructions to PPO"


def findings(found: Mapping[str, Any]) -> list[Section]:
    """Sections of the report: the comparison first, then each stage."""
    sections = []
    if "evaluation" in found:
        sections.append(Section(TITLES["evaluation"], 2, list(_compared(found["evaluation"]))))
    for name in ("ppo", "reward", "feedback", "sft"):
        if name in found:
            sections.append(Section(TITLES[name], 2, list(_stage(name, found[name]))))
    return sections


def _compared(run: Mapping[str, Any]) -> Any:
    from ptft_hf.rlhf.evaluating import summary

    text = summary(run)
    yield f"{text[0].upper()}{text[1:]}."
    if run["notes"]:
        yield list(run["notes"])
    rows = [
        [sample["prompt"][-400:], sample[side]["answer"], f"{sample[side]['score']:.3f}"]
        for sample in run["samples"][:6]
        for side in ("against", "policy")
    ]
    labelled = [[("before", "after")[i % 2], *row] for i, row in enumerate(rows)]
    yield Table("Held-out prompts, answered before and after PPO", ["", "prompt", "answer", "score"], labelled, 3)


def _stage(name: str, run: Mapping[str, Any]) -> Any:
    if name == "feedback":
        yield (
            f"{run['judged']:,} of {run['pairs']:,} pairs of answers were judged; {run['exported']['rows']:,} have a "
            "preference, which the reward model learned from."
        )
        return
    training_ = run["training"]
    rate = f"{training_['seconds']:,.0f} s, peak memory {training_['peak_memory_mb']:,.0f} MB"
    adapter, model = run["adapter"]["name"], run["model"]["reference"]
    yield f"{model}, {adapter}, {run['task']['name']}: {run['parameters']['trainable']:,} weights trained in {rate}."
    if name == "ppo":
        yield Table("Over the run", ["", "first updates", "last updates"], figures_of_policy(run))
        yield [f"update {one['update']}: {one['text']}" for one in run["findings"]] or "The doctor found nothing."
        return
    metrics = run["metrics"]
    rows = [
        [metric, *(f"{metrics[split][metric]:.4f}" for split in metrics)] for metric in next(iter(metrics.values()))
    ]
    yield Table("Metrics", ["", *metrics], rows)
    found = run["report"]["test"]
    if "rivals" in found:
        low, high = found["accuracy_interval"]
        yield (
            f"Accuracy on {found['pairs']:,} held-out pairs between {low:.3f} and {high:.3f}; by length alone "
            f"{found['rivals']['length']:.3f}, by a bag of words {found['rivals']['bag_of_words']:.3f}."
        )
