"""--output_config: what is written reads back as the same config."""

from __future__ import annotations

import pytest

from sfumato.config import load_config
from sfumato.config.schema import vocabulary
from sfumato.config.write import format_toml, write_config
from sfumato.errors import UserError

WORDS = [
    "--network_args", "conv_dim=4", "betas=0.9,0.99", "name='4'", "up=sine", "--text_encoder_lr", "1e-4", "2e-5",
    "--resolution", "512,768", "--lr_scheduler", "cosine", "--lr_warmup_steps", "10%", "--cache_latents",
    "--caption_prefix", 'a "quoted" \\ façade\x7f\n', "--seed", "5", "--tokenizer", "a/b", "c/d",
]  # fmt: skip


def test_written_and_read_again(base, tmp_path):
    path = tmp_path / "new.toml"
    config = load_config([*base, *WORDS, "--output_config", f"--config_file={path}"])
    assert write_config(config) == path
    again = load_config([f"--config_file={path}"])
    for name in set(vocabulary()) - {"config_file", "output_config"}:
        assert again.value(name) == config.value(name), name
    assert again.source("seed") == "new.toml"


def test_only_what_differs_is_written(load):
    text = format_toml(load("--seed 5 --max_train_steps 1600"))
    assert "seed = 5\n" in text
    assert "max_train_steps" not in text


def test_secrets_are_not_written(load):
    assert "wandb" not in format_toml(load("--wandb_api_key canary"))


def test_a_file_is_not_overwritten(base, tmp_path):
    (tmp_path / "old.toml").write_text("# mine")
    config = load_config([*base, "--output_config", "--config_file", str(tmp_path / "old")])
    with pytest.raises(UserError) as error:
        write_config(config)
    assert error.value.code == "config-file-exists"
    assert "old.toml" in str(error.value)
    assert (tmp_path / "old.toml").read_text() == "# mine"


def test_what_is_required_may_be_missing(tmp_path):
    path = tmp_path / "part.toml"
    write_config(load_config(["--seed", "5", "--output_config", f"--config_file={path}"]))
    assert path.read_text().splitlines()[-1] == "seed = 5"


def test_it_needs_a_name():
    with pytest.raises(UserError) as error:
        load_config(["--output_config"])
    assert error.value.code == "output-config-without-file"
