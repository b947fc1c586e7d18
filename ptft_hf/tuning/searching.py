"""The tries of a search, chosen and pruned by optuna, kept in a file, and the run of the best."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers
from rich.markup import escape
from rich.table import Table

from ptft_hf import checkpoints, recipes, report, training
from ptft_hf.errors import AdapterError, ModelError, OutputError, RecipeError
from ptft_hf.inference import TrainedModel
from ptft_hf.preparing import make_plan, prepare, training_arguments
from ptft_hf.recipes.upstream import importable
from ptft_hf.settings import LOWER_IS_BETTER
from ptft_hf.tuning.ranges import Range

STUDY, RESULT, BEST, TRIES = "tune.db", "tune.json", "best", "tries"
FREE_TRIES, FREE_EVALUATIONS = 4, 1
"""No try is pruned before so many others are finished, nor at its own first evaluation, where a warm-up and a small
learning rate look alike."""


def tune(
    *,
    model: str,
    task: str | Path | recipes.TaskRecipe,
    adapter: Any,
    search: Sequence[Range],
    output_dir: str | Path,
    trials: int = 20,
    data: Any = None,
    seed: int = 42,
    settings: Sequence[str] = (),
) -> TrainedModel:
    """Try settings, choose by the validation metric, train the winner once more and read the test set, once.

    Each try is a run as :func:`ptft_hf.train`'s, scored on validation alone; one whose best so far is worse than the
    median of the others at the same evaluation is stopped. All are kept in ``tune.db``: the same call goes on where a
    stopped search was, and with more ``trials`` it searches on. The n-th try draws from ``seed + n``, so that a
    search that was stopped ends as one that was not.

    Args:
        model: As :func:`ptft_hf.train`'s; so are ``task``, ``adapter``, ``data``, ``seed`` and ``settings``.
        search: What is searched.
        output_dir: Gets ``tune.db``, ``tune.json`` (every try) and ``best``, the winner's run.
        trials: How many tries in all.

    Returns:
        The winner, loaded from ``best``.

    Raises:
        RecipeError: Ranges or settings are wrong, or optuna is not installed.
        OutputError: The folder holds something else, or another search.
        ModelError: Every try failed.
    """
    if not importable("optuna"):
        raise RecipeError("ptft tune: needs the package optuna: pip install 'ptft-hf[tune]'")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecipeError("ptft tune: runs in one process; start it without torchrun")
    if trials < 1:
        raise RecipeError(f"trials: {trials} is not at least 1")
    check_ranges(task, adapter, search, settings)
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder = Path(output_dir)
    asked = {
        "model": model,
        "task": _plain(task),
        "adapter": _plain(adapter),
        "search": {one.key: str(one) for one in search},
        "settings": list(settings),
        "seed": seed,
    }
    study = open_study(folder, asked)
    for number in range(counted(study), trials):
        report.say(f"try {number + 1} of {trials}", style="bold")
        study.sampler = optuna.samplers.TPESampler(seed=seed + number)
        one_try(study, folder, dict(model=model, task=task, adapter=adapter, data=data, seed=seed), search, settings)
    done = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
    if not done:
        errors = dict.fromkeys(t.user_attrs["error"] for t in study.trials if "error" in t.user_attrs)
        raise ModelError("every try failed", *errors)
    chosen = study.best_trial
    winner = folder / BEST
    best = training.train(
        model=model,
        task=task,
        adapter=adapter,
        output_dir=winner,
        data=data,
        seed=seed,
        settings=[*settings, *chosen.user_attrs["settings"]],
        **_where_it_stands(winner, chosen.number),
    )
    checkpoints.write_text(winner.parent / f"{BEST}.trial", str(chosen.number))
    result = summary(study, asked, best)
    checkpoints.write_text(folder / RESULT, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    show(result)
    return best


def _where_it_stands(winner: Path, number: int) -> dict[str, bool]:
    """Whether the winner's run is to be gone on with, or another winner's is to be replaced."""
    mark = winner.parent / f"{BEST}.trial"
    same = not mark.is_file() or mark.read_text() == str(number)
    there = winner.is_dir() and any(winner.iterdir())
    return {"resume": there and same, "overwrite": there and not same}


def _plain(one: Any) -> Any:
    return one.model_dump(mode="json") if hasattr(one, "model_dump") else str(one)


def check_ranges(task: Any, adapter: Any, search: Sequence[Range], settings: Sequence[str]) -> None:
    """Refuse ranges of which an end, or a choice, is no setting.

    Raises:
        RecipeError: With every fault.
    """
    problems: list[str] = []
    given = {pair.partition("=")[0].strip() for pair in settings}
    problems += [f"--search {one.key}: is given by --set, too" for one in search if one.key in given]
    if recipes.saved_adapter_kind(adapter) is None and isinstance(adapter, str | Path | recipes.AdapterRecipe):
        for one in search:
            for value in one.values:
                try:
                    recipes.load_run(task, adapter, [*settings, setting(one.key, value)])
                except RecipeError as error:
                    problems += error.problems
    if problems:
        raise RecipeError(*dict.fromkeys(problems))


def setting(key: str, value: Any) -> str:
    return f"{key}={json.dumps(value)}"


def open_study(folder: Path, asked: Mapping[str, Any]) -> Any:
    """The search in a folder, begun or gone on with; tries that were being run when it was stopped have failed.

    Raises:
        OutputError: The folder holds something else, or another search.
    """
    import optuna

    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if folder.exists() and (not folder.is_dir() or (names and STUDY not in names)):
        raise OutputError(f"{folder}: holds other files ({', '.join(names[:5])}); choose an empty or a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        storage=f"sqlite:///{(folder / STUDY).resolve()}",
        study_name="tune",
        load_if_exists=True,
        direction="maximize",  # of the metric's negative, where less is better
        pruner=optuna.pruners.MedianPruner(n_startup_trials=FREE_TRIES, n_warmup_steps=FREE_EVALUATIONS),
    )
    before = study.user_attrs.get("asked")
    if before is not None and before != dict(asked):
        changed = [name for name in asked if before.get(name) != asked[name]]
        raise OutputError(
            *(f"{folder}: holds a search with {name} {before.get(name)!r}, not {asked[name]!r}" for name in changed)
        )
    study.set_user_attr("asked", dict(asked))
    for trial in study.get_trials(states=[optuna.trial.TrialState.RUNNING]):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    return study


def counted(study: Any) -> int:
    """Tries that came to an end of their own, be it an error."""
    return sum(trial.state.name in ("COMPLETE", "PRUNED") or "error" in trial.user_attrs for trial in study.trials)


class Pruning(transformers.TrainerCallback):
    """Tells optuna every evaluation's metric, and stops the run when it is told to."""

    def __init__(self, trial: Any, metric: str, sign: float) -> None:
        self.trial, self.metric, self.sign, self.count = trial, metric, sign, 0

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        import optuna

        self.trial.report(self.sign * metrics[f"eval_{self.metric}"], self.count)
        self.count += 1
        if self.count > FREE_EVALUATIONS and state.global_step < state.max_steps and self.trial.should_prune():
            raise optuna.TrialPruned


def one_try(
    study: Any, folder: Path, what: Mapping[str, Any], search: Sequence[Range], settings: Sequence[str]
) -> None:
    """Draw settings, run them, and tell the study. A try whose settings do not fit, or that diverges, has failed."""
    import optuna

    trial = study.ask()
    drawn = {one.key: one.suggest(trial) for one in search}
    chosen = [setting(key, value) for key, value in drawn.items()]
    trial.set_user_attr("settings", chosen)
    report.say(f"  {' '.join(chosen)}")
    states, started = optuna.trial.TrialState, time.perf_counter()
    shutil.rmtree(folder / TRIES, ignore_errors=True)
    value, state = None, states.FAIL
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout holds the search's own result
            value = _run(trial, folder / TRIES / str(trial.number), what, [*settings, *chosen])
        state = states.COMPLETE
    except optuna.TrialPruned:
        state = states.PRUNED
        report.say("  stopped early: its best so far is worse than the median of the others")
    except (ModelError, AdapterError, RecipeError) as error:
        trial.set_user_attr("error", str(error))
        report.say(f"  failed: {error}", style="yellow")
    trial.set_user_attr("seconds", round(time.perf_counter() - started, 2))
    study.tell(trial, value, state=state)
    shutil.rmtree(folder / TRIES, ignore_errors=True)
    gc.collect()


def _run(trial: Any, place: Path, what: Mapping[str, Any], settings: Sequence[str]) -> float:
    """The validation metric of one run, the higher the better."""
    plan = make_plan(what["model"], what["task"], what["adapter"], settings)
    if what["data"] is not None:
        plan = plan._replace(task=plan.task.model_copy(update={"data": None}))
    ready = prepare(plan, what["data"], what["seed"])
    arguments = training_arguments(plan, ready, place, what["seed"])
    metric = str(arguments.metric_for_best_model or ready.task.best_metric).removeprefix("eval_")
    sign = -1.0 if metric in LOWER_IS_BETTER else 1.0
    watch = Pruning(trial, metric, sign)
    trained = training.run(
        plan, ready, arguments, place, resume=False, overwrite=False, evaluated=["validation"], callbacks=[watch]
    )
    found = trained.run["metrics"]["validation"]
    name = metric if metric in found else ready.task.best_metric
    trial.set_user_attr("metric", name)
    trial.set_user_attr("validation", found)
    return (-1.0 if name in LOWER_IS_BETTER else 1.0) * float(found[name])


# ---- the end ----


def summary(study: Any, asked: Mapping[str, Any], best: TrainedModel) -> dict[str, Any]:
    """The content of ``tune.json``."""
    chosen = study.best_trial
    return {
        **asked,
        "metric": chosen.user_attrs["metric"],
        "tries": [
            {
                "try": trial.number + 1,
                "state": {"COMPLETE": "finished", "PRUNED": "pruned"}.get(trial.state.name, "failed"),
                "evaluations": len(trial.intermediate_values),
                **trial.user_attrs,
            }
            for trial in study.trials
        ],
        "best": {"try": chosen.number + 1, "settings": chosen.user_attrs["settings"]},
        "metrics": best.run["metrics"],
    }


def show(result: Mapping[str, Any]) -> None:
    """One table of the tries, best first, and the winner's test metrics."""
    keys, metric = list(result["search"]), result["metric"]
    table = Table("try")
    for name in (*keys, f"validation {metric}", "seconds"):
        table.add_column(escape(name), justify="right")
    sign = 1.0 if metric in LOWER_IS_BETTER else -1.0
    worst = sign * math.inf
    for one in sorted(result["tries"], key=lambda one: sign * one.get("validation", {}).get(metric, worst)):
        values = [pair.partition("=")[2] for pair in one.get("settings", [])] or [""] * len(keys)
        outcome = f"{one['validation'][metric]:.4f}" if "validation" in one else one["state"]
        table.add_row(str(one["try"]), *map(_short, values), outcome, f"{one.get('seconds', 0):.0f}")
    console = report.results()
    console.print(table)
    console.print(
        f"try {result['best']['try']} was best on validation: {escape(' '.join(result['best']['settings']))}; test "
        f"{metric} {result['metrics']['test'][metric]:.4f}",
        soft_wrap=True,
    )


def _short(text: str) -> str:
    try:
        return f"{float(text):.3g}"
    except ValueError:
        return text.strip('"')
