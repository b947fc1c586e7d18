"""Folders that are either whole or not there: staging, manifests, resume, and the round-trip proof."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from ptft_hf.errors import CheckpointError, RoundTripError

MANIFEST = "manifest.json"
STAGING = ".staging"


# ---- whole folders ----


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, names: Iterable[str] | None = None) -> None:
    """Flush the folder's files to the disk and record name, size and SHA-256 of each in ``manifest.json``."""
    files = (
        sorted(names)
        if names is not None
        else sorted(
            str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST
        )
    )
    entries = {}
    for name in files:
        _flush(folder / name)
        entries[name] = {"size": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
    write_text(folder / MANIFEST, json.dumps({"files": entries}, indent=1))


def damage(folder: Path) -> list[str]:
    """What is wrong with a folder that has a manifest; an empty list if it is whole."""
    try:
        entries = json.loads((folder / MANIFEST).read_text("utf-8"))["files"]
    except FileNotFoundError:
        return [f"{folder}: no {MANIFEST}; it was never finished"]
    except (ValueError, KeyError, TypeError):
        return [f"{folder / MANIFEST}: not readable as a manifest"]
    problems = []
    for name, entry in entries.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{path}: missing")
        elif path.stat().st_size != entry["size"]:
            problems.append(f"{path}: {path.stat().st_size} bytes instead of {entry['size']}")
        elif sha256(path) != entry["sha256"]:
            problems.append(f"{path}: its bytes have changed since it was written (SHA-256 differs)")
    return problems


def write_text(path: Path, text: str) -> None:
    """Write a file at once or not at all."""
    staged = path.with_name(f".{path.name}.staged")
    staged.write_text(text, encoding="utf-8")
    _flush(staged)
    staged.replace(path)


def publish(staged: Path, final: Path) -> None:
    """Make a finished folder visible under its name, in one step that survives a power cut."""
    write_manifest(staged)
    _flush(staged)
    if final.exists():
        remove(final)
    staged.rename(final)
    _flush(final.parent)


def publish_into(staged: Path, folder: Path, last: str) -> None:
    """Move the files of a finished folder into one that exists, with their manifest; ``last`` is moved last, so
    that its presence says that all others are there."""
    write_manifest(staged)
    for path in sorted(staged.iterdir(), key=lambda path: path.name == last):
        if path.is_dir() and (folder / path.name).exists():
            remove(folder / path.name)
        path.rename(folder / path.name)
    _flush(folder)
    staged.rmdir()


def remove(folder: Path) -> None:
    """Delete a folder such that a half-deleted one is never taken for a checkpoint."""
    doomed = folder.with_name(f".deleted-{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---- checkpoints of a run ----


def steps(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoints in a folder, oldest first, intact or not."""
    found = [
        (int(path.name.removeprefix("checkpoint-")), path)
        for path in folder.glob("checkpoint-*")
        if path.is_dir() and path.name.removeprefix("checkpoint-").isdigit()
    ]
    return sorted(found)


def newest_intact(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and for each newer one why it is not taken."""
    skipped: list[str] = []
    for _, path in reversed(steps(folder)):
        problems = damage(path)
        if not problems:
            return path, skipped
        skipped.append(f"skipped {path.name}: {problems[0]}")
    return None, skipped


def discard_unfinished(folder: Path) -> None:
    """Remove what a killed process left of a save or a deletion."""
    for path in [*folder.glob(f"{STAGING}*"), *folder.glob(".deleted-*")]:
        shutil.rmtree(path)


def rotate(folder: Path, keep: int | None, best_step: int | None) -> None:
    """Delete the oldest checkpoints beyond ``keep`` (``save_total_limit``), never the best or the newest."""
    if not keep or keep < 1:
        return
    existing = steps(folder)
    protected = {existing[-1][0], best_step} if existing else set()
    spare = [path for step, path in existing if step not in protected]
    count = max(0, len(existing) - max(keep, len(protected & {s for s, _ in existing})))
    for path in spare[:count]:
        remove(path)


# ---- models ----


def save_model(model: Any, tokenizer: Any, folder: Path, state_dict: Mapping[str, Any] | None = None) -> None:
    """Weights as safetensors, configuration and tokenizer. Beside a PEFT adapter stands the configuration of
    the model that it belongs to: labels and padding token, without which no one could use it."""
    folder.mkdir(parents=True, exist_ok=True)
    if hasattr(model, "peft_config"):
        # "auto" would ask the Hub whether the vocabulary has grown.
        model.save_pretrained(folder, state_dict=state_dict, save_embedding_layers=False)
        model.get_base_model().config.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's template; ours is written at the end
    else:
        model.save_pretrained(folder, state_dict=state_dict)
    tokenizer.save_pretrained(folder)


Probe = list[dict[str, torch.Tensor]]


def logits_on(model: Any, probe: Probe) -> list[torch.Tensor]:
    """Logits of each batch, in evaluation mode, without autocast."""
    model.eval()
    device = next(model.parameters()).device
    with torch.no_grad():
        results = [model(**{k: v.to(device) for k, v in b.items() if k != "labels"}) for b in probe]
    return [first_logits(r).float().cpu() for r in results]


def first_logits(outputs: Any) -> torch.Tensor:
    """``outputs.logits``, whether upstream gives an object, a dictionary or a tuple."""
    logits: torch.Tensor = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
    return logits


def prove(trained: Any, reload: Callable[[], Any], probe: Probe) -> dict[str, Any]:
    """Load what was saved into a freshly built model and compare its logits with those of the model in memory.

    Args:
        trained: The model as training left it.
        reload: Builds a new model from the saved folder alone.
        probe: Batches on which both are run.

    Returns:
        ``{"max_difference": 0.0, "examples": n}``.

    Raises:
        RoundTripError: Any logit differs, or is not a number; the weights that differ are named.
    """
    before = logits_on(trained, probe)
    fresh = reload()
    fresh.to(next(trained.parameters()).device)
    after = logits_on(fresh, probe)
    examples = sum(len(batch) for batch in before)
    if not all(torch.isfinite(batch).all() for batch in before):
        raise RoundTripError(
            "the trained model gives logits that are not numbers: training diverged; lower "
            "learning_rate, or set max_grad_norm"
        )
    difference = max((a - b).abs().max().item() for a, b in zip(before, after, strict=True))
    if difference == 0.0:
        return {"max_difference": 0.0, "examples": examples}
    names = differing_weights(trained, fresh)
    raise RoundTripError(
        f"the saved model is not the trained one: logits differ by up to {difference:.3g} on {examples} "
        f"examples; weights that differ: {names[:20] or 'none by name'}"
    )


def differing_weights(one: Any, other: Any) -> list[str]:
    """Names of the weights that only one model has, or whose values are not equal bit for bit."""
    first, second = one.state_dict(), other.state_dict()
    names = sorted(first.keys() ^ second.keys())
    for name in sorted(first.keys() & second.keys()):
        a, b = first[name].cpu(), second[name].cpu()
        if a.shape != b.shape or not torch.equal(a.float(), b.float()):
            names.append(name)
    return names


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: Missing, or not a JSON object.
    """
    try:
        value = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file; is this the folder of a finished run?") from error
    except (ValueError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: a JSON object was expected")
    return value
