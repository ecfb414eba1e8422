"""Contact sheets, plots of options' values, sketches of images while they are made, and the autoencoder's tiles."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from families.loading import NoMethod, load_model
from families.toys import ToyShelf
from sfumato.cli.generate_axes import read_axes
from sfumato.cli.main import main
from sfumato.config import ModelOptions
from sfumato.config.prompts import Prompt
from sfumato.demo.base import CHECKPOINT
from sfumato.errors import UserError
from sfumato.families.encoding import decode_latents, encode_images
from sfumato.sample import generate_steps
from sfumato.sampling.request import make_request
from sfumato.tools.image_sheet import GAP, LABEL, LINE_DISTANCE, MARGIN, draw_contact_sheet, draw_table
from sfumato.tools.progress_sketch import ProgressSketch, fit_latent_colors
from test_regions import write_lora

START = "--W 64 --H 64 --steps 2 --seed 5 --scale 3"


def run(model: Path, words: str, out: Path) -> list[Path]:
    assert main(["generate", "--ckpt", str(model), *shlex.split(f"{START} {words}"), "--outdir", str(out)]) == 0
    return sorted(out.iterdir())


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def find_in(sheet: np.ndarray, image: np.ndarray) -> list[tuple[int, int]]:
    """Where an image is in a sheet, (x, y)."""
    height, width = image.shape[:2]
    places = np.argwhere((sheet[: -height + 1, : -width + 1] == image[0, 0]).all(-1))
    return [(x, y) for y, x in places.tolist() if (sheet[y : y + height, x : x + width] == image).all()]


@pytest.mark.full
def test_every_combination_is_in_its_place(toy_shelf: ToyShelf, tmp_path: Path) -> None:
    """Each is the image that its options make alone; the labels of both axes are written."""
    model = toy_shelf.paths("sd")["pretrained_model_name_or_path"]
    *images, sheet = run(model, '--prompt "a cat" --xy "steps=1,2" "scale=2,4"', tmp_path / "xy")
    assert sheet.name.startswith("xy_")
    page, places = read(sheet), [find_in(read(sheet), read(path)) for path in images]
    assert [len(found) for found in places] == [1] * 4
    columns, rows = (sorted({found[0][axis] for found in places}) for axis in (0, 1))
    assert len(columns) == len(rows) == 2
    assert [found[0] for found in places] == [(x, y) for x in columns for y in rows]  # column after column
    (alone,) = run(model, '--prompt "a cat" --steps 1 --scale 4', tmp_path / "alone")
    assert find_in(page, read(alone)) == [(columns[0], rows[1])]
    ink = (page < 128).all(-1)
    assert ink[: rows[0] - GAP // 2, columns[0] :].any()
    assert ink[rows[1] : rows[1] + 20, : columns[0]].any()


@pytest.mark.full
def test_plots_of_models_and_adapters(toy_shelf: ToyShelf, tmp_path: Path) -> None:
    """An option of the model loads it again; without --seed all images have the same one."""
    model = toy_shelf.paths("sd")["pretrained_model_name_or_path"]
    words = '--prompt "a (cat:1.5)" --W 64 --H 64 --steps 1 --xy "emb_normalize_mode=original,abs" "seed=1,2"'
    *images, _ = run(model, words, tmp_path / "modes")
    pixels = [read(path) for path in images]
    assert len({image.tobytes() for image in pixels}) == 4
    line = ["generate", "--ckpt", str(model), "--prompt", "a cat", "--W", "64", "--H", "64", "--steps", "1"]
    line += ["--xy", "clip_skip=1,2", "--outdir", str(tmp_path / "skips")]
    assert main(line) == 0
    *images, _ = sorted((tmp_path / "skips").iterdir())
    assert len({path.stem.split("_")[-1] for path in images}) == 1
    assert (read(images[0]) != read(images[1])).any()


@pytest.mark.full
def test_a_plot_of_checkpoints(tmp_path: Path) -> None:
    """Beside strengths of an adapter: each image is what its checkpoint makes alone; of files the names are shown."""
    other, lora = tmp_path / "other.safetensors", tmp_path / "lora.safetensors"
    state = load_file(CHECKPOINT)
    with safe_open(CHECKPOINT, "pt") as file:
        metadata = file.metadata()
    name = "model.diffusion_model.out.2.weight"
    save_file({**state, name: state[name] * 0.9}, other, metadata)
    write_lora(load_model(ModelOptions(pretrained_model_name_or_path=str(CHECKPOINT))), lora, 3)
    base = f'--prompt "a cat" --network_weights {lora}'
    axes = f'--xy "ckpt={CHECKPOINT},{other}" "lora_mul=0,1"'
    *images, _ = run(CHECKPOINT, f"{base} {axes}", tmp_path / "xy")
    alone: list[bytes] = []
    for model in (CHECKPOINT, other):
        for strength in (0, 1):
            out = tmp_path / f"{model.stem} {strength}"
            (made,) = run(model, f"{base} --network_mul {strength}", out)
            alone.append(read(made).tobytes())
    assert [read(path).tobytes() for path in images] == alone
    assert len(set(alone)) == 4
    (across, down) = read_axes([f"ckpt={CHECKPOINT},{other}", "lora_mul=0,1"])
    assert across.labels == [f"ckpt {CHECKPOINT.name}", "ckpt other.safetensors"]
    assert down.labels == ["lora_mul 0", "lora_mul 1"]


@pytest.mark.parametrize("text", ["steps", "nonsense=1,2", "steps=", "steps=x", "outdir=a,b"])
def test_wrong_axes(text: str) -> None:
    with pytest.raises(UserError):
        read_axes([text])


def test_at_most_two_axes() -> None:
    with pytest.raises(UserError) as raised:
        read_axes(["steps=1", "scale=1", "seed=1"])
    assert raised.value.code == "xy-too-many"
    (axis,) = read_axes(["lora_mul=0,0.5"])
    assert (axis.field, axis.values, axis.labels) == ("network_mul", [(0.0,), (0.5,)], ["lora_mul 0", "lora_mul 0.5"])


@pytest.mark.full
def test_a_contact_sheet(toy_shelf: ToyShelf, tmp_path: Path) -> None:
    model = toy_shelf.paths("sd")["pretrained_model_name_or_path"]
    sheet, *images = run(model, '--prompt "a cat" --images_per_prompt 3 --grid', tmp_path)
    assert sheet.name.startswith("grid_")
    page = read(sheet)
    places = [find_in(page, read(path))[0] for path in images]
    label = round(places[0][1] - MARGIN)
    step = 64 + GAP
    assert places == [(MARGIN, MARGIN + label), (MARGIN + step, MARGIN + label), (MARGIN, MARGIN + 2 * label + step)]


def test_sheets_of_images_of_several_sizes(tmp_path: Path) -> None:
    """Smaller ones stand in the middle of their place, larger ones are made smaller."""
    for name, size in (("a", (40, 20)), ("b", (1024, 512))):
        Image.new("RGB", size, "red").save(tmp_path / f"{name}.png")
    table = draw_table([[tmp_path / "a.png", None, tmp_path / "b.png"]], ["one", "two", "three"], [""])
    assert table.width == 2 * MARGIN + 3 * 512 + 2 * GAP
    assert table.height == 2 * MARGIN + 256 + int(np.ceil(LABEL * LINE_DISTANCE))
    red = (np.asarray(table) == (255, 0, 0)).all(-1)
    assert red.sum() == 40 * 20 + 512 * 256
    assert draw_contact_sheet([tmp_path / "a.png"]).width == 2 * MARGIN + 40


@pytest.mark.full
def test_a_sketch_is_near_the_image(tmp_path: Path) -> None:
    """Of an image of smooth colors that the map was not fitted to; a mean color would be ten times as far away."""
    model = load_model(ModelOptions(pretrained_model_name_or_path=str(CHECKPOINT)))
    colors = fit_latent_colors(model)
    draw = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(9)) * 2 - 1
    pixels = torch.nn.functional.interpolate(draw, size=(128, 128), mode="bilinear", align_corners=True)
    latents = encode_images(model, pixels, None, vae_batch_size=1)
    sketch = ProgressSketch(model, tmp_path / "sketch.png")
    small = torch.nn.functional.avg_pool2d(pixels, model.latents.downscale)[0]
    error = (sketch.paint(latents[0]) - small).square().mean()
    assert error < 0.1 * (small - small.mean((1, 2), keepdim=True)).square().mean()
    assert colors.shape == (model.latents.channels + 1, 3)
    sketch.write(torch.cat([latents, latents]))
    with Image.open(tmp_path / "sketch.png") as image:
        assert image.width == 2 * image.height >= 256


@pytest.mark.full
def test_the_last_estimate_is_the_image(toy_shelf: ToyShelf) -> None:
    """DDIM's last step goes to the estimate of the prediction, up to the noise of the first timestep."""
    model = load_model(toy_shelf.options("sd"))
    request = make_request(Prompt(prompt="a cat", width=64, height=64, sample_steps=3), model, sampler="euler", seed=1)
    method: Any = NoMethod()
    steps = list(generate_steps(model, method, [request]))
    assert [step.number for step in steps] == [1, 2, 3]
    torch.testing.assert_close(steps[-1].estimate_image(), steps[-1].latents, rtol=0, atol=1e-4)


def test_tiles_are_those_of_diffusers(toy_shelf: ToyShelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the class's own tiling, decoding and encoding; and where memory is short, which is reported."""
    model = load_model(toy_shelf.options("sd"))
    vae: Any = model.vae
    latents = torch.randn(1, model.latents.channels, 20, 16, generator=torch.Generator().manual_seed(1))
    whole = decode_latents(model, latents)
    model.vae_tile_size = 64
    tiled, encoded = decode_latents(model, latents), encode_images(model, whole, None, vae_batch_size=1)
    vae.enable_tiling()
    vae.tile_sample_min_size, vae.tile_latent_min_size = 64, 8
    with torch.no_grad():
        theirs = vae.decode(latents / model.latents.scale).sample
        their_latents = vae.encode(whole).latent_dist.mean * model.latents.scale
    assert torch.equal(tiled, theirs)
    torch.testing.assert_close(encoded, their_latents)
    assert not torch.equal(tiled, whole)
    model.vae_tile_size = 0

    decode = type(model).decode

    def short(self: Any, z: torch.Tensor) -> torch.Tensor:
        if not self.vae_tile_size:
            raise torch.OutOfMemoryError("short")
        return decode(self, z)

    monkeypatch.setattr(type(model), "decode", short)
    assert decode_latents(model, latents).shape == whole.shape
    assert model.vae_tile_size > 0


@pytest.mark.full
def test_images_are_decoded_in_batches(toy_shelf: ToyShelf, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(toy_shelf.options("sd"))
    latents = torch.randn(3, model.latents.channels, 4, 4)
    decode, sizes = type(model).decode, []

    def count(self: Any, z: torch.Tensor) -> torch.Tensor:
        sizes.append(len(z))
        return decode(self, z)

    monkeypatch.setattr(type(model), "decode", count)
    together, alone = decode_latents(model, latents, 2), decode_latents(model, latents)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    assert sizes == [2, 1, 1, 1, 1]
