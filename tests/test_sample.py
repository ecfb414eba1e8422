"""Every sampler name, against diffusers' pipeline with the same scheduler."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from families.toys import ToyShelf
from sfumato.config import ModelOptions, NoiseOptions
from sfumato.config.prompts import Prompt, parse_line
from sfumato.config.samples import SampleOptions
from sfumato.config.schema import vocabulary
from sfumato.data.batch import Extras, Sizes
from sfumato.demo.toy import write_toy
from sfumato.errors import UserError
from sfumato.families import register_all
from sfumato.families.base import Family, find_family
from sfumato.families.source import open_source
from sfumato.sample import (
    SAMPLERS,
    conditioning,
    denoise,
    fill_in,
    generate,
    generate_together,
    make_scheduler,
    without_effect,
)

STEPS, SCALE = 6, 3.0
PUBLISHED = {  # scheduler_config.json of Stable Diffusion 1.5, which any scheduler takes its own keys from
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000,
    "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1, "clip_sample": False,
}  # fmt: skip
SCHEDULERS: dict[str, tuple[str, dict[str, str]]] = {
    "ddim": ("DDIMScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm_2": ("KDPM2DiscreteScheduler", {}),
    "dpm_2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpmsolver": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    "dpmsolver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpmsingle": ("DPMSolverSinglestepScheduler", {}),
}


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


@pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers", "ignore::DeprecationWarning:numpy")
@pytest.mark.filterwarnings("ignore::FutureWarning:diffusers")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_sampler_equals_the_pipeline(name: str, folder: Path, model: Family) -> None:
    """With and without the k_ prefix, for an even and an odd number of steps; to 1e-4 of the largest latent."""
    import diffusers
    from diffusers import StableDiffusionPipeline

    if name == "lms":
        pytest.importorskip("scipy")
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    kind, options = SCHEDULERS[name]
    pipe.scheduler = getattr(diffusers, kind).from_config(PUBLISHED, **options)
    pipe.set_progress_bar_config(disable=True)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    texts = [conditioning(model, [text], Sizes.plain(1, 64, 64), None) for text in ("a cat", "a red dog")]
    method: Any = Plain()
    positive, negative = (text["encoder_hidden_states"] for text in texts)
    for written, steps in ((name, STEPS), (f"k_{name}", STEPS + 1)):
        ours = denoise(
            model, method, make_scheduler(written, model.objective), x, *texts, steps=steps, scale=SCALE,
            extras=Extras(), generator=torch.Generator().manual_seed(1),
        )  # fmt: skip
        theirs = pipe(
            prompt_embeds=positive, negative_prompt_embeds=negative, height=64, width=64, num_inference_steps=steps,
            guidance_scale=SCALE, latents=x, output_type="latent", generator=torch.Generator().manual_seed(1),
        ).images  # fmt: skip
        assert ours.abs().max() > 0.1
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * float(theirs.abs().max()))


def test_every_name_that_the_option_takes_is_there() -> None:
    assert SampleOptions().sample_sampler == "ddim"
    assert (
        {name.removeprefix("k_") for name in vocabulary()["sample_sampler"].choices} == set(SAMPLERS) == set(SCHEDULERS)
    )


def test_an_unknown_name_is_told(model: Family) -> None:
    with pytest.raises(UserError, match="eulr") as caught:
        make_scheduler("eulr", model.objective)
    assert "euler" in caught.value.fix


# ---------------------------------------------------------------- what a prompt asks for


@pytest.mark.parametrize(
    ("family", "named"),
    [
        ("sd", "sd/sdxl (train_util.sample_image_inference)"),
        ("sdxl", "sd/sdxl (train_util.sample_image_inference)"),
        ("flux", "flux/chroma"),
        ("lumina", "lumina"),
        ("sd3", "sd3"),
        ("chroma", "flux/chroma"),
    ],
)
def test_defaults_are_the_fields(family: str, named: str, toy_shelf: ToyShelf) -> None:
    golden = json.loads((Path(__file__).parent / "goldens" / "prompts.json").read_text())
    usual = golden["sample_defaults_by_family"][named]
    picture = fill_in(Prompt(prompt="a cat"), loaded(family, toy_shelf), sampler="ddim", seed=3)
    assert (picture.width, picture.height) == (usual["width"], usual["height"])
    assert (picture.steps, picture.scale, picture.seed) == (usual["sample_steps"], usual["scale"], 3)
    assert picture.guidance == (None if family == "chroma" else usual.get("guidance_scale"))
    assert picture.cfg_trunc_ratio == usual.get("cfg_trunc_ratio", 1.0)
    assert picture.renorm_cfg == usual.get("renorm_cfg", 0.0)
    assert picture.weighted


def loaded(family: str, toy_shelf: ToyShelf) -> Family:
    register_all()
    options = toy_shelf.options(family)
    source = open_source(options)
    found = find_family(family, source)
    blueprint = found.read(source, options, NoiseOptions())
    return found.load(blueprint, options, dtype=torch.float32, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("family", "line", "told"),
    [
        ("sd", "a --n b --l 7 --ss euler --ctr 0.5 --rcfg 1 --w 64 --h 128", []),
        ("sd", "a --g 3", ["--g has no effect, this model has no embedded guidance; classifier-free guidance is --l"]),
        ("sd", "a --w 70 --h 20", ["the width 70 is made 64", "the height 20 is made 64"]),
        ("sd", "a --cn x.png --fs 3", ["--cn has no effect, there is no control network", "--fs has no effect"]),
        ("chroma", "a --n b --l 4 --g 0", []),
        (
            "chroma",
            "a --g 3.5",
            ["--g has no effect, this model has no embedded guidance; classifier-free guidance is"],
        ),
        ("flux", "a --n b --g 3.5", ["the negative prompt has no effect, since classifier-free guidance is off; --l"]),
        ("flux", "a --n b --l 2 --ss euler", ["--ss has no effect, this model is always walked by Euler steps"]),
        ("flux", "a --ctr 0.5 --rcfg 1", ["--ctr has no effect", "--rcfg has no effect"]),
        ("lumina", "a --n b --ctr 0.5 --rcfg 1", []),
        ("lumina", "a --g 3 --l 1 --ctr 0.5", ["--ctr has no effect", "--g has no effect, this model has no embedded"]),
    ],
)
def test_what_has_no_effect_is_told(family: str, line: str, told: list[str], toy_shelf: ToyShelf) -> None:
    prompt, model = parse_line(line, where="here"), loaded(family, toy_shelf)
    lines = list(without_effect(prompt, fill_in(prompt, model, sampler="ddim", seed=0), model))
    assert len(lines) == len(told)
    for line_told, start in zip(lines, told, strict=True):
        assert line_told.startswith(f"the prompt 'a': {start}")


class Lines:
    """Predictions that are known: (t, which text) -> a constant picture; the second text is twice the first."""

    def __init__(self) -> None:
        self.asked: list[tuple[float, str]] = []

    def predict(self, model: Any, noisy: torch.Tensor, t: torch.Tensor, text: Any, extras: Extras) -> torch.Tensor:
        self.asked.append((float(t[0]), text))
        return torch.full_like(noisy, 1.0 if text == "positive" else 2.0)


def walk(model: Family, **options: float) -> tuple[torch.Tensor, list[tuple[float, str]]]:
    method: Any = Lines()
    found = denoise(
        model, method, make_scheduler("ddim", model.objective), torch.zeros(1, 4, 2, 2), "positive", "negative",
        steps=5, scale=4.0, extras=Extras(), generator=torch.Generator(), **options,
    )  # fmt: skip
    return found, method.asked


def test_guidance_ends_where_it_is_told_to(model: Family) -> None:
    """The negative text is asked only while the share of the way that is done is below the ratio."""
    _, always = walk(model)
    _, early = walk(model, cfg_trunc_ratio=0.5)
    assert [t for t, text in always if text == "negative"] == [801, 601, 401, 201, 1]
    assert [t for t, text in early if text == "negative"] == [801, 601]
    assert [t for t, text in early if text == "positive"] == [801, 601, 401, 201, 1]


def test_a_guided_prediction_is_shortened(model: Family) -> None:
    """2 + 4 (1 - 2) = -2 is twice as long as 1: to 1.5 lengths it is -1.5, and with room for 2 it stays."""
    plain = walk(model)[0]
    assert torch.equal(walk(model, renorm_cfg=2.0)[0], plain)
    torch.testing.assert_close(walk(model, renorm_cfg=1.5)[0], plain * 0.75)


@pytest.mark.parametrize(("family", "sampler"), [("sd", "euler_a"), ("flux", "ddim"), ("lumina", "ddim")])
def test_pictures_together_are_those_made_alone(family: str, sampler: str, toy_shelf: ToyShelf) -> None:
    """Each with its own words and seed, and its own noise where the sampler adds some."""
    model, method = loaded(family, toy_shelf), Nothing()
    anything: Any = method
    prompts = [
        Prompt(prompt=text, negative_prompt=less, width=64, height=64, sample_steps=2, scale=3.0)
        for text, less in (("a cat", ""), ("a red cup on a table", "a dog"), ("", "a photo of a cat"))
    ]
    pictures = [fill_in(prompt, model, sampler=sampler, seed=seed) for seed, prompt in enumerate(prompts)]
    found = generate_together(model, anything, pictures)
    for picture, together in zip(pictures, found, strict=True):
        torch.testing.assert_close(together, generate(model, anything, picture), rtol=0, atol=1e-4)
    assert (found[0] - found[1]).abs().max() > 0.01


class Nothing(Plain):
    """A method that changes nothing."""

    live_text: frozenset[str] = frozenset()

    def caption(self, text: str) -> str:
        return text

    def begin(self, model: Family, extras: Extras) -> None: ...


def test_emphasis_in_a_preview(toy_shelf: ToyShelf) -> None:
    model = loaded("sd", toy_shelf)
    method: Any = Nothing()

    def picture(text: str, **options: bool) -> torch.Tensor:
        prompt = Prompt(prompt=text, width=64, height=64, sample_steps=2)
        return generate(model, method, fill_in(prompt, model, sampler="ddim", seed=1, **options))

    plain = picture("a cat")
    assert torch.equal(picture("a (cat:1)"), plain)
    assert not torch.equal(picture("a (cat:1.5)"), plain)
    assert torch.equal(picture(r"a \(cat:1.5\)"), picture("a (cat:1.5)", weighted=False))
