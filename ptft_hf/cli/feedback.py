"""Verbs of human feedback: feedback generate, import, serve, stats, export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ptft_hf.allocator import keep_freed_memory
from ptft_hf.cli.options import app, stoppable

feedback = typer.Typer(
    no_args_is_help=True, help="Which of two answers is better? Sample them, have people judge, export preferences."
)
app.add_typer(feedback, name="feedback")

Database = Annotated[
    Path, typer.Argument(metavar="DB", help="The SQLite file of the collection.", show_default=False)
]
Output = Annotated[Path, typer.Option(metavar="DB", help="The SQLite file; made if it is not there, else added to.")]


@feedback.command()
def generate(
    model: Annotated[
        list[str],
        typer.Option(help="A decoder: Hub id, checkpoint, or folder of a run. Several answer in turn."),
    ],
    task: Annotated[str, typer.Option(help="Recipe of prompts: a name from `ptft ls tasks`, or a YAML file.")],
    output: Output,
    answers: Annotated[int, typer.Option(help="To each prompt, by all models together.")] = 2,
    prompts: Annotated[int | None, typer.Option(help="The first so many of the split; all by default.")] = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "train",
    temperature: Annotated[float | None, typer.Option(help="The recipe's for PPO by default.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="The longest answer; the recipe's for PPO by default.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Compute in float32, bfloat16 or float16.")] = "float32",
    seed: Annotated[int, typer.Option(help="Of answers and splits.")] = 42,
) -> None:
    """Sample answers to prompts and store all pairs of them; what is there already is not sampled again."""
    from ptft_hf import recipes

    recipes.load_task(task)  # its faults, before torch is imported
    from ptft_hf import report
    from ptft_hf.feedback import generating

    keep_freed_memory()
    with stoppable("the same command goes on with the prompts that are left"):
        added = generating.generate(
            model=model,
            task=task,
            database=output,
            answers=answers,
            prompts=prompts,
            split=split,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            dtype=dtype,
            seed=seed,
        )
    report.say(
        f"{added.answers:,} answers to {added.prompts:,} prompts, {added.cut_off:,} of them cut off; "
        f"{added.pairs:,} pairs to judge (answers of the same text make none)"
    )


@feedback.command("import")
def import_(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="JSON lines or csv: prompt, chosen, rejected.", show_default=False),
    ],
    output: Output,
) -> None:
    """Take pairs from a file of preferences, to be reviewed; which was chosen is not shown."""
    from ptft_hf import report
    from ptft_hf.feedback import files

    found = files.import_pairs(file, output)
    report.say(
        f"{found.pairs:,} pairs to judge; left out: {found.same:,} rows whose answers are the same text, "
        f"{found.known:,} that were there already"
    )


@feedback.command()
def serve(
    database: Database,
    host: Annotated[str, typer.Option(help="Where to listen; this machine alone by default.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes any that is free.")] = 8000,
    token: Annotated[
        str | None,
        typer.Option(
            envvar="PTFT_FEEDBACK_TOKEN",
            help="Secret of the link, at least 16 characters; a new one at each start by default.",
        ),
    ] = None,
    next_: Annotated[
        str, typer.Option("--next", help="random, or uncertain: what the reward model is least sure of first.")
    ] = "random",
    reward: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE[#LABEL]",
            help="For --next uncertain: a reward model's run, a sequence classifier's folder or checkpoint, or "
            "package.module:function. Its scores are kept.",
        ),
    ] = None,
    overlap: Annotated[float, typer.Option(help="Share of pairs that several annotators judge.")] = 0.1,
    annotators: Annotated[int, typer.Option(help="How many judge a pair of that share.")] = 2,
) -> None:
    """Serve the page on which people judge, behind a link that is printed once."""
    from ptft_hf.feedback import server
    from ptft_hf.feedback.choosing import Policy

    with stoppable("the same command goes on; everything judged is kept"):
        server.serve(
            database,
            host=host,
            port=port,
            token=token,
            policy=Policy(next_, overlap, annotators),
            reward=reward,
        )


@feedback.command()
def stats(
    database: Database,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Numbers, agreement of annotators (Cohen's or Fleiss' kappa), position and length bias, with intervals."""
    from ptft_hf.feedback import reporting, statistics

    found = statistics.statistics_of(database)
    if as_json:
        print(json.dumps(found))
    else:
        reporting.show(found)


@feedback.command()
def export(
    database: Database,
    to: Annotated[Path, typer.Option(metavar="FILE", help="JSON lines: prompt, chosen, rejected.")],
    ties: Annotated[bool, typer.Option("--ties", help="Write ties, too, with `tie: true`.")] = False,
) -> None:
    """Write what the majority of each pair's annotators prefers."""
    from ptft_hf import report
    from ptft_hf.feedback import files

    done = files.export_preferences(database, to, ties=ties)
    left: dict[str, Any] = {
        "without a majority": done.conflicts,
        "ties": 0 if ties else done.ties,
        "both bad": done.both_bad,
    }
    report.say(
        f"{done.rows:,} rows in {to}{f', {done.ties:,} of them ties' if ties else ''}; left out: "
        + ", ".join(f"{count:,} {what}" for what, count in left.items())
    )
