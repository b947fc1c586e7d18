"""Verbs that train nothing and load no weights: plan, inspect, ls, show, validate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ptft_hf.allocator import keep_freed_memory
from ptft_hf.cli.options import Set, Task, app
from ptft_hf.errors import DataError, RecipeError

if TYPE_CHECKING:
    from ptft_hf.planning import Forecast


@app.command()
def plan(
    task: Task,
    model: Annotated[str | None, typer.Option(help="As in `ptft train`.")] = None,
    policy: Annotated[str | None, typer.Option(help="As in `ptft ppo`, of which this is the forecast then.")] = None,
    reward: Annotated[
        list[str] | None, typer.Option(metavar="[WEIGHT*]SOURCE[#LABEL]", help="As in `ptft ppo`.")
    ] = None,
    judge: Annotated[str | None, typer.Option(help="As in `ptft ppo`.")] = None,
    adapter: Annotated[str | None, typer.Option(help="As in `ptft train` or `ptft ppo`.")] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="What there is, such as 16GiB; by default what is free here.")
    ] = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="Take some steps with the longest batch, and correct the forecast.")
    ] = False,
    gflops: Annotated[
        float | None, typer.Option(help="Speed of the machine, 10^9 operations a second; by default measured here.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the order of rows, and of splits that are made.")] = 42,
    set_: Set = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Forecast memory, time and disk of a run with these arguments, and what to change to fit. Loads no weights.

    Of `ptft train` with --model; of `ptft ppo` with --policy, and then of memory and disk alone, without advice.
    """
    import json

    of_policy, of_model = {"--reward": reward, "--judge": judge}, {"--probe": probe, "--gflops": gflops}
    _check_plan(model, policy, adapter, of_policy, of_model)
    sets = set_ or []
    if policy is not None:
        found = _plan_ppo(policy, reward or [], task, adapter, judge, seed, sets, memory)
    else:
        assert model is not None and adapter is not None
        found = _plan_training(model, task, adapter, seed, sets, probe, memory, gflops)
    if as_json:
        print(json.dumps(found.to_dict()))
    else:
        from ptft_hf import report
        from ptft_hf.planning import showing

        showing.show(report.results(), found)


def _check_plan(
    model: str | None,
    policy: str | None,
    adapter: str | None,
    of_policy: dict[str, Any],
    of_model: dict[str, Any],
) -> None:
    """Refuse what belongs to the other kind of run.

    Raises:
        RecipeError: All that is wrong.
    """
    if (model is None) == (policy is None):
        raise RecipeError("name one: --model, the checkpoint of a training run, or --policy, that of a run of PPO")
    kind, other = ("--model", of_policy) if policy is None else ("--policy", of_model)
    faults = [f"{name}: has no effect with {kind}" for name, value in other.items() if value]
    if policy is None and adapter is None:
        faults.append("--adapter: is missing; full/default trains all weights, `ptft ls adapters` lists the others")
    if faults:
        raise RecipeError(*faults)


def _plan_training(
    model: str,
    task: str,
    adapter: str,
    seed: int,
    sets: list[str],
    probe: bool,
    memory: str | None,
    gflops: float | None,
) -> Forecast:
    from ptft_hf import recipes

    recipes.check_run(task, adapter, sets)  # every fault of the recipes, before torch is imported
    from ptft_hf import planning

    keep_freed_memory()
    given: dict[str, Any] = {"seed": seed, "settings": sets, "probe": probe, "memory": memory, "gflops": gflops}
    return planning.plan(model=model, task=task, adapter=adapter, **given)


def _plan_ppo(
    policy: str,
    reward: list[str],
    task: str,
    adapter: str | None,
    judge: str | None,
    seed: int,
    sets: list[str],
    memory: str | None,
) -> Forecast:
    from ptft_hf.recipes.ppo import check_ppo

    check_ppo(policy, task, adapter, sets)
    from ptft_hf.rlhf.forecasting import plan_ppo

    keep_freed_memory()
    given: dict[str, Any] = {"reward": reward, "adapter": adapter, "judge": judge, "seed": seed, "settings": sets}
    return plan_ppo(policy=policy, task=task, memory=memory, **given)


@app.command()
def inspect(
    model: Annotated[str, typer.Option(help="Hub id, name@revision, or folder of the checkpoint; or config:TYPE.")],
    task: Task,
    rows: Annotated[int, typer.Option(min=1, help="How many are shown; the longest is the last.")] = 5,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "train",
    seed: Annotated[int, typer.Option(help="Of splits that are made.")] = 42,
    set_: Set = None,
) -> None:
    """Show rows as the model reads them, with what is trained marked; refuse what a run would. Loads no weights."""
    from ptft_hf import recipes

    recipes.load_run(task, "full/default", set_ or [])
    from ptft_hf import inspecting, report

    seen = inspecting.inspect(model=model, task=task, split=split, rows=rows, seed=seed, settings=set_ or [])
    for note in seen.findings.notes:
        report.say(f"- {note}")
    inspecting.show(report.results(), seen.rows, limit=600, title=seen.title)
    seen.findings.refuse()


@app.command("ls")
def list_recipes(
    kind: Annotated[
        str | None, typer.Argument(metavar="[tasks|adapters]", help="One kind alone.", show_default=False)
    ] = None,
) -> None:
    """List the recipes of the catalogue."""
    from ptft_hf import recipes

    if kind not in (None, "tasks", "adapters"):
        raise DataError(f"{kind!r} is neither tasks nor adapters")
    for which in ("tasks", "adapters"):
        if kind in (None, which):
            names = recipes.catalogue(which)
            width = max(map(len, names), default=0)
            print(f"{which}:")
            for name in names:
                recipe = recipes.load_task(name) if which == "tasks" else recipes.load_adapter(name)
                print(f"  {name:<{width}}  {recipe.description or ''}".rstrip())


@app.command()
def show(name: Annotated[str, typer.Argument(help="A name from `ptft ls`, or a YAML file.")]) -> None:
    """Print a recipe with its includes resolved."""
    from ptft_hf import recipes

    print(recipes.to_yaml(recipes.load_recipe(name)), end="")


@app.command()
def validate(files: Annotated[list[str], typer.Argument(metavar="FILE ...", help="Recipe files.")]) -> None:
    """Check recipes without running them; every fault of every file is reported."""
    from ptft_hf import recipes
    from ptft_hf.errors import RecipeError

    problems: list[str] = []
    for file in files:
        try:
            recipes.load_recipe(file)
            print(f"{file}: fine")
        except RecipeError as error:
            problems += error.problems
    if problems:
        raise RecipeError(*problems)
