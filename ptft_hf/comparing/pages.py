"""How a report looks: sections of text, tables and pictures as Markdown, and as one page that fetches nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

import jinja2
from markupsafe import Markup


class Code(NamedTuple):
    """A command."""

    text: str


class Table(NamedTuple):
    """Rows of text; all columns but the first ``left`` hold numbers."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1


class Picture(NamedTuple):
    """An SVG and what it shows."""

    svg: str
    caption: str


Part: TypeAlias = str | list[str] | Table | Picture | Code
"""A paragraph, a list of sentences, a table, a picture or a command."""


class Section(NamedTuple):
    """A heading, of level 2 or 3, and what stands under it."""

    title: str
    level: int
    parts: Sequence[Part]
    """Paragraphs, lists of sentences, tables and pictures."""


# ---- HTML ----


def html(title: str, sections: Sequence[Section]) -> str:
    """One page with its styles and pictures in it; whatever comes from data is escaped."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["kind"] = lambda part: type(part).__name__
    environment.filters["svg"] = lambda picture: Markup(picture.svg)  # drawn by us: text in it is shapes
    template = environment.from_string(Path(__file__).with_name("page.html").read_text("utf-8"))
    return template.render(title=title, sections=sections)


# ---- Markdown ----


def markdown(title: str, sections: Sequence[Section]) -> str:
    """The same without the pictures."""
    blocks = [f"# {_escaped(title)}"]
    for section in sections:
        blocks.append(f"{'#' * section.level} {_escaped(section.title)}")
        for part in section.parts:
            blocks += _blocks(part)
    return "\n\n".join(blocks) + "\n"


def _blocks(part: Part) -> Iterator[str]:
    if isinstance(part, str):
        yield _escaped(part)
    elif isinstance(part, Code):
        yield f"```\n{part.text}\n```"
    elif isinstance(part, Table):
        yield f"{_escaped(part.caption)}:"
        dashes = ["---" if i < part.left else "---:" for i in range(len(part.head))]
        rows = [part.head, dashes, *part.rows]
        yield "\n".join(
            f"| {' | '.join(cell if row is dashes else _escaped(cell) for cell in row)} |" for row in rows
        )
    elif isinstance(part, list):
        yield "\n".join(f"- {_escaped(line)}" for line in part)


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*_\[\]<>|#&])", r"\\\1", " ".join(text.split()))
