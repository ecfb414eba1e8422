"""Prompts of parts of an image: each with its prompt and its adapter, against the predictions of the parts alone."""

from __future__ import annotations

import shlex
from dataclasses import replace
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
from sfumato.families.attention_couple import mix_parts
from sfumato.families.base import Family
from sfumato.methods.inference_adapters import InferenceAdapters
from sfumato.sample import generate_steps
from sfumato.sampling.regions import read_region_weights, select_part
from sfumato.sampling.request import make_request
from sfumato.sampling.schedulers import make_scheduler
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


class CoupledAttention:
    """A processor of diffusers for cross-attention to the texts of two parts, one after the other: the sum of what each
    gives, the first one's share of each place from `weight` (h, w)."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **more: Any) -> Tensor:
        side = int(hidden_states.shape[1] ** 0.5)
        share = torch.nn.functional.adaptive_avg_pool2d(self.weight[None, None], side).reshape(1, -1, 1)
        queries = attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        total = torch.zeros_like(hidden_states)
        for text, weight in zip(encoder_hidden_states.chunk(2, dim=1), (share, 1 - share), strict=True):
            keys, values = (
                layer(text).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for layer in (attn.to_k, attn.to_v)
            )
            scores = queries @ keys.transpose(-1, -2) * queries.shape[-1] ** -0.5
            total += weight * attn.to_out[0]((scores.softmax(-1) @ values).transpose(1, 2).flatten(2))
        return total


@pytest.mark.full
@pytest.mark.parametrize("colored", [True, False])
def test_parts_meet_in_the_attention_of_a_unet(colored: bool, toy_shelf: ToyShelf, tmp_path: Path) -> None:
    """Attention Couple: as diffusers' pipeline with cross-attention to both texts, weighted at each place."""
    from diffusers import DiffusionPipeline
    from diffusers.models.attention_processor import AttnProcessor2_0

    model = load_model(toy_shelf.options("sd"))
    mask = write_mask(tmp_path / "mask.png", [(255, 0, 0), (0, 255, 0)])
    prompt = Prompt(
        prompt="x", parts=PARTS, negative_prompt="a cup", width=64, height=64, sample_steps=4, scale=3.0,
        mask_image=str(mask) if colored else None,
    )  # fmt: skip
    request = make_request(prompt, model, sampler="ddim", seed=1)
    *_, ours = generate_steps(model, METHOD, [request])
    folder = toy_shelf.paths("sd", "diffusers")["pretrained_model_name_or_path"]
    pipe = DiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = make_scheduler("ddim", model.objective)
    assert model.latents.downscale == 8
    weight = torch.zeros(8, 8) if colored else torch.full((8, 8), 0.5)
    weight[:, :4] = 1.0 if colored else 0.5
    coupled, plain = CoupledAttention(weight), AttnProcessor2_0()
    pipe.unet.set_attn_processor({name: coupled if ".attn2." in name else plain for name in pipe.unet.attn_processors})
    first, second, negative = (pipe.encode_prompt(text, "cpu", 1, False)[0] for text in (*PARTS, "a cup"))
    theirs = pipe(
        prompt_embeds=torch.cat([first, second], dim=1), negative_prompt_embeds=torch.cat([negative, negative], dim=1),
        height=64, width=64, num_inference_steps=4, guidance_scale=3.0, output_type="latent",
        latents=torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)),
    ).images  # fmt: skip
    torch.testing.assert_close(ours.latents, theirs, rtol=0, atol=1e-4)
    alone = list(
        generate_steps(model, METHOD, [make_request(replace(prompt, parts=()), model, sampler="ddim", seed=1)])
    )
    assert (alone[-1].latents - theirs).abs().max() > 1e-2


@pytest.mark.full
def test_a_part_that_is_everywhere_is_the_image(toy_shelf: ToyShelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the pooled vector of its text, too, in batches, and where the size of the features changes."""
    model = load_model(toy_shelf.options("sdxl"))
    prompt = Prompt(
        prompt="x", parts=PARTS, negative_prompt="a cup", width=128, height=64, sample_steps=1, scale=3.0,
        ds_depth_1=1, ds_timesteps_1=500,
    )  # fmt: skip
    for number, text in enumerate(PARTS):
        weights = torch.zeros(2, 8, 16)
        weights[number] = 1
        monkeypatch.setattr("sfumato.sample.read_region_weights", lambda *_, weights=weights: weights)
        requests = [make_request(prompt, model, sampler="ddim", seed=seed) for seed in (1, 2)]
        plain = make_request(replace(prompt, prompt=text, parts=()), model, sampler="ddim", seed=2)
        ours, alone = (list(generate_steps(model, METHOD, each))[-1].prediction for each in (requests, [plain]))
        torch.testing.assert_close(ours[1:], alone, rtol=0, atol=1e-4)
        assert (ours[0] - ours[1]).abs().max() > 1e-2


def test_what_is_combined_of_parts() -> None:
    """At places with their weights, of vectors with the shares of the area; each part goes on with the sum."""
    weights = torch.tensor([[[[1.0, 0.5], [0.0, 0.0]]], [[[0.0, 0.5], [1.0, 1.0]]]])
    features = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    mixed = mix_parts(features, weights, None)
    torch.testing.assert_close(mixed[1], weights[0] * features[1] + weights[1] * features[3])
    assert torch.equal(mixed[:2], mixed[2:])
    tokens = mix_parts(features.flatten(2).transpose(1, 2), weights, (2, 2))
    torch.testing.assert_close(tokens, mixed.flatten(2).transpose(1, 2))
    vectors = mix_parts(features[:, :, 0, 0], weights, None)
    torch.testing.assert_close(vectors[0], 0.375 * features[0, :, 0, 0] + 0.625 * features[2, :, 0, 0])


@pytest.mark.full
def test_each_part_has_its_prompt(toy_shelf: ToyShelf, tmp_path: Path) -> None:
    """Of models without cross-attention: the sum of weight x (negative + scale (prompt - negative)) of each part."""
    model = load_model(toy_shelf.options("flux"))
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
    """Where it is alone, as if there were only that one, in text encoder and denoiser, for the negative prompt, too."""
    model = load_model(toy_shelf.options("sd"))
    files = [(write_lora(model, tmp_path / f"{seed}.safetensors", seed), 1.0) for seed in range(2)]
    method: Any = InferenceAdapters(model, files)
    size = {"width": 64, "height": 64, "sample_steps": 1}
    weights = torch.ones(1, 1, 8, 8)

    def mix(shares: tuple[float, float]) -> Tensor:
        """With these shares of every place."""
        given = Prompt(prompt="x", parts=PARTS, negative_prompt="a cup", scale=3.0, network_mul=(0.5, 0.75), **size)
        request = make_request(given, model, sampler="ddim", seed=1)
        with pytest.MonkeyPatch.context() as patch:
            rows = torch.cat([weights * share for share in shares])[:, 0]
            patch.setattr("sfumato.sample.read_region_weights", lambda *_: rows)
            (step,) = generate_steps(model, method, [request])
        return step.prediction

    alone = [
        predict(model, method, prompt=text, network_mul=strengths)
        for text, strengths in zip(PARTS, ((0.5, 0.0), (0.0, 0.75)), strict=True)
    ]
    torch.testing.assert_close(mix((1.0, 0.0)), alone[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(mix((0.0, 1.0)), alone[1], rtol=0, atol=1e-5)
    assert min((mix((0.5, 0.5)) - each).abs().max() for each in alone) > 1e-3
    plain = predict(model, method, prompt=PARTS[0], network_mul=(0.0, 0.0))
    assert (plain - alone[0]).abs().max() > 1e-3


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
