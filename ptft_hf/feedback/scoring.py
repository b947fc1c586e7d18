"""A reward model's scores of all answers, computed once and stored, by which ``--next uncertain`` orders pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from ptft_hf import report
from ptft_hf.feedback.store import Store
from ptft_hf.rlhf import rewards

BATCH_SIZE = 32
AT_ONCE = 256
"""Answers between two commits."""


def score(database: str | Path | Store, reward: Any) -> int:
    """Score every answer that is in a pair and has no score of this reward yet; one that was stopped goes on.

    Args:
        database: The file, or the opened store.
        reward: As :func:`ptft_hf.rlhf.reward_names.parse` reads it (a sequence classifier's folder or checkpoint, or
            ``package.module:function``), or a function of prompts and answers. Another reward than the last one's
            replaces all scores.

    Returns:
        How many answers were scored.

    Raises:
        RecipeError: The reward cannot be read or imported.
        ModelError: It cannot be loaded, or gives something else than a finite number an answer.
    """
    if not isinstance(database, Store):
        with Store(database) as store:
            return score(store, reward)
    built = rewards.build([reward], lambda _: None, BATCH_SIZE)
    if database.setting("reward") != built.name:
        database.forget_scores()
        database.set_setting("reward", built.name)
    left = database.unscored()
    with report.bar(len(left), "Scoring", "answer", stays=False) as bar:
        for start in range(0, len(left), AT_ONCE):
            ids, prompts, sources, answers = zip(*left[start : start + AT_ONCE], strict=True)
            # No reward that stands alone reads the policy's ids.
            batch = rewards.Answered(list(prompts), list(answers), cast(Any, None), list(sources))
            database.set_scores(list(zip(ids, built(batch), strict=True)))
            bar.update(len(ids))
    return len(left)
