"""Prompts of parts of an image: each with its prompt and its adapter, against the predictions of the parts alone."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from families.loading import NoMethod, load_model
from families.toys import ToyShelf
from sfumato.cli.generate_series import split_parts
from sfumato.cli.main import main
from sfumato.config.prompts import Prompt
from sfumato.families.base import Family
from sfumato.methods.inference_adapters import InferenceAdapters
from sfumato.sample import generate_steps
from sfumato.sampling.regions import read_region_weights, select_part
from sfumato.sampling.request import make_request
from sfumato.sampling.settings import RegionSettings

METHOD: Any = NoMethod()
PARTS = ("a cat", "a red dog")


def write_mask(path: Path, colors: list[tuple[int, int, int]]) -> Path:
    """Columns of these colors, 64 pixels a side in all."""
    pixels = np.zeros((64, 64, 3), np.uint8)
    for number, color in enumerate(colors):
        pixels[:, 64 * number // len(colors) : 64 * (number + 1) // len(colors)] = color
    Image.fromarray(pixels).save(path)
    return path


def predict(model: Family, method: Any, **more: Any) -> Tensor:
    """The guided prediction of the only step."""
    given: dict[str, Any] = {"negative_prompt": "a cup", "width": 64, "height": 64, "sample_steps": 1, "scale": 3.0}
    request = make_request(Prompt(**{**given, **more}), model, sampler="ddim", seed=1)
    (step,) = generate_steps(model, method, [request])
    return step.prediction


@pytest.mark.full
@pytest.mark.parametrize("family", ["sd", "flux"])
def test_each_part_has_its_prompt(family: str, toy_shelf: ToyShelf, tmp_path: Path) -> None:
    """Half and half: sum of weight x (negative + scale (prompt - negative)) of each part."""
    model = load_model(toy_shelf.options(family))
    mask = write_mask(tmp_path / "mask.png", [(255, 0, 0), (0, 255, 0)])
    both = predict(model, METHOD, prompt=" AND ".join(PARTS), parts=PARTS, mask_image=str(mask))
    alone = [predict(model, METHOD, prompt=text) for text in PARTS]
    half = both.shape[-1] // 2
    torch.testing.assert_close(both[..., :half], alone[0][..., :half], rtol=0, atol=1e-5)
    torch.testing.assert_close(both[..., half:], alone[1][..., half:], rtol=0, atol=1e-5)
    assert (alone[0] - alone[1]).abs().max() > 1e-3
    everywhere = predict(model, METHOD, prompt="x", parts=PARTS)
    torch.testing.assert_close(everywhere, (alone[0] + alone[1]) / 2, rtol=0, atol=1e-5)


def write_lora(model: Family, path: Path, seed: int) -> Path:
    """Of every attention layer of the denoiser and of the text encoder."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}
    for part, ends in (("denoiser", ("to_q", "to_k")), ("clip", ("q_proj",))):
        for group in model.parts[part].network.groups(every=True):
            if group.paths[0].endswith(ends):
                layer: Any = model.parts[part].module.get_submodule(group.paths[0])
                state[f"{group.name}.lora_down.weight"] = torch.randn(2, layer.in_features, generator=generator)
                state[f"{group.name}.lora_up.weight"] = torch.randn(layer.out_features, 2, generator=generator) * 0.05
                state[f"{group.name}.alpha"] = torch.tensor(2.0)
    assert len(state) > 6
    save_file(state, path)
    return path


@pytest.mark.full
def test_each_adapter_acts_in_its_part(toy_shelf: ToyShelf, tmp_path: Path) -> None:
    """As if there were only that one, in text encoder and denoiser, for the negative prompt, too."""
    model = load_model(toy_shelf.options("sd"))
    files = [(write_lora(model, tmp_path / f"{seed}.safetensors", seed), 1.0) for seed in range(2)]
    method: Any = InferenceAdapters(model, files)
    mask = write_mask(tmp_path / "mask.png", [(255, 0, 0), (0, 255, 0)])
    both = predict(model, method, prompt="x", parts=PARTS, mask_image=str(mask), network_mul=(0.5, 0.75))
    alone = [
        predict(model, method, prompt=text, network_mul=strengths)
        for text, strengths in zip(PARTS, ((0.5, 0.0), (0.0, 0.75)), strict=True)
    ]
    half = both.shape[-1] // 2
    torch.testing.assert_close(both[..., :half], alone[0][..., :half], rtol=0, atol=1e-5)
    torch.testing.assert_close(both[..., half:], alone[1][..., half:], rtol=0, atol=1e-5)
    plain = predict(model, method, prompt=PARTS[0], network_mul=(0.0, 0.0))
    assert (plain - alone[0]).abs().max() > 1e-3
    assert (both - predict(model, method, prompt="x", parts=PARTS, mask_image=str(mask))).abs().max() > 1e-3


def test_the_places_of_parts(toy_shelf: ToyShelf, tmp_path: Path) -> None:
    """By channels, by colors, everywhere where a channel is empty or there are more parts; shares sum up to 1."""
    model: Any = load_model(toy_shelf.options("sd"))
    mask = write_mask(tmp_path / "mask.png", [(255, 0, 0), (255, 255, 0), (0, 0, 0), (0, 255, 0)])

    def weights(parts: int, codes: int | None = None) -> list[list[float]]:
        settings = RegionSettings(
            parts=("x",) * parts, region_mask=str(mask), network_regional_mask_max_color_codes=codes
        )
        return read_region_weights(model, settings, (64, 64))[:, 0, 1::2].tolist()

    assert weights(2) == [[1, 0.5, 0.5, 0], [0, 0.5, 0.5, 1]]
    assert weights(3)[2] == pytest.approx([0.5, 1 / 3, 1, 0.5])  # the blue channel is empty: everywhere
    expected = [[1, 0, 1 / 3, 0], [0, 0, 1 / 3, 1], [0, 1, 1 / 3, 0]]
    assert weights(3, 3) == [pytest.approx(row) for row in expected]
    pixels = np.asarray(Image.open(mask))
    assert select_part(pixels, 3, None) is select_part(pixels, 3, 3) is None
    assert split_parts("a AND b AND c") == ("a", "b", "c")
    assert split_parts("salt and pepper, ROCK&ROLL") == ()


@pytest.mark.full
def test_the_command_line(
    toy_shelf: ToyShelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codes: list[str]
) -> None:
    """A mask beside a prompt in parts says where they are; the command in the image makes it again."""
    monkeypatch.chdir(tmp_path)
    model = load_model(toy_shelf.options("sd"))
    for seed in range(2):
        write_lora(model, tmp_path / f"{seed}.safetensors", seed)
    Image.new("RGB", (64, 64)).save("start.png")
    write_mask(tmp_path / "mask.png", [(255, 0, 0), (0, 255, 0)])
    path = str(toy_shelf.paths("sd")["pretrained_model_name_or_path"])
    start = ["generate", "--ckpt", path, *shlex.split("--W 64 --H 64 --steps 2 --seed 1 --scale 2")]
    pixels: dict[str, np.ndarray] = {}
    for name, words in {
        "parts": "--mask_path mask.png --network_weights 0.safetensors 1.safetensors --network_mul 0.5 1",
        "one adapter": "--mask_path mask.png --network_weights 0.safetensors --network_mul 0.5",
        "everywhere": "",
        "plain": "--plain_prompt",
        "from an image": "--mask_path mask.png --image_path start.png",
    }.items():
        line = [*start, "--prompt", "a cat AND a red dog", *words.split(), "--outdir", name]
        assert main(line) == 0
        (made,) = (tmp_path / name).iterdir()
        image = Image.open(made)
        pixels[name] = np.asarray(image)
        command: list[str] = shlex.split(image.text["command"])[1:]  # pyright: ignore[reportAttributeAccessIssue]
        command = [path if word == Path(path).name else word for word in command]
        assert main([*command, "--outdir", f"{name} again"]) == 0
        (again,) = (tmp_path / f"{name} again").iterdir()
        assert (np.asarray(Image.open(again)) == pixels[name]).all(), (name, command)
    assert len({image.tobytes() for image in pixels.values()}) == len(pixels)
    three = "--network_weights 0.safetensors 1.safetensors 1.safetensors"
    for words in (three, "--network_weights 0.safetensors --network_merge"):
        assert main([*start, "--prompt", "a AND b", *words.split(), "--outdir", "x"]) == 2
    assert codes == ["regional-adapters"] * 2
