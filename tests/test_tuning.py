"""Searches: ranges as they are written, tries that are kept, pruned, gone on with; the test set read once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ptft_hf.errors import ModelError, OutputError, RecipeError
from ptft_hf.recipes.upstream import importable
from ptft_hf.tuning import Range, read_ranges
from tests.commands import Ptft, ptft  # noqa: F401
from tests.conftest import rows
from tests.runs import learner, recipe, splits

needs_optuna = pytest.mark.skipif(not importable("optuna"), reason="optuna is not installed (the extra tune)")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("learning_rate=log:1e-5:1e-2", Range("learning_rate", "log", (1e-5, 1e-2))),
        ("weight_decay=uniform:0:0.3", Range("weight_decay", "uniform", (0.0, 0.3))),
        ("num_train_epochs=int:1:4", Range("num_train_epochs", "int", (1, 4))),
        ("adapter.r=logint:4:64", Range("adapter.r", "logint", (4, 64))),
        ("adapter.r=4,8,16", Range("adapter.r", "choice", (4, 8, 16))),
        ("task.loss=cross_entropy,focal", Range("task.loss", "choice", ("cross_entropy", "focal"))),
        ("task.class_weights=balanced,null", Range("task.class_weights", "choice", ("balanced", None))),
    ],
)
def test_ranges_are_read(text: str, expected: Range) -> None:
    assert read_ranges([text]) == [expected]
    assert read_ranges([f"{expected.key}={expected}"]) == [expected] or None in expected.values


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate", "expected KEY=log:LOW:HIGH"),
        ("learning_rate=lgo:1:2", "unknown kind of range 'lgo' (did you mean 'log'?)"),
        ("learning_rate=log:1e-2:1e-5", "the lower end is not below the upper one"),
        ("learning_rate=log:0:1", "a logarithmic range begins above 0"),
        ("learning_rate=log:1:x", "expected log:LOW:HIGH, two numbers"),
        ("adapter.r=int:1.5:4", "expected int:LOW:HIGH, two whole numbers"),
        ("adapter.r=4", "'4' is one value; use --set for it"),
        ("adapter.r=4,", "'' is no value"),
        ("gone.yaml", "gone.yaml: there is no such file"),
    ],
)
def test_ranges_that_are_none_are_refused(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read_ranges([text, "seed=bad"])
    assert len(caught.value.problems) == 2
    assert message in caught.value.problems[0]


def test_a_file_holds_ranges_and_lists(tmp_path: Path) -> None:
    file = tmp_path / "search.yaml"
    file.write_text("learning_rate: log:1e-5:1e-2\nadapter: {r: [4, 8], lora_dropout: uniform:0:0.1}\n")
    found = read_ranges([str(file), "weight_decay=0,0.1"])
    assert [(one.key, str(one)) for one in found] == [
        ("learning_rate", "log:1e-05:0.01"),
        ("adapter.r", "4,8"),
        ("adapter.lora_dropout", "uniform:0:0.1"),
        ("weight_decay", "0,0.1"),
    ]
    file.write_text("adapter: {r: 4}\n")
    with pytest.raises(RecipeError, match="4 is one value"):
        read_ranges([str(file)])
    with pytest.raises(RecipeError, match="nothing to search"):
        read_ranges([])


def test_without_optuna_the_command_says_what_to_install(ptft: Ptft, task_file: Path, tmp_path: Path) -> None:  # noqa: F811
    if importable("optuna"):
        pytest.skip("optuna is installed")
    flags = ["--model", "m", "--task", task_file, "--adapter", "full/default", "--output", tmp_path / "out"]
    done = ptft("tune", *flags, "--search", "learning_rate=log:1e-5:1e-2")
    assert done.code == 2
    assert "pip install 'ptft-hf[tune]'" in done.err
    assert not (tmp_path / "out").exists()


# ---- with optuna ----


def search(base: Path, output: Path, *ranges: str, trials: int = 2, **settings: Any) -> Any:
    from ptft_hf.tuning import searching

    given = {"num_train_epochs": 1, "per_device_train_batch_size": 8, "warmup_steps": 0, "bf16": False} | settings
    return searching.tune(
        model=str(base),
        task=recipe(),
        adapter="full/default",
        search=read_ranges(ranges),
        output_dir=output,
        trials=trials,
        data=splits(rows(24, 1), validation=rows(16, 2), test=rows(16, 3)),
        settings=[f"{key}={json.dumps(value)}" for key, value in given.items()],
    )


@needs_optuna
def test_the_best_on_validation_is_trained_once_more_and_alone_sees_test(tmp_path: Path) -> None:
    base = learner(tmp_path / "bert")
    best = search(base, tmp_path / "out", "learning_rate=1e-9,5e-3", trials=3)
    result = json.loads((tmp_path / "out/tune.json").read_text())
    assert [one["state"] for one in result["tries"]] == ["finished"] * 3
    scores = [one["validation"]["macro_f1"] for one in result["tries"]]
    chosen = result["tries"][result["best"]["try"] - 1]
    assert chosen["validation"]["macro_f1"] == max(scores)
    assert best.run["metrics"]["validation"] == chosen["validation"]  # the same run again
    assert list(best.run["metrics"]) == ["validation", "test"]
    assert result["metrics"] == best.run["metrics"]
    assert [f"learning_rate={best.run['settings']['learning_rate']!r}"] == [
        f"learning_rate={json.loads(pair.partition('=')[2])!r}" for pair in chosen["settings"]
    ]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "best",
        "best.trial",
        "tune.db",
        "tune.json",
    ]


@needs_optuna
def test_a_search_that_was_stopped_ends_as_one_that_was_not(tmp_path: Path) -> None:
    """And it is gone on with under the same settings alone."""
    import optuna

    base, ranges = learner(tmp_path / "bert"), ("learning_rate=log:1e-4:1e-2", "weight_decay=0,0.1")
    search(base, tmp_path / "whole", *ranges, trials=2)
    search(base, tmp_path / "parts", *ranges, trials=1)
    study = optuna.load_study(study_name="tune", storage=f"sqlite:///{tmp_path / 'parts/tune.db'}")
    study.ask()  # a try that was killed
    search(base, tmp_path / "parts", *ranges, trials=2)
    found = []
    for name in ("whole", "parts"):
        tries = json.loads((tmp_path / name / "tune.json").read_text())["tries"]
        found.append([(one["settings"], one["validation"]) for one in tries if one["state"] == "finished"])
    assert found[0] == found[1]
    assert len(found[0]) == 2
    with pytest.raises(OutputError, match="holds a search with search "):
        search(base, tmp_path / "parts", "learning_rate=log:1e-4:1e-1", trials=3)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").touch()
    with pytest.raises(OutputError, match="holds other files"):
        search(base, tmp_path / "other", *ranges)


@needs_optuna
def test_tries_that_diverge_have_failed_and_others_go_on(tmp_path: Path) -> None:
    base = learner(tmp_path / "bert")
    with pytest.raises(ModelError, match="every try failed"):
        search(base, tmp_path / "out", "learning_rate=1e30,1e31", trials=1, max_grad_norm=0)
    with pytest.raises(RecipeError, match="learning_rat"):
        search(base, tmp_path / "two", "learning_rat=1,2")
    with pytest.raises(RecipeError, match="is given by --set, too"):
        search(base, tmp_path / "two", "warmup_steps=1,2")
    assert not (tmp_path / "two").exists()


@needs_optuna
def test_a_try_worse_than_the_median_is_stopped_at_its_second_evaluation() -> None:
    import optuna
    import transformers

    from ptft_hf.tuning import searching

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    pruner = optuna.pruners.MedianPruner(searching.FREE_TRIES, searching.FREE_EVALUATIONS)
    study = optuna.create_study(direction="maximize", pruner=pruner)
    state = transformers.TrainerState(global_step=2, max_steps=9)

    def evaluations(values: list[float], sign: float = 1.0) -> int:
        """How many of them a try gets to see."""
        trial = study.ask()
        watch = searching.Pruning(trial, "f1", sign)
        for count, value in enumerate(values, 1):
            try:
                watch.on_evaluate(None, state, None, metrics={"eval_f1": value})
            except optuna.TrialPruned:
                return count
        study.tell(trial, sign * values[-1])
        return len(values)

    for _ in range(searching.FREE_TRIES):
        assert evaluations([0.5, 0.6, 0.7]) == 3
    assert evaluations([0.1, 0.8, 0.9]) == 3  # a bad start alone is no reason
    assert evaluations([0.1, 0.2, 0.9]) == 2
    assert evaluations([0.9, 0.2, 0.3]) == 3  # the best checkpoint is what would be kept
    assert evaluations([0.5, 0.6, 0.7]) == 3
