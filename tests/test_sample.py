"""Every sampler against diffusers' pipeline with the same scheduler, and what a prompt asks for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from denoising import run_denoising
from families.loading import NoMethod, load_model
from families.toys import ToyShelf
from sfumato.config.evaluation import SampleOptions
from sfumato.config.prompts import Prompt, parse_line
from sfumato.config.schema import vocabulary
from sfumato.data.batch import Extras, Sizes
from sfumato.errors import UserError
from sfumato.families.base import Family
from sfumato.sample import encode_prompts, generate, generate_batch
from sfumato.sampling.denoise import Guidance
from sfumato.sampling.request import list_ignored, make_request
from sfumato.sampling.schedulers import SAMPLERS, make_scheduler

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


@pytest.fixture(scope="module")
def folder(toy_shelf: ToyShelf) -> Path:
    return toy_shelf.paths("sd", "diffusers")["pretrained_model_name_or_path"]


@pytest.fixture(scope="module")
def model(toy_shelf: ToyShelf) -> Family:
    return load_model(toy_shelf.options("sd", "diffusers"))


@pytest.mark.full
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
    texts = [encode_prompts(model, [text], Sizes.from_size(1, 64, 64), None) for text in ("a cat", "a red dog")]
    positive, negative = (text["encoder_hidden_states"] for text in texts)
    for written, steps in ((name, STEPS), (f"k_{name}", STEPS + 1)):
        guidance = Guidance(negative=texts[1], scale=SCALE)
        ours = run_denoising(model, x, texts[0], guidance, sampler=written, steps=steps)
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


def test_an_unknown_sampler_is_an_error(model: Family) -> None:
    with pytest.raises(UserError, match="eulr") as error:
        make_scheduler("eulr", model.objective)
    assert error.value.code == "sampler-unknown"
    assert "euler" in error.value.fix


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
    request = make_request(Prompt(prompt="a cat"), load_model(toy_shelf.options(family)), sampler="ddim", seed=3)
    assert (request.width, request.height) == (usual["width"], usual["height"])
    assert (request.steps, request.scale, request.seed) == (usual["sample_steps"], usual["scale"], 3)
    assert request.guidance == (None if family == "chroma" else usual.get("guidance_scale"))
    assert request.cfg_trunc_ratio == usual.get("cfg_trunc_ratio", 1.0)
    assert request.renorm_cfg == usual.get("renorm_cfg", 0.0)
    assert request.weighted


@pytest.mark.parametrize(
    ("family", "line", "ignored"),
    [
        ("sd", "a --n b --l 7 --ss euler --ctr 0.5 --rcfg 1 --w 64 --h 128", []),
        ("sd", "a --g 3", ["--g "]),
        ("sd", "a --w 70 --h 20", ["the width 70 ", "the height 20 "]),
        ("sd", "a --cn x.png --fs 3", ["--cn ", "--fs "]),
        ("chroma", "a --n b --l 4 --g 0", []),
        (
            "chroma",
            "a --g 3.5",
            ["--g "],
        ),
        ("flux", "a --n b --g 3.5", ["the negative prompt "]),
        ("flux", "a --n b --l 2 --ss euler", ["--ss "]),
        ("flux", "a --ctr 0.5 --rcfg 1", ["--ctr ", "--rcfg "]),
        ("lumina", "a --n b --ctr 0.5 --rcfg 1", []),
        ("lumina", "a --g 3 --l 1 --ctr 0.5", ["--ctr ", "--g "]),
    ],
)
def test_options_without_effect_are_listed(family: str, line: str, ignored: list[str], toy_shelf: ToyShelf) -> None:
    prompt, model = parse_line(line, where="here"), load_model(toy_shelf.options(family))
    lines = list(list_ignored(prompt, make_request(prompt, model, sampler="ddim", seed=0), model))
    assert len(lines) == len(ignored)
    for found, start in zip(lines, ignored, strict=True):
        assert found.startswith(f"the prompt 'a': {start}")


class Lines:
    """Predictions that are known: (t, which text) -> a constant image; the second text is twice the first."""

    def __init__(self) -> None:
        self.asked: list[tuple[float, str]] = []

    def predict(self, model: Any, noisy: torch.Tensor, t: torch.Tensor, text: Any, extras: Extras) -> torch.Tensor:
        self.asked.append((float(t[0]), text))
        return torch.full_like(noisy, 1.0 if text == "positive" else 2.0)


def denoise_lines(model: Family, **options: float) -> tuple[torch.Tensor, list[tuple[float, str]]]:
    method, negative = Lines(), cast("Any", "negative")
    guidance = Guidance(negative=negative, scale=4.0, **options)
    found = run_denoising(model, torch.zeros(1, 4, 2, 2), "positive", guidance, method=method, steps=5)
    return found, method.asked


def test_guidance_ends_at_the_truncation_ratio(model: Family) -> None:
    """The negative text is asked only while the share of the way that is done is below the ratio."""
    _, always = denoise_lines(model)
    _, early = denoise_lines(model, truncation=0.5)
    assert [t for t, text in always if text == "negative"] == [801, 601, 401, 201, 1]
    assert [t for t, text in early if text == "negative"] == [801, 601]
    assert [t for t, text in early if text == "positive"] == [801, 601, 401, 201, 1]


def test_a_guided_prediction_is_shortened(model: Family) -> None:
    """2 + 4 (1 - 2) = -2 is twice as long as 1: to 1.5 lengths it is -1.5, and with room for 2 it stays."""
    plain = denoise_lines(model)[0]
    assert torch.equal(denoise_lines(model, norm_limit=2.0)[0], plain)
    torch.testing.assert_close(denoise_lines(model, norm_limit=1.5)[0], plain * 0.75)


@pytest.mark.parametrize(("family", "sampler"), [("sd", "euler_a"), ("flux", "ddim"), ("lumina", "ddim")])
def test_a_batch_gives_the_same_images_as_single_requests(family: str, sampler: str, toy_shelf: ToyShelf) -> None:
    """Each with its own words and seed, and its own noise where the sampler adds some."""
    model, method = load_model(toy_shelf.options(family)), NoMethod()
    anything: Any = method
    prompts = [
        Prompt(prompt=text, negative_prompt=less, width=64, height=64, sample_steps=2, scale=3.0)
        for text, less in (("a cat", ""), ("a red cup on a table", "a dog"), ("", "a photo of a cat"))
    ]
    requests = [make_request(prompt, model, sampler=sampler, seed=seed) for seed, prompt in enumerate(prompts)]
    found = generate_batch(model, anything, requests)
    for request, together in zip(requests, found, strict=True):
        torch.testing.assert_close(together, generate(model, anything, request), rtol=0, atol=1e-4)
    assert (found[0] - found[1]).abs().max() > 0.01


def test_prompt_weights_in_an_image(toy_shelf: ToyShelf) -> None:
    model = load_model(toy_shelf.options("sd"))
    method: Any = NoMethod()

    def make_image(text: str, **options: bool) -> torch.Tensor:
        prompt = Prompt(prompt=text, width=64, height=64, sample_steps=2)
        return generate(model, method, make_request(prompt, model, sampler="ddim", seed=1, **options))

    plain = make_image("a cat")
    assert torch.equal(make_image("a (cat:1)"), plain)
    assert not torch.equal(make_image("a (cat:1.5)"), plain)
    assert torch.equal(make_image(r"a \(cat:1.5\)"), make_image("a (cat:1.5)", weighted=False))
