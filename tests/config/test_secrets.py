"""Secrets of options, of the environment and of logins: found, and shown nowhere."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sfumato.cli.main import main
from sfumato.config import load_config
from sfumato.config.secrets import (
    SECRET_VARIABLES,
    collect_machine_secrets,
    describe_exposed,
    find_secret_words,
    redact,
)

HUB_TOKEN = "hf_" + "Ab3" * 12
NEEDED = ["--pretrained_model_name_or_path", "me/model", "--train_data_dir", ".", "--output_dir", "out"]


@pytest.fixture(autouse=True)
def no_logins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in SECRET_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name in ("HF_HOME", "HF_TOKEN_PATH", "HF_STORED_TOKENS_PATH", "XDG_CACHE_HOME", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_TOKEN", "HUGGINGFACEHUB_API_TOKEN"]
)
def test_tokens_of_the_environment(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "canary-secret")
    assert collect_machine_secrets() == {"canary-secret"}


@pytest.mark.parametrize(
    ("variable", "place"),
    [("HF_HOME", "hub/token"), ("HF_TOKEN_PATH", "hub/my_token"), ("XDG_CACHE_HOME", "hub/huggingface/token"),
     ("", ".cache/huggingface/token")],
)  # fmt: skip
def test_tokens_of_hf_auth_login(variable: str, place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / place
    path.parent.mkdir(parents=True)
    path.write_text("canary-in-use\n")
    (path.parent / "stored_tokens").write_text("[work]\nhf_token = canary-stored\n\n[home]\nhf_token = canary-other\n")
    if variable:
        monkeypatch.setenv(variable, str(path if variable == "HF_TOKEN_PATH" else tmp_path / "hub"))
    assert collect_machine_secrets() == {"canary-in-use", "canary-stored", "canary-other"}


def test_keys_of_wandb_login_and_damaged_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    netrc = tmp_path / ".netrc"
    netrc.write_text(
        "machine api.wandb.ai\n  login user\n  password canary-key\nmachine x.org login a password b12345\n"
    )
    assert collect_machine_secrets() == {"canary-key"}
    netrc.write_bytes(b"machine \xff\xfe")
    (tmp_path / ".cache" / "huggingface").mkdir(parents=True)
    (tmp_path / ".cache" / "huggingface" / "stored_tokens").write_bytes(b"\xff[[[")
    assert collect_machine_secrets() == frozenset()


@pytest.mark.parametrize(
    "words",
    [
        ["huggingface_token", "canary1"], ["--huggingface-token", "canary1"], ["huggingface_token=canary1"],
        ["—wandb_api_key", "canary1"], ["wandb_apikey=canary1"],
    ],
)  # fmt: skip
def test_secrets_that_were_mistyped(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert find_secret_words(words) == {"canary1"}
    argv = ["train", *NEEDED, *words]
    monkeypatch.setattr(sys, "argv", ["sfumato", *argv])
    assert main(argv) == 2
    assert "canary1" not in "".join(capsys.readouterr())


def test_words_that_are_no_secrets() -> None:
    assert not find_secret_words(["--keep_tokens", "1234567", "--max_token_length=1234567", "--tokenizer", "abcdefgh"])


@pytest.mark.parametrize(
    ("path", "secret"),
    [
        (f"https://x.org/{HUB_TOKEN}/model.safetensors", HUB_TOKEN),
        ("https://user:canary1@x.org/model.safetensors", "canary1"),
        ("https://x.org/models/1?token=canary1", "canary1"),
    ],
)
def test_a_secret_in_the_path_of_a_missing_model(
    path: str, secret: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert secret not in redact(path, ())
    assert secret not in redact(str(Path(path)), ())  # one slash is lost
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--pretrained_model_name_or_path", path, "--train_data_dir", ".", "--output_dir", "o"]) == 2
    told = "".join(capsys.readouterr())
    assert "(secret)" in told
    assert secret not in told


def test_plain_texts_stay_as_they_are() -> None:
    text = "me@x.org, /home/a@b/c, hf_transfer, https://huggingface.co/me/it?download=true, a:/b"
    assert redact(text, ()) == text


@pytest.mark.parametrize("log_with", ["wandb", "all", "tensorboard"])
def test_what_a_command_line_with_wandb_shows(log_with: str, tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('wandb_api_key = "canary-in-file"\n')
    (tmp_path / "p.txt").write_text("a cat")
    given = ["--log_with", log_with, "--huggingface_token", "canary1", "--logging_dir", "logs"]
    given += ["--config_file", str(tmp_path / "a.toml")]
    warnings, notes = describe_exposed(load_config([*NEEDED, *given]))
    if log_with == "tensorboard":
        assert (warnings, notes) == ([], [])
        return
    (warning,), (note,) = warnings, notes
    assert "--huggingface_token" in warning
    assert "--config_file" in note
    assert "canary" not in warning + note
