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
from ptft_hf.forward import logits_of_heads
from ptft_hf.models import adapter_kind, base_config, located, plain_model
from ptft_hf.recipes import saved_adapter_kind

MANIFEST = "manifest.json"
STAGING = ".staging"
RUNS_CODE = ("trust_remote_code", "allow_all_kernels")
"""Arguments of ``from_pretrained`` that have code run which came with a checkpoint, or from the Hub."""
LOADED = (".safetensors", ".bin", ".json", ".model", ".txt", ".jinja", ".py")
"""Endings of the files of a model's folder that decide what it computes."""


# ---- folders of others ----

HOW_TO_TRUST = (
    "--trust-remote-code; in Python trust_remote_code=True; of a policy in PPO, in evaluation and for feedback "
    "model.trust_remote_code of the task's recipe (or --set model.trust_remote_code=true); for --reward and "
    "--judge give a function that loads it (ptft_hf.load(..., trust_remote_code=True))"
)


def check_code(folder: Path, run: Mapping[str, Any], trusted: Any) -> None:
    """Let a run have Python code run that came with its checkpoint where that is ``trusted`` alone: the run's folder
    may be a stranger's.

    Raises:
        CheckpointError: The run would have it run; it ends with how to allow that.
    """
    facts = run["model"]
    asked = [name for name in RUNS_CODE if facts.get("options", {}).get(name)]
    if asked and not trusted:
        whose = f"{facts['reference']} and of {folder}" if saved_adapter_kind(folder) else str(folder)
        raise CheckpointError(
            f"{folder}: its run.json turns {' and '.join(asked)} on, so that Python code of {whose} would run here; "
            f"if you trust that code, allow it: {HOW_TO_TRUST}"
        )


# ---- whole folders ----


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def contents(references: Iterable[str | Path]) -> dict[str, str]:
    """``sha256:...`` of weights, configuration and tokenizer in each reference that is a folder; what else there is,
    such as a model on the Hub or a function, has no entry.

    Raises:
        CheckpointError: A file cannot be read.
    """
    found = {}
    for reference in map(str, references):
        folder, digest = Path(located(reference, {})[0]), hashlib.sha256()
        if not folder.is_dir():
            continue
        for path in sorted(folder.iterdir()):
            if path.suffix in LOADED and path.is_file():
                try:
                    digest.update(f"{path.name} {sha256(path)}\n".encode())
                except OSError as error:
                    raise CheckpointError(f"{path}: cannot be read: {error}") from error
        found[reference] = f"sha256:{digest.hexdigest()}"
    return found


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
        entries = manifest(folder)
    except FileNotFoundError:
        return [f"{folder}: no {MANIFEST}; it was never finished"]
    except CheckpointError as error:
        return list(error.problems)
    problems = []
    for name, (size, digest) in entries.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{path}: missing")
        elif path.stat().st_size != size:
            problems.append(f"{path}: {path.stat().st_size} bytes instead of {size}")
        elif sha256(path) != digest:
            problems.append(f"{path}: its bytes have changed since it was written (SHA-256 differs)")
    return problems


def manifest(folder: Path) -> dict[str, tuple[int, str]]:
    """Size and SHA-256 of each file of a finished folder, by name.

    Raises:
        FileNotFoundError: It has no manifest.
        CheckpointError: The manifest is damaged.
    """
    try:
        files = json.loads((folder / MANIFEST).read_text("utf-8"))["files"]
        entries = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / MANIFEST}: not readable as a manifest; it is damaged") from error
    if not entries:
        raise CheckpointError(f"{folder / MANIFEST}: names no files; it is damaged")
    return entries


def write_text(path: Path, text: str) -> None:
    """Write a file at once or not at all."""
    staged = path.with_name(f".{path.name}.staged")
    staged.write_text(text, encoding="utf-8")
    _flush(staged)
    staged.replace(path)
    _flush(path.parent)


def publish(staged: Path, final: Path) -> None:
    """Make a finished folder visible under its name, in one step that survives a power cut."""
    write_manifest(staged)
    _flush(staged)
    if final.exists():
        remove(final)
    staged.rename(final)
    _flush(final.parent)


def publish_into(staged: Path, folder: Path, last: str) -> None:
    """Move the files of a finished folder into one that exists: their manifest first, so that it is known at
    any moment which files are ours, and ``last`` when all others are there and nothing is left to tidy up."""
    write_manifest(staged)
    for path in sorted(staged.iterdir(), key=lambda path: path.name != MANIFEST):
        if path.name != last:
            if path.is_dir() and (folder / path.name).exists():
                remove(folder / path.name)
            path.rename(folder / path.name)
    waiting = folder / f".{last}.staged"
    (staged / last).rename(waiting)
    staged.rmdir()
    _flush(folder)
    waiting.rename(folder / last)
    _flush(folder)


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


def newest_intact(folder: Path, *, with_best: bool = False) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and for each newer one why it is not taken.

    Args:
        folder: Where the checkpoints are.
        with_best: The run ends with its best checkpoint, so the one that was best so far must be whole too.
    """
    skipped: list[str] = []
    for _, path in reversed(steps(folder)):
        problems = damage(path)
        if not problems and with_best:
            best = read_json(path / "trainer_state.json").get("best_global_step")
            if best and folder / f"checkpoint-{best}" != path:
                problems = [
                    f"it needs the best one so far: {p}" for p in damage(folder / f"checkpoint-{best}")
                ]
        if not problems:
            return path, skipped
        skipped.append(f"skipped {path.name}: {problems[0]}")
    return None, skipped


def discard_newer(folder: Path, start: Path | None) -> None:
    """Remove what would count as newer than the checkpoint that a run goes on from; all if it starts over."""
    reached = int(start.name.removeprefix("checkpoint-")) if start else -1
    for step, path in steps(folder):
        if step > reached:
            remove(path)


def discard_unfinished(folder: Path) -> None:
    """Remove what a killed process left of a save or a deletion."""
    for path in [*folder.glob(f"{STAGING}*"), *folder.glob(".deleted-*")]:
        shutil.rmtree(path)
    for path in folder.glob(".*.staged"):
        path.unlink()


def rotate(folder: Path, keep: int | None, best_step: int | None) -> None:
    """Delete the oldest checkpoints beyond ``keep`` (``save_total_limit``), never the best or the newest."""
    if not keep or keep < 1:
        return
    existing = steps(folder)
    protected = {existing[-1][0], best_step} if existing else set()
    spare = [path for step, path in existing if step not in protected]
    for path in spare[: max(0, len(existing) - max(keep, len(existing) - len(spare)))]:
        remove(path)


# ---- models ----


def save_model(model: Any, tokenizer: Any, folder: Path, state_dict: Mapping[str, Any] | None = None) -> None:
    """Weights as safetensors, configuration and tokenizer. Beside an adapter stands the configuration of the
    model that it belongs to: labels and padding token, without which no one could use it, and how it generates."""
    folder.mkdir(parents=True, exist_ok=True)
    kind = adapter_kind(model)
    # "auto" would ask the Hub whether the vocabulary has grown.
    options = {"save_embedding_layers": False} if kind == "peft" else {}
    model.save_pretrained(folder, state_dict=state_dict, **options)
    if kind is not None:
        base = plain_model(model)
        base_config(base).save_pretrained(folder)
        if base.can_generate():
            base.generation_config.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's template; ours is written at the end
    tokenizer.save_pretrained(folder)


Probe = list[dict[str, torch.Tensor]]
ALIGNMENT = 64
"""Bytes of whose multiples torch puts tensors on a CPU."""


def logits_on(model: Any, probe: Probe) -> list[torch.Tensor]:
    """Logits of each batch, in evaluation mode, without autocast; those of several heads side by side."""
    model.eval()
    device = next(model.parameters()).device
    with torch.no_grad():
        results = [model(**{k: v.to(device) for k, v in b.items() if k != "labels"}) for b in probe]
    heads = [[logits.float().cpu() for logits in logits_of_heads(result)] for result in results]
    return [h[0] if len(h) == 1 else torch.cat([logits.flatten(1) for logits in h], 1) for h in heads]


def are_finite(logits: Iterable[torch.Tensor]) -> bool:
    """Whether all are numbers, told by the least and the largest: ``torch.isfinite`` of all makes copies of them."""
    return all(torch.isfinite(torch.stack(batch.aminmax())).all() for batch in logits)


def prove(trained: Any, reload: Callable[[], Any], probe: Probe) -> dict[str, Any]:
    """Load what was saved into a freshly built model and compare it with the model in memory: the weights, all
    of them, and the logits.

    Args:
        trained: The model as training left it.
        reload: Builds a new model from the saved folder alone.
        probe: Batches on which both are run.

    Returns:
        ``{"max_difference": 0.0, "examples": n}``.

    Raises:
        RoundTripError: Any weight or logit differs, or is not a number; the weights that differ are named.
    """
    before = logits_on(trained, probe)
    if not are_finite(before):
        raise RoundTripError(
            "the trained model gives logits that are not numbers: training diverged; lower "
            "learning_rate, or set max_grad_norm"
        )
    fresh = reload()
    fresh.to(next(trained.parameters()).device)
    after = logits_on(fresh, probe)
    examples = sum(len(batch) for batch in before)
    names = differing_weights(trained, fresh)
    if not names and not all(map(torch.equal, before, after)):
        for model in (trained, fresh):
            align(model)
        before, after = (logits_on(model, probe) for model in (trained, fresh))
    if not names and all(map(torch.equal, before, after)):
        return {"max_difference": 0.0, "examples": examples}
    if [batch.shape for batch in before] == [batch.shape for batch in after]:
        pairs = zip(before, after, strict=True)
        difference = max((a - b).abs().nan_to_num(torch.inf).max().item() for a, b in pairs)
        found = f"logits differ by up to {difference:.3g} on {examples} examples"
    else:
        found = f"logits have the shapes {[tuple(batch.shape) for batch in after]}"
    raise RoundTripError(
        f"the saved model is not the trained one: {found}; "
        f"weights that differ: {', '.join(names[:20]) or 'none by name'}"
    )


def align(model: Any) -> None:
    """Move weights to where torch puts new ones. Read from a file they begin anywhere, and with one output, or one
    row, products of matrices may then add up in another order (MKL on AMD: every second one of 384 numbers)."""
    for parameter in model.parameters():
        if parameter.device.type == "cpu" and parameter.data_ptr() % ALIGNMENT:
            parameter.data = parameter.data.clone()


def differing_weights(one: Any, other: Any) -> list[str]:
    """Names of the weights that only one model has, or whose values are not equal. What PEFT keeps of the head
    that it has replaced (``original_module``) takes no part in the model and is not saved."""
    first, second = (
        {name: value for name, value in model.state_dict().items() if ".original_module." not in name}
        for model in (one, other)
    )
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
