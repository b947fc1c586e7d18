"""The package from outside: its names, what importing it costs, which way imports point, and what is shipped."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import ptft_hf

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ptft_hf"

# ---- names ----


def test_the_public_names_are_these():
    assert ptft_hf.__all__ == [
        "train",
        "plan",
        "evaluate",
        "load",
        "TrainedModel",
        "load_task",
        "load_adapter",
        "TaskRecipe",
        "AdapterRecipe",
        "PtftError",
        "RecipeError",
        "DataError",
        "ModelError",
        "AdapterError",
        "CheckpointError",
        "RoundTripError",
        "OutputError",
    ]
    assert dir(ptft_hf) == sorted(ptft_hf.__all__)


@pytest.mark.parametrize("name", ptft_hf.__all__)
def test_every_public_name_can_be_imported_and_says_what_it_is(name: str):
    value = getattr(ptft_hf, name)
    assert value.__name__ == name
    assert value.__doc__


def test_another_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'ptft_hf' has no attribute 'trian'"):
        ptft_hf.trian  # noqa: B018


# ---- what importing costs ----

HEAVY = "torch transformers datasets peft accelerate trl numpy sklearn matplotlib huggingface_hub"
RUN = f"""
import sys
sys.argv[0] = "ptft"
{{statement}}
print("HEAVY", sorted(set({HEAVY.split()!r}) & set(sys.modules)))
"""
MAIN = """
from ptft_hf.cli import main
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
"""
REFUSED = MAIN.replace("not stop.code", "stop.code == 2")


def heavy_modules(statement: str, *arguments: str) -> str:
    """The heavy packages that a fresh interpreter has loaded after a statement."""
    done = subprocess.run(
        [sys.executable, "-c", RUN.format(statement=statement), *arguments],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    return done.stdout.rpartition("HEAVY ")[2].strip()


def test_heavy_imports_would_be_seen():
    assert heavy_modules("import numpy") == "['numpy']"


def test_importing_the_package_imports_nothing_heavy():
    assert heavy_modules("import ptft_hf; ptft_hf.load_task; ptft_hf.RoundTripError; dir(ptft_hf)") == "[]"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["train", "--help"],
        ["feedback", "generate", "--help"],
        ["ls"],
        ["show", "lora/r8_attention"],
        ["show", "sequence_classification/aclsum_roles"],
        ["validate", "adapters/full/default.yaml", "tasks/sequence_classification/sst2.yaml"],
    ],
    ids=" ".join,
)
def test_verbs_that_only_read_recipes_import_nothing_heavy(arguments: list[str]):
    assert heavy_modules(MAIN, *arguments) == "[]"


def test_a_faulty_recipe_is_refused_before_anything_heavy_is_imported(tmp_path: Path):
    flags = ["--model", "m", "--task", "no/task", "--adapter", "no/adapter", "--output", str(tmp_path / "o")]
    assert heavy_modules(REFUSED, "train", *flags) == "[]"


@pytest.mark.parametrize("verb", ["train", "train further", "plan", "inspect", "tune"])
def test_prompts_are_refused_before_anything_heavy_is_imported(verb: str, tmp_path: Path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}', encoding="utf-8")
    flags = {"--model": "m", "--task": "prompts/tldr"}
    if verb != "inspect":
        flags["--adapter"] = str(tmp_path) if verb == "train further" else "lora/r8_attention"
    if verb not in ("inspect", "plan"):
        flags["--output"] = str(tmp_path / "o")
    if verb == "tune":
        flags["--search"] = "learning_rate=1e-3,1e-2"
    assert heavy_modules(REFUSED, verb.split()[0], *(part for pair in flags.items() for part in pair)) == "[]"


@pytest.mark.parametrize("adapter", ["adalora/r12_to_8", "prefix/tokens20", "lora/pissa"])
def test_what_ppo_cannot_train_is_refused_before_anything_heavy_is_imported(adapter: str, tmp_path: Path):
    flags = ["--policy", "m", "--reward", "r", "--task", "prompts/tldr", "--output", str(tmp_path / "o")]
    assert heavy_modules(REFUSED, "ppo", *flags, "--adapter", adapter) == "[]"


def test_importing_what_trains_says_nothing():
    code = "import ptft_hf; ptft_hf.train; import bitsandbytes"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# ---- which way imports point ----

LAYERS = [
    {"errors", "allocator"},
    {"recipes"},
    {"data", "models", "metrics", "report"},
    {"settings", "forward"},
    {"adapters", "tasks"},
    {"checkpoints", "card", "onnx_models"},
    {"inference", "inspecting"},
    {"preparing", "exporting"},
    {"sampling", "rounding", "atomic", "by_recipe"},
    {"resuming", "callbacks", "frozen"},
    {"trainer"},
    {"records", "building"},
    {"planning"},
    {"training"},
    {"hub", "comparing", "tuning"},
    {"rlhf"},
    {"feedback"},
    {"pipeline"},
    {"cli"},
    {"__main__"},
]
"""Bottom first: a module imports from the layers below its own and from itself, never from its neighbours."""
LAYER = {name: number for number, layer in enumerate(LAYERS) for name in layer}


def imports_of(file: Path) -> Iterator[str]:
    """Modules of this package that a file imports, function-level imports included, without ``ptft_hf.``."""
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, (
                f"{file}:{node.lineno}: a relative import, which this test does not follow"
            )
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from (name.removeprefix("ptft_hf.") for name in names if name.startswith("ptft_hf."))


def wrong_ways(package: Path) -> list[str]:
    """Imports that point up or sideways, as ``file -> module``."""
    wrong = []
    for file in sorted(package.rglob("*.py")):
        own = file.relative_to(package).parts[0].removesuffix(".py")
        if own == "__init__":  # the public names, each imported when it is first used
            continue
        targets = {name.partition(".")[0] for name in imports_of(file)} - {own}
        wrong += [
            f"{file.relative_to(package)} -> {target}"
            for target in sorted(targets)
            if LAYER[target] >= LAYER[own]
        ]
    return wrong


def test_every_module_has_a_layer():
    names = {
        path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert names - {"__init__"} == set(LAYER)


def test_imports_point_one_way():
    assert wrong_ways(PACKAGE) == []


def test_an_import_that_points_up_or_sideways_is_found(tmp_path: Path):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "one.py").write_text("def f():\n    from ptft_hf.adapters import build\n")
    (tmp_path / "errors.py").write_text("import ptft_hf.recipes\n")
    (tmp_path / "models.py").write_text("from ptft_hf import recipes, data\n")
    (tmp_path / "cli.py").write_text("from ptft_hf import training\n")
    assert wrong_ways(tmp_path) == ["errors.py -> recipes", "models.py -> data", "tasks/one.py -> adapters"]


def test_the_catalogue_folders_hold_recipes_and_no_code():
    for folder in ("adapters", "tasks"):
        assert list((ROOT / folder).rglob("*.yaml"))
        assert not list((ROOT / folder).rglob("*.py"))


# ---- what is shipped ----


def recipes_of(root: Path) -> set[str]:
    return {
        str(path.relative_to(root))
        for kind in ("adapters", "tasks")
        for path in root.glob(f"{kind}/*/*.yaml")
    }


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel is installed, away from the checkout."""
    folder = tmp_path_factory.mktemp("site")
    (wheel,) = built.glob("*.whl")
    flags = ["--no-deps", "--no-index", "--disable-pip-version-check", "--quiet", "--target", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "install", *flags, str(wheel)], check=True, cwd=folder)
    return folder


def outside(installed: Path, cwd: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a Python command in which ``ptft_hf`` is the installed wheel; the checkout is not on the path."""
    environment = {**os.environ, "PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=cwd, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done


def test_the_sdist_has_recipes_and_tests(built: Path):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    expected = {
        "pyproject.toml",
        "LICENSE",
        "README.md",
        "Makefile",
        "constraints.txt",
        "requirements-demo.txt",
    }
    assert recipes_of(ROOT) | expected | {"tests/test_package.py", "ptft_hf/py.typed"} <= names


def test_the_wheel_has_recipes_and_types_and_nothing_at_the_top_but_the_package(built: Path):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    pages = {str(path.relative_to(ROOT)) for path in PACKAGE.rglob("page.*")}
    assert {f"ptft_hf/_recipes/{name}" for name in recipes_of(ROOT)} | {"ptft_hf/py.typed"} | pages <= names
    assert len(pages) == 4
    assert {name.partition("/")[0] for name in names} == {
        "ptft_hf",
        f"{wheel.name.rsplit('-', 3)[0]}.dist-info",
    }


def test_the_installed_wheel_lists_the_same_recipes(installed: Path, tmp_path: Path):
    where = outside(installed, tmp_path, "-c", "import ptft_hf; print(ptft_hf.__file__)").stdout.strip()
    assert Path(where).is_relative_to(installed)
    listed = outside(installed, tmp_path, "-m", "ptft_hf", "ls").stdout
    for name in recipes_of(ROOT):
        assert f" {name.partition('/')[2].removesuffix('.yaml')} " in listed


@pytest.mark.slow
def test_the_installed_wheel_trains(installed: Path, tmp_path: Path, task_file: Path, checkpoint):
    flags = ["--model", str(checkpoint("bert")), "--task", task_file.name, "--adapter", "lora/r8_attention"]
    away = tmp_path
    done = outside(
        installed, away, "-m", "ptft_hf", "train", *flags, "--output", "out", "--set", "num_train_epochs=1"
    )
    assert "saved in out and proven" in done.stdout
    answers = outside(installed, away, "-m", "ptft_hf", "predict", "out", "a good film").stdout
    assert '"label"' in answers
