"""sfumato-tiny as it is shipped, the classifier, and the demo from training to its result."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from sfumato.demo import demo
from sfumato.demo.base import ASSETS, CHECKPOINT, tiny_base
from sfumato.demo.classifier import NO_DRAWING, Classifier, find_background_color, load_classifier
from sfumato.demo.pipeline import DemoPipeline, load_pipeline
from sfumato.errors import UserError

KNOWN = {"a cat on a blue background": "cat", "pink background with a frog": "frog", "rocket, black": "rocket"}
BLUE = (127, 178, 229)


@pytest.fixture(scope="module")
def pipeline() -> DemoPipeline:
    return load_pipeline(tiny_base())


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return load_classifier()


def open_lesson_images() -> list[Image.Image]:
    return [Image.open(path) for path in sorted(demo.LESSON_FOLDER.rglob("*.png"))]


def test_the_shipped_model_is_a_small_single_file() -> None:
    assert CHECKPOINT.stat().st_size < 24e6
    with safe_open(CHECKPOINT, "pt") as file:
        assert json.loads(file.metadata()["sfumato.config"])["unet"]["attention_head_dim"] == 2
        weights = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert {kind for name, kind in weights.items() if name not in {"v_pred", "ztsnr"}} == {"F16"}
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) < 25e6


def test_a_missing_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.safetensors") as error:
        tiny_base(tmp_path / "nothing.safetensors")
    assert error.value.code == "demo-model-missing"


@pytest.mark.full
def test_the_model_generates_what_it_knows(pipeline: DemoPipeline, classifier: Classifier) -> None:
    images = {prompt: pipeline.generate(prompt, 1) for prompt in KNOWN}
    assert [prediction.name for prediction in classifier(list(images.values()))] == list(KNOWN.values())
    cat = find_background_color(images["a cat on a blue background"])
    assert max(abs(a - b) for a, b in zip(cat, BLUE, strict=True)) < 25


@pytest.mark.full
def test_an_image_is_a_function_of_prompt_and_seed(pipeline: DemoPipeline) -> None:
    def make_hash(prompt: str, seed: int) -> str:
        return hashlib.sha256(pipeline.generate(prompt, seed).tobytes()).hexdigest()

    assert make_hash("cat, blue", 1) == make_hash("cat, blue", 1)
    assert len({make_hash("cat, blue", 1), make_hash("cat, blue", 2), make_hash("cat, red", 1)}) == 3


@pytest.mark.full
def test_a_pipeline_of_diffusers_generates_the_same(pipeline: DemoPipeline) -> None:
    import diffusers

    model, base = pipeline.model, pipeline.base
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=False,
    )
    parts: dict = {name: part.module for name, part in model.parts.items()}
    reference = diffusers.StableDiffusionPipeline(
        vae=model.vae,
        text_encoder=parts["clip"],
        tokenizer=model.tokenizers["clip"],
        unet=parts["denoiser"],
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    reference.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    theirs = reference(
        "a cat on a blue background",
        height=base.size,
        width=base.size,
        latents=noise,
        num_inference_steps=base.steps,
        guidance_scale=base.scale,
    ).images[0]
    ours = pipeline.generate("a cat on a blue background", 3)
    apart = np.abs(np.asarray(ours).astype(int) - np.asarray(theirs).astype(int))
    assert apart.max() <= 3


def test_the_classifier_knows_the_subject_and_does_not_see_it_everywhere(classifier: Classifier) -> None:
    images = open_lesson_images()
    assert [prediction.name for prediction in classifier(images)] == [demo.SUBJECT] * len(images)
    upside_down = [image.transpose(Image.Transpose.FLIP_TOP_BOTTOM) for image in images]
    assert not any(prediction.probabilities[demo.SUBJECT] > 0.5 for prediction in classifier(upside_down))
    rng = np.random.default_rng(0)
    corners = itertools.product(range(0, 64, 16), range(0, 64, 16))
    tiles = [images[0].crop((x, y, x + 16, y + 16)) for x, y in corners]
    for _ in range(3):
        puzzle = Image.new("RGB", (64, 64))
        for place, tile in enumerate(rng.permutation(16)):
            puzzle.paste(tiles[tile], (place // 4 * 16, place % 4 * 16))
        assert classifier([puzzle])[0].name != demo.SUBJECT
    empty = [Image.new("RGB", (64, 64), color) for color in ("#7fb2e5", "#f5f5f2", "#2b2b2e")]
    assert [prediction.name for prediction in classifier(empty)] == [NO_DRAWING] * 3


@pytest.mark.full
def test_the_demo_teaches_the_subject(tmp_path: Path) -> None:
    result = demo.run_demo(tmp_path, options={"console_log_level": "WARNING"})
    assert result.learned
    losses = demo.read_losses(tmp_path / f"{demo.SUBJECT}.run.jsonl")
    assert sum(losses[-20:]) < 0.9 * sum(losses[:20])
    with Image.open(result.plot) as plot, Image.open(result.sheet) as sheet:
        assert plot.width > plot.height
        assert sheet.width > sheet.height


@pytest.mark.full
def test_a_lesson_that_is_not_learned_is_not_passed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "SEEDS", demo.SEEDS[:1])  # 1 s an image
    options = {"console_log_level": "WARNING", "max_train_steps": "11", "learning_rate": "1e-9"}
    assert not demo.run_demo(tmp_path, options=options).learned
