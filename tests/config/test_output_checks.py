"""Prompt files and thumbnails, before a run."""

from __future__ import annotations

import pytest

from sfumato.config.output_checks import check_prompts, check_thumbnail
from sfumato.errors import UserError

SAMPLES = "--sample_every_n_steps=1"


@pytest.mark.parametrize("content", ["", "\n", "# nothing yet\n"])
def test_a_file_without_prompts_is_noted(load, tmp_path, content):
    path = tmp_path / "prompt.txt"
    path.write_text(content)
    prompts = f"--sample_prompts={path}"
    assert len(check_prompts(load([prompts, SAMPLES]))) == 1
    assert check_prompts(load([prompts])) == []
    with pytest.raises(UserError) as error:
        check_prompts(load([prompts, SAMPLES, "--strict"]))
    assert error.value.code == "sample-prompts-empty"


def test_a_prompt_is_enough(load, tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text("a cat")
    assert check_prompts(load([f"--sample_prompts={path}", SAMPLES])) == []


def test_a_wrong_prompt_is_refused_where_samples_are_made(load, tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text("a cat --ss none")
    with pytest.raises(UserError) as error:
        check_prompts(load([f"--sample_prompts={path}", SAMPLES]))
    assert error.value.code == "prompt-sampler-unknown"
    assert check_prompts(load([f"--sample_prompts={path}"])) == []


def test_a_thumbnail_is_a_file_or_a_data_url(load, tmp_path):
    (tmp_path / "a.png").touch()
    check_thumbnail(load())
    check_thumbnail(load([f"--metadata_thumbnail={tmp_path / 'a.png'}"]))
    check_thumbnail(load(["--metadata_thumbnail=data:image/png;base64,AAAA"]))
    with pytest.raises(UserError) as error:
        check_thumbnail(load([f"--metadata_thumbnail={tmp_path / 'b.png'}"]))
    assert error.value.code == "thumbnail-missing"
