"""LyCORIS' presets in TOML files: what they choose, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from sfumato.common.names import LYCORIS_PRESETS, LycorisPreset
from sfumato.errors import UserError
from sfumato.methods.lycoris_preset import read_preset_file

CLIP = '"CLIPAttention", "CLIPMLP"'


def read(tmp_path: Path, text: str) -> tuple[LycorisPreset, list[str]]:
    (tmp_path / "mine.toml").write_text(text, encoding="utf-8")
    return read_preset_file(tmp_path / "mine.toml")


@pytest.mark.parametrize(("name", "text"), [
    ("full", ""),
    ("full", f'''enable_conv = true
        unet_target_module = ["Transformer2DModel", "ResnetBlock2D", "Downsample2D", "Upsample2D"]
        text_encoder_target_module = [{CLIP}]'''),
    ("attn-mlp", f'''enable_conv = false
        unet_target_module = ["Transformer2DModel"]
        unet_target_name = []
        text_encoder_target_module = [{CLIP}]'''),
    ("attn-only", '''enable_conv = false
        unet_target_module = ["CrossAttention"]
        unet_target_name = []
        text_encoder_target_module = ["CLIPAttention"]'''),
    ("unet-transformer-only", '''unet_target_module = ["Transformer2DModel"]
        unet_target_name = []
        text_encoder_target_module = []'''),
])  # fmt: skip
def test_files_that_say_what_a_preset_says(name: str, text: str, tmp_path: Path) -> None:
    assert read(tmp_path, text) == (LYCORIS_PRESETS[name], [])


def test_names_and_what_is_left_out(tmp_path: Path) -> None:
    preset, excluded = read(
        tmp_path,
        """unet_target_module = []
        unet_target_name = ["conv_in", '.*attn1']
        text_encoder_target_module = []
        exclude_name = ['down_blocks\\.0']""",
    )
    assert (preset.layers, preset.has_text_encoders) == (r"(?!)", False)
    assert preset.more_layers == r"(?:conv_in)(?:\..*)?|(?:.*attn1)(?:\..*)?"
    assert excluded == [r"(?:down_blocks\.0)(?:\..*)?"]


@pytest.mark.parametrize(("text", "code"), [
    ("x = [", "lycoris-preset-damaged"),
    ("unet_targets = []", "lycoris-preset-key"),
    ('unet_target_module = "Attention"', "lycoris-preset-value"),
    ('unet_target_module = ["CrossAtention"]', "lycoris-preset-class"),
    ('unet_target_name = ["("]', "lycoris-preset-pattern"),
    ('[module_algo_map.Attention]\nalgo = "lokr"', "lycoris-preset-algo-map"),
    ('text_encoder_target_module = ["CLIPAttention"]', "lycoris-preset-text-classes"),
])  # fmt: skip
def test_refusals(text: str, code: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        read(tmp_path, text)
    assert error.value.code == code


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        read_preset_file(tmp_path / "none.toml")
    assert error.value.code == "lycoris-preset-missing"
