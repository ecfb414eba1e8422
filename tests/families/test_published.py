"""Published models by name: their sizes are those of the model cards, their adapter names those of the goldens."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from families.built_part import BuiltPart
from keys import on_meta
from lora_keys import golden, shapes_in_file
from sfumato.adapters.lora import LoRA
from sfumato.config import load_config
from sfumato.errors import UserError
from sfumato.families._t5 import TIED_WEIGHTS
from sfumato.families.blueprint import Blueprint
from sfumato.families.detection import describe_model
from sfumato.families.published import (
    build_published,
    list_published,
    read_published,
    write_published,
)

DENOISERS = {  # parameters
    "chroma": 8_899_983_424,
    "flux-dev": 11_901_408_320,
    "flux-fill-dev": 11_902_391_360,
    "flux-kontext-dev": 11_901_408_320,
    "flux-schnell": 11_891_178_560,
    "lumina-2": 2_609_769_152,
    "sd15": 859_520_964,
    "sd15-inpainting": 859_535_364,
    "sd21": 865_910_724,
    "sd3-medium": 2_028_328_000,
    "sd35-large": 8_056_627_520,
    "sd35-medium": 2_243_171_520,
    "sdxl": 2_567_463_684,
    "sdxl-inpainting": 2_567_478_084,
}
FOR_INPAINTING = ("flux-fill-dev", "sd15-inpainting", "sdxl-inpainting")  # the layers of the plain models
ENCODERS = {
    ("sd15", "text_encoder"): 123_060_480,
    ("sd21", "text_encoder"): 340_387_840,
    ("sdxl", "text_encoder_2"): 694_659_840,
    ("flux-dev", "text_encoder_2"): 4_762_310_656,
    ("lumina-2", "text_encoder"): 2_614_341_888,
    ("sd15", "vae"): 83_653_863,
    ("flux-dev", "vae"): 83_819_683,
}
TITLES = {
    "chroma": "Chroma",
    "flux-dev": "FLUX.1 dev",
    "flux-fill-dev": "FLUX.1 Fill",
    "flux-kontext-dev": "FLUX.1 Kontext",
    "flux-schnell": "FLUX.1 schnell",
    "lumina-2": "Lumina-Image 2.0",
    "sd15": "Stable Diffusion 1.x",
    "sd15-inpainting": "Stable Diffusion 1.x, for inpainting",
    "sd21": "Stable Diffusion 2.x, predicting v",
    "sd3-medium": "Stable Diffusion 3 medium",
    "sd35-large": "Stable Diffusion 3.5 large",
    "sd35-medium": "Stable Diffusion 3.5 medium",
    "sdxl": "Stable Diffusion XL",
    "sdxl-inpainting": "Stable Diffusion XL, for inpainting",
}
GOLDENS = {
    "chroma": "lora_chroma",
    "flux-dev": "lora_flux_unet_only",
    "flux-fill-dev": "lora_flux_unet_only",  # the layers of FLUX.1 dev
    "flux-kontext-dev": "lora_flux_unet_only",  # likewise
    "flux-schnell": "lora_flux_schnell",
    "lumina-2": "lora_lumina",
    "sd3-medium": "lora_sd3_medium",
    "sd35-large": "lora_sd35_large",
    "sd35-medium": "lora_sd35_medium",
    "sd15": "lora_sd15",
    "sd15-inpainting": "lora_sd15",
    "sd21": "lora_sd21_linearproj",
    "sdxl": "lora_sdxl",
    "sdxl-inpainting": "lora_sdxl",
}


@pytest.fixture(scope="module")
def read_blueprint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Blueprint]:
    @cache
    def read(name: str) -> Blueprint:
        folder = write_published(name, tmp_path_factory.mktemp(name))
        options = ["--pretrained_model_name_or_path", str(folder), "--train_data_dir", str(folder)]
        if name == "chroma":
            options.append("--apply_t5_attn_mask")
        return describe_model(load_config([*options, "--output_dir", str(folder)]))[1]

    return read


@pytest.mark.parametrize("name", DENOISERS)
def test_denoisers_have_the_published_size(name):
    networks = read_published(name)["networks"]
    denoiser = next(config for folder, config in networks.items() if folder in ("unet", "transformer"))
    assert count_parameters(build_published(denoiser)) == DENOISERS[name]


def count_parameters(network: nn.Module) -> int:
    """Parameters without buffers, tied ones once: what model cards give as a model's size."""
    return sum(parameter.numel() for name, parameter in network.named_parameters() if name not in TIED_WEIGHTS)


def test_no_model_is_missing_here():
    assert set(list_published()) == set(DENOISERS) == set(GOLDENS)


@pytest.mark.parametrize(("name", "folder"), ENCODERS)
def test_encoders_have_the_published_size(name, folder):
    assert count_parameters(build_published(read_published(name)["networks"][folder])) == ENCODERS[name, folder]


@pytest.mark.full
def test_headers_are_recognized(read_blueprint):
    assert {name: read_blueprint(name).title for name in list_published()} == TITLES


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.full] if name in FOR_INPAINTING else []) for name in GOLDENS]
)
def test_adapters_have_the_names_and_shapes_of_sd_scripts(read_blueprint, name):
    """From the header alone, of the denoiser; the encoders' names are in the same golden where it trains them."""
    network = read_blueprint(name).networks["denoiser"]
    module = on_meta(lambda: build_published(read_published(name)["networks"][_folder(name)]))
    groups = BuiltPart(spec=network.spec, module=module).groups()
    shapes = shapes_in_file([LoRA(group, rank=4, alpha=1) for group in groups])
    expected = {key: shape for key, shape in golden(GOLDENS[name]).items() if key.startswith("lora_unet")}
    assert shapes == expected
    assert {group.name for group in network.groups()} == {key.partition(".")[0] for key in expected}


def _folder(name: str) -> str:
    return "unet" if name.startswith(("sd15", "sd21", "sdxl")) else "transformer"


def test_a_weight_cannot_be_read(read_blueprint):
    with pytest.raises(UserError) as raised:
        read_blueprint("sd15").networks["denoiser"].weights.read("conv_in.weight")
    assert raised.value.code == "tensor-file-header-only"
    empty = read_blueprint("sd15").networks["denoiser"].weights.make_empty("conv_in.weight")
    assert (empty.dtype, tuple(empty.shape)) == (torch.float16, (320, 4, 3, 3))


def test_an_unknown_name(tmp_path: Path):
    with pytest.raises(UserError) as raised:
        write_published("flux-deb", tmp_path / "model")
    assert (raised.value.code, raised.value.fix) == ("published-model-unknown", "did you mean 'flux-dev'?")
    assert not (tmp_path / "model").exists()
