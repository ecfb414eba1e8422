"""The contract: what holds for each family at toy size, against diffusers' own pipelines where it has one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sfumato.config import Config, ModelOptions, NetworkOptions, OptimOptions, load_config
from sfumato.config.loop import LoopOptions
from sfumato.config.noise import NoiseOptions
from sfumato.config.prompts import Prompt
from sfumato.data.batch import Extras, Sizes, Tensors
from sfumato.demo.toy import write_toy
from sfumato.encode import live_text
from sfumato.families import register_all
from sfumato.families._source import open_source
from sfumato.families.base import FAMILIES, Family, find_family
from sfumato.methods import make_method
from sfumato.sample import conditioning, denoise, fill_in, make_scheduler

register_all()
CASES = {"sd": {}, "flux": {"apply_t5_attn_mask": True}}


@dataclass(frozen=True)
class Toys:
    """Where one family's toy lies, in both layouts."""

    original: ModelOptions
    diffusers: ModelOptions
    folder: Path


@pytest.fixture(scope="session", params=sorted(CASES))
def toys(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Toys:
    folder = tmp_path_factory.mktemp(request.param)
    paths = write_toy(request.param, folder / "original")
    write_toy(request.param, folder / "diffusers", layout="diffusers")
    components = {name: str(path) for name, path in paths.items() if not name.startswith("tokenizer")}
    options = CASES[request.param]
    return Toys(
        original=ModelOptions(**components, **options),
        diffusers=ModelOptions(pretrained_model_name_or_path=str(folder / "diffusers"), **options),
        folder=folder,
    )


def load(model: ModelOptions, dtype: torch.dtype = torch.float32, noise: NoiseOptions | None = None) -> Family:
    source = open_source(model)
    family = find_family(None, source)
    blueprint = family.read(source, model, noise or NoiseOptions())
    loaded = family.load(blueprint, model, dtype=dtype, device=torch.device("cpu"))
    loaded.freeze()
    return loaded


def inputs_of(model: Family, captions: list[str], size: int = 64, dtype: torch.dtype = torch.float32) -> Any:
    generator = torch.Generator().manual_seed(0)
    batch = len(captions)
    x = torch.randn(batch, model.latents.channels, size // 8, size // 8, generator=generator).to(dtype)
    features = {part: live_text(model, part, captions) for part in model.text_parts}
    return x, model.condition(features, Sizes.plain(batch, size, size), None)


def predict(model: Family, captions: list[str], t: float = 600.0) -> Tensor:
    x, conditioning = inputs_of(model, captions)
    with torch.no_grad():
        return model.predict(x, torch.full((len(captions),), t), conditioning)


def test_both_layouts_give_the_same_model(toys: Toys) -> None:
    torch.testing.assert_close(
        predict(load(toys.original), ["a cat"]), predict(load(toys.diffusers), ["a cat"]), rtol=0, atol=1e-6
    )


def test_a_loaded_single_file_is_saved_again_bit_for_bit(toys: Toys, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from sfumato.families._saving import save_single_file

    save_single_file(load(toys.original), tmp_path / "again.safetensors", {})
    before, after = (
        load_file(str(toys.original.pretrained_model_name_or_path)),
        load_file(tmp_path / "again.safetensors"),
    )
    assert {k for k in before} <= set(after)
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


def test_samples_do_not_see_their_neighbours(toys: Toys) -> None:
    model = load(toys.original)
    together = predict(model, ["a cat", "a red cup of coffee on a wooden table"])
    alone = predict(model, ["a cat"])
    x, conditioning = inputs_of(model, ["a cat", "a red cup of coffee on a wooden table"])
    assert together.shape == x.shape
    torch.testing.assert_close(together[:1], alone, rtol=0, atol=1e-5)


def test_header_names_the_groups_that_the_loaded_model_has(toys: Toys) -> None:
    model = load(toys.original)
    for name, part in model.parts.items():
        planned, real = model.blueprint.networks[name].groups(), part.groups()
        assert [group.name for group in planned] == [group.name for group in real]
        assert [group.rows for group in planned] == [group.rows for group in real]


# ---------------------------------------------------------------- sampling


@dataclass
class Plain:
    """No method at all: the model as it is."""

    live_text: frozenset[str] = frozenset()

    def caption(self, text: str) -> str:
        return text

    def begin(self, model: Family, extras: Extras) -> None: ...

    def predict(self, model: Family, noisy: Tensor, t: Tensor, conditioning: Tensors, extras: Extras) -> Tensor:
        return model.predict(noisy, t, conditioning)


def sd_pipeline(folder: Path, model: Any, picture: Any, x: Tensor) -> Tensor:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.scheduler = make_scheduler(picture.sampler, model.objective)
    pipe.set_progress_bar_config(disable=True)
    hidden = [
        model.encode_text("clip", [text])[0]["hidden"][None] for text in (picture.prompt, picture.negative_prompt)
    ]
    return pipe(
        prompt_embeds=hidden[0], negative_prompt_embeds=hidden[1], height=picture.height, width=picture.width,
        num_inference_steps=picture.steps, guidance_scale=picture.scale, latents=x, output_type="latent",
        generator=torch.Generator().manual_seed(5),
    ).images  # fmt: skip


def flux_pipeline(folder: Path, model: Any, picture: Any, x: Tensor) -> Tensor:
    from diffusers import FluxPipeline

    from sfumato.families.flux import pack, unpack

    pipe = FluxPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)

    def embeds(text: str) -> tuple[Tensor, Tensor]:
        pooled, hidden = (model.encode_text(part, [text])[0] for part in ("clip_l", "t5"))
        return pooled["pooled"][None], hidden["hidden"][None]

    (pooled, hidden), (no_pooled, no_hidden) = embeds(picture.prompt), embeds(picture.negative_prompt)
    found = pipe(
        prompt_embeds=hidden, pooled_prompt_embeds=pooled, negative_prompt_embeds=no_hidden,
        negative_pooled_prompt_embeds=no_pooled, true_cfg_scale=picture.scale, guidance_scale=picture.guidance,
        height=picture.height, width=picture.width, num_inference_steps=picture.steps, latents=pack(x),
        output_type="latent", max_sequence_length=512,
    ).images  # fmt: skip
    return unpack(found, x.shape)


PIPELINES: dict[str, Callable[..., Tensor]] = {"sd": sd_pipeline, "flux": flux_pipeline}


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_denoising_equals_the_diffusers_pipeline(toys: Toys, scale: float) -> None:
    plain = toys.diffusers.model_copy(update={"apply_t5_attn_mask": False})  # diffusers' pipeline has no mask
    model = load(plain)
    picture = fill_in(
        Prompt(prompt="a cat", negative_prompt="a red dog", width=64, height=96, sample_steps=4, scale=scale),
        model, sampler="ddim", seed=3,
    )  # fmt: skip
    spec = model.latents
    x = torch.randn(1, spec.channels, 12, 8, generator=torch.Generator().manual_seed(picture.seed))
    sizes = Sizes.plain(1, 96, 64)
    method: Any = Plain()
    negative = conditioning(model, [picture.negative_prompt], sizes, picture.guidance) if picture.guided else None
    ours = denoise(
        model, method, make_scheduler(picture.sampler, model.objective), x,
        conditioning(model, [picture.prompt], sizes, picture.guidance), negative, steps=picture.steps,
        scale=scale, extras=Extras(), generator=torch.Generator().manual_seed(5),
    )  # fmt: skip
    theirs = PIPELINES[model.name](toys.folder / "diffusers", model, picture, x)
    assert ours.abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
