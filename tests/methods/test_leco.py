"""Concepts and sliders: the target against an untouched model, the denoising against diffusers, and a run's life."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from safetensors import safe_open
from torch import Tensor, nn

from families.loading import load_family
from families.toys import ToyShelf
from rehearsing import needs_rehearsal
from sfumato.config import load_config
from sfumato.data.batch import Batch
from sfumato.errors import SeveralErrors, UserError
from sfumato.families.base import Family
from sfumato.families.encoding import encode_with_grad
from sfumato.loss import training_loss
from sfumato.plan import make_run_plan
from sfumato.tools.rehearse import rehearse_plan
from sfumato.training import concept_loss
from sfumato.training.concept_loss import ConceptGoal
from sfumato.training.latents import load_latents
from sfumato.training.run import Run
from toy_runs import (
    build_toy_run,
    equal_tensors,
    make_arguments,
    make_images,
    read_metrics,
    read_weights,
    train_toy,
)

FAMILIES = ("sd", "sdxl", "sd3", "flux", "chroma", "lumina")
Toy = Mapping[str, Path]
PROMPTS = """
resolution = 128
[[prompts]]
target = "a cat"
positive = "a dog"
unconditional = "a bird"
neutral = "a fish"
guidance_scale = 1.5
batch_size = 2
multiplier = -0.5
[[prompts]]
target = "a house"
action = "enhance"
weight = 3
dynamic_crops = true
"""
NO_IMAGES = dict.fromkeys(("train_data_dir", "resolution", "enable_bucket", "min_bucket_reso", "max_bucket_reso"))
LECO = {**NO_IMAGES, "caption_extension": None, "method": "leco", "max_denoising_steps": 4}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.toml"
    file.write_text(PROMPTS)
    return file


def build(toy: Toy, prompts: Path, output: Path, **options: Any) -> Run:
    """A run whose adapters change what they are attached to."""
    run = build_toy_run(toy, output, output, prompts_file=prompts, **LECO, **options)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in run.method.modules.named_parameters():
        if "lora_up" in name:
            nn.init.normal_(parameter, std=0.3, generator=generator)
    return run


def take_batch(run: Run, target: str) -> Batch:
    batches = (batch for step in run.loader.steps() for batch in step.batches)
    return next(batch for batch in batches if batch.captions[0] == target)


class Recorder:
    """Keeps what a run's loss compares, and what its model predicts for."""

    def __init__(self, run: Run) -> None:
        self.run, self.compared, self.inputs = run, list[tuple[Tensor, Tensor]](), list[tuple[Tensor, Tensor]]()
        self.loss, self.predict = run.context.recipe.loss, run.model.predict
        run.context = replace(run.context, recipe=replace(run.context.recipe, loss=self.record_loss))
        run.model.predict = self.record_predict

    def record_loss(self, estimate: Tensor, target: Tensor, level: Any) -> Tensor:
        self.compared.append((estimate.detach(), target))
        return self.loss(estimate, target, level)

    def record_predict(self, noisy: Tensor, t: Tensor, *rest: Any) -> Tensor:
        self.inputs.append((noisy, t))
        return self.predict(noisy, t, *rest)


def condition(run: Run, model: Family, batch: Batch, text: str) -> dict[str, Tensor]:
    count = len(batch.captions)
    features = {part: encode_with_grad(model, part, [text] * count) for part in model.text_parts}
    return model.condition(features, batch.sizes, run.context.recipe.guidance)


@pytest.mark.fast_for("flux", "sd-")
@pytest.mark.parametrize("family", FAMILIES, ids=lambda name: f"{name}-")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_target_and_latents(toy_shelf: ToyShelf, prompts: Path, tmp_path: Path, family: str) -> None:
    toy = toy_shelf.paths(family)
    run = build(toy, prompts, tmp_path)
    options = run.config.model
    plain = load_family(run.plan.family, run.plan.blueprint, options)
    batch, recorder = take_batch(run, "a cat"), Recorder(run)
    with torch.no_grad():
        loss = training_loss(run.context, batch, load_latents(run, batch), 2)
        (noisy, t), (estimate, target) = recorder.inputs[-1], recorder.compared[0]
        level = plain.objective.level(t)
        said = {
            text: plain.objective.estimate(plain.predict(noisy, t, condition(run, plain, batch, text)), noisy, level)
            for text in ("a dog", "a bird", "a fish")
        }
        wanted = said["a fish"] - 1.5 * (said["a dog"] - said["a bird"])
        torch.testing.assert_close(target, wanted, rtol=1e-3, atol=1e-4)
        assert not torch.allclose(estimate, wanted, atol=1e-3)
        run.method.set_batch(run.model, batch.extras)
        assert batch.extras.multiplier is not None
        assert batch.extras.multiplier.tolist() == [-0.5, -0.5]
        own = recorder.predict(noisy, t, condition(run, plain, batch, "a cat"))
        torch.testing.assert_close(estimate, run.model.objective.estimate(own, noisy, level), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(noisy, denoise(run, plain, batch, t, recorder), rtol=1e-3, atol=1e-3)
    assert loss == pytest.approx(((estimate - target) ** 2).mean().item(), rel=1e-4)


def denoise(run: Run, plain: Family, batch: Batch, t: Tensor, recorder: Recorder) -> Tensor:
    """With diffusers' scheduler, sample by sample, until it would go on at t."""
    objective, samples = run.model.objective, []
    for i in range(len(t)):
        one = batch.take(torch.tensor([i]))
        run.method.set_batch(run.model, one.extras)
        if objective.predicts == "velocity":
            scheduler = FlowMatchEulerDiscreteScheduler(**objective.scheduler_options())
        else:
            scheduler = DDIMScheduler(
                **objective.scheduler_options(), clip_sample=False, set_alpha_to_one=False, steps_offset=1
            )
        latents = load_latents(run, one)
        x = run.context.randomness.per_sample(
            "noise", one.ids, lambda draw, _, shape=latents[0].shape: torch.randn(shape, generator=draw)
        )
        objective.set_timesteps(scheduler, 4, run.model.latents, x.shape)
        text, negative = (condition(run, plain, one, words) for words in ("a cat", "a bird"))
        for time in scheduler.timesteps:
            if time == t[i]:
                break
            cat, bird = (recorder.predict(x, time.float().expand(1), words) for words in (text, negative))
            x = scheduler.step(bird + 3.0 * (cat - bird), time, x).prev_sample
        samples.append(x)
    return torch.cat(samples)


@pytest.mark.full
def test_a_run_and_its_file(toy_shelf: ToyShelf, prompts: Path, tmp_path: Path) -> None:
    """The file is the LoRA of any other run that trains the denoiser, but for its metadata."""
    toy, options = toy_shelf.paths("flux"), {**LECO, "prompts_file": prompts}
    whole = train_toy(toy, tmp_path, tmp_path / "whole", **options)
    assert {row["step"] for row in read_metrics(whole)} == {1, 2, 3, 4}
    with safe_open(whole / "lora.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_leco_prompt_count"] == "2"
    assert metadata["ss_leco_prompts_file"] == "prompts.toml"
    assert '"target": "a cat"' in metadata["ss_leco_preview"]
    images = make_images(tmp_path / "images", 1)
    other = train_toy(toy, images, tmp_path / "other", network_train_unet_only=True, max_train_steps=1)
    assert read_weights(other).keys() == read_weights(whole).keys()
    assert any(tensor.any() for name, tensor in read_weights(whole).items() if "lora_up" in name)


@pytest.mark.full
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_in_bf16_are_those_of_a_given_target(
    toy_shelf: ToyShelf, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    """What is computed before the main forward has no effect on its gradients; autocast keeps no weights of it."""
    options = {"mixed_precision": "bf16", "gradient_checkpointing": checkpointing}
    run = build(toy_shelf.paths("sd"), prompts, tmp_path, **options)
    batch, kept = take_batch(run, "a cat"), dict[str, Tensor]()

    def keep(name: str, function: Any) -> Any:
        def call(*arguments: Any) -> Tensor:
            if name not in kept:
                kept[name] = function(*arguments)
            return kept[name]

        return call

    monkeypatch.setattr(ConceptGoal, "denoise", keep("noisy", ConceptGoal.denoise))
    monkeypatch.setattr(concept_loss, "predict_target", keep("target", concept_loss.predict_target))
    found: list[dict[str, Tensor]] = []
    for _ in range(2):
        run.optimizer.zero_grad(set_to_none=True)
        with run.autocast():
            loss = training_loss(run.context, batch, load_latents(run, batch), 2)
        loss.backward()
        parameters = run.method.modules.named_parameters()
        found.append({name: p.grad.clone() for name, p in parameters if p.grad is not None})
    assert equal_tensors(*found)
    assert len(found[0]) == len(list(run.method.modules.parameters()))


@pytest.mark.full
@needs_rehearsal
def test_it_rehearses_in_bf16_with_checkpointing(toy_shelf: ToyShelf, prompts: Path, tmp_path: Path) -> None:
    """On a GPU autocast keeps what it casts: recomputation would meet weights without gradients, and torch aborts."""
    options = {**LECO, "prompts_file": prompts, "mixed_precision": "bf16", "gradient_checkpointing": True}
    config = load_config(make_arguments(toy_shelf.paths("sd"), tmp_path, tmp_path, **options))
    stages = {stage.name: stage for stage in rehearse_plan(make_run_plan(config, processes=1))}
    assert {"training step", "save"} <= stages.keys()
    assert "vae" not in stages["training step"].resident


def test_samples_do_not_depend_on_their_batch(toy_shelf: ToyShelf, prompts: Path, tmp_path: Path) -> None:
    run = build(toy_shelf.paths("sd"), prompts, tmp_path)
    batch = take_batch(run, "a cat")

    def measure(part: Batch) -> float:
        with torch.no_grad():
            return training_loss(run.context, part, load_latents(run, part), 1).item()

    alone = [measure(batch.take(torch.tensor([i]))) for i in range(2)]
    assert measure(batch) == pytest.approx(sum(alone), rel=1e-4)


def test_weights_crops_and_sizes(toy_shelf: ToyShelf, prompts: Path, tmp_path: Path) -> None:
    run = build(toy_shelf.paths("sd"), prompts, tmp_path)
    batch = take_batch(run, "a house")
    assert batch.weight.tolist() == [3.0]
    ((height, width),) = batch.sizes.original.tolist()
    assert 128 <= height <= 3 * 128
    assert 128 <= width <= 3 * 128
    assert batch.sizes.target.tolist() == [[128, 128]]
    assert not run.model.parts["vae"].is_loaded
    assert not any(run.model.parts[part].is_loaded for part in run.model.text_parts)


def test_dynamic_resolutions_come_equally_often(toy_shelf: ToyShelf, tmp_path: Path) -> None:
    file = tmp_path / "prompts.yaml"
    file.write_text("- {target: a, resolution: 256, dynamic_resolution: true}\n- {target: b, resolution: 100}\n")
    options = {**LECO, "prompts_file": file}
    plan = make_run_plan(load_config(make_arguments(toy_shelf.paths("sd"), tmp_path, tmp_path, **options)), processes=1)
    first, second = plan.data.datasets
    assert first.buckets == {(w, h): 1 for w in (128, 192) for h in (128, 192)}
    assert second.buckets == {(96, 96): 4}
    assert any("100x100" in note for note in plan.data.notes)


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"prompts_file": None}, "prompts-file-missing"),
        ({"method": "adapter", "train_data_dir": "."}, "prompts-file-without-leco"),
        ({"network_train_text_encoder_only": True}, "leco-text-encoder-only"),
        ({"resolution": 64, "strict": True}, "leco-options-unused"),
        ({"text_encoder_lr": 1e-4, "strict": True}, "leco-options-unused"),
        ({"min_timestep": 4, "strict": True}, "leco-options-unused"),
    ],
)
def test_options(toy_shelf: ToyShelf, prompts: Path, tmp_path: Path, options: dict[str, Any], code: str) -> None:
    given = {**LECO, "prompts_file": prompts, **options}
    with pytest.raises(UserError) as error:
        load_config(make_arguments(toy_shelf.paths("sd"), tmp_path, tmp_path, **given))
    codes = error.value.codes if isinstance(error.value, SeveralErrors) else [error.value.code]
    assert code in codes
