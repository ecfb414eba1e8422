"""Metadata that a safetensors header cannot hold is shortened: thumbnail, rare tags, then the longest texts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sfumato.errors import UserError
from sfumato.formats import checkpoint_writer
from sfumato.formats.metadata_limit import THUMBNAIL_KEY, fit_metadata, measure

TAGS = {"a": {f"tag {i}": i + 1 for i in range(500)}, "b": {"box": 3}}


def make_metadata(**more: str) -> dict[str, str]:
    datasets = [{"batch_size_per_device": 2, "tag_frequency": TAGS}]
    tables = {"ss_tag_frequency": json.dumps(TAGS), "ss_datasets": json.dumps(datasets)}
    return {"ss_network_dim": "4", "ss_training_comment": "é" * 100, **tables, **more}


def test_what_fits_stays() -> None:
    metadata = make_metadata(**{THUMBNAIL_KEY: "data:" + "x" * 1000})
    assert fit_metadata(metadata) == (metadata, [])
    assert fit_metadata(metadata, measure(metadata)) == (metadata, [])


def test_the_thumbnail_goes_first() -> None:
    metadata = make_metadata(**{THUMBNAIL_KEY: "data:" + "x" * 1000})
    fitted, notes = fit_metadata(metadata, measure(metadata) - 1)
    assert set(metadata) - set(fitted) == {THUMBNAIL_KEY}
    assert fitted["ss_tag_frequency"] == metadata["ss_tag_frequency"]
    assert len(notes) == 1


def test_rare_tags_go_next() -> None:
    metadata = make_metadata()
    limit = measure(metadata) // 3
    fitted, notes = fit_metadata(metadata, limit)
    assert measure(fitted) <= limit
    assert set(fitted) == set(metadata)
    (table,) = (json.loads(fitted["ss_tag_frequency"]),)
    assert 0 < len(table["a"]) < 500
    assert min(table["a"].values()) > 500 - len(table["a"])
    assert table["b"] == {"box": 3}
    assert json.loads(fitted["ss_datasets"])[0] == {"batch_size_per_device": 2, "tag_frequency": table}
    assert len(notes) == 1


def test_at_last_long_texts_go_but_not_what_programs_need() -> None:
    fitted, notes = fit_metadata(make_metadata(ss_dataset_dirs="x" * 5000), 300)
    assert measure(fitted) <= 300
    assert fitted["ss_network_dim"] == "4"
    assert any("ss_dataset_dirs" in note for note in notes)
    assert len(fit_metadata({"ss_network_args": "x" * 1000}, 10)[0]) == 1


def test_bytes_that_are_no_letters_are_replaced() -> None:
    assert fit_metadata({"ss_sd_model_name": "m\udcff.ckpt", "a": "é"}) == (
        {"ss_sd_model_name": "m?.ckpt", "a": "é"},
        [],
    )


def test_a_header_beyond_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_writer, "MAX_HEADER_BYTES", 1000)
    with pytest.raises(UserError) as error:
        checkpoint_writer.write_safetensors(tmp_path / "a.safetensors", {"a": torch.zeros(1)}, {"a": "x" * 1000})
    assert error.value.code == "safetensors-header-too-long"
    assert not list(tmp_path.iterdir())
