"""Prior preservation: targets of the reference model against a second, untouched model, and their effect."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from families.loading import load_family
from families.toys import ToyShelf
from sfumato.config import Config, load_config
from sfumato.data.batch import Batch
from sfumato.errors import UserError
from sfumato.families.encoding import encode_with_grad
from sfumato.loss import training_loss
from sfumato.parallel.start import start_parallel
from sfumato.plan import make_run_plan
from sfumato.training.latents import load_latents
from sfumato.training.run import Run
from sfumato.training.setup_run import build_run
from toy_runs import equal_tensors, make_arguments, make_images, read_metrics, read_weights, train_toy

FAMILIES = ("sd", "sdxl", "flux", "chroma", "sd3", "lumina")
Toy = Mapping[str, Path]
DATA = """
[general]
resolution = 64
batch_size = 2
caption_extension = '.txt'
[[datasets]]
[[datasets.subsets]]
image_dir = '{images}/1_cat'
[[datasets.subsets]]
image_dir = '{images}/1_dog'
custom_attributes = {{ diff_output_preservation = true }}
"""


@pytest.fixture(params=FAMILIES)
def toy(request: pytest.FixtureRequest, toy_shelf: ToyShelf) -> Toy:
    return toy_shelf.paths(request.param)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """One trained image and one preserved image of the same size: they make one batch."""
    for name in ("1_cat", "1_dog"):
        make_images(tmp_path / "images", 1, name=name)
    (tmp_path / "images" / "1_dog" / "0.txt").write_text("a photo of a dog")
    file = tmp_path / "data.toml"
    file.write_text(DATA.format(images=(tmp_path / "images").as_posix()))
    return file


def make_config(toy: Toy, data: Path | None, output: Path, **options: Any) -> Config:
    """data: a dataset file; None if the options name the images."""
    given: dict[str, Any] = {"enable_bucket": None, "min_bucket_reso": None, "max_bucket_reso": None}
    given |= {"dataset_config": data, "train_data_dir": None, "resolution": None}
    return load_config(make_arguments(toy, output, output, **given | options))


def make_run(toy: Toy, data: Path | None, output: Path, **options: Any) -> Run:
    """A run whose adapters change what they are attached to."""
    training = build_run(make_config(toy, data, output, **options), start_parallel())
    assert training is not None
    generator = torch.Generator().manual_seed(0)
    for name, parameter in training.method.modules.named_parameters():
        if "lora_up" in name:
            nn.init.normal_(parameter, std=0.3, generator=generator)
    return training


def first_batch(training: Run) -> Batch:
    return next(iter(training.loader.steps())).batches[0]


def compute_loss(training: Run, batch: Batch) -> Tensor:
    return training_loss(training.context, batch, load_latents(training, batch), len(batch.captions))


def replace_loss(training: Run, loss: Callable[[Tensor, Tensor, Any], Tensor]) -> None:
    recipe = replace(training.context.recipe, loss=loss)
    training.context = replace(training.context, recipe=recipe)


def loss_and_gradients(training: Run, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    training.optimizer.zero_grad(set_to_none=True)
    training.context.randomness.seed_modules(0, 0, 0)
    with training.autocast():
        loss = compute_loss(training, batch)
    loss.backward()
    found = {n: p.grad.clone() for n, p in training.method.modules.named_parameters() if p.grad is not None}
    return loss.detach(), found


class Recorder:
    """Stands in a run for its loss and its model's predictions, and keeps what goes through them."""

    def __init__(self, training: Run) -> None:
        self.compared: list[tuple[Tensor, Tensor]] = []
        self.met: list[tuple[Tensor, Tensor]] = []
        self.loss, self.predict = training.context.recipe.loss, training.model.predict
        replace_loss(training, self.recorded_loss)
        training.model.predict = self.recorded_predict

    def recorded_loss(self, estimate: Tensor, target: Tensor, level: Any) -> Tensor:
        estimate.retain_grad()
        self.compared.append((estimate, target))
        return self.loss(estimate, target, level)

    def recorded_predict(self, noisy: Tensor, t: Tensor, conditioning: Any, images: Any) -> Tensor:
        self.met.append((noisy, t))
        return self.predict(noisy, t, conditioning, images)


@torch.no_grad()
def untouched_estimate(training: Run, batch: Batch, noisy: Tensor, t: Tensor) -> Tensor:
    """The estimate of the checkpoint, from a second copy that never had an adapter."""
    blueprint, family = training.plan.blueprint, training.plan.family
    model = load_family(family, blueprint, training.config.model)
    model.set_resolutions(dataset.settings.resolution for dataset in training.plan.data.datasets)
    features = {part: encode_with_grad(model, part, batch.captions) for part in model.text_parts}
    prediction = model.predict(noisy, t, model.condition(features, batch.sizes, training.context.recipe.guidance))
    return model.objective.estimate(prediction, noisy, model.objective.level(t))


def test_the_target_is_what_an_untouched_model_predicts(toy: Toy, data: Path, tmp_path: Path) -> None:
    """Also with text encoders that train, whose untrained features are used; the other sample keeps its own target."""
    training = make_run(toy, data, tmp_path / "out")
    recorder = Recorder(training)
    batch = first_batch(training)
    held = batch.captions.index("a photo of a dog")
    assert batch.preserve is not None
    assert batch.preserve.tolist() == [held == 0, held == 1]
    compute_loss(training, batch)
    ((estimate, target),) = recorder.compared
    before, (noisy, t) = recorder.met
    assert torch.equal(before[0], noisy[[held]])  # the preserved sample only
    assert torch.equal(before[1], t[[held]])

    wanted = untouched_estimate(training, batch, noisy, t)
    torch.testing.assert_close(target[held], wanted[held], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(estimate[held], wanted[held], atol=1e-2)  # the adapters do change what is predicted
    compute_loss(training, replace(batch, preserve=None))
    assert torch.equal(target[1 - held], recorder.compared[1][1][1 - held])


@pytest.mark.fast_for("plain", "checkpointing-flux", "cached-sd")
@pytest.mark.parametrize("toy", ["sd", "flux"], indirect=True)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_checkpointing": True, "network_dropout": 0.3},
        {"mixed_precision": "bf16", "network_args": ["rank_dropout=0.2", "module_dropout=0.2"]},
        {"network_train_unet_only": True, "cache_latents": True, "cache_text_encoder_outputs": True},
    ],
    ids=["plain", "checkpointing", "bf16", "cached"],
)
def test_gradients_are_those_of_a_given_target(toy: Toy, data: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """The reference prediction has no side effects: strengths, dropout and recomputation are the same."""
    training = make_run(toy, data, tmp_path / "out", cache_dir=tmp_path / "cache", **options)
    batch = replace(first_batch(training), extras=replace(first_batch(training).extras, multiplier=torch.ones(2)))
    targets: list[Tensor] = []
    plain = training.context.recipe.loss

    def recorded(estimate: Tensor, target: Tensor, level: Any) -> Tensor:
        targets.append(target)
        return plain(estimate, target, level)

    def given(estimate: Tensor, target: Tensor, level: Any) -> Tensor:
        return plain(estimate, targets[0], level)

    replace_loss(training, recorded)
    loss, gradients = loss_and_gradients(training, batch)
    replace_loss(training, given)
    wanted_loss, wanted = loss_and_gradients(training, replace(batch, preserve=None))
    assert torch.equal(loss, wanted_loss)
    assert equal_tensors(gradients, wanted)
    assert any(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("toy", ["sd"], indirect=True)
def test_a_batch_without_such_samples_costs_nothing(toy: Toy, data: Path, tmp_path: Path) -> None:
    training = make_run(toy, data, tmp_path / "out")
    calls: list[int] = []
    training.model.denoiser.register_forward_pre_hook(lambda module, args: calls.append(1))
    batch = first_batch(training)
    compute_loss(training, batch)
    assert len(calls) == 2
    compute_loss(training, replace(batch, preserve=None))
    assert len(calls) == 3


@pytest.mark.full
@pytest.mark.parametrize("toy", ["sdxl", "flux"], indirect=True)
def test_preserved_regularization_images_do_not_change_a_new_adapter(toy: Toy, tmp_path: Path) -> None:
    """A new adapter changes nothing, so it has its target; only the other images change it."""
    images = make_images(tmp_path / "images", 1, name="1_cat")
    options: dict[str, Any] = {"reg_data_dir": make_images(tmp_path / "reg", 1, name="1_dog"), "max_train_steps": 1}
    options |= {"train_batch_size": 2, "enable_bucket": None, "min_bucket_reso": None, "max_bucket_reso": None}
    plain = train_toy(toy, images, tmp_path / "plain", **options, prior_loss_weight=1)
    held = train_toy(toy, images, tmp_path / "held", **options, prior_loss_weight=1, preserve_reg_images=True)
    alone = train_toy(toy, images, tmp_path / "alone", **options, prior_loss_weight=0)
    assert read_metrics(held)[0]["loss/current"] == pytest.approx(read_metrics(alone)[0]["loss/current"], rel=1e-5)
    assert read_metrics(held)[0]["loss/current"] < read_metrics(plain)[0]["loss/current"]
    assert not equal_tensors(read_weights(plain), read_weights(held))


@pytest.mark.parametrize("toy", ["sd"], indirect=True)
def test_full_training_has_no_reference_model(toy: Toy, data: Path, tmp_path: Path) -> None:
    images = half_transparent(tmp_path / "images", "1_cat", 0)
    masked = {"train_data_dir": images, "resolution": 64, "alpha_mask": True, "masked_prior_preservation_weight": 1}
    for options in ({"dataset_config": data}, masked):
        config = make_config(toy, None, tmp_path / "out", method="full", network_dim=None, **options)
        with pytest.raises(UserError) as error:
            make_run_plan(config, processes=1)
        assert error.value.code == "full-training-without-reference"


def half_transparent(images: Path, name: str, alpha: int) -> Path:
    """The left half of each image has weight 1, the right half the given alpha."""
    for path in (images / name).glob("*.png"):
        image = np.asarray(Image.open(path))
        plane = np.full(image.shape[:2], alpha, np.uint8)
        plane[:, : image.shape[1] // 2] = 255
        Image.fromarray(np.dstack([image, plane])).save(path)
    return images


def test_outside_of_masks_the_model_is_preserved(toy: Toy, tmp_path: Path) -> None:
    """mean of mask (estimate - target)^2 + weight (1 - mask) (estimate - untrained)^2, and its gradient."""
    images = half_transparent(make_images(tmp_path / "images", 1), "2_cat", 51)
    options: dict[str, Any] = {"train_data_dir": images, "resolution": 64, "alpha_mask": True, "train_batch_size": 2}
    training = make_run(toy, None, tmp_path / "out", masked_prior_preservation_weight=0.5, **options)
    recorder = Recorder(training)
    batch = first_batch(training)
    loss = compute_loss(training, batch)
    loss.backward()
    (estimate, target), (again, untrained) = recorder.compared
    assert again is estimate
    wanted = untouched_estimate(training, batch, *recorder.met[1])
    torch.testing.assert_close(untrained, wanted, rtol=1e-4, atol=1e-5)
    mask = torch.ones_like(estimate)
    mask[..., mask.shape[-1] // 2 :] = 0.2
    away, drift = (estimate - target).detach(), (estimate - untrained).detach()
    summed = (mask * away.double() ** 2 + 0.5 * (1 - mask) * drift.double() ** 2).mean()
    assert float(loss.detach()) == pytest.approx(float(summed), rel=1e-5)
    gradient = 2 * (mask * away + 0.5 * (1 - mask) * drift) / mask.numel()
    torch.testing.assert_close(estimate.grad, gradient)

    recorder.met.clear()
    compute_loss(training, replace(batch, mask=torch.ones_like(mask)))  # nothing lies outside
    assert len(recorder.met) == 1


@pytest.mark.parametrize("toy", ["sd", "flux"], indirect=True)
def test_outside_of_masks_a_change_is_taken_back(toy: Toy, tmp_path: Path) -> None:
    """Images whose mask is zero everywhere: the adapters shrink towards zero."""
    images = half_transparent(make_images(tmp_path / "images", 1), "2_cat", 0)
    options: dict[str, Any] = {"train_data_dir": images, "resolution": 64, "alpha_mask": True}
    training = make_run(toy, None, tmp_path / "out", masked_prior_preservation_weight=1, **options)
    batch = first_batch(training)
    assert batch.mask is not None
    batch = replace(batch, mask=torch.zeros_like(batch.mask))
    drift = []
    for _ in range(8):
        loss, _ = loss_and_gradients(training, batch)
        drift.append(float(loss))
        training.optimizer.step()
    assert drift[-1] < 0.9 * drift[0]


@pytest.mark.parametrize("toy", ["sd"], indirect=True)
def test_without_masks_there_is_no_outside(toy: Toy, data: Path, tmp_path: Path) -> None:
    config = make_config(toy, data, tmp_path / "out", masked_prior_preservation_weight=1)
    with pytest.raises(UserError, match="--masked_prior_preservation_weight") as error:
        make_run_plan(config, processes=1)
    assert error.value.code == "prior-preservation-without-masks"
