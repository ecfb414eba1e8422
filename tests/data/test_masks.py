"""Masks and control images from folders and alpha channels to batches; exactly what changed is created again."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.loaders import encode, make_caches
from sfumato.data.batch_sampler import BatchSampler
from sfumato.data.cache.entries import ContentHashes, LatentKeys, TensorCache
from sfumato.data.cache.filling import fill_latents, list_latent_items
from sfumato.data.cache.sharing import FillOptions
from sfumato.data.cache.store import DiskStore, MemoryStore
from sfumato.data.loader import Loader, LoaderSettings
from sfumato.data.masks import MASK, MaskKeys, downscale_mask, fill_masks, list_mask_items
from sfumato.errors import UserError

GOLDENS = json.loads((Path(__file__).parents[1] / "goldens" / "math.json").read_text(encoding="utf-8"))


def write(path: Path, size=(64, 64), seed=0, mode="RGB", caption: str | None = "cat") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    channels = {"RGB": 3, "RGBA": 4, "L": 1}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    Image.fromarray(pixels.squeeze(-1) if mode == "L" else pixels).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


@pytest.fixture
def data(tmp_path, find):
    """Three images with masks of two kinds, and one with an alpha channel."""
    find.bucket_step = 32
    for i, size in enumerate([(64, 64), (128, 32), (32, 128)]):
        write(tmp_path / "a" / f"{i}.png", size, i)
        write(tmp_path / "masks" / f"{i}.webp", size, 10 + i, "L" if i == 1 else "RGB", None)
    write(tmp_path / "b" / "3.png", (64, 64), 3, "RGBA")
    return tmp_path


SUBSET = "[[datasets.subsets]]\nimage_dir = '{root}/"
MASKS = "conditioning_data_dir = '{root}/masks'\n"
BOTH = f"""
[general]
caption_extension = '.txt'
flip_aug = true
enable_bucket = true
resolution = 64
min_bucket_reso = 32
max_bucket_reso = 256
bucket_reso_steps = 32
batch_size = 2
[[datasets]]
{SUBSET}a'
{MASKS}
{SUBSET}b'
alpha_mask = true
"""


def make_loader(plan, *, cached=False, downscale=8, workers=0, store=None) -> Loader:
    store = store or MemoryStore()
    caches = make_caches(store, downscale=downscale)
    if cached:
        caches.latents = TensorCache(store)
        fill_latents(caches.latents, caches.latent_keys, list_latent_items(plan), encode)
        fill_masks(caches.latents, caches.mask_keys, list_mask_items(plan))
    return Loader(BatchSampler(plan, seed=7), caches, LoaderSettings(max_train_steps=9, workers=workers))


def batches(loader: Loader):
    steps = islice(loader.steps(), 2 * loader.sampler.steps_per_epoch)
    return list(chain.from_iterable(step.batches for step in steps))


def test_masks_are_downscaled_as_recorded():
    """Against sd-scripts: a loss of ones times the mask, area-averaged."""
    case = next(entry for entry in GOLDENS["masked_loss"] if entry["case"] == "alpha_masks 4x4 ramp")
    plane = (np.array(case["inputs"]["alpha_masks"][0]).reshape(4, 4) * 255).round().astype(np.uint8)
    loss = torch.tensor(case["loss"]).reshape(2, 1, 2, 2)
    assert (loss * downscale_mask(plane, 2)).flatten().tolist() == pytest.approx(case["result"], rel=1e-6)


def test_masks_are_the_red_channel_and_the_alpha_channel_flipped_with_their_image(find, data):
    """Sizes are those of the buckets, so that means of 8x8 pixels of the files themselves are what is wanted."""
    plan = find.toml(BOTH, "--masked_loss")
    seen = set()
    for batch in batches(make_loader(plan)):
        assert batch.mask.shape == (len(batch.captions), 1, *(side // 8 for side in batch.pixels.shape[2:]))
        assert batch.mask.dtype == torch.float32
        for pixels, mask in zip(batch.pixels, batch.mask, strict=True):
            image = ((pixels + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
            for i in range(4):
                folder = "a" if i < 3 else "b"
                own = np.asarray(Image.open(data / folder / f"{i}.png"))
                for flipped in (False, True):
                    file_pixels = own[:, ::-1] if flipped else own
                    if file_pixels.shape[:2] == image.shape[:2] and np.array_equal(file_pixels[..., :3], image):
                        if i == 3:
                            plane = file_pixels[..., 3]
                        else:
                            plane = np.asarray(Image.open(data / "masks" / f"{i}.webp").convert("RGB"))[..., 0]
                            plane = plane[:, ::-1] if flipped else plane
                        means = plane.reshape(plane.shape[0] // 8, 8, plane.shape[1] // 8, 8).mean((1, 3)) / 255
                        np.testing.assert_allclose(mask[0].numpy(), means, rtol=0, atol=1e-6)
                        seen.add((i, flipped))
    assert {i for i, _ in seen} == {0, 1, 2, 3}
    assert {flipped for _, flipped in seen} == {False, True}


@pytest.mark.parametrize("downscale", [8, 16])
def test_cached_masks_are_uncached_ones(find, data, downscale):
    plan = find.toml(BOTH, "--masked_loss")
    live = batches(make_loader(plan, downscale=downscale))
    cached = batches(make_loader(plan, cached=True, downscale=downscale))
    for ours, theirs in zip(live, cached, strict=True):
        assert ours.latents is None
        assert theirs.pixels is None
        assert torch.equal(ours.mask, theirs.mask)
        assert torch.equal(ours.entry_seeds, theirs.entry_seeds)


def test_an_image_without_a_mask_has_full_weight(find, data):
    plain = BOTH.replace("alpha_mask = true", "")
    plan = find.toml(plain, "--masked_loss")
    assert any("subsets[1]: no masks" in note for note in plan.notes)
    for cached in (False, True):
        masks = [batch.mask for batch in batches(make_loader(plan, cached=cached)) if batch.mask is not None]
        is_full = [(mask == 1).flatten(1).all(1) for mask in masks]
        assert any(samples.any() and not samples.all() for samples in is_full)  # both in one batch
    write(data / "b" / "3.png", (64, 64), 3, "RGB")  # without an alpha channel
    opaque = find.toml(BOTH.replace(MASKS, ""))
    assert all((batch.mask == 1).all() for batch in batches(make_loader(opaque)) if batch.mask is not None)
    assert all(batch.mask is None for batch in batches(make_loader(find.toml(plain.replace(MASKS, "")))))


def test_an_alpha_mask_works_without_masked_loss_and_changes_no_latents(find, data):
    masked = BOTH.replace(MASKS, "")
    with_mask, without = find.toml(masked), find.toml(masked.replace("alpha_mask = true", ""))
    for ours, theirs in zip(batches(make_loader(with_mask)), batches(make_loader(without)), strict=True):
        assert torch.equal(ours.pixels, theirs.pixels)
        assert torch.equal(ours.entry_seeds, theirs.entry_seeds)
    assert any(batch.mask is not None and batch.mask.min() < 1 for batch in batches(make_loader(with_mask)))


def test_a_mask_file_takes_precedence_over_the_alpha_channel(find, data):
    write(data / "a" / "0.png", (64, 64), 0, "RGBA")
    both = BOTH.replace(MASKS, MASKS + "alpha_mask = true\n")
    plan = find.toml(both, "--masked_loss")
    assert any("alpha_mask has no effect" in note for note in plan.notes)
    places = {Path(place.image.path).parent.name: place.channel for place in list_mask_items(plan)}
    assert places == {"masks": "red", "b": "alpha"}


def test_masks_of_another_size_but_the_same_shape_do(find, data):
    large = Image.open(data / "masks" / "1.webp").resize((1280, 320), Image.Resampling.NEAREST)
    large.save(data / "masks" / "1.webp", lossless=True)
    assert find.toml(BOTH, "--masked_loss").num_train_images == 4


FAULTS = {
    "missing": (lambda root: (root / "masks" / "1.webp").unlink(), "conditioning-image-missing"),
    "spare": (lambda root: write(root / "masks" / "9.png", caption=None), "conditioning-image-unmatched"),
    "shape": (
        lambda root: write(root / "masks" / "1.webp", (64, 64), caption=None),
        "conditioning-image-shape-mismatch",
    ),
    "twice": (lambda root: write(root / "masks" / "1.png", (128, 32), caption=None), "conditioning-image-ambiguous"),
    "damaged": (lambda root: (root / "masks" / "1.webp").write_bytes(b"no"), "image-header-damaged"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_images_without_their_mask_are_an_error(find, data, name):
    change, code = FAULTS[name]
    change(data)
    with pytest.raises(UserError):
        find.toml(BOTH, "--masked_loss")
    assert find.codes == [code]
    assert "1." in find.messages[0] or "9.png" in find.messages[0]


def test_masks_that_nothing_uses_are_a_fault_and_a_loss_without_masks_is_said(find, data):
    with pytest.raises(UserError) as error:
        find.toml(BOTH)
    assert error.value.code == "conditioning-images-unused"
    plain = BOTH.replace(MASKS, "").replace("alpha_mask = true", "")
    assert [note for note in find.toml(plain, "--masked_loss").notes if "--masked_loss has no effect" in note]
    with pytest.raises(UserError) as error:
        find.toml(plain, "--masked_loss", "--strict")
    assert error.value.code == "data-option-without-effect"


def test_a_folder_of_masks_from_the_command_line(find, data):
    """For a folder N_text the masks are in a folder of that name, or all in one."""
    (data / "t").mkdir()
    (data / "a").rename(data / "t" / "2_cat")
    argv = ("--train_data_dir", data / "t", "--resolution", 64, "--caption_extension", ".txt", "--masked_loss")
    plan = find(*argv, "--conditioning_data_dir", data / "masks")
    paths = [item.conditioning.path for item in plan.datasets[0].subsets[0].items]
    assert [Path(path).relative_to(data).as_posix() for path in paths] == [f"masks/{i}.webp" for i in range(3)]
    (data / "deep").mkdir()
    (data / "masks").rename(data / "deep" / "2_cat")
    plan = find(*argv, "--conditioning_data_dir", data / "deep")
    assert Path(plan.datasets[0].subsets[0].items[0].conditioning.path) == data / "deep" / "2_cat" / "0.webp"


def test_control_images_are_transformed_like_their_images(find, data):
    """The same files as images and as control images: bit for bit the same in every batch, however it is cropped."""
    for i in range(3):
        (data / "masks" / f"{i}.webp").unlink()
        (data / "masks" / f"{i}.png").write_bytes((data / "a" / f"{i}.png").read_bytes())
    text = BOTH.replace("flip_aug", "random_crop = true\nflip_aug").replace("resolution = 64", "resolution = 80")
    text = text[: text.index(SUBSET.format(root="{root}") + "b")]
    for bucketed in (text, text.replace("enable_bucket = true", "enable_bucket = false")):
        plan = find.toml(bucketed, "--method", "control_net")
        for batch in batches(make_loader(plan)):
            assert torch.equal(batch.extras.images["control"].pixels, batch.pixels)
            assert batch.mask is None
        color_changed = find.toml(bucketed.replace("flip_aug", "color_aug = true\nflip_aug"), "--method", "control_net")
        pairs = [(batch.extras.images["control"].pixels, batch.pixels) for batch in batches(make_loader(color_changed))]
        assert any(not torch.equal(control, pixels) for control, pixels in pairs)  # their colors are those of the file
        assert all((control - pixels).abs().mean() < 0.2 for control, pixels in pairs)


def test_control_images_come_beside_cached_latents_too(find, data):
    text = BOTH[: BOTH.index(SUBSET.format(root="{root}") + "b")]
    plan = find.toml(text, "--method", "control_net")
    for ours, theirs in zip(batches(make_loader(plan)), batches(make_loader(plan, cached=True)), strict=True):
        assert torch.equal(ours.extras.images["control"].pixels, theirs.extras.images["control"].pixels)


# ---------------------------------------------------------------- what a change makes new


class Disk:
    """Fills a disk cache from a plan, each time through a newly opened store; (latents, masks) made."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, plan, *, downscale: int = 8) -> tuple[int, int]:
        store = DiskStore(self.folder)
        names = LatentKeys(fingerprint="vae", dtype=torch.float32, hashes=ContentHashes(store))
        cache = TensorCache(store)
        latents = fill_latents(cache, names, list_latent_items(plan), encode)
        masks = fill_masks(cache, MaskKeys(downscale=downscale, hashes=names.hashes), list_mask_items(plan))
        store.close()
        return latents.created, masks.created


def another_mask(root: Path) -> None:
    write(root / "masks" / "1.webp", (128, 32), 77, caption=None)


def another_alpha(root: Path) -> None:
    """The colors stay, but the content hash is one of all bytes."""
    pixels = np.asarray(Image.open(root / "b" / "3.png")).copy()
    pixels[0, 0, 3] ^= 1
    Image.fromarray(pixels).save(root / "b" / "3.png")


@pytest.mark.parametrize(
    ("change", "edit", "options", "new"),
    [
        (lambda root: None, lambda text: text, {}, (0, 0)),
        (another_mask, lambda text: text, {}, (0, 2)),  # the mask and its flipped version
        (another_alpha, lambda text: text, {}, (2, 2)),
        (lambda root: None, lambda text: text.replace("resolution = 64", "resolution = 128"), {}, (8, 8)),
        (lambda root: None, lambda text: text.replace("batch_size = 2", "batch_size = 1"), {}, (0, 0)),
        (lambda root: None, lambda text: text, {"downscale": 16}, (0, 8)),
        # 128x32 and 32x128 are cropped to the one size, the square images stay
        (lambda root: None, lambda text: text.replace("enable_bucket = true", "enable_bucket = false"), {}, (4, 4)),
        # nothing is resized at this size
        (lambda root: None, lambda text: text + "resize_interpolation = 'nearest'\n", {}, (0, 0)),
    ],
)  # fmt: skip
def test_exactly_what_depends_on_a_change_is_new(find, data, change, edit, options, new):
    disk = Disk(data / "latents")
    assert disk(find.toml(BOTH, "--masked_loss")) == (8, 8)
    change(data)
    assert disk(find.toml(edit(BOTH), "--masked_loss"), **options) == new
    assert disk(find.toml(edit(BOTH), "--masked_loss"), **options) == (0, 0)


def test_masks_cost_no_new_latents(find, data):
    disk = Disk(data / "latents")
    unmasked = BOTH.replace(MASKS, "").replace("alpha_mask = true", "")
    assert disk(find.toml(unmasked)) == (8, 0)
    assert disk(find.toml(BOTH.replace(MASKS, ""))) == (0, 2)
    assert disk(find.toml(BOTH, "--masked_loss")) == (0, 6)


def test_several_sizes_of_one_folder_are_separate_entries(find, data):
    text = BOTH[: BOTH.index(SUBSET.format(root="{root}") + "b")]
    twice = text + f"[[datasets]]\nresolution = 128\nbatch_size = 1\n{SUBSET}a'\n{MASKS}"
    disk = Disk(data / "latents")
    assert disk(find.toml(text, "--masked_loss")) == (6, 6)
    assert disk(find.toml(twice, "--masked_loss")) == (6, 6)
    loader = make_loader(find.toml(twice, "--masked_loss"), cached=True)
    assert {tuple(batch.latents.shape[2:]) for batch in batches(loader)} == {
        (8, 8), (4, 16), (16, 4), (16, 16), (8, 32), (32, 8),
    }  # fmt: skip
    for batch in batches(loader):
        assert batch.mask.shape[2:] == batch.latents.shape[2:]


def test_fill_masks_shares_its_work(find, data):
    plan = replace(find.toml(BOTH, "--masked_loss"))
    store = MemoryStore()
    names = MaskKeys(downscale=8, hashes=ContentHashes(store))
    reports = []
    counts = fill_masks(
        TensorCache(store),
        names,
        list_mask_items(plan),
        options=FillOptions(progress=lambda *counts: reports.append(counts)),
    )
    assert (counts.existing, counts.created, reports[-1]) == (0, 8, (8, 8))
    assert all(TensorCache(store).get(names.make_key(place))[MASK].shape[0] == 1 for place in list_mask_items(plan))
