"""The demo: a base model that does what it was wired to do, and a run from nothing to pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open

from sfumato.config import ModelOptions, NoiseOptions
from sfumato.data.batch import Sizes
from sfumato.demo import base, demo
from sfumato.encode import live_text
from sfumato.families import register_all
from sfumato.families._source import open_source
from sfumato.families.base import Family, find_family


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Family:
    register_all()
    made = base.make_base(tmp_path_factory.mktemp("base"))
    options = ModelOptions(**{name: str(path) for name, path in made.model.items()})
    source = open_source(options)
    family = find_family(None, source)
    blueprint = family.read(source, options, NoiseOptions())
    return family.load(blueprint, options, dtype=torch.float32, device=torch.device("cpu"))


def smooth_picture(size: int) -> torch.Tensor:
    coarse = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 1.6 - 0.8
    return F.interpolate(coarse, size=(size, size), mode="bicubic").clamp(-1, 1)


@torch.no_grad()
def test_latents_are_the_mean_colours(model: Family) -> None:
    pixels = smooth_picture(64)
    latents = model.encode_image(pixels, torch.randn(1, 4, 8, 8))
    colours = F.avg_pool2d(pixels, 8) * base.CONTRAST
    torch.testing.assert_close(latents[:, :3], colours, rtol=0, atol=0.02)
    torch.testing.assert_close(latents[:, 3], colours.mean(1), rtol=0, atol=0.02)


@torch.no_grad()
def test_decoding_blurs_the_colours_back(model: Family) -> None:
    pixels = smooth_picture(64)
    again = model.decode(model.encode_image(pixels, torch.zeros(1, 4, 8, 8)))
    inside = (..., slice(8, -8), slice(8, -8))  # the edges fade to grey
    assert (again - pixels)[inside].square().mean().sqrt() < 0.1


@torch.no_grad()
def test_the_denoiser_takes_everything_for_noise(model: Family) -> None:
    x = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    features = {part: live_text(model, part, ["a photo of a cat"] * 4) for part in model.text_parts}
    conditioning = model.condition(features, Sizes.plain(4, 64, 64), None)
    prediction = model.predict(x, torch.tensor([10.0, 300.0, 600.0, 990.0]), conditioning)
    assert ((prediction - x).square().mean((1, 2, 3)) < 0.1).all()


@pytest.mark.slow
def test_the_demo_from_nothing_to_pictures(tmp_path: Path) -> None:
    result = demo.demo(tmp_path, options={"max_train_steps": "60", "console_log_level": "WARNING"})
    losses = demo.read_losses(tmp_path / f"{demo.NAME}.run.jsonl")
    assert len(losses) == 60
    assert sum(losses[-20:]) < 0.9 * sum(losses[:20])
    with safe_open(result.lora, "pt") as file:
        assert file.metadata()["ss_network_dim"] == "8"
    with Image.open(result.plot) as plot, Image.open(result.sheet) as sheet:
        assert plot.width > plot.height
        assert sheet.height > sheet.width
