"""Upload to the Hub, against a stand-in on this machine."""

# ruff: noqa: F811 - fixtures are imported, and then named as parameters

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants

import ptft_hf
from ptft_hf import checkpoints, hub
from ptft_hf.errors import CheckpointError, OutputError, RecipeError
from tests import hub_stand_in
from tests.finished import Finished, full, lora  # noqa: F401


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[hub_stand_in.Hub]:
    """A stand-in to which huggingface_hub talks in this process, with a token."""
    with hub_stand_in.running() as stand_in:
        use(monkeypatch, stand_in.address)
        yield stand_in


def use(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """huggingface_hub reads its settings from the environment when it is imported: they are constants by now."""
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    assert HfApi().endpoint == address


@pytest.mark.parametrize("name", ["full", "lora"])
def test_what_is_uploaded_is_the_manifest_and_its_files(
    server: hub_stand_in.Hub, name: str, request: pytest.FixtureRequest
):
    run = request.getfixturevalue(name)
    address = hub.push(run.folder, "owner/name")
    assert address == f"{server.address}/owner/name/commit/{'0' * 40}"
    uploaded = server.files["owner/name", "main"]
    manifest = checkpoints.read_json(run.folder / "manifest.json")["files"]
    assert set(uploaded) == {*manifest, "manifest.json"}
    assert not any("checkpoint" in name or name == "settings.json" for name in uploaded)
    for file in set(manifest) - {"README.md"}:
        assert uploaded[file] == (run.folder / file).read_bytes()


def test_what_is_downloaded_again_is_whole_and_answers_alike(
    server: hub_stand_in.Hub, lora: Finished, tmp_path: Path
):
    hub.push(lora.folder, "owner/name")
    for name, content in server.files["owner/name", "main"].items():
        (tmp_path / name).write_bytes(content)
    assert checkpoints.damage(tmp_path) == []
    assert ptft_hf.load(tmp_path).predict(lora.texts) == ptft_hf.load(lora.folder).predict(lora.texts)


def test_the_uploaded_card_loads_from_the_hub_and_not_from_this_machine(
    server: hub_stand_in.Hub, full: Finished
):
    hub.push(full.folder, "owner/name")
    card = server.files["owner/name", "main"]["README.md"].decode()
    assert "folder = 'owner/name'  #" in card
    assert "load(snapshot_download('owner/name'))" in card
    assert str(full.folder) not in card
    assert str(full.folder) in (full.folder / "README.md").read_text("utf-8")  # which stays as it was


def test_a_name_without_an_owner_is_the_users_own(server: hub_stand_in.Hub, full: Finished):
    hub.push(full.folder, "name")
    assert "folder = 'me/name'  #" in server.files["me/name", "main"]["README.md"].decode()


def test_a_run_of_which_no_card_can_be_made_leaves_no_empty_repository(
    server: hub_stand_in.Hub, full: Finished, tmp_path: Path
):
    folder = shutil.copytree(full.folder, tmp_path / "copy", ignore=shutil.ignore_patterns("checkpoints"))
    run = checkpoints.read_json(folder / "run.json")
    run["task"]["leakage"] = "hide"
    (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")
    checkpoints.write_manifest(folder)
    with pytest.raises(RecipeError, match="leakage: expected 'warn', 'drop' or 'error', got 'hide'"):
        hub.push(folder, "owner/name")
    del run["task_state"]
    (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")
    checkpoints.write_manifest(folder)
    with pytest.raises(CheckpointError, match="is no run that trained a model for a task"):
        hub.push(folder, "owner/name")
    assert server.created == []


def test_visibility_and_branch_are_passed_on(server: hub_stand_in.Hub, lora: Finished):
    hub.push(lora.folder, "owner/name", private=True, revision="v2")
    hub.push(lora.folder, "owner/other")
    assert [request.get("visibility") for request in server.created] == ["private", "public"]
    assert set(server.files) == {("owner/name", "v2"), ("owner/other", "main")}


def test_a_damaged_folder_is_refused_before_the_hub_is_asked(
    server: hub_stand_in.Hub, lora: Finished, tmp_path: Path
):
    folder = shutil.copytree(lora.folder, tmp_path / "copy")
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\xff")
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: its bytes have changed"):
        hub.push(folder, "owner/name")
    with pytest.raises(CheckpointError, match="is this the folder of a finished run"):
        hub.push(tmp_path, "owner/name")
    assert server.created == []


def test_a_hub_that_refuses_says_to_log_in(server: hub_stand_in.Hub, lora: Finished):
    server.refuse = 401
    with pytest.raises(OutputError, match=r"owner/name: the Hub refuses; log in \(`hf auth login`\)"):
        hub.push(lora.folder, "owner/name")
    assert server.files == {}


@pytest.mark.parametrize("repository", ["a/b/c", "owner/na me", ""])
def test_a_name_that_is_none_is_refused(server: hub_stand_in.Hub, lora: Finished, repository: str):
    with pytest.raises(OutputError):
        hub.push(lora.folder, repository)
    assert server.files == {}


def test_a_hub_that_cannot_be_reached_is_one_error_and_soon(lora: Finished, monkeypatch: pytest.MonkeyPatch):
    with hub_stand_in.running() as gone:
        address = gone.address
    use(monkeypatch, address)  # nothing listens there any more
    started = time.monotonic()
    with pytest.raises(OutputError, match="owner/name: the Hub did not take the upload") as caught:
        hub.push(lora.folder, "owner/name")
    assert len(caught.value.problems) == 1
    assert time.monotonic() - started < 5


def test_the_verb_prints_the_address_and_offline_is_exit_code_2(lora: Finished):
    """In processes of their own, where HF_ENDPOINT and HF_HUB_OFFLINE are read as a user sets them."""
    command = [sys.executable, "-m", "ptft_hf", "push", str(lora.folder), "owner/name", "--private"]
    with hub_stand_in.running() as server:
        environment = {"HF_ENDPOINT": server.address, "HF_TOKEN": "hf_of_a_test", "HF_HUB_OFFLINE": "0"}
        done = subprocess.run(command, capture_output=True, text=True, env=with_(environment))
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == f"{server.address}/owner/name/commit/{'0' * 40}\n"
        assert json.loads(server.files["owner/name", "main"]["run.json"])["seed"] == 42
        offline = subprocess.run(
            command, capture_output=True, text=True, env=with_({**environment, "HF_HUB_OFFLINE": "1"})
        )
    assert (offline.returncode, offline.stdout) == (2, "")
    assert offline.stderr.startswith("error: owner/name: the Hub did not take the upload: ")
    assert "offline mode is enabled" in offline.stderr
    assert offline.stderr.count("\n") == 1


def with_(settings: dict[str, str]) -> dict[str, str]:
    import os

    return {**os.environ, **settings}
