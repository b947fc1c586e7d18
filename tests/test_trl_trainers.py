"""What recipes say of rates, dropout and first weights reaches TRL's trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest

import ptft_hf
from ptft_hf.recipes import task_from_dict
from ptft_hf.rlhf import by_trl
from ptft_hf.trainer import Trainer
from tests.test_by_trl import length, run
from tests.test_instruction import TALK, checkpoint

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:trl"),
]


class Stop(Exception):
    """Before the first step."""


def rates(trainer: Any) -> dict[str, float]:
    found = {id(p): g["lr"] for g in trainer.create_optimizer().param_groups for p in g["params"]}
    return {name: found[id(p)] for name, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("algorithm", ["dpo", "grpo"])
@pytest.mark.parametrize(
    ("adapter", "settings", "count"),
    [
        ("lora/loraplus", {}, 2),
        ("lora/r16_all_linear", {"adapter.layerwise_lr_decay": 0.5}, 2),
        ("full/default", {"adapter.layerwise_lr_decay": 0.5}, 3),  # and the embeddings
    ],
)
def test_rates_are_those_of_our_own_trainer(
    algorithm: str,
    adapter: str,
    settings: dict[str, Any],
    count: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, found = checkpoint(tmp_path / "base"), list[dict[str, float]]()

    def stopped(trainer: Any, *args: Any, **kwargs: Any) -> None:
        found.append(rates(getattr(trainer, "trainer", trainer)))
        raise Stop

    monkeypatch.setattr(Trainer, "train", stopped)
    monkeypatch.setattr(by_trl.Run, "train", stopped)
    settings = {**settings, "learning_rate": 1e-3}
    with pytest.raises(Stop):
        run(algorithm, base, tmp_path / "trl", adapter, settings=settings)
    table = datasets.Dataset.from_list([{"messages": TALK}] * 4)
    with pytest.raises(Stop):
        ptft_hf.train(
            model=str(base),
            task=task_from_dict({"name": "sft", "family": "instruction"}),
            adapter=adapter,
            output_dir=tmp_path / "own",
            data=datasets.DatasetDict({name: table for name in ("train", "validation", "test")}),
            settings={**settings, "bf16": False, "model.max_length": 100},
        )
    trl, own = found
    assert trl == own and len(set(own.values())) == count


@pytest.mark.parametrize("kept", [False, True])
def test_the_trunks_dropout_is_off_where_answers_are_sampled_unless_it_is_asked_for(
    kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, trainers, seen = by_trl.Run._trainer, list[Any](), set[bool]()

    def watched(self: Any, *given: Any) -> Any:
        trainers.append(original(self, *given))
        return trainers[0]

    def reward(prompts: list[str], answers: list[str]) -> list[float]:
        model = trainers[0].model
        attention = [m for m in model.modules() if type(m).__name__ == "LlamaAttention"]
        seen.update(m.training for m in attention if model.training)
        return length(prompts, answers)

    monkeypatch.setattr(by_trl.Run, "_trainer", watched)
    run(
        "grpo",
        checkpoint(tmp_path / "base"),
        tmp_path / "run",
        reward=reward,
        settings={"adapter.trunk_dropout": kept},
    )
    assert seen == {kept}
