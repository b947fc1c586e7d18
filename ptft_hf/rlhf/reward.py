"""A reward model of preferences: :func:`train_reward`."""

from __future__ import annotations

from typing import Any

from ptft_hf.inference import TrainedModel
from ptft_hf.rlhf.sft import main, train_family


def train_reward(*, task: Any, **options: Any) -> TrainedModel:
    """Train a scorer on a recipe of the family ``preference``; arguments and errors are those of
    :func:`ptft_hf.train`."""
    return train_family("preference", task, **options)


if __name__ == "__main__":
    main()
