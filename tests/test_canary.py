"""Secrets and private paths, given wherever they can be, in a run with every output on: none of them is written."""

from __future__ import annotations

import gzip
import json
import shutil
import sys
import types
import zlib
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors import safe_open

from families.toys import ToyShelf
from sfumato.cli.main import main
from toy_runs import make_arguments, make_images

HOME = "canary-home"  # a folder that everything lies in
OPTION_TOKEN, OPTION_KEY = "hf_canary1secret", "canary2secret" * 3
ENVIRONMENT_TOKEN, ENVIRONMENT_KEY = "hf_canary3secret", "canary4secret" * 3
SECRETS = (OPTION_TOKEN, OPTION_KEY, ENVIRONMENT_TOKEN, ENVIRONMENT_KEY)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder for what the hub receives; its first answer repeats the token."""
    folder = tmp_path / "hub"

    class Api:
        def __init__(self, token: str | None = None) -> None:
            self.token = token

        def create_repo(self, repo_id: str, **more: Any) -> None:
            if not folder.exists():
                folder.mkdir()
                raise RuntimeError(f"401 for {self.token} and {ENVIRONMENT_TOKEN}")

        def upload_file(self, *, path_or_fileobj: Path, path_in_repo: str, **more: Any) -> None:
            shutil.copy(path_or_fileobj, folder / path_in_repo)

        def upload_folder(self, *, folder_path: Path, path_in_repo: str, **more: Any) -> None:
            shutil.copytree(folder_path, folder / path_in_repo)

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    return folder


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A file with what a stand-in for wandb would publish: all that it gets but the key and its own local folder."""
    path = tmp_path / "wandb.jsonl"

    def write(**given: Any) -> None:
        with path.open("a") as file:
            file.write(json.dumps(given) + "\n")

    class Started:
        def log(self, values: Any, *, step: int) -> None:
            write(step=step, **values)

        def finish(self) -> None:
            write(done=True)

    def init(*, settings: dict[str, Any], dir: str, **given: Any) -> Started:
        assert settings.pop("api_key") == OPTION_KEY
        write(**given, settings=settings)
        return Started()

    module = types.ModuleType("wandb")
    module.__spec__ = ModuleSpec("wandb", None)  # some libraries ask whether it is there
    monkeypatch.setattr(module, "Settings", dict, raising=False)
    monkeypatch.setattr(module, "Error", OSError, raising=False)
    monkeypatch.setattr(module, "init", init, raising=False)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return path


def contents(path: Path) -> bytes:
    """A file's bytes, and what is packed in it."""
    content = path.read_bytes()
    if path.suffix == ".gz":
        content += gzip.decompress(content)
    if path.suffix == ".png":
        with Image.open(path) as image:
            content += repr(getattr(image, "text", {})).encode()  # text chunks may be compressed
    for start in (b"\x78\x9c", b"\x78\xda", b"\x78\x01"):
        if content.startswith(start):
            content += zlib.decompress(content)
    return content


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def write_options(home: Path) -> list[str]:
    """Files that options point to, in the private folder, and the options."""
    (home / "prompts.txt").write_text("a cat --w 64 --h 64 --s 2\n")
    (home / "trackers.toml").write_text('[wandb]\nentity = "us"\n')
    (home / "secrets.toml").write_text(
        f'huggingface_token = "{OPTION_TOKEN}"\nwandb_api_key = "{OPTION_KEY}"\n'
        f"metadata_merged_from = '{home}/a.safetensors, {home}/b.safetensors'\n"
    )
    Image.new("RGB", (8, 8)).save(home / "thumbnail.png")
    given = {
        "config_file": home / "secrets.toml", "log_tracker_config": home / "trackers.toml",
        "sample_prompts": home / "prompts.txt", "metadata_thumbnail": home / "thumbnail.png",
        "console_log_file": home / "console.log", "plot_timesteps": home / "out" / "timesteps.png",
        "logging_dir": home / "logs", "log_with": "all", "cache_dir": home / "cache",
        "console_log_level": "DEBUG", "sample_every_n_steps": 1, "save_every_n_steps": 1,
        "max_train_steps": 2, "huggingface_repo_id": "me/it",
    }  # fmt: skip
    flags = ("log_config", "save_state", "cache_latents_to_disk", "async_upload", "save_state_to_huggingface")
    options = [f"--{flag}" for flag in flags]
    for name, value in given.items():
        options += [f"--{name}", str(value)]
    return options


def test_no_secret_and_no_private_path_in_any_output(
    toy_shelf: ToyShelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: Path, wandb: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("HF_TOKEN", ENVIRONMENT_TOKEN)
    monkeypatch.setenv("WANDB_API_KEY", ENVIRONMENT_KEY)
    home = tmp_path / HOME
    home.mkdir()
    source = toy_shelf.paths("sd")["pretrained_model_name_or_path"]
    model = shutil.copytree(source.parent, home / "model") / source.name
    argv = make_arguments(
        {"pretrained_model_name_or_path": model}, make_images(home / "images"), home / "out", console_log_level=None
    )
    assert main(["train", *argv, *write_options(home)]) == 0

    given = {
        home / "secrets.toml",
        home / "trackers.toml",
        home / "prompts.txt",
        *(home / "images").rglob("*"),
        *(home / "model").rglob("*"),
    }
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path not in given]
    kinds = {path.suffix for path in written}
    assert {".safetensors", ".json", ".jsonl", ".png", ".log"} <= kinds
    secrets = [secret.encode() for secret in SECRETS]
    for path in written:
        assert not [secret for secret in secrets if secret in contents(path)], path
    output = "".join(capfd.readouterr())
    assert not [secret for secret in SECRETS if secret in output]

    # The messages are for the user alone and the cache records where an image lay; neither is published.
    private = [path for path in written if path.is_relative_to(home / "cache") or path == home / "console.log"]
    assert len(private) > 1
    for path in set(written) - set(private):
        assert HOME.encode() not in contents(path), path

    # The files that were searched have content: the checks above are not of empty files.
    assert "401 for (secret) and (secret)" in (home / "console.log").read_text()
    state = json.loads((home / "out" / "lora-state" / "state.json").read_text())
    assert state["info"]["options"]["sample_prompts"] == "prompts.txt"
    first, *rest = [json.loads(line) for line in wandb.read_text().splitlines()]
    assert first["config"]["logging_dir"] == "logs"
    assert [row.get("step") for row in rest] == [1, 2, None]
    assert b"prompts.txt" in b"".join(path.read_bytes() for path in (home / "logs").rglob("events*"))
    ours = metadata(home / "out" / "lora.safetensors")
    assert ours["modelspec.merged_from"] == "a.safetensors, b.safetensors"
    assert metadata(hub / "lora.safetensors") == ours
    assert (hub / "lora-state" / "state.json").read_bytes() == (home / "out" / "lora-state" / "state.json").read_bytes()
