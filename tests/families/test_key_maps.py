"""Key maps against diffusers' own converters, every key both ways."""

from __future__ import annotations

import re

import pytest
from diffusers.loaders import single_file_utils
from torch import nn

from keys import UNETS, on_meta, round_trip, same, tagged
from sfumato.families import _chroma_keys, _flux_keys, _unet, _vae
from sfumato.formats.keymap import KeyMap

SD1_UNET = UNETS["sd15"]
FLUX_DEV = {"num_layers": 19, "num_single_layers": 38, "guidance_embeds": True}


def test_sd1_unet() -> None:
    unet = on_meta(lambda: _unet.build(SD1_UNET))
    original = round_trip(_unet.key_map(SD1_UNET), tagged(unet))
    assert len(original) == 686
    file = {"model.diffusion_model." + name: tensor for name, tensor in original.items()}
    theirs = single_file_utils.convert_ldm_unet_checkpoint(file, dict(unet.config))
    same(tagged(unet), theirs)


def test_sd1_unet_configuration_from_shapes() -> None:
    unet = on_meta(lambda: _unet.build(SD1_UNET))
    shapes = {name: tuple(t.shape) for name, t in _unet.key_map(SD1_UNET).to_original(unet.state_dict()).items()}
    found = _unet.config_from_shapes(shapes)
    again = on_meta(lambda: _unet.build(found | {"attention_head_dim": 8}))
    assert {n: t.shape for n, t in again.state_dict().items()} == {n: t.shape for n, t in unet.state_dict().items()}


@pytest.mark.parametrize("quant", [True, False])
def test_vae(quant: bool) -> None:
    config = {
        "block_out_channels": [32, 32, 64, 64],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "latent_channels": 4,
        "use_quant_conv": quant,
        "use_post_quant_conv": quant,
    }
    vae = _vae.build(config)
    original = round_trip(_vae.key_map(4), vae.state_dict())
    assert original["encoder.mid.attn_1.q.weight"].shape == (64, 64, 1, 1)
    theirs = single_file_utils.convert_ldm_vae_checkpoint(
        {"first_stage_model." + name: tensor for name, tensor in original.items()}, dict(vae.config)
    )
    same(vae.state_dict(), theirs)
    found = _vae.config_from_shapes({name: tuple(tensor.shape) for name, tensor in original.items()})
    assert {name: found[name] for name in config} == config


def test_flux_dev() -> None:
    """Every key of the full model, rows at their real numbers, columns cut to one."""
    transformer = on_meta(lambda: _flux_keys.build(FLUX_DEV))
    state = tagged(transformer, columns=1)
    original = round_trip(_flux_keys.FLUX_KEYS, state)
    assert len(original) == 780
    theirs = single_file_utils.convert_flux_transformer_checkpoint_to_diffusers(dict(original))
    same(state, theirs)


@pytest.mark.parametrize("guided", [True, False])
def test_flux_configuration_from_shapes(guided: bool) -> None:
    transformer = on_meta(lambda: _flux_keys.build(FLUX_DEV | {"num_layers": 2, "guidance_embeds": guided}))
    shapes = {name: tuple(t.shape) for name, t in _flux_keys.FLUX_KEYS.to_original(transformer.state_dict()).items()}
    found = _flux_keys.config_from_shapes(shapes)
    assert found["guidance_embeds"] is guided
    again = on_meta(lambda: _flux_keys.build(found))
    assert {n: t.shape for n, t in again.state_dict().items()} == {
        n: t.shape for n, t in transformer.state_dict().items()
    }
    assert dict(again.config)["axes_dims_rope"] == [16, 56, 56]
    fused = "single_blocks.0.linear1"
    assert _flux_keys.split_flux_rows(fused + ".weight", shapes[fused + ".weight"]) == [3072, 3072, 3072, 12288]
    assert _flux_keys.split_flux_rows(fused + ".bias", shapes[fused + ".bias"]) == [3072, 3072, 3072, 12288]


def test_chroma() -> None:
    """Every key of the full model, rows at their real numbers, columns cut to one."""
    transformer = on_meta(lambda: _chroma_keys.build({}))
    state = tagged(transformer, columns=1)
    original = round_trip(_chroma_keys.CHROMA_KEYS, state)
    assert len(original) == 643
    theirs = single_file_utils.convert_chroma_transformer_checkpoint_to_diffusers(dict(original))
    same(state, theirs)


def original_shapes(module: nn.Module, keys: KeyMap) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in keys.to_original(module.state_dict()).items()}


def test_chroma_has_all_of_schnells_keys_but_its_modulation() -> None:
    """19 and 38 blocks without modulation, and five layers of the network that gives it instead."""
    schnell = on_meta(lambda: _flux_keys.build(FLUX_DEV | {"guidance_embeds": False}))
    flux = original_shapes(schnell, _flux_keys.FLUX_KEYS)
    chroma = original_shapes(on_meta(lambda: _chroma_keys.build({})), _chroma_keys.CHROMA_KEYS)
    gone = {key for key in flux if re.search(r"_mod\.|modulation|time_in|vector_in", key)}
    assert {key: flux[key] for key in flux.keys() - gone} == {key: chroma[key] for key in flux.keys() & chroma.keys()}
    own = {key: chroma[key] for key in chroma.keys() - flux.keys()}
    hidden = {"in_layer": (5120, 5120), "out_layer": (5120, 5120)}
    expected: dict[str, tuple[int, ...]] = {f"norms.{n}.scale": (5120,) for n in range(5)}
    for n in range(5):
        expected |= {f"layers.{n}.{name}.weight": shape for name, shape in hidden.items()}
        expected |= {f"layers.{n}.{name}.bias": (5120,) for name in hidden}
    expected |= {"in_proj.weight": (5120, 64), "in_proj.bias": (5120,)}
    expected |= {"out_proj.weight": (3072, 5120), "out_proj.bias": (3072,)}
    assert own == {f"distilled_guidance_layer.{key}": shape for key, shape in expected.items()}


@pytest.mark.full
def test_chroma_configuration_from_shapes() -> None:
    config = {"num_layers": 2, "num_single_layers": 3, "approximator_layers": 4}
    transformer = on_meta(lambda: _chroma_keys.build(config))
    shapes = {
        name: tuple(t.shape) for name, t in _chroma_keys.CHROMA_KEYS.to_original(transformer.state_dict()).items()
    }
    found = _chroma_keys.config_from_shapes(shapes)
    assert {name: dict(transformer.config)[name] for name in found} | {
        "axes_dims_rope": [16, 56, 56],
        "out_channels": 64,
    } == found
