"""What the configuration tests share: a command line that is complete, and reading faults."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from sfumato.config import Config, load_config
from sfumato.errors import SeveralErrors, UserError


@pytest.fixture
def base(tmp_path: Path) -> list[str]:
    """The least that a run needs."""
    (tmp_path / "images").mkdir()
    (tmp_path / "model.safetensors").touch()
    return [
        f"--pretrained_model_name_or_path={tmp_path / 'model.safetensors'}",
        f"--train_data_dir={tmp_path / 'images'}",
        f"--output_dir={tmp_path / 'out'}",
        "--resolution=512",
    ]


@pytest.fixture
def load(base: list[str]) -> Callable[..., Config]:
    """load("--seed 1") on top of `base`; a list instead of a text is taken word by word."""
    return lambda words="", **more: load_config(base + split(words), **more)


@pytest.fixture
def faults(base: list[str]) -> Callable[..., list[str]]:
    """The faults of a command line on top of `base`, one text each."""
    return lambda words="", **more: faults_of(base + split(words), **more)


@pytest.fixture
def codes_of(base: list[str]) -> Callable[..., list[str]]:
    """The codes of the faults of a command line on top of `base`, in order."""
    return lambda words="", **more: [error.code for error in collect_faults(base + split(words), **more)]


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], str]:
    """Write a configuration file; gives the option that names it."""

    def write(text: str) -> str:
        path = tmp_path / "run.toml"
        path.write_text(text, encoding="utf-8")
        return f"--config_file={path}"

    return write


def split(words: str | Sequence[str]) -> list[str]:
    return words.split() if isinstance(words, str) else list(words)


def faults_of(argv: Sequence[str], **more) -> list[str]:
    return [str(error) for error in collect_faults(argv, **more)]


def collect_faults(argv: Sequence[str], **more) -> list[UserError]:
    """Every fault that reading a command line reports."""
    try:
        load_config(argv, **more)
    except SeveralErrors as several:
        return several.errors
    except UserError as error:
        return [error]
    return []
