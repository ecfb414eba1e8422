"""Noise against sd-scripts' numbers from the same draws."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from sfumato.config import NoiseOptions
from sfumato.diffusion import noise

MATH = json.loads((Path(__file__).parents[1] / "goldens" / "math.json").read_text())
LATENT = torch.linspace(-1, 2, 4 * 8 * 6).reshape(4, 8, 6)


def draw_noise(**options: Any) -> Tensor:
    return noise.make_noise(NoiseOptions(**options))(Generator().manual_seed(1), LATENT)


@pytest.mark.parametrize("row", [row for row in MATH["pyramid_noise"] if row["shape"][0] == 1], ids=str)
def test_coarser_layers(row: dict[str, Any]) -> None:
    """Of one sample, since here each sample is rescaled to deviation 1 independently of its batch."""
    torch.manual_seed(row["torch_seed"])
    ratios = random.Random(row["python_random_seed"])

    def draw(shape: Sequence[int]) -> Tensor:
        return torch.randn(1, *shape)[0]

    start = torch.randn(row["shape"])[0]
    before = start.clone()
    values = noise.add_layers(start, [ratios.random() * 2 + 2 for _ in range(row["iterations"])], draw, row["discount"])
    assert values.flatten()[:16].tolist() == pytest.approx(row["output_first16"], rel=1e-4, abs=1e-6)
    assert torch.equal(start, before)  # the reference changes its input


@pytest.mark.parametrize("row", MATH["noise_offset"], ids=str)
def test_offset(row: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(row["torch_seed"])
    latent, plain = torch.randn(1, 2, 3, 3)[0], torch.randn(1, 2, 3, 3)[0]
    normal = torch.randn(1, 2, 1, 1)[0]
    monkeypatch.setattr(noise, "draw_gaussian", lambda generator, shape: normal)
    options = NoiseOptions(noise_offset=row["offset"], adaptive_noise_scale=row["adaptive"])
    values = noise.draw_offset(Generator(), latent, options)
    assert values.flatten().tolist() == pytest.approx(row["delta_per_channel"], rel=1e-5, abs=1e-7)
    assert (plain + values).flatten()[:4].tolist() == pytest.approx(row["result_first4"], rel=1e-5)


def test_the_default_is_gaussian_noise() -> None:
    assert torch.equal(draw_noise(), torch.randn(4, 8, 6, generator=Generator().manual_seed(1)))
    assert torch.equal(draw_noise(noise_offset=0.0, multires_noise_iterations=0), draw_noise())


def test_an_offset_is_one_number_for_each_channel() -> None:
    change = draw_noise(noise_offset=0.1) - draw_noise()
    assert change.std((1, 2)).max() < 1e-6
    assert change.mean((1, 2)).std() > 0.01
    random_strength = draw_noise(noise_offset=0.1, noise_offset_random_strength=True) - draw_noise()
    assert random_strength.std((1, 2)).max() < 1e-6
    assert random_strength.abs().max() > 0


def test_layered_noise_has_deviation_one() -> None:
    assert draw_noise(multires_noise_iterations=6, multires_noise_discount=0.3).std() == pytest.approx(1.0)


def test_an_offset_and_layers_are_both_applied() -> None:
    """The offset first, so that the layers rescale it, too."""
    generator, options = Generator().manual_seed(1), NoiseOptions(noise_offset=0.5, multires_noise_iterations=3)
    plain = noise.draw_gaussian(generator, LATENT.shape)
    shifted = plain + noise.draw_offset(generator, LATENT, options)
    both = noise.add_multires(shifted, generator, 3, options.multires_noise_discount)
    assert torch.equal(draw_noise(noise_offset=0.5, multires_noise_iterations=3), both)
    assert both.std() == pytest.approx(1.0)


def test_only_the_input_is_perturbed() -> None:
    assert noise.make_perturb(NoiseOptions()) is None
    plain = torch.zeros(4, 64, 64)
    perturb = noise.make_perturb(NoiseOptions(ip_noise_gamma=0.1))
    assert perturb is not None
    assert perturb(Generator().manual_seed(0), plain).std() == pytest.approx(0.1, rel=0.05)
    weaker = noise.make_perturb(NoiseOptions(ip_noise_gamma=0.1, ip_noise_gamma_random_strength=True))
    assert weaker is not None
    strengths = [weaker(Generator().manual_seed(seed), plain).std().item() for seed in range(40)]
    assert max(strengths) < 0.11
    assert min(strengths) < 0.03
    assert sum(strengths) / 40 == pytest.approx(0.05, abs=0.015)
