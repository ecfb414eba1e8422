"""Every setting of a prompt changes its image, neutral values do not, and a batch is what its images are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from families.loading import NoMethod, load_model
from families.toys import ToyShelf
from sfumato.config.prompts import parse_line
from sfumato.data.batch import Sizes
from sfumato.errors import UserError
from sfumato.families.base import Family
from sfumato.families.deep_shrink import DeepShrink, list_input_blocks, list_output_layers
from sfumato.sample import encode_prompts, generate, generate_batch, generate_stages
from sfumato.sampling.denoise import Guidance
from sfumato.sampling.growth import Growth, parse_unsharp
from sfumato.sampling.images import encode_start
from sfumato.sampling.request import list_ignored, make_request
from sfumato.sampling.settings import GradualLatent

LINE = "a cat --n a dog --w 64 --h 64 --s 2 --d 1 --l 3"
METHOD: Any = NoMethod()
IMAGE = "--s 5 --img {image} --t 0.6"
GROWING = "--ss euler_a --s 6 --w 128 --h 128 --glt 1000 --gle 1"


@pytest.fixture(scope="module")
def models(toy_shelf: ToyShelf) -> dict[str, Family]:
    return {family: load_model(toy_shelf.options(family)) for family in ("sd", "sdxl")}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    pixels = np.random.default_rng(0).integers(0, 256, (96, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "image.png")
    mask = np.zeros((64, 64), np.uint8)
    mask[:, 32:] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    return {"image": folder / "image.png", "mask": folder / "mask.png"}


def make_image(model: Family, line: str, files: dict[str, Path], **more: Any) -> Tensor:
    prompt = parse_line(line.format(**files), where="here")
    assert not prompt.notes
    request = make_request(prompt.apply_defaults(more), model, sampler="ddim", seed=0)
    assert not list(list_ignored(prompt, request, model))
    return generate(model, METHOD, request)


@pytest.mark.parametrize(
    ("family", "base", "more"),
    [
        ("sd", "", "--nl 0.5"),
        ("sd", "", IMAGE),
        pytest.param("sd", IMAGE, "--t 0.9", marks=pytest.mark.full),
        ("sd", IMAGE, "--mk {mask}"),
        ("sd", "", "--dsd1 1 --dst1 0"),
        pytest.param("sd", "--dsd1 1 --dst1 0", "--dsr 0.75", marks=pytest.mark.full),
        pytest.param("sd", "--dsd1 1 --dst1 900 --s 4", "--dsd2 2 --dst2 100", marks=pytest.mark.full),
        ("sd", GROWING.replace("--glt 1000 --gle 1", ""), "--glt 1000 --gle 1"),
        pytest.param("sd", GROWING, "--gle 3", marks=pytest.mark.full),
        pytest.param("sd", GROWING, "--glr 0.75", marks=pytest.mark.full),
        pytest.param("sd", GROWING, "--gls 0.25", marks=pytest.mark.full),
        pytest.param("sd", GROWING, "--glsn 0.9", marks=pytest.mark.full),
        pytest.param("sd", GROWING, "--glus 3,0.5,0.5", marks=pytest.mark.full),
        pytest.param("sd", f"{GROWING} --glus 3,0.5,0.5", "--glus 3,0.5,0.5,0", marks=pytest.mark.full),
        ("sdxl", "", "--p2 a red cup"),
        ("sdxl", "", "--c a red cup"),
        ("sdxl", "", "--ow 512"),
        *(pytest.param("sdxl", "", f"--{name} 512", marks=pytest.mark.full) for name in ("oh", "nw", "nh", "ct", "cl")),
    ],
)
def test_a_setting_changes_the_image(
    family: str, base: str, more: str, models: dict[str, Family], files: dict[str, Path]
) -> None:
    first, second = (make_image(models[family], f"{LINE} {text}", files) for text in (base, f"{base} {more}"))
    assert first.shape == second.shape
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("family", "neutral"), [("sd", "--dsd1 1 --dst1 0 --dsr 1"), ("sdxl", "--p2 a cat"), ("sdxl", "--c a cat")]
)
def test_a_neutral_value_changes_nothing(
    family: str, neutral: str, models: dict[str, Family], files: dict[str, Path]
) -> None:
    first, second = (make_image(models[family], f"{LINE} {text}", files) for text in ("", neutral))
    torch.testing.assert_close(first, second, rtol=0, atol=1e-5)


def test_a_masked_image_keeps_what_is_black(models: dict[str, Family], files: dict[str, Path]) -> None:
    """The left half of the latents are those of the encoded image."""
    prompt = parse_line(f"{LINE} {IMAGE} --mk {{mask}}".format(**files), where="")
    request = make_request(prompt, models["sd"], sampler="ddim", seed=0)
    (latents,) = generate_stages(models["sd"], METHOD, [request])
    start = encode_start(models["sd"], request, 1)
    assert start is not None
    same = latents == start.latents
    assert same[..., :4].all()
    assert not same[..., 4:].any()


@pytest.mark.parametrize(
    ("latents", "start"),
    [(True, ""), *(pytest.param(*each, marks=pytest.mark.full) for each in ((False, ""), (False, IMAGE)))],
)
def test_hires_fix(latents: bool, start: str, models: dict[str, Family], files: dict[str, Path]) -> None:
    """A first stage of half the size with its own steps, and an image that depends on it and on the strength."""
    model, line = models["sd"], f"{LINE} --w 128 --h 128 --s 5 {start}".format(**files)
    options = {"highres_fix_scale": 0.5, "highres_fix_steps": 4, "highres_fix_latents_upscaling": latents or None}
    prompt = parse_line(line, where="here")

    def run(**more: Any) -> list[Tensor]:
        request = make_request(prompt.apply_defaults({**options, **more}), model, sampler="ddim", seed=0)
        return list(generate_stages(model, METHOD, [request]))

    first, second = run()
    assert (first.shape[-2:], second.shape[-2:]) == ((8, 8), (16, 16))
    alone = make_image(model, f"{LINE} --w 64 --h 64 {start} --s 4", files)
    assert torch.equal(alone, generate_batch(model, METHOD, [small_request(model, prompt, options)])[0])
    assert not torch.equal(run(strength=0.4)[1], second) or start
    assert not torch.equal(run(highres_fix_steps=6)[0], first)
    if start:
        assert not torch.equal(run(highres_fix_strength=0.9)[0], first)


def small_request(model: Family, prompt: Any, options: dict[str, Any]) -> Any:
    from sfumato.sampling.highres import make_first_stage

    return make_first_stage(make_request(prompt.apply_defaults(options), model, sampler="ddim", seed=0), model)


def test_the_scale_of_a_negative_prompt() -> None:
    """Both prompts are compared with the empty one: 1 + 3 (4 - 1) - 2 (3 - 1)."""
    numbers = [torch.full((1, 1, 1, 1), value) for value in (4.0, 3.0, 1.0)]
    assert float(Guidance(scale=3.0, negative_scale=2.0).combine(*numbers)) == 6.0
    assert float(Guidance(scale=3.0).combine(*numbers[:2])) == 6.0


def test_the_second_prompt_and_the_pooled_one_are_those_of_diffusers(models: dict[str, Family]) -> None:
    """The second encoder's text makes its hidden states and the pooled vector."""
    model, sizes = models["sdxl"], Sizes.from_size(1, 64, 64)
    cat, cup = (encode_prompts(model, [text], sizes, None) for text in ("a cat", "a red cup"))
    width = model.parts["clip_l"].network.config["hidden_size"]
    from sfumato.sample import encode_requests

    def encode(more: str) -> dict[str, Tensor]:
        request = make_request(parse_line(f"{LINE} {more}", where="here"), model, sampler="ddim", seed=0)
        return encode_requests(model, METHOD, [request], sizes, None)

    second, pooled = encode("--p2 a red cup"), encode("--c a red cup")
    assert torch.equal(second["encoder_hidden_states"][..., :width], cat["encoder_hidden_states"][..., :width])
    assert torch.equal(second["encoder_hidden_states"][..., width:], cup["encoder_hidden_states"][..., width:])
    assert torch.equal(second["text_embeds"], cup["text_embeds"])
    assert torch.equal(pooled["encoder_hidden_states"], cat["encoder_hidden_states"])
    assert torch.equal(pooled["text_embeds"], cup["text_embeds"])


def test_a_batch_of_settings_is_what_its_images_are(models: dict[str, Family]) -> None:
    lines = ["a cat --p2 a cup", "a dog --c a cat", "a red cup"]
    model = models["sdxl"]
    requests = [
        make_request(
            parse_line(f"{line} --w 64 --h 64 --s 2 --l 3 --nl 0.5 --d {i}", where=""), model, sampler="ddim", seed=0
        )
        for i, line in enumerate(lines)
    ]
    assert len({request.batch_key for request in requests}) == 1
    for request, together in zip(requests, generate_batch(model, METHOD, requests), strict=True):
        torch.testing.assert_close(together, generate(model, METHOD, request), rtol=0, atol=1e-4)


def test_the_blocks_of_deep_shrink(models: dict[str, Family]) -> None:
    """As original checkpoints count them; every output but the last meets a skip connection."""
    unet = models["sd"].denoiser
    levels, layers = len(unet.config["block_out_channels"]), unet.config["layers_per_block"]  # pyright: ignore
    assert len(list_input_blocks(unet)) == 1 + levels * layers + levels - 1 == len(list_output_layers(unet))
    settings = DeepShrink(ds_depth_1=3, ds_timesteps_1=700, ds_depth_2=2, ds_timesteps_2=300)
    assert [settings.find_depth(t) for t in (999, 700, 699, 300, 299)] == [3, 3, 2, 2, None]


def test_the_sizes_of_a_gradual_latent() -> None:
    growth = Growth.start(GradualLatent(gradual_latent_timesteps=700, gradual_latent_every_n_steps=2), (64, 48))
    sizes = []
    for step, t in enumerate((900, 750, 700, 600, 500, 400, 300, 200, 100, 50)):
        growth.is_due(step, torch.tensor(t), is_last=False)
        sizes.append(growth.size)
    late = Growth.start(GradualLatent(gradual_latent_timesteps=0), (64, 48))
    assert [late.is_due(step, torch.tensor(5), is_last=step == 1) for step in range(2)] == [False, True]
    assert late.size == (64, 48)
    assert sizes[:4] == [(32, 24), (32, 24), (40, 30), (40, 30)]
    assert sizes[-2:] == [(64, 48), (64, 48)]
    assert parse_unsharp("4,1,2").kernel_size == 5


def test_a_gradual_latent_needs_its_sampler(models: dict[str, Family]) -> None:
    with pytest.raises(UserError) as raised:
        make_request(parse_line("a --glt 500 --ss euler", where=""), models["sd"], sampler="ddim", seed=0)
    assert raised.value.code == "gradual-latent-sampler"


@pytest.mark.fast_for("flux")
@pytest.mark.parametrize("family", ["flux", "sd3", "lumina", "chroma"])
def test_what_a_model_has_no_use_for_is_listed(family: str, toy_shelf: ToyShelf) -> None:
    model = load_model(toy_shelf.options(family))
    line = "a cat --w 64 --h 64 --ow 5 --dsd1 1 --glt 3 --t 0.5 --mk x.png"
    prompt = parse_line(line, where="here")
    lines = list(list_ignored(prompt, make_request(prompt, model, sampler="ddim", seed=0), model))
    assert len(lines) == 5
