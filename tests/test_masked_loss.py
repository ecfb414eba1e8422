"""Masks in training, for every family: the loss in closed form, gradients outside the mask, runs from files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from families.toys import ToyShelf
from sfumato.loss import training_loss
from sfumato.training.latents import load_latents
from toy_runs import build_toy_run, equal_tensors, make_images, read_metrics, read_weights, train_toy

FAMILIES = ("sd", "sdxl", "flux", "chroma")
Toy = Mapping[str, Path]


@pytest.fixture(params=FAMILIES)
def toy(request: pytest.FixtureRequest, toy_shelf: ToyShelf) -> Toy:
    return toy_shelf.paths(request.param)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return make_images(tmp_path / "images", 3)


def masks(images: Path, folder: Path, left: int, right: int) -> Path:
    """For each image a mask with these values in its left and right half."""
    folder.mkdir()
    for path in (images / "2_cat").glob("*.png"):
        width, height = Image.open(path).size
        plane = np.full((height, width), right, np.uint8)
        plane[:, : width // 2] = left
        Image.fromarray(plane).save(folder / path.name)
    return folder


def with_alpha(images: Path, left: int, right: int, name: str = "2_cat") -> None:
    for path in (images / name).glob("*.png"):
        image = np.asarray(Image.open(path))
        plane = np.full(image.shape[:2], right, np.uint8)
        plane[:, : image.shape[1] // 2] = left
        Image.fromarray(np.dstack([image, plane])).save(path)


@pytest.mark.parametrize("alpha", [False, True])
def test_a_half_mask_gives_half_the_sum_and_no_gradient_elsewhere(
    toy: Toy, images: Path, tmp_path: Path, alpha: bool
) -> None:
    """mean over the latent of mask * (estimate - target)^2, not divided by the mask's mean: 255 left, 51 right."""
    if alpha:
        with_alpha(images, 255, 51)
        options = {"alpha_mask": True}
    else:
        options = {"masked_loss": True, "conditioning_data_dir": masks(images, tmp_path / "masks", 255, 51)}
    training = build_toy_run(toy, images, tmp_path / "out", train_batch_size=2, **options)
    seen: list[tuple[Tensor, Tensor]] = []
    plain = training.context.recipe.loss

    def recorded(estimate: Tensor, target: Tensor, level: object) -> Tensor:
        estimate.retain_grad()
        seen.append((estimate, target))
        return plain(estimate, target, level)  # pyright: ignore[reportArgumentType]

    training.context = replace(training.context, recipe=replace(training.context.recipe, loss=recorded))
    batch = next(iter(training.loader.steps())).batches[0]
    count = len(batch.captions)
    x0 = load_latents(training, batch)
    loss = training_loss(training.context, batch, x0, count)
    loss.backward()
    ((estimate, target),) = seen
    squares = (estimate - target).detach().double() ** 2
    left, right = squares.chunk(2, dim=-1)
    wanted = (left.sum() + 0.2 * right.sum()) / squares.numel()
    assert float(loss.detach()) == pytest.approx(float(wanted), rel=1e-5)
    assert batch.mask is not None
    torch.testing.assert_close(estimate.grad, 2 * batch.mask * (estimate - target).detach() / squares.numel())

    nothing = replace(batch, mask=(batch.mask == 1).float())  # the right half does not count at all
    training_loss(training.context, nothing, x0, count).backward()
    estimate = seen[1][0]
    assert estimate.grad is not None
    assert not estimate.grad.chunk(2, dim=-1)[1].any()
    assert estimate.grad.chunk(2, dim=-1)[0].abs().min() > 0


@pytest.mark.full
def test_white_masks_change_nothing_and_black_ones_teach_nothing(toy: Toy, images: Path, tmp_path: Path) -> None:
    def trained(name: str, left: int, right: int) -> Path:
        folder = masks(images, tmp_path / f"masks-{name}", left, right)
        return train_toy(
            toy, images, tmp_path / name, max_train_steps=2, masked_loss=True, conditioning_data_dir=folder
        )

    plain = train_toy(toy, images, tmp_path / "plain", max_train_steps=2)
    assert equal_tensors(read_weights(plain), read_weights(trained("white", 255, 255)))
    assert not equal_tensors(read_weights(plain), read_weights(trained("half", 255, 0)))
    black = trained("black", 0, 0)
    assert not any(tensor.any() for name, tensor in read_weights(black).items() if name.endswith("lora_up.weight"))
    assert all(row["loss/current"] == 0 for row in read_metrics(black))


@pytest.mark.full
def test_cached_masks_train_like_uncached_ones(toy: Toy, images: Path, tmp_path: Path) -> None:
    """A mask file for one half of the data, an alpha channel for the other."""
    with_alpha(make_images(images, 2, name="1_dog"), 200, 30, name="1_dog")
    folder = masks(images, tmp_path / "masks", 200, 30)
    file = tmp_path / "data.toml"
    file.write_text(MASKED.format(images=images.as_posix(), masks=folder.as_posix()))
    options = {"dataset_config": file, "train_data_dir": None, "masked_loss": True, "flip_aug": True}
    options |= {"network_train_unet_only": True, "max_train_steps": 3}
    plain = train_toy(toy, images, tmp_path / "plain", **options)
    disk = {"cache_latents_to_disk": True, "cache_dir": tmp_path / "cache"}
    for name in ("made", "found"):
        cached = train_toy(toy, images, tmp_path / name, **options, **disk)
        assert equal_tensors(read_weights(plain), read_weights(cached))
        assert read_metrics(plain) == read_metrics(cached)


MASKED = """
[[datasets]]
batch_size = 2
[[datasets.subsets]]
image_dir = '{images}/2_cat'
conditioning_data_dir = '{masks}'
[[datasets.subsets]]
image_dir = '{images}/1_dog'
alpha_mask = true
"""
SEVERAL_SIZES = """
[general]
caption_extension = '.txt'
enable_bucket = true
flip_aug = true
[[datasets]]
resolution = 64
min_bucket_reso = 64
max_bucket_reso = 128
batch_size = 2
[[datasets.subsets]]
image_dir = '{folder}'
[[datasets]]
resolution = 128
min_bucket_reso = 64
max_bucket_reso = 192
[[datasets.subsets]]
image_dir = '{folder}'
"""


@pytest.mark.full
@pytest.mark.parametrize("toy", ["sdxl", "flux"], indirect=True)
def test_one_folder_at_several_sizes_trains_alike_from_disk(toy: Toy, images: Path, tmp_path: Path) -> None:
    file = tmp_path / "sizes.toml"
    file.write_text(SEVERAL_SIZES.format(folder=(images / "2_cat").as_posix()))
    options = {"dataset_config": file, "train_data_dir": None, "resolution": None, "enable_bucket": None}
    options |= {"min_bucket_reso": None, "max_bucket_reso": None, "max_train_epochs": 2, "max_train_steps": None}
    plain = train_toy(toy, images, tmp_path / "plain", **options)
    disk = {"cache_latents_to_disk": True, "cache_dir": tmp_path / "cache"}
    for name in ("made", "found"):
        cached = train_toy(toy, images, tmp_path / name, **options, **disk)
        assert equal_tensors(read_weights(plain), read_weights(cached))
        assert read_metrics(plain) == read_metrics(cached)


@pytest.mark.full
@pytest.mark.parametrize("toy", ["sd"], indirect=True)
def test_augmented_runs_are_the_same_for_any_number_of_workers(toy: Toy, images: Path, tmp_path: Path) -> None:
    options = {"color_aug": True, "random_crop": True, "flip_aug": True, "enable_bucket": False, "resolution": 64}
    options |= {"min_bucket_reso": None, "max_bucket_reso": None}
    one = train_toy(toy, images, tmp_path / "one", max_data_loader_n_workers=0, **options)
    several = train_toy(toy, images, tmp_path / "several", max_data_loader_n_workers=2, train_batch_size=1, **options)
    assert equal_tensors(read_weights(one), read_weights(several))
    assert read_metrics(one) == read_metrics(several)


@pytest.mark.full
@pytest.mark.parametrize("toy", ["sd"], indirect=True)
def test_black_masks_leave_a_fully_trained_model_as_it_was(toy: Toy, images: Path, tmp_path: Path) -> None:
    common = {"method": "full", "network_dim": None, "learning_rate": "1e-2", "max_train_steps": 2, "masked_loss": True}
    common |= {"optimizer_type": "SGD"}  # AdamW would still decay the weights
    for name, right in (("black", 0), ("half", 255)):
        folder = masks(images, tmp_path / f"masks-{name}", 0, right)
        train_toy(toy, images, tmp_path / name, conditioning_data_dir=folder, **common)
    before = load_file(toy["pretrained_model_name_or_path"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in read_weights(tmp_path / "black").items())
    assert any(not torch.equal(tensor, before[name]) for name, tensor in read_weights(tmp_path / "half").items())
