"""Lumina-Image 2.0's timesteps in training and sampling, and guidance that ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from denoising import run_denoising
from families.lumina_toys import SYSTEM, Options, load
from families.toys import ToyShelf
from sfumato.compat.scripts import SCRIPTS
from sfumato.config import NoiseOptions
from sfumato.config.prompts import Prompt
from sfumato.data.batch import Extras, Sizes
from sfumato.diffusion.timesteps import make_density
from sfumato.families.base import Family
from sfumato.families.encoding import encode_captions
from sfumato.sample import encode_prompts, generate
from sfumato.sampling.denoise import Guidance
from sfumato.sampling.request import make_request
from sfumato.sampling.schedulers import make_scheduler
from toy_runs import make_images, train_toy


@pytest.fixture(scope="session")
def toy(toy_shelf: ToyShelf) -> Options:
    return {name: str(path) for name, path in toy_shelf.paths("lumina").items() if name != "tokenizer"}


@pytest.fixture(scope="session")
def tokenizer(toy_shelf: ToyShelf) -> tuple[str]:
    return (str(toy_shelf.paths("lumina")["tokenizer"]),)


def test_without_options_timesteps_are_as_the_script_draws_them(toy: Options) -> None:
    """`sfumato train` knows the family's density and shift, which sd-scripts' script sets as its defaults."""
    preset = SCRIPTS["lumina_train_network"].presets
    names = ("timestep_sampling", "discrete_flow_shift", "model_prediction_type")
    preset_noise = NoiseOptions(**{name: preset[name] for name in names})
    for noise in (NoiseOptions(), preset_noise):
        model = load(noise=noise, **toy)
        density, other = (make_density(each, model.objective) for each in (noise, preset_noise))
        u = torch.arange(20, dtype=torch.float64) / 20
        assert torch.equal(*(each(u, (16, 64, 64), model.latents) for each in (density, other)))
        assert model.blueprint.metadata["ss_timestep_sampling"] == "shift"
        assert model.blueprint.metadata["ss_discrete_flow_shift"] == 6.0
        assert model.blueprint.metadata["ss_model_prediction_type"] == "raw"


@pytest.mark.parametrize("shift", [None, 3.0])
def test_the_time_grid_of_previews(toy: Options, shift: float | None) -> None:
    """That of diffusers' scheduler with the published shift, or with --discrete_flow_shift."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    model = load(noise=NoiseOptions(discrete_flow_shift=shift), **toy)
    ours = make_scheduler("ddim", model.objective)
    model.objective.set_timesteps(ours, 7, model.latents, (1, 16, 8, 8))
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift or 6.0)
    theirs.set_timesteps(sigmas=[1 - i / 7 for i in range(7)])
    torch.testing.assert_close(ours.timesteps, theirs.timesteps)


class Counting:
    """The model as it is, with a note of each call: t, and how many tokens its text has."""

    live_text: frozenset[str] = frozenset()

    def __init__(self) -> None:
        self.asked: list[tuple[float, int]] = []

    def rewrite_caption(self, text: str) -> str:
        return text

    def set_batch(self, model: Family, extras: Extras) -> None: ...

    def predict(self, model: Family, noisy: Tensor, t: Tensor, text: Any, extras: Extras) -> Tensor:
        self.asked.append((float(t[0]), text["encoder_attention_mask"].shape[1]))
        return model.predict(noisy, t, text)


def test_guidance_ends_as_the_prompt_says(toy: Options) -> None:
    """By default while the model's time, 1 - sigma, is below 0.25: sigma above 0.75."""
    model, steps, shift = load(**toy), 8, 6.0
    even = [1 - i / steps for i in range(steps)]
    sigmas = [shift * sigma / (1 + (shift - 1) * sigma) for sigma in even]
    for ratio, limit in ((None, 0.75), (0.6, 0.4), (1.0, -1.0)):
        method: Any = Counting()
        prompt = Prompt(
            prompt="a cat", negative_prompt="a red dog", width=64, height=64, sample_steps=steps, cfg_trunc_ratio=ratio
        )
        generate(model, method, make_request(prompt, model, sampler="ddim", seed=1))
        words = [len(encode_captions(model, "gemma2", [text])[0]["hidden"]) for text in ("a cat", "a red dog")]
        assert words[0] != words[1]
        asked = [t / 1000 for t, length in method.asked if length == words[1]]
        assert asked == pytest.approx([sigma for sigma in sigmas if sigma > limit])
        assert len(method.asked) == steps + len(asked)


@pytest.mark.parametrize("system", ["", SYSTEM])
def test_a_prompt_equals_the_pipelines(toy: Options, toy_shelf: ToyShelf, system: str) -> None:
    """Both texts from words on: the system prompt before the one, nothing before the other."""
    from diffusers import Lumina2Pipeline

    model, method = load(**toy, system_prompt=system), Counting()
    pipe = Lumina2Pipeline.from_pretrained(toy_shelf.paths("lumina", "diffusers")["pretrained_model_name_or_path"])
    pipe.set_progress_bar_config(disable=True)
    x = torch.randn(1, 16, 8, 12, generator=torch.Generator().manual_seed(3))
    given: dict[str, Any] = {"prompt": "a cat", "system_prompt": system}
    if not system:  # the pipeline joins an empty one, too; nothing is joined here
        hidden, mask = pipe._get_gemma_prompt_embeds("a cat")
        empty, nothing = pipe._get_gemma_prompt_embeds("")
        given = {
            "prompt_embeds": hidden, "prompt_attention_mask": mask, "negative_prompt_embeds": empty,
            "negative_prompt_attention_mask": nothing,
        }  # fmt: skip
    theirs = pipe(
        **given, width=96, height=64, num_inference_steps=3, guidance_scale=4.0, cfg_normalization=False, latents=x,
        output_type="latent",
    ).images  # fmt: skip
    sizes = Sizes.from_size(1, 64, 96)
    guidance = Guidance(negative=encode_prompts(model, [""], sizes, None, negative=True), scale=4.0)
    text = encode_prompts(model, ["a cat"], sizes, None)
    ours = run_denoising(model, x, text, guidance, method=method, steps=3)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_previews_know_the_system_prompt(toy: Options, tokenizer: tuple[str], tmp_path: Path) -> None:
    """The same image as of a prompt that begins with it, whether text is cached or not."""
    paths = {name: Path(path) for name, path in toy.items()}
    images, options = make_images(tmp_path / "images", 2), {"max_train_steps": 1, "sample_at_first": True}
    options |= {"tokenizer": tokenizer[0], "network_train_unet_only": True}

    def preview(name: str, prompt: str, **more: Any) -> bytes:
        file = tmp_path / f"{name}.txt"
        file.write_text(f"{prompt} --n a dog --w 64 --h 64 --s 2 --d 5 --l 3")
        out = train_toy(paths, images, tmp_path / name, sample_prompts=file, **options, **more)
        (path,) = (out / "sample").iterdir()
        return Image.open(path).tobytes()

    system = {"system_prompt": "you draw"}
    wanted = preview("wanted", "you draw <Prompt Start> a cat")
    assert preview("system", "a cat", **system) == wanted
    assert preview("cached", "a cat", **system, cache_text_encoder_outputs=True) == wanted
    assert preview("without", "a cat") != wanted
