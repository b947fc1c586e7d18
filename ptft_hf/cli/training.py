"""Verbs that train: train, ppo, rlhf, compare, tune."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ptft_hf.allocator import keep_freed_memory
from ptft_hf.cli.options import (
    Adapter,
    Model,
    Overwrite,
    Resume,
    Set,
    Task,
    app,
    stoppable,
)


@app.command()
def train(
    model: Model,
    task: Task,
    adapter: Adapter,
    output: Annotated[Path, typer.Option(help="The folder that becomes the final model.")],
    seed: Annotated[int, typer.Option(help="Of initial weights, order of rows, dropout and splits.")] = 42,
    algorithm: Annotated[
        str | None,
        typer.Option(
            help="Of language models, by TRL: dpo or kto on preferences, grpo or rloo on prompts. --set "
            "algorithm.beta=0.1 is a field of its config."
        ),
    ] = None,
    reward: Annotated[
        list[str] | None,
        typer.Option(metavar="[WEIGHT*]SOURCE[#LABEL]", help="Of grpo and rloo, as of ptft ppo."),
    ] = None,
    set_: Set = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Fine-tune a checkpoint, choose the best step on validation (--algorithm: the last), test, save and prove it."""
    from ptft_hf import recipes

    if algorithm is not None or reward:
        _train_by_trl(algorithm, model, task, adapter, output, reward, seed, set_ or [], resume, overwrite)
        return
    recipes.check_run(task, adapter, set_ or [])  # every fault of the recipes, before torch is imported
    from ptft_hf.training import train as run

    keep_freed_memory()
    with stoppable("--resume goes on from the newest checkpoint", output / "checkpoints"):
        run(
            model=model,
            task=task,
            adapter=adapter,
            output_dir=output,
            seed=seed,
            settings=set_ or [],
            resume=resume,
            overwrite=overwrite,
        )


def _train_by_trl(
    algorithm: str | None,
    model: str,
    task: str,
    adapter: str,
    output: Path,
    reward: list[str] | None,
    seed: int,
    sets: list[str],
    resume: bool,
    overwrite: bool,
) -> None:
    from ptft_hf import recipes
    from ptft_hf.errors import RecipeError
    from ptft_hf.recipes.algorithms import load_algorithm

    if algorithm is None:
        raise RecipeError("--reward: has no effect without --algorithm grpo or rloo")
    if recipes.saved_adapter_kind(adapter) is None:
        load_algorithm(algorithm, task, adapter, sets)  # every fault, before torch is imported
    from ptft_hf.rlhf.by_trl import train_by_trl

    keep_freed_memory()
    with stoppable("--resume goes on from the newest checkpoint", output / "checkpoints"):
        train_by_trl(
            algorithm=algorithm,
            model=model,
            task=task,
            adapter=adapter,
            output_dir=output,
            reward=reward,
            seed=seed,
            settings=sets,
            resume=resume,
            overwrite=overwrite,
        )


@app.command()
def ppo(
    policy: Annotated[str, typer.Option(help="A causal LM, or the folder of a PEFT adapter on one (an SFT run).")],
    reward: Annotated[
        list[str],
        typer.Option(
            metavar="[WEIGHT*]SOURCE[#LABEL[:logit][:answer]]",
            help="A reward model's run (preference), a sequence classifier's folder or checkpoint (LABEL's "
            "probability, or its logit; of prompt and answer, or of the answer alone), or package.module:function. "
            "Several are added up.",
        ),
    ],
    task: Annotated[str, typer.Option(help="Recipe of prompts: a name from `ptft ls tasks`, or a YAML file.")],
    output: Annotated[Path, typer.Option(help="The folder that becomes the policy.")],
    adapter: Annotated[
        str | None,
        typer.Option(help="Of a policy that is a checkpoint: lora/r16_all_linear by default, or full/default."),
    ] = None,
    judge: Annotated[
        str | None, typer.Option(help="A reward that is not trained for; the doctor looks whether it rises, too.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of new weights, order of prompts, answers and splits.")] = 42,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="An option of PPO (kl_coef=0.1), or task.*, adapter.*, model.* for a recipe's field.",
        ),
    ] = None,
    stop_on: Annotated[
        list[str] | None, typer.Option(help="A finding of the doctor that ends the run, or all.")
    ] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Train a policy by PPO for a reward, watched by the doctor; save it with its critic, and prove the save."""
    from ptft_hf.recipes.ppo import check_ppo

    sets = [*(set_ or []), *([f"stop_on=[{', '.join(stop_on)}]"] if stop_on else [])]
    check_ppo(policy, task, adapter, sets)
    from ptft_hf.rlhf.ppo import train_ppo

    keep_freed_memory()
    with stoppable("--resume goes on from the newest checkpoint", output / "checkpoints"):
        train_ppo(
            policy=policy,
            reward=reward,
            task=task,
            output_dir=output,
            adapter=adapter,
            judge=judge,
            seed=seed,
            settings=sets,
            resume=resume,
            overwrite=overwrite,
        )


@app.command()
def rlhf(
    pipeline: Annotated[
        Path, typer.Argument(metavar="PIPELINE", help="YAML file that names the stages.", show_default=False)
    ],
    output: Annotated[Path, typer.Option(help="Folder of the stages; what is done in it is not run again.")],
) -> None:
    """Run SFT, a reward model, PPO and the comparison with where it started, stage by stage, and write a report."""
    from ptft_hf.recipes.pipeline import load_pipeline

    recipe = load_pipeline(pipeline)
    from ptft_hf.pipeline import run_pipeline

    keep_freed_memory()
    with stoppable("the same command goes on where it was"):
        run_pipeline(recipe, output)


@app.command()
def compare(
    output: Annotated[
        Path, typer.Option(help="Folder for cells/*.json and the reports; what it holds is not run again.")
    ],
    grid: Annotated[
        Path | None,
        typer.Argument(
            metavar="[GRID]", help="YAML file with a grid; options stand over it.", show_default=False
        ),
    ] = None,
    model: Annotated[list[str] | None, typer.Option(help="A checkpoint; may be given many times.")] = None,
    task: Annotated[list[str] | None, typer.Option(help="A task recipe; may be given many times.")] = None,
    adapters: Annotated[list[str] | None, typer.Option(metavar="A,B,...", help="Adapter recipes.")] = None,
    seeds: Annotated[str | None, typer.Option(help="0,1,2 by default; no verdict under three.")] = None,
    sizes: Annotated[
        str | None, typer.Option(help="Training rows, such as 500,2000,all; all by default.")
    ] = None,
    validation_size: Annotated[int | None, typer.Option(help="Validation rows; all by default.")] = None,
    test_size: Annotated[
        int | None, typer.Option(help="Test rows, the same for all methods; all by default.")
    ] = None,
    learning_rates: Annotated[
        int | None, typer.Option(help="Tries for each method, of which validation chooses; 3 by default.")
    ] = None,
    search: Annotated[
        str | None,
        typer.Option(help="climb, by default: towards the better rates; around: the same for each seed."),
    ] = None,
    set_: Set = None,
    margin: Annotated[
        float, typer.Option(min=0.0, help="Smaller differences count as none; 0.01 is a point.")
    ] = 0.01,
    reference: Annotated[
        str | None, typer.Option(help="Compare with this adapter alone, not all with all.")
    ] = None,
    executor: Annotated[str, typer.Option(help="Where cells run: local, or ray for many machines.")] = "local",
    jobs: Annotated[int, typer.Option(min=1, help="Cells at a time.")] = 1,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run failed cells again.")] = False,
    keep_weights: Annotated[
        bool, typer.Option("--keep-weights", help="Keep each cell's chosen run.")
    ] = False,
) -> None:
    """Compare methods over seeds and training-set sizes: intervals, verdicts, costs and a report."""
    import shlex

    from ptft_hf import comparing

    given = {
        "models": model,
        "tasks": task,
        "adapters": comparing.split_commas(adapters or []),
        "seeds": comparing.numbers("seeds", seeds),
        "sizes": comparing.numbers("sizes", sizes),
        "validation_size": validation_size,
        "test_size": test_size,
        "learning_rates": learning_rates,
        "search": search,
        "settings": set_,
    }
    grid_ = comparing.read_grid(
        grid, {name: value for name, value in given.items() if value not in (None, [])}
    )
    reference = None if reference is None else grid_.name_of_reference(reference)
    with stoppable("the same command goes on with the cells that are left"):
        results = comparing.run_grid(
            grid_, output, jobs=jobs, executor=executor, retry_failed=retry_failed, keep_weights=keep_weights
        )
    command = f"ptft {shlex.join(sys.argv[1:])}"
    files = comparing.write_report(results, output, margin=margin, reference=reference, command=command)
    comparing.show(results, margin)
    print(f"{files[0]}\n{files[1]}")
    if all(result["status"] == "failed" for result in results):
        raise typer.Exit(1)


@app.command()
def tune(
    model: Model,
    task: Task,
    adapter: Annotated[
        str, typer.Option(help="Adapter recipe: a name from `ptft ls adapters`, or a YAML file.")
    ],
    search: Annotated[
        list[str],
        typer.Option(
            metavar="KEY=RANGE",
            help="log:1e-5:1e-2, uniform:0:0.3, int:1:4, logint:4:64 or a,b,c for a key as of --set; or a YAML file "
            "of keys. May be given many times.",
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder for the tries' figures and the winner's run.")],
    trials: Annotated[int, typer.Option(min=1, help="Tries in all.")] = 20,
    seed: Annotated[int, typer.Option(help="Of the search, and of every run in it.")] = 42,
    set_: Set = None,
) -> None:
    """Search ranges of settings by the validation metric, train the winner once, and test that."""
    from ptft_hf import recipes
    from ptft_hf.tuning import read_ranges

    ranges = read_ranges(search)
    recipes.check_run(task, adapter, set_ or [])
    from ptft_hf.tuning import searching

    keep_freed_memory()
    with stoppable("the same command goes on with the tries that are left"):
        searching.tune(
            model=model,
            task=task,
            adapter=adapter,
            search=ranges,
            output_dir=output,
            trials=trials,
            seed=seed,
            settings=set_ or [],
        )
