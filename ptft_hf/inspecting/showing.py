"""Marked rows on a terminal: colours where there are any, brackets where there are none, tags under words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from ptft_hf.tasks.marks import Segment
from ptft_hf.tasks.tags import OUTSIDE

STYLES = {"input": "", "trained": "bold green", "special": "cyan", "cut": "dim"}


class Atom(NamedTuple):
    """What is not broken over two lines."""

    text: str
    style: str
    label: str
    spaced: bool


def show(console: Console, rows: Sequence[Sequence[Segment]], *, limit: int, title: str) -> None:
    """Print rows, each numbered.

    Args:
        console: Decides by itself whether there are colours: a terminal, and no ``NO_COLOR``.
        rows: What :func:`ptft_hf.inspecting.segments_of` gave of each.
        limit: Characters of a piece, and of all labelled pieces together, after which they are shortened.
        title: What is said first, with what the marks mean behind it.
    """
    colours = console.color_system is not None and not console.no_color
    legend = Text(f"{title}; what is trained is ")
    legend.append(*(("green", STYLES["trained"]) if colours else ("[[so]]", "")))
    if any(segment.label for row in rows for segment in row):
        legend.append(", or has below it what is learnt there")
    console.print(legend, soft_wrap=True)
    for number, row in enumerate(rows, 1):
        head = f"  {number}  "
        for line in lines(shortened(row, limit), max(console.width - len(head), 20), colours):
            console.print(Text(head) + line, soft_wrap=True)
            head = " " * len(head)


def lines(segments: Sequence[Segment], width: int, colours: bool) -> Iterator[Text]:
    """Lines of at most ``width`` columns (a longer word excepted), each with its labels, if any, in another below."""
    line: list[Atom] = []
    used = 0
    for atom in atoms(segments, colours):
        room = columns(atom) + (atom.spaced and bool(line))
        if line and atom.spaced and used + room > width:
            yield from _laid_out(line)
            line, used = [], 0
            room = columns(atom)
        line.append(atom)
        used += room
    yield from _laid_out(line)


def columns(atom: Atom) -> int:
    return max(cell_len(atom.text), cell_len(atom.label) + 1 if atom.label else 0)


def _laid_out(line: Sequence[Atom]) -> Iterator[Text]:
    above, below = Text(), Text()
    for i, atom in enumerate(line):
        gap = " " if atom.spaced and i else ""
        above.append(gap).append(atom.text, atom.style).append(" " * (columns(atom) - cell_len(atom.text)))
        below.append(gap).append(atom.label, "green").append(" " * (columns(atom) - cell_len(atom.label)))
    for text in (above, below):
        text.rstrip()
        if text:
            yield text


def atoms(segments: Sequence[Segment], colours: bool) -> Iterator[Atom]:
    """Words; the line breaks of a text as a sign, since a row is one paragraph here."""
    spaced = False
    for text, mark, label in segments:
        text = text.replace("\r\n", "\n").replace("\n", " \u21b5 ")
        begins, ends = text[:1].isspace(), text[-1:].isspace()
        words = text.split() or ([""] if label else [])
        if words and mark == "trained" and not label and not colours:
            words[0] = f"[[{words[0]}"
            words[-1] += "]]"
        style = "green" if label == OUTSIDE else STYLES[mark]
        for i, word in enumerate(words):
            yield Atom(word, style if colours else "", label if i == 0 else "", spaced or begins or i > 0)
        spaced = ends or ((spaced or begins) and not words)


def shortened(segments: Sequence[Segment], limit: int) -> list[Segment]:
    """Long pieces without their middle; where every word has a label, the first words."""
    found: list[Segment] = []
    labelled = 0
    for segment in segments:
        text = segment.text
        labelled += len(text) if segment.label else 0
        if labelled > limit:
            return [*found, Segment(" ...", "cut")]
        if len(text) > limit:
            head, tail = text[: limit // 2].rsplit(" ", 1)[0], text[-(limit // 2) :].split(" ", 1)[-1]
            left_out = len(text) - len(head) - len(tail)
            found += [
                segment._replace(text=f"{head} "),
                Segment(f"... {left_out:,} characters ...", "cut"),
                segment._replace(text=f" {tail}"),
            ]
        else:
            found.append(segment)
    return found
