"""The hub: what is uploaded where and in which order; a failure neither ends a run nor shows a token."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import ClassVar

import pytest

from sfumato.config import HubOptions
from sfumato.errors import UserError
from sfumato.track.hub import Hub, fetch_state, parse_repo_path

TOKEN = "hf_canary3f9a"


class FakeApi:
    """Records what huggingface_hub's client is asked for."""

    calls: ClassVar[list[tuple]] = []
    fault: Exception | None = None
    gate: threading.Event | None = None
    folder = Path()

    def __init__(self, token=None):
        self.token = token

    def create_repo(self, repo_id, *, repo_type=None, private=None, exist_ok=False):
        self.calls.append(("create", repo_id, repo_type, private, exist_ok, self.token))

    def upload_file(self, *, repo_id, repo_type, path_or_fileobj, path_in_repo):
        if self.gate:
            assert self.gate.wait(10)
        if self.fault:
            raise self.fault
        content = Path(path_or_fileobj).read_bytes()
        self.calls.append(("file", repo_id, repo_type, path_in_repo, content, self.token))

    def upload_folder(self, *, repo_id, repo_type, folder_path, path_in_repo):
        names = sorted(path.relative_to(folder_path).as_posix() for path in Path(folder_path).rglob("*"))
        self.calls.append(("folder", repo_id, repo_type, path_in_repo, names, self.token))

    def snapshot_download(self, repo_id, *, repo_type, revision, allow_patterns):
        if self.fault:
            raise self.fault
        self.calls.append(("download", repo_id, repo_type, revision, allow_patterns, self.token))
        return str(self.folder)


@pytest.fixture
def api(monkeypatch):
    """The class in place of the real client, fresh for each test."""
    fresh = type("FakeApi", (FakeApi,), {"calls": [], "fault": None, "gate": None})
    monkeypatch.setattr("huggingface_hub.HfApi", fresh)
    return fresh


def options(**more) -> HubOptions:
    return HubOptions.model_validate({"huggingface_repo_id": "me/it", **more})


def warnings(messages):
    return [record.getMessage() for record in messages if record.levelno >= logging.WARNING]


def test_files_and_folders_are_uploaded_to_the_given_path(api, tmp_path):
    file, state = tmp_path / "lora.safetensors", tmp_path / "lora-state"
    file.write_bytes(b"weights")
    (state / "inner").mkdir(parents=True)
    (state / "state.json").touch()
    (state / "inner" / "x.bin").touch()
    given = options(
        huggingface_path_in_repo="a/b",
        huggingface_repo_type="dataset",
        huggingface_token=TOKEN,
        huggingface_repo_visibility="public",
        save_state_to_huggingface=True,
    )
    with Hub(given, {TOKEN}) as hub:
        hub.upload(file)
        hub.upload_state(state)
    assert api.calls == [
        ("create", "me/it", "dataset", False, True, TOKEN),
        ("file", "me/it", "dataset", "a/b/lora.safetensors", b"weights", TOKEN),
        ("folder", "me/it", "dataset", "a/b/lora-state", ["inner", "inner/x.bin", "state.json"], TOKEN),
    ]


@pytest.mark.parametrize("visibility", [None, "private", "Public"])
def test_a_new_repository_is_private_by_default(api, tmp_path, visibility):
    (tmp_path / "x").touch()
    with Hub(options(huggingface_repo_visibility=visibility), ()) as hub:
        hub.upload(tmp_path / "x")
    assert api.calls[0] == ("create", "me/it", None, True, True, None)
    assert api.calls[1][3] == "x"


def test_nothing_is_uploaded_by_default(api, tmp_path):
    with Hub(HubOptions(save_state_to_huggingface=True), ()) as hub:
        hub.upload(tmp_path)
        hub.upload_state(tmp_path)
    with Hub(options(), ()) as hub:
        hub.upload_state(tmp_path)
    assert api.calls == []


def test_asynchronous_uploads_are_waited_for_at_the_end(api, tmp_path):
    api.gate = threading.Event()
    paths = [tmp_path / name for name in ("1", "2", "3")]
    for path in paths:
        path.write_text(path.name)
    with Hub(options(async_upload=True), ()) as hub:
        hub.upload(paths[0])
        hub.upload(paths[1])
        assert [call[0] for call in api.calls if call[0] != "create"] == []  # held by the gate
        api.gate.set()
        hub.finish(paths[0])
        paths[0].unlink()  # it is uploaded
        hub.upload(paths[2], last=True)
        assert [call[3] for call in api.calls[1:]] == ["1", "2", "3"]
    with Hub(options(async_upload=True), ()) as hub:
        hub.upload(paths[1])
    assert [call[3] for call in api.calls if call[0] == "file"] == ["1", "2", "3", "2"]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("hub")]


class FromAnywhere(Exception):
    """An exception of a class that we do not know, e.g. an HTTP library's."""


@pytest.mark.parametrize("kind", [OSError, ValueError, FromAnywhere])
@pytest.mark.parametrize("background", [False, True])
def test_a_failure_is_a_warning_with_its_reason_and_without_the_token(api, tmp_path, messages, kind, background):
    api.fault = kind(f"401 for the token {TOKEN}\n at somewhere")
    (tmp_path / "x").touch()
    with Hub(options(huggingface_token=TOKEN, async_upload=background), {TOKEN}) as hub:
        hub.upload(tmp_path / "x")
    (warning,) = warnings(messages)
    assert warning == f"x was not uploaded: {kind.__name__}: 401 for the token (secret) at somewhere"


def test_a_state_is_downloaded(api, tmp_path):
    api.folder = tmp_path
    given = HubOptions.model_validate({"huggingface_token": TOKEN})
    assert fetch_state(given, Path("me/it/runs/x-state:v1:dataset"), {TOKEN}) == tmp_path / "runs/x-state"
    assert fetch_state(HubOptions(), Path("me/it"), ()) == tmp_path
    assert api.calls == [
        ("download", "me/it", "dataset", "v1", "runs/x-state/*", TOKEN),
        ("download", "me/it", None, None, None, None),
    ]


def test_a_failed_download_is_an_error(api):
    api.fault = FromAnywhere(f"no such repository for {TOKEN}")
    with pytest.raises(UserError, match=r"me/it.*FromAnywhere") as error:
        fetch_state(HubOptions(), Path("me/it/x"), {TOKEN})
    assert error.value.code == "hub-download-failed"
    assert TOKEN not in str(error.value)


def test_names_on_the_hub():
    assert parse_repo_path(Path("a/b/c/d::model")) == ("a/b", "c/d", None, "model")
    for wrong in ("a", "a:b", "a/b/c:1:banana", "a/b/c:1:model:4", "/a/b"):
        with pytest.raises(UserError) as error:
            parse_repo_path(Path(wrong))
        assert error.value.code == "hub-path-invalid"
