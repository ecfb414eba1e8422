"""An autoencoder that overflows in half precision: such images are processed in float32, whatever came before them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from families.loading import load_model
from families.toys import ToyShelf
from sfumato.errors import UserError
from sfumato.families import _vae as vaes
from sfumato.families.base import Family
from sfumato.families.encoding import decode_latents, encode_images
from sfumato.families.part import WeightChange
from toy_runs import equal_tensors, make_images, read_metrics, read_weights, train_toy

SEEDS = [3, 4, 5]


class Overflowing(nn.Module):
    """A layer that changes nothing, but on the way what is bright is too large for float16."""

    def forward(self, x: Tensor) -> Tensor:
        bright = x.mean((1, 2, 3), keepdim=True) > 0.3
        return x + 0 * (x * torch.where(bright, 1e7, 1.0).to(x.dtype))


def load(toy_shelf: ToyShelf, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, *, overflows: bool = True) -> Family:
    """The toy with its autoencoder in this dtype, which a run never has in float16 by itself."""
    monkeypatch.setattr(vaes, "choose_dtype", lambda wanted, **_: wanted)
    model = load_model(toy_shelf.options("sd"), dtype)
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


@pytest.mark.full
def test_an_image_that_overflows_is_encoded_in_float32(
    toy_shelf: ToyShelf, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is what float32 makes of it, its neighbors are what they are without it, and the warning comes once."""
    half, whole = load(toy_shelf, torch.float16, monkeypatch), load(toy_shelf, torch.float16, monkeypatch)
    plain = load(toy_shelf, torch.float16, monkeypatch, overflows=False)
    before = {name: tensor.clone() for name, tensor in half.vae.state_dict().items()}
    whole.parts["vae"].convert(torch.float32)
    x = some_pixels()
    with caplog.at_level("WARNING"):
        found = encode_images(half, x, SEEDS, vae_batch_size=2)
        again = encode_images(half, x.flip(0), SEEDS[::-1], vae_batch_size=3).flip(0)
    assert len([record for record in caplog.records if "float16" in record.message]) == 1
    assert found.dtype == torch.float32
    assert torch.equal(found[1], encode_images(whole, x, SEEDS, vae_batch_size=1)[1])
    others = encode_images(plain, x, SEEDS, vae_batch_size=1)
    for row in (0, 2):
        torch.testing.assert_close(found[row], others[row], rtol=0, atol=2e-3)  # batches of other sizes, in float16
        assert not torch.equal(found[row], encode_images(whole, x, SEEDS, vae_batch_size=1)[row])
    torch.testing.assert_close(found, again, rtol=0, atol=2e-3)
    after = half.vae.state_dict()
    assert all(torch.equal(before[name], after[name]) and after[name].dtype == torch.float16 for name in before)


@pytest.mark.full
def test_an_image_is_decoded_in_float32_where_half_overflows(
    toy_shelf: ToyShelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    half, whole = load(toy_shelf, torch.float16, monkeypatch), load(toy_shelf, torch.float16, monkeypatch)
    whole.parts["vae"].convert(torch.float32)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.1
    latents[1] += 1
    with torch.autocast("cpu", torch.bfloat16):  # as previews are made; not the autoencoder
        found = decode_latents(half, latents)
        reference = torch.cat([decode_latents(whole, row[None]) for row in latents])
    assert torch.equal(found[1], reference[1])
    assert found.dtype == reference.dtype == torch.float32
    assert not torch.equal(found[0], reference[0])
    torch.testing.assert_close(found[0], reference[0], rtol=0, atol=1e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a device")
def test_an_unloaded_autoencoder_decodes_on_the_device(toy_shelf: ToyShelf, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(toy_shelf, torch.float32, monkeypatch, overflows=False)
    here = decode_latents(model, torch.zeros(1, 4, 8, 8))
    vae = model.parts["vae"]
    vae.unload()
    vae.device = torch.device("cuda")
    there = decode_latents(model, torch.zeros(1, 4, 8, 8, device="cuda"))
    assert there.device.type == "cuda"
    assert not vae.is_loaded
    torch.testing.assert_close(here, there.cpu(), rtol=0, atol=1e-2)


@pytest.mark.full
def test_what_is_not_finite_in_float32_either(toy_shelf: ToyShelf, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(toy_shelf, torch.float16, monkeypatch, overflows=False)
    latents = torch.zeros(1, 4, 8, 8)
    with pytest.raises(UserError) as error:
        decode_latents(model, latents * torch.nan)
    assert error.value.code == "sample-latents-nonfinite"
    broken: Any = model.vae
    broken.decoder.conv_out.weight.data[0, 0, 0, 0] = torch.nan
    with pytest.raises(UserError) as error:
        decode_latents(model, latents)
    assert error.value.code == "sample-image-nonfinite"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Dark and bright images of one size."""
    folder = make_images(tmp_path / "images", 4)
    for path in folder.rglob("*.png"):
        number = int(path.stem)
        noise = np.random.default_rng(number).integers(0, 60, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise + 190 * (number % 2)).save(path)
    return folder


@pytest.mark.full
def test_cached_is_uncached_though_some_overflow(
    toy_shelf: ToyShelf, tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And so a run that is resumed, for which those that came before the overflow are behind."""
    from sfumato.families.sd import StableDiffusion

    plain = StableDiffusion.__init__

    def insert_overflow(vae: Any) -> None:
        vae.encoder.conv_in = nn.Sequential(Overflowing(), vae.encoder.conv_in)

    def open_overflowing(self: Any, *given: Any, **options: Any) -> None:
        plain(self, *given, **options)
        self.parts["vae"].add_change(WeightChange(identity="", apply=insert_overflow))

    monkeypatch.setattr(vaes, "choose_dtype", lambda wanted, **_: wanted)
    monkeypatch.setattr(StableDiffusion, "__init__", open_overflowing)
    toy = toy_shelf.paths("sd")
    options = {"mixed_precision": "fp16", "max_train_steps": 3, "network_train_unet_only": True, "train_batch_size": 2}
    log = tmp_path / "log.txt"
    live = train_toy(
        toy, images, tmp_path / "live", **options, save_state=True, save_every_n_steps=1, console_log_file=log
    )
    cached = train_toy(toy, images, tmp_path / "cached", **options, cache_latents=True)
    resumed = train_toy(toy, images, tmp_path / "resumed", **options, resume=live / "lora-step00000002-state")
    assert log.read_text().count("overflows in float16") == 1
    assert equal_tensors(read_weights(live), read_weights(cached))
    assert equal_tensors(read_weights(live), read_weights(resumed))
    assert read_metrics(live) == read_metrics(cached)


@pytest.mark.full
@pytest.mark.parametrize("cached", [False, True, None])
def test_a_damaged_autoencoder_names_the_image(
    cached: bool | None, toy_shelf: ToyShelf, tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of training, live or cached, or of validation, which comes first."""
    from sfumato.families.sd import StableDiffusion

    def broken(model: Any, pixels: Tensor, noise: Tensor) -> Tensor:
        return vaes.encode(model.parts["vae"], model.latents, pixels, noise) * (torch.nan if pixels.mean() > 0 else 1)

    monkeypatch.setattr(StableDiffusion, "encode_image", broken)
    toy, held_out = toy_shelf.paths("sd"), {"validation_split": 0.5} if cached is None else {}
    with pytest.raises(UserError) as error:
        train_toy(toy, images, tmp_path / "out", cache_latents=cached, **held_out)
    assert str(images / "2_cat") in str(error.value)
    assert Path(str(error.value).split()[3]).stem in ("1", "3")
    assert error.value.code == "latents-not-finite"


@pytest.mark.parametrize("family", ["sd", "sdxl", "flux", "chroma", "sd3", "lumina"])
def test_no_half_vae_keeps_it_in_float32(family: str, toy_shelf: ToyShelf) -> None:
    """By itself it is in the model's precision but never in float16."""
    found: list[torch.dtype] = []
    for dtype, no_half in ((torch.bfloat16, False), (torch.bfloat16, True), (torch.float16, False)):
        model = load_model(toy_shelf.options(family, no_half_vae=no_half), dtype)
        found.append(next(model.vae.parameters()).dtype)
        assert "no_half_vae" in model.options
    assert found == [torch.bfloat16, torch.float32, torch.float32]


@pytest.mark.full
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("family", ["sd", "sdxl", "flux", "chroma", "sd3", "lumina"])
def test_cached_is_uncached_in_half_precision(
    family: str, precision: str, toy_shelf: ToyShelf, tmp_path: Path, images: Path
) -> None:
    """Autocast is for what trains; encoders that do not are read as the cache reads them."""
    toy = toy_shelf.paths(family)
    options = {"mixed_precision": precision, "max_train_steps": 2, "network_train_unet_only": True}
    live = train_toy(toy, images, tmp_path / "live", **options)
    cached = train_toy(toy, images, tmp_path / "cached", **options, cache_latents=True, cache_text_encoder_outputs=True)
    assert equal_tensors(read_weights(live), read_weights(cached))
    assert read_metrics(live) == read_metrics(cached)
