"""The latent upscaler: the network against torch's own functions, and the command on a toy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from sfumato.cli.main import main
from sfumato.compat.launch import main as launch
from sfumato.demo.toy import write_toy
from sfumato.sampling.latent_upscaler import load_upscaler
from tools.test_dataset_review import draw_discs

Weights = dict[str, Tensor]


def make_weights(*, silent: bool = False) -> Weights:
    """In sd-scripts' names and shapes, made without the class that is tested. silent: the correction is 0."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / max(1, np.prod(shape[1:])) ** 0.5

    weights: Weights = {}

    def add_layer(conv: str, norm: str, out: int, inner: int) -> None:
        weights[f"{conv}.weight"] = draw(out, inner, 3, 3)
        weights[f"{norm}.weight"], weights[f"{norm}.bias"] = 1 + 0.1 * draw(out), 0.1 * draw(out)
        weights[f"{norm}.running_mean"], weights[f"{norm}.running_var"] = 0.1 * draw(out), 1 + 0.1 * draw(out).abs()
        weights[f"{norm}.num_batches_tracked"] = torch.tensor(5)

    add_layer("conv1", "bn1", 128, 4)
    for i in range(1, 21):
        add_layer(f"resblock{i}.conv1", f"resblock{i}.bn1", 128, 128)
        add_layer(f"resblock{i}.conv2", f"resblock{i}.bn2", 128, 128)
    add_layer("conv2", "bn2", 64, 128)
    add_layer("conv3", "bn3", 64, 64)
    weights["conv_final.weight"] = draw(4, 64, 1, 1) * (0 if silent else 1e-2)
    weights["conv_final.bias"] = torch.zeros(4)
    return weights


def compute_plainly(weights: Weights, x: Tensor) -> Tensor:
    def layer(x: Tensor, conv: str, norm: str) -> Tensor:
        values = (weights[f"{norm}.{name}"] for name in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(F.conv2d(x, weights[f"{conv}.weight"], padding=1), *values)

    start = x
    x = layer(x, "conv1", "bn1").relu()
    for first in range(1, 21, 4):
        before = x
        for i in range(first, first + 4):
            inner = layer(x, f"resblock{i}.conv1", f"resblock{i}.bn1").relu()
            x = (layer(inner, f"resblock{i}.conv2", f"resblock{i}.bn2") + x).relu()
        x = x + before
    x = layer(layer(x, "conv2", "bn2").relu(), "conv3", "bn3")
    return start + F.conv2d(x, weights["conv_final.weight"], weights["conv_final.bias"])


@pytest.mark.parametrize("name", ["u.safetensors", "u.pth"])
def test_the_network_computes_what_its_layers_say(tmp_path: Path, name: str) -> None:
    weights = make_weights()
    if name.endswith("pth"):
        torch.save(weights, tmp_path / name)
    else:
        save_file(weights, tmp_path / name)
    x = torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = load_upscaler(tmp_path / name)(x)
    expected = compute_plainly(weights, x)
    assert (expected - x).abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.full
def test_a_file_with_other_tensors(tmp_path: Path, codes: list[str]) -> None:
    save_file({name: t for name, t in make_weights().items() if "resblock20" not in name}, tmp_path / "u.safetensors")
    draw_discs(0).save(tmp_path / "a.png")
    toy = write_toy("sd", tmp_path / "toy")["pretrained_model_name_or_path"]
    words = ["--vae_path", toy, "--weights", tmp_path / "u.safetensors", "--image_pattern", tmp_path / "*.png"]
    assert main(["dataset", "upscale-latents", *map(str, words)]) == 2
    assert codes == ["upscaler-unsuitable"]
    assert main(["dataset", "upscale-latents", *map(str, words[:-1]), str(tmp_path / "*.gif")]) == 2
    assert codes[-1] == "upscale-pattern-empty"


@pytest.mark.full
def test_the_command_without_a_correction_is_the_autoencoder_of_diffusers(tmp_path: Path) -> None:
    """The image enlarged, encoded to the posterior's mode and decoded, by diffusers' own class."""
    toy = write_toy("sd", tmp_path / "toy", layout="diffusers")["pretrained_model_name_or_path"]
    save_file(make_weights(silent=True), tmp_path / "u.safetensors")
    image = draw_discs(0)
    (tmp_path / "images").mkdir()
    image.save(tmp_path / "images" / "a.png")
    words = ["--vae_path", toy, "--weights", tmp_path / "u.safetensors", "--debug"]
    words += ["--image_pattern", tmp_path / "images" / "*.png", "--output_dir", tmp_path / "out"]
    assert launch(["tools/latent_upscaler", *map(str, words)]) == 0
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == ["a_lanczos4.png", "a_upscaled.png"]

    vae = AutoencoderKL.from_pretrained(toy, subfolder="vae")
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        larger = F.interpolate(pixels, size=(128, 192), mode="bicubic", antialias=True).clamp(-1, 1)
        expected = vae.decode(vae.encode(larger).latent_dist.mode()).sample[0].clamp(-1, 1)
    found = np.asarray(Image.open(tmp_path / "out" / "a_upscaled.png")).astype(float) / 127.5 - 1
    assert np.abs(found - expected.permute(1, 2, 0).numpy()).max() < 1.5 / 127.5


@pytest.mark.full
def test_the_hires_fix_of_gen_img_goes_through_the_network(tmp_path: Path, codes: list[str]) -> None:
    """A network that corrects nothing makes the image of the plain hires fix, another one another image."""
    toy = write_toy("sd", tmp_path / "toy")["pretrained_model_name_or_path"]
    line = ["gen_img", "--ckpt", toy, "--prompt", "a cat --w 128 --h 128", "--highres_fix_scale", "0.5", "--seed", "2"]
    line += ["--highres_fix_steps", "2", "--steps", "2", "--strength", "0.6", "--sequential_file_name"]
    module = ["--highres_fix_upscaler", "tools.latent_upscaler"]
    images = {}
    for name in ("plain", "silent", "loud"):
        weights = tmp_path / f"{name}.safetensors"
        save_file(make_weights(silent=name == "silent"), weights)
        more = [] if name == "plain" else [*module, "--highres_fix_upscaler_args", f"weights={weights}"]
        assert launch([*map(str, line), *more, "--outdir", str(tmp_path / name)]) == 0
        (path,) = (tmp_path / name).iterdir()
        images[name] = np.asarray(Image.open(path)).astype(int)
        assert str(tmp_path) not in str(Image.open(path).info)
    assert np.abs(images["silent"] - images["plain"]).max() <= 1
    assert np.abs(images["loud"] - images["plain"]).max() > 1
    assert launch([*map(str, line), *module, "--outdir", str(tmp_path / "none")]) == 2
    assert codes == ["gen-img-upscaler-without-weights"]
