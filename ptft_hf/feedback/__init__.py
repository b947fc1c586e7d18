"""Which of two answers is better? Answers sampled from models, judged by people on a local page, and exported.

The rooms behind it, each importing only those before: ``store`` (the database, one SQLite file), ``files`` (pairs in
from JSON lines, and preferences out), ``choosing`` (which pair is shown next), ``judging`` (what was shown to whom,
and what they said), ``statistics``, ``reporting`` (as tables), ``generating`` and ``scoring`` (which need torch),
``server`` (the page).

From Python::

    from ptft_hf import feedback

    feedback.generate(["runs/sft"], "prompts/tldr", "answers.sqlite", answers=2)
    feedback.serve("answers.sqlite")                        # until Ctrl-C
    feedback.statistics_of("answers.sqlite")["agreement"]
    feedback.export_preferences("answers.sqlite", "preferences.jsonl")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ptft_hf.feedback.choosing import Policy
    from ptft_hf.feedback.files import export_preferences, import_pairs
    from ptft_hf.feedback.generating import check_task, generate
    from ptft_hf.feedback.scoring import score
    from ptft_hf.feedback.server import serve
    from ptft_hf.feedback.statistics import statistics_of
    from ptft_hf.feedback.store import Store

_HOME = {
    "Policy": "choosing",
    "Store": "store",
    "check_task": "generating",
    "export_preferences": "files",
    "generate": "generating",
    "import_pairs": "files",
    "score": "scoring",
    "serve": "server",
    "statistics_of": "statistics",
}
__all__ = [
    "Policy",
    "Store",
    "check_task",
    "export_preferences",
    "generate",
    "import_pairs",
    "score",
    "serve",
    "statistics_of",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ptft_hf.feedback' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"ptft_hf.feedback.{_HOME[name]}"), name)
