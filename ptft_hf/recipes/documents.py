"""YAML for recipes: the YAML 1.2 core schema, with the file and line of every value kept for error messages.

PyYAML reads YAML 1.1, where ``3e-4`` is a string, ``no`` is false and of a repeated key the last one counts.
Here ``3e-4`` is a float, only ``true`` and ``false`` are booleans, a repeated key is an error, and keys are
strings.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

Key = tuple[str | int, ...]
"""The path of a value: ``("training", "learning_rate")``."""

_TAG = "tag:yaml.org,2002:"
_SCALARS = (  # https://yaml.org/spec/1.2.2/#1032-tag-resolution: name, pattern, possible first characters
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
)


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    table: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    for name, pattern, firsts in _SCALARS:
        for first in firsts:
            table.setdefault(first, []).append((_TAG + name, re.compile(rf"(?:{pattern})\Z")))
    return table


class _Loader(yaml.SafeLoader):
    """Composes nodes; aliases are refused, since what they repeat would have no line of its own."""

    yaml_implicit_resolvers = _resolvers()

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            problem = "aliases (*name) are not supported; use include:"
            raise yaml.composer.ComposerError(None, None, problem, mark)
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """Quotes the strings that :class:`_Loader` would not read as strings."""

    yaml_implicit_resolvers = _resolvers()

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(set, lambda dumper, data: dumper.represent_list(sorted(data)))


@dataclass(frozen=True)
class Origin:
    """Where a value was written."""

    source: str
    """What an error message starts with: a file's path, or ``--set task.``."""
    folder: Path
    """What a relative path in the value is relative to."""
    line: int | None = None
    """The line in the file, from 1; 0 is the file as a whole, None is no file."""

    @property
    def order(self) -> tuple[bool, str, int]:
        """Sorts by file and line, what is of no file last."""
        return self.line is None, self.source, self.line or 0

    def at(self, key: Key) -> str:
        """The start of an error message about the value at ``key``: ``tasks/x.yaml:7: training.seed``."""
        name = ".".join(map(str, key))
        if self.line is None:
            return self.source + name
        place = f"{self.source}:{self.line}" if self.line else self.source
        return f"{place}: {name}" if name else place


@dataclass
class Document:
    """A recipe file as read, or several merged: its values, the origin of each, and what is wrong."""

    values: dict[str, Any]
    origins: dict[Key, Origin]
    problems: list[str] = field(default_factory=list)

    def origin(self, key: Key) -> Origin:
        """The origin of the value at ``key``, or of the nearest map or list around it."""
        while key and key not in self.origins:
            key = key[:-1]
        return self.origins[key]

    def problem(self, key: Key, message: str) -> None:
        """Note what is wrong with the value at ``key``."""
        self.problems.append(f"{self.origin(key).at(key)}: {message}")

    def drop(self, key: str) -> Any:
        """Remove a top-level key if it is there; its value, or None."""
        for inner in [inner for inner in self.origins if inner[:1] == (key,)]:
            del self.origins[inner]
        return self.values.pop(key, None)

    def merge(self, over: Document) -> None:
        """Lay another document over this one: maps merge, everything else is replaced."""

        def lay(under: dict[str, Any], new: Mapping[str, Any], at: Key) -> None:
            for name, value in new.items():
                key = (*at, name)
                if isinstance(value, dict) and isinstance(under.get(name), dict):
                    lay(under[name], value, key)
                    continue
                for inner in [inner for inner in self.origins if inner[: len(key)] == key]:
                    del self.origins[inner]
                under[name] = value
                self.origins |= {k: v for k, v in over.origins.items() if k[: len(key)] == key}

        lay(self.values, over.values, ())
        if over.origins[()].line is not None:  # the includer's file, but no --set, is the recipe
            self.origins[()] = over.origins[()]
        self.problems += over.problems


def read(file: Path) -> Document:
    """Read one recipe file; what is wrong with it is in ``problems``, never raised."""
    document = Document({}, {(): Origin(display(file), file.parent.absolute(), 0)})
    try:
        raw = file.read_bytes()
        values = parse(raw.decode("utf-8-sig"), document)
    except OSError as error:
        document.problem((), f"cannot be read: {error.strerror}")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        document.problems.append(
            f"{display(file)}:{line}: byte 0x{error.object[error.start]:02x} is not UTF-8; save it as UTF-8"
        )
    else:
        if isinstance(values, dict):
            document.values = values
        elif not document.problems:
            found = "is empty" if values is None else f"holds {shown(values)}"
            document.problem((), f"{found}; a recipe is a map of keys to values")
    return document


def parse(text: str, document: Document) -> Any:
    """The value of a YAML text; origins and problems go into ``document``, whose own origin is the text's."""
    origin = document.origins[()]
    try:
        node = yaml.compose(text, Loader=_Loader)
        return None if node is None else _convert(node, (), document)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark and origin.line is not None else None
        place = origin if line is None else Origin(origin.source, origin.folder, line)
        because = ", ".join(part for part in (error.context, error.problem) if part)
        document.problems.append(f"{place.at(())}: not YAML: {because}")
    except yaml.YAMLError as error:
        document.problem((), f"not YAML: {' '.join(str(error).split())}")
    except RecursionError:
        document.problem((), "nested too deeply")
    return None


def _convert(node: yaml.Node, key: Key, document: Document) -> Any:
    kind = node.tag.removeprefix(_TAG)
    if isinstance(node, yaml.MappingNode) and kind == "map":
        return _mapping(node, key, document)
    if isinstance(node, yaml.SequenceNode) and kind == "seq":
        for index, item in enumerate(node.value):
            _note(document, (*key, index), item)
        return [_convert(item, (*key, index), document) for index, item in enumerate(node.value)]
    text = node.value
    try:
        match kind if isinstance(node, yaml.ScalarNode) else "":
            case "null":
                return None
            case "bool":
                return {"true": True, "false": False}[text.lower()]
            case "int":
                return int(text, 0) if text[:2] in ("0x", "0o") else int(text)
            case "float":
                return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
            case "str" | "!":
                return text
    except (KeyError, ValueError):
        document.problem(key, f"{text!r} is not of the type !!{kind}")
        return None
    document.problem(key, f"the YAML tag {node.tag!r} is not supported")
    return None


def _mapping(node: yaml.MappingNode, key: Key, document: Document) -> dict[str, Any]:
    values: dict[str, Any] = {}
    lines: dict[str, int] = {}
    for name_node, value_node in node.value:
        if not isinstance(name_node, yaml.ScalarNode):
            document.problem(key, "a key that is itself a map or a list")
            continue
        name: str = name_node.value
        line: int = name_node.start_mark.line + 1
        if name in values:
            place = _note(document, (*key, name), name_node)
            document.problems.append(f"{place.at((*key, name))}: given twice (first on line {lines[name]})")
            continue
        _note(document, (*key, name), name_node)
        lines[name] = line
        values[name] = _convert(value_node, (*key, name), document)
    return values


def _note(document: Document, key: Key, node: yaml.Node) -> Origin:
    """Keep the origin of one value: the line of its key, or of the item in a list."""
    whole = document.origins[()]
    line = None if whole.line is None else node.start_mark.line + 1
    document.origins[key] = Origin(whole.source, whole.folder, line)
    return document.origins[key]


def from_mapping(values: Mapping[str, Any], source: str, folder: Path) -> Document:
    """A document from Python values, such as the overrides of ``--set``."""

    def walk(value: Any, key: Key) -> Iterator[Key]:
        yield key
        items = (
            value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        )
        for name, inner in items:
            yield from walk(inner, (*key, name))

    copied = _copied(values)
    return Document(copied, {key: Origin(source, folder) for key in walk(copied, ())})


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _copied(inner) for name, inner in value.items()}
    return [_copied(inner) for inner in value] if isinstance(value, list) else value


def dump(values: Mapping[str, Any]) -> str:
    """YAML that :func:`read` reads back to the same values, keys in the order given."""
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def display(file: Path) -> str:
    """A file's path as an error message names it: relative to the working folder if it lies within."""
    path, here = str(file.absolute()), os.getcwd()
    return os.path.relpath(path, here) if os.path.commonpath([path, here]) == here else path


def shown(value: Any) -> str:
    """A value as an error message shows it: ``null`` and ``true`` as in YAML, long ones cut."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
