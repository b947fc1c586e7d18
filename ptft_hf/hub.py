"""Upload of a finished run to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from ptft_hf import checkpoints
from ptft_hf.errors import CheckpointError, OutputError


def push(folder: str | Path, repository: str, *, private: bool = False, revision: str | None = None) -> str:
    """Upload the files of a finished run, after checking them against their manifest.

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
    from huggingface_hub import HfApi

    path = Path(folder)
    checkpoints.read_json(path / "run.json")
    if problems := checkpoints.damage(path):
        raise CheckpointError(*problems)
    names = checkpoints.read_json(path / checkpoints.MANIFEST)["files"]
    api = HfApi()
    try:
        repo = api.create_repo(repository, private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=path,
            allow_patterns=[*names, checkpoints.MANIFEST],
            revision=revision,
            commit_message="Upload a model trained with ptft_hf",
        )
    except Exception as error:  # of several HTTP libraries, by version
        reason = " ".join(str(error).split())[:300]
        raise OutputError(f"{repository}: the Hub did not take the upload: {reason}") from error
    return str(commit.commit_url)
