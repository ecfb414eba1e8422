"""Metadata that no file can hold is shortened before the first step, and the run is saved."""

from __future__ import annotations

from pathlib import Path

import pytest

from families.toys import ToyShelf
from sfumato.formats import metadata_limit
from sfumato.formats.header import read_header
from toy_runs import make_images, train_toy


def test_a_run_with_a_long_thumbnail_is_saved_without_it(
    toy_shelf: ToyShelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(metadata_limit, "METADATA_BYTES", 10_000)
    thumbnail = tmp_path / "thumbnail.png"
    thumbnail.write_bytes(bytes(12_000))
    images = make_images(tmp_path / "images", 1)
    options = {"max_train_steps": 1, "metadata_thumbnail": thumbnail}
    output = train_toy(toy_shelf.paths("sd"), images, tmp_path / "out", **options)
    metadata = read_header(output / "lora.safetensors").metadata
    assert "modelspec.thumbnail" not in metadata
    assert metadata["modelspec.title"] == "lora"
    assert "cat" in metadata["ss_tag_frequency"]
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "thumbnail is not in" in line)
    assert "WARNING" in line
