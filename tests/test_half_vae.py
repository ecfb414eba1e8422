"""An autoencoder that overflows in half precision: such pictures are done in float32, whatever came before them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from families.toys import ToyShelf
from sfumato.config import NoiseOptions
from sfumato.errors import UserError
from sfumato.families import _vae as vaes
from sfumato.families import register_all
from sfumato.families.base import Family, find_family
from sfumato.families.encoding import decode_latents, encode_images
from sfumato.families.source import open_source
from training import losses, pictures, run, same, weights

SEEDS = [3, 4, 5]


class Overflowing(nn.Module):
    """A layer that changes nothing, but on the way what is bright is too large for float16."""

    def forward(self, x: Tensor) -> Tensor:
        bright = x.mean((1, 2, 3), keepdim=True) > 0.3
        return x + 0 * (x * torch.where(bright, 1e7, 1.0).to(x.dtype))


def load(toy_shelf: ToyShelf, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, *, overflows: bool = True) -> Family:
    """The toy with its autoencoder in this dtype, which a run never has in float16 by itself."""
    register_all()
    monkeypatch.setattr(vaes, "precision", lambda wanted, **_: wanted)
    options = toy_shelf.options("sd")
    source = open_source(options)
    family = find_family("sd", source)
    model = family.load(family.read(source, options, NoiseOptions()), options, dtype=dtype, device=torch.device("cpu"))
    model.freeze()
    if overflows:
        vae: Any = model.vae
        for part in (vae.encoder, vae.decoder):
            part.conv_in = nn.Sequential(Overflowing(), part.conv_in)
    return model


def some_pixels() -> Tensor:
    """Dark, bright, dark."""
    dark = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)) - 1
    dark[1] += 1.2
    return dark.clamp(-1, 1)


def test_a_picture_that_overflows_is_encoded_in_float32(
    toy_shelf: ToyShelf, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is what float32 makes of it, its neighbours are what they are without it, and it is told once."""
    half, whole = load(toy_shelf, torch.float16, monkeypatch), load(toy_shelf, torch.float16, monkeypatch)
    plain = load(toy_shelf, torch.float16, monkeypatch, overflows=False)
    before = {name: tensor.clone() for name, tensor in half.vae.state_dict().items()}
    whole.vae.float()
    x = some_pixels()
    with caplog.at_level("WARNING"):
        found = encode_images(half, x, SEEDS, vae_batch_size=2)
        again = encode_images(half, x.flip(0), SEEDS[::-1], vae_batch_size=3).flip(0)
    assert len([record for record in caplog.records if "overflows in float16" in record.message]) == 1
    assert found.dtype == torch.float32
    assert torch.equal(found[1], encode_images(whole, x, SEEDS, vae_batch_size=1)[1])
    others = encode_images(plain, x, SEEDS, vae_batch_size=1)
    for row in (0, 2):
        torch.testing.assert_close(found[row], others[row], rtol=0, atol=2e-3)  # batches of other sizes, in float16
        assert not torch.equal(found[row], encode_images(whole, x, SEEDS, vae_batch_size=1)[row])
    torch.testing.assert_close(found, again, rtol=0, atol=2e-3)
    after = half.vae.state_dict()
    assert all(torch.equal(before[name], after[name]) and after[name].dtype == torch.float16 for name in before)


def test_a_picture_is_decoded_in_float32_where_half_overflows(
    toy_shelf: ToyShelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    half, whole = load(toy_shelf, torch.float16, monkeypatch), load(toy_shelf, torch.float16, monkeypatch)
    whole.vae.float()
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.1
    latents[1] += 1
    with torch.autocast("cpu", torch.bfloat16):  # as previews are made; not the autoencoder
        found = decode_latents(half, latents)
        reference = torch.cat([decode_latents(whole, row[None]) for row in latents])
    assert torch.equal(found[1], reference[1])
    assert found.dtype == reference.dtype == torch.float32
    assert not torch.equal(found[0], reference[0])
    torch.testing.assert_close(found[0], reference[0], rtol=0, atol=1e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a device that things can be put away from")
def test_an_autoencoder_that_was_put_away_decodes_on_the_device(
    toy_shelf: ToyShelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(toy_shelf, torch.float32, monkeypatch, overflows=False)
    here = decode_latents(model, torch.zeros(1, 4, 8, 8))
    model.parts["denoiser"].module.to("cuda")
    there = decode_latents(model, torch.zeros(1, 4, 8, 8, device="cuda"))
    assert there.device.type == "cuda"
    assert next(model.vae.parameters()).device.type == "cpu"
    torch.testing.assert_close(here, there.cpu(), rtol=0, atol=1e-2)


def test_what_is_not_finite_in_float32_either(toy_shelf: ToyShelf, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(toy_shelf, torch.float16, monkeypatch, overflows=False)
    latents = torch.zeros(1, 4, 8, 8)
    with pytest.raises(UserError, match="the denoiser makes latents that are not finite"):
        decode_latents(model, latents * torch.nan)
    broken: Any = model.vae
    broken.decoder.conv_out.weight.data[0, 0, 0, 0] = torch.nan
    with pytest.raises(UserError, match="a picture that is not finite, in float32 neither"):
        decode_latents(model, latents)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Dark and bright pictures of one size."""
    folder = pictures(tmp_path / "images", 4)
    for path in folder.rglob("*.png"):
        number = int(path.stem)
        noise = np.random.default_rng(number).integers(0, 60, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise + 190 * (number % 2)).save(path)
    return folder


@pytest.mark.slow
def test_cached_is_uncached_though_some_overflow(
    toy_shelf: ToyShelf, tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And so a run that is resumed, for which those that came before the overflow are behind."""
    from sfumato.families.sd import StableDiffusion

    plain = StableDiffusion.load.__func__

    def load_overflowing(cls: Any, *given: Any, **options: Any) -> Any:
        model = plain(cls, *given, **options)
        model.vae.encoder.conv_in = nn.Sequential(Overflowing(), model.vae.encoder.conv_in)
        return model

    monkeypatch.setattr(vaes, "precision", lambda wanted, **_: wanted)
    monkeypatch.setattr(StableDiffusion, "load", classmethod(load_overflowing))
    toy = toy_shelf.paths("sd")
    options = {"mixed_precision": "fp16", "max_train_steps": 3, "network_train_unet_only": True, "train_batch_size": 2}
    log = tmp_path / "log.txt"
    live = run(toy, images, tmp_path / "live", **options, save_state=True, save_every_n_steps=1, console_log_file=log)
    cached = run(toy, images, tmp_path / "cached", **options, cache_latents=True)
    resumed = run(toy, images, tmp_path / "resumed", **options, resume=live / "lora-step00000002-state")
    assert log.read_text().count("the autoencoder overflows in float16") == 1
    assert same(weights(live), weights(cached))
    assert same(weights(live), weights(resumed))
    assert losses(live) == losses(cached)


@pytest.mark.parametrize("cached", [False, True, None])
def test_a_damaged_autoencoder_names_the_picture(
    cached: bool | None, toy_shelf: ToyShelf, tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of training, live or cached, or of validation, which comes first."""
    from sfumato.families.sd import StableDiffusion

    def broken(model: Any, pixels: Tensor, noise: Tensor) -> Tensor:
        return vaes.encode(model.vae, model.latents, pixels, noise) * (torch.nan if pixels.mean() > 0 else 1)

    monkeypatch.setattr(StableDiffusion, "encode_image", broken)
    toy, held_out = toy_shelf.paths("sd"), {"validation_split": 0.5} if cached is None else {}
    with pytest.raises(UserError) as caught:
        run(toy, images, tmp_path / "out", cache_latents=cached, **held_out)
    assert str(images / "2_cat") in str(caught.value)
    assert Path(str(caught.value).split()[3]).stem in ("1", "3")
    assert "are not finite, in float32 neither" in str(caught.value)


@pytest.mark.parametrize("family", ["sd", "sdxl", "flux", "chroma", "sd3", "lumina"])
def test_no_half_vae_keeps_it_whole(family: str, toy_shelf: ToyShelf) -> None:
    """By itself it is in the model's precision but never in float16."""
    register_all()
    found: list[torch.dtype] = []
    for dtype, whole in ((torch.bfloat16, False), (torch.bfloat16, True), (torch.float16, False)):
        options = toy_shelf.options(family, no_half_vae=whole)
        source = open_source(options)
        kind = find_family(family, source)
        blueprint = kind.read(source, options, NoiseOptions())
        found.append(
            next(kind.load(blueprint, options, dtype=dtype, device=torch.device("cpu")).vae.parameters()).dtype
        )
        assert "no_half_vae" in kind.options
    assert found == [torch.bfloat16, torch.float32, torch.float32]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("family", ["sd", "sdxl", "flux", "chroma", "sd3", "lumina"])
def test_cached_is_uncached_in_half_precision(
    family: str, precision: str, toy_shelf: ToyShelf, tmp_path: Path, images: Path
) -> None:
    """Autocast is for what trains; encoders that do not are read as the cache reads them."""
    toy = toy_shelf.paths(family)
    options = {"mixed_precision": precision, "max_train_steps": 2, "network_train_unet_only": True}
    live = run(toy, images, tmp_path / "live", **options)
    cached = run(toy, images, tmp_path / "cached", **options, cache_latents=True, cache_text_encoder_outputs=True)
    assert same(weights(live), weights(cached))
    assert losses(live) == losses(cached)
