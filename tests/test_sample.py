"""Every sampler name, against diffusers' pipeline with the same scheduler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sfumato.config import ModelOptions, NoiseOptions
from sfumato.config.samples import SampleOptions
from sfumato.config.schema import vocabulary
from sfumato.data.batch import Extras, Sizes
from sfumato.demo.toy import write_toy
from sfumato.errors import UserError
from sfumato.families import register_all
from sfumato.families._source import open_source
from sfumato.families.base import Family, find_family
from sfumato.sample import SAMPLERS, conditioning, denoise, make_scheduler

STEPS, SCALE = 6, 3.0


class Plain:
    """No method at all: the model as it is."""

    def predict(self, model: Family, noisy: torch.Tensor, t: torch.Tensor, text: Any, extras: Extras) -> torch.Tensor:
        return model.predict(noisy, t, text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sd")
    write_toy("sd", folder, layout="diffusers")
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> Family:
    register_all()
    options = ModelOptions(pretrained_model_name_or_path=str(folder))
    source = open_source(options)
    family = find_family("sd", source)
    blueprint = family.read(source, options, NoiseOptions())
    return family.load(blueprint, options, dtype=torch.float32, device=torch.device("cpu"))


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_equals_the_pipeline(name: str, folder: Path, model: Family) -> None:
    from diffusers import StableDiffusionPipeline

    if name == "lms":
        pytest.importorskip("scipy")
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.scheduler = make_scheduler(name, model.objective)
    pipe.set_progress_bar_config(disable=True)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    texts = [conditioning(model, [text], Sizes.plain(1, 64, 64), None) for text in ("a cat", "a red dog")]
    method: Any = Plain()
    ours = denoise(
        model, method, make_scheduler(f"k_{name}", model.objective), x, *texts, steps=STEPS, scale=SCALE,
        extras=Extras(), generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    positive, negative = (text["encoder_hidden_states"] for text in texts)
    theirs = pipe(
        prompt_embeds=positive, negative_prompt_embeds=negative, height=64, width=64, num_inference_steps=STEPS,
        guidance_scale=SCALE, latents=x, output_type="latent", generator=torch.Generator().manual_seed(1),
    ).images  # fmt: skip
    scale = float(ours.abs().max())
    assert scale > 0.1
    assert float((ours - theirs).abs().max()) < 1e-4 * max(1.0, scale)


def test_every_name_that_the_option_takes_is_there() -> None:
    assert SampleOptions().sample_sampler == "ddim"
    assert {name.removeprefix("k_") for name in vocabulary()["sample_sampler"].choices} == set(SAMPLERS)


def test_an_unknown_name_is_told(model: Family) -> None:
    with pytest.raises(UserError, match="eulr") as caught:
        make_scheduler("eulr", model.objective)
    assert "euler" in caught.value.fix
