"""Option names of transformers and PEFT, read from their installed source with ``ast``.

Importing ``peft`` takes seconds and ``transformers.training_args`` imports torch, so the names that a recipe
may use are read from the source files: nothing is imported, and there is no second list to keep in step.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from functools import cache
from pathlib import Path

from ptft_hf.errors import RecipeError


def importable(package: str) -> bool:
    """Whether a top-level package or module can be imported; it is not."""
    if package in sys.modules:
        return True
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def installed_folders(package: str) -> list[Path]:
    """The folders of an installed top-level package, found without importing it; empty if there is none."""
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):  # a dotted name whose parent is missing; a module without a spec
        return []
    if spec is None:
        return []
    return [Path(folder) for folder in spec.submodule_search_locations or []]


@cache
def training_argument_names() -> frozenset[str]:
    """The fields of ``transformers.TrainingArguments``.

    Raises:
        RecipeError: If transformers is not installed or its source is not laid out as expected.
    """
    return class_fields("transformers", "training_args", "TrainingArguments")


@cache
def quantization_names() -> frozenset[str]:
    """The arguments of ``transformers.BitsAndBytesConfig``.

    Raises:
        RecipeError: If transformers is not installed or its source is not laid out as expected.
    """
    for node in _class("transformers", "utils.quantization_config", "BitsAndBytesConfig").body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            return frozenset(argument.arg for argument in node.args.args) - {"self"}
    raise _unexpected("transformers", "utils.quantization_config", "BitsAndBytesConfig.__init__")


@cache
def generation_names() -> frozenset[str]:
    """The arguments of ``transformers.GenerationConfig``, which takes them out of its ``**kwargs``.

    Raises:
        RecipeError: If transformers is not installed or its source is not laid out as expected.
    """
    names = set()
    for node in _class("transformers", "generation.configuration_utils", "GenerationConfig").body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            for call in ast.walk(node):
                if isinstance(call, ast.Call) and ast.unparse(call.func) == "kwargs.pop":
                    names.add(ast.literal_eval(call.args[0]))
    if "max_new_tokens" not in names:
        raise _unexpected("transformers", "generation.configuration_utils", "GenerationConfig.__init__")
    return frozenset(name for name in names if not name.startswith("_"))


def peft_types() -> frozenset[str]:
    """The methods registered by the installed PEFT, as ``PeftType`` spells them (``LORA``, ...).

    Raises:
        RecipeError: If PEFT is not installed or its source is not laid out as expected.
    """
    return frozenset(_peft_configs())


@cache
def peft_config_names(peft_type: str) -> frozenset[str]:
    """The fields of one method's ``PeftConfig``, inherited ones included.

    Args:
        peft_type: One of :func:`peft_types`.

    Raises:
        KeyError: If PEFT has no such method.
        RecipeError: If PEFT is not installed or its source is not laid out as expected.
    """
    module, name = _peft_configs()[peft_type]
    return class_fields("peft", module, name)


@cache
def _peft_configs() -> dict[str, tuple[str, str]]:
    """``{"LORA": ("tuners.lora", "LoraConfig"), ...}`` from its calls of ``register_peft_method``."""
    found: dict[str, tuple[str, str]] = {}
    for folder in installed_folders("peft"):
        for file in sorted((folder / "tuners").glob("*/__init__.py")):
            for call in ast.walk(ast.parse(file.read_bytes())):
                if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)):
                    continue
                if call.func.id != "register_peft_method":
                    continue
                given = {keyword.arg: keyword.value for keyword in call.keywords}
                name, config = given.get("name"), given.get("config_cls")
                if isinstance(name, ast.Constant) and isinstance(config, ast.Name):
                    found[str(name.value).upper()] = (f"tuners.{file.parent.name}", config.id)
    if not found:
        raise _unexpected("peft", "tuners", "register_peft_method")
    return found


def class_fields(package: str, module: str, name: str) -> frozenset[str]:
    """The ``__init__`` arguments of a dataclass: its own fields and those of its bases in the package."""
    home, node = _definition(package, module, name)
    if node is None:
        raise _unexpected(package, module, name)
    names: set[str] = set()
    for base in node.bases:
        if isinstance(base, ast.Name) and _definition(package, home, base.id)[1] is not None:
            names |= class_fields(package, home, base.id)
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            names = (names | {line.target.id}) if _is_argument(line) else (names - {line.target.id})
    return frozenset(names)


def _is_argument(line: ast.AnnAssign) -> bool:
    """Whether an annotated name of a dataclass is an argument: no ``ClassVar``, no ``field(init=False)``."""
    if "ClassVar" in ast.unparse(line.annotation):
        return False
    keywords = line.value.keywords if isinstance(line.value, ast.Call) else []
    return not any(
        keyword.arg == "init" and isinstance(keyword.value, ast.Constant) and keyword.value.value is False
        for keyword in keywords
    )


def _class(package: str, module: str, name: str) -> ast.ClassDef:
    node = _definition(package, module, name)[1]
    if node is None:
        raise _unexpected(package, module, name)
    return node


def _definition(package: str, module: str, name: str) -> tuple[str, ast.ClassDef | None]:
    """The module that defines a class, following imports, and the class (None if outside the package)."""
    is_package, tree = _module(package, module)
    if tree is None:
        return module, None
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return module, node
    for node in tree.body:
        if not isinstance(node, ast.ImportFrom):
            continue
        for alias in node.names:
            if (alias.asname or alias.name) == name:
                source = _imported_module(package, module, is_package, node)
                return (module, None) if source is None else _definition(package, source, alias.name)
    return module, None


def _imported_module(package: str, module: str, is_package: bool, node: ast.ImportFrom) -> str | None:
    """The module a ``from`` names, within the package ("" is its top); None if it is another package's."""
    if node.level == 0:
        top, _, rest = (node.module or "").partition(".")
        return rest if top == package else None
    parts = module.split(".") if module else []
    up = node.level - 1 if is_package else node.level
    return ".".join([*parts[: len(parts) - up], *([node.module] if node.module else [])])


@cache
def _module(package: str, module: str) -> tuple[bool, ast.Module | None]:
    """Whether a module is a package (a folder), and its syntax tree; None if it has no source file."""
    for folder in installed_folders(package):
        file = folder.joinpath(*module.split(".")) if module else folder
        for is_package, source in ((True, file / "__init__.py"), (False, file.with_suffix(".py"))):
            if source.is_file():
                return is_package, ast.parse(source.read_bytes())
    return False, None


def _unexpected(package: str, module: str, name: str) -> RecipeError:
    if not installed_folders(package):
        return RecipeError(f"the package '{package}' is not installed: pip install {package}")
    return RecipeError(
        f"{name} is not in {package}/{module.replace('.', '/')} of the installed '{package}': "
        "this version is laid out differently; install one that this project's pyproject.toml allows"
    )
