"""Upload of a finished run to the Hugging Face Hub."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ptft_hf import checkpoints, recipes
from ptft_hf.card import is_policy, model_card, without_task
from ptft_hf.errors import CheckpointError, OutputError

CARD = "README.md"


def push(folder: str | Path, repository: str, *, private: bool = False, revision: str | None = None) -> str:
    """Upload the files of a finished run, after checking them against their manifest.

    Checkpoints and logs stay. The uploaded card loads the model from the Hub and not from ``folder``.

    Args:
        folder: Output folder of a run.
        repository: ``owner/name``; made if it is not there.
        private: Make it private.
        revision: Branch; made if it is not there.

    Returns:
        The address of the commit.

    Raises:
        CheckpointError: The folder is not a finished, undamaged run.
        OutputError: The Hub refuses, or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    path = Path(folder)
    run = checkpoints.read_json(path / "run.json")
    if problems := checkpoints.damage(path):
        raise CheckpointError(*problems)
    if "task_state" not in run and not is_policy(run):
        raise CheckpointError(without_task(path, run))
    api, files = HfApi(), contents(path, run, repository)  # before a repository is made that stays empty
    try:
        repo = api.create_repo(repository, private=private, exist_ok=True).repo_id
        if repo != repository:  # which was named without its owner
            files = contents(path, run, repo)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        commit = api.create_commit(
            repo,
            [CommitOperationAdd(name, content) for name, content in files.items()],
            commit_message="Upload a model trained with ptft_hf",
            revision=revision,
        )
    except Exception as error:  # of several HTTP libraries, by version
        raise OutputError(f"{repository}: {_reason(error)}") from error
    return str(commit.commit_url)


def contents(folder: Path, run: dict[str, Any], repository: str) -> dict[str, Path | bytes]:
    """What is uploaded, by name: the files of the manifest, with a card for the Hub, and the manifest."""
    manifest = checkpoints.read_json(folder / checkpoints.MANIFEST)
    files: dict[str, Path | bytes] = {name: folder / name for name in manifest["files"]}
    card = model_card(run, recipes.saved_adapter_kind(folder), repository=repository).encode()
    manifest["files"][CARD] = {"size": len(card), "sha256": hashlib.sha256(card).hexdigest()}
    files[CARD] = card
    return {**files, checkpoints.MANIFEST: json.dumps(manifest, indent=1).encode()}


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return f"the Hub refuses; log in (`hf auth login`) with a token that may write there: {text}"
    return f"the Hub did not take the upload: {text}"
