"""A policy's adapter merged into its base: a whole model, for those that serve models and know no adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ptft_hf import card, checkpoints, inference, models, report
from ptft_hf.errors import CheckpointError, OutputError
from ptft_hf.rlhf import decoders

ROWS, TOKENS = 8, 32
"""How many random tokens the two models are compared on."""


def is_policy(folder: Path) -> bool:
    """Whether a folder is of a run of PPO or of TRL's algorithms."""
    run = folder / "run.json"
    return run.is_file() and card.is_policy(checkpoints.read_json(run))


def merge_policy(
    path: str | Path,
    output_dir: str | Path,
    *,
    model: str | None = None,
    base: str = "full_precision",
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """As :func:`ptft_hf.inference.merge`, of a policy, which has no task: the two are compared on random tokens. The
    critic stays where it is.

    Returns:
        ``{"examples", "max_logit_difference", "largest_logit"}``.

    Raises:
        CheckpointError: This is no adapter, or its method cannot be merged; or the merged model is another one.
        OutputError: ``output_dir`` exists and is not empty.
    """
    source, folder = Path(path), Path(output_dir)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"{folder}: exists and is not empty; choose another folder")
    adapted, run = decoders.of_run(source, model, trust_remote_code)
    tokenizer = models.load_tokenizer(str(source), **inference.options_of_whole(run["model"]))
    policy = inference.TrainedModel(adapted.eval(), tokenizer, decoders.WRITES, run, source)
    merged = policy.merge(base)
    rows = len(models.plain_model(adapted).get_input_embeddings().weight)
    ids = torch.randint(rows, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    probe = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    (logits,) = checkpoints.logits_on(merged.model, probe)

    def difference(other: Any) -> float:
        return float((checkpoints.logits_on(other, probe)[0] - logits).abs().nan_to_num(torch.inf).max())

    same = adapted
    if models.quantized_layers(adapted):
        same = policy.on_base(base)
        report.say(
            f"- merged on its {base} base: against the quantized model that was trained, logits differ by at most "
            f"{difference(adapted):.2g}"
        )
    found = {"examples": ROWS, "max_logit_difference": difference(same), "largest_logit": float(logits.abs().max())}
    if not found["max_logit_difference"] <= 1e-3 * max(1.0, found["largest_logit"]):
        raise CheckpointError(
            f"{path}: merged and adapter differ by {found['max_logit_difference']:.3g} in their logits; nothing was "
            "written"
        )
    merged.run["merge"] = found
    merged.save(folder)
    return found
