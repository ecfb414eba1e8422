"""Batches: the same for any number of workers, processes and caches, and from any step on."""

from __future__ import annotations

import tarfile
import threading
from collections import Counter
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.loaders import RICH, SUBSET, collect_steps, encode, make_loader, plan_maker, to_plain_data
from sfumato.data.buckets import crop_box
from sfumato.errors import UserError


@pytest.fixture
def plan(find, write_images, tmp_path):
    return plan_maker(find, write_images, tmp_path)


@pytest.mark.parametrize("cached", [False, True])
def test_any_number_of_workers_gives_the_same(plan, cached):
    plan = plan()
    expected = collect_steps(make_loader(plan, cached=cached), 25)
    for workers in (1, 2, 5):
        assert collect_steps(make_loader(plan, cached=cached, workers=workers), 25) == expected


AUGMENTED = RICH.replace("flip_aug = true", "flip_aug = true\ncolor_aug = true\nrandom_crop = true\nalpha_mask = true")


@pytest.mark.parametrize("buckets", ["true", "false"])
def test_augmented_images_are_the_same_for_any_number_of_workers_and_from_any_step_on(plan, buckets):
    text = AUGMENTED.replace("enable_bucket = true", f"enable_bucket = {buckets}")
    plan = plan(text)
    expected = collect_steps(make_loader(plan), 25)
    assert collect_steps(make_loader(plan, workers=3), 25) == expected
    assert collect_steps(make_loader(plan, workers=2), 15, first=10) == expected[10:]
    assert collect_steps(make_loader(plan, seed=8), 25) != expected


@pytest.mark.parametrize("first", [1, 6, 13])
def test_starting_later_gives_the_tail(plan, first):
    loader = make_loader(plan(), workers=2)
    assert collect_steps(loader, 20 - first, first) == collect_steps(loader, 20)[first:]


@pytest.mark.parametrize("workers", [0, 3])
def test_images_in_archives_are_loaded_like_those_in_folders(find, write_images, tmp_path, workers):
    paths = write_images(tmp_path / "a", 4, size=(80, 64))
    for i, half in enumerate((paths[:2], paths[2:])):
        with tarfile.open(tmp_path / f"{i}.tar", "w") as archive:
            for path in half:
                archive.add(path, path.name)
                archive.add(path.with_suffix(".txt"), path.with_suffix(".txt").name)
    text = f"[[datasets]]\nresolution = 64\nbatch_size = 2\n{SUBSET}a'\nnum_repeats = 3\n"
    folders = make_loader(find.toml(text), workers=0)
    archives = make_loader(find.toml(text.replace("/a'", "/{0..1}.tar'")), workers=workers)
    assert collect_steps(archives, 8) == collect_steps(folders, 8)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("workers", [0, 3])
def test_every_image_exactly_its_repeats(plan, processes, workers):
    plan = plan(processes=processes)
    seen: Counter[tuple[int, int]] = Counter()
    weights = 0.0
    for rank in range(processes):
        loader = make_loader(plan, workers=workers, rank=rank)
        for step in islice(loader.steps(), loader.sampler.steps_per_epoch):
            for batch in step.batches:
                for sample, weight in zip(batch.ids.tolist(), batch.weight.tolist(), strict=True):
                    seen[(sample, 0)] += weight > 0
                    weights += weight
    assert set(seen.values()) == {1}
    assert len(seen) == weights == plan.samples_per_epoch


def by_id(plan, processes: int, *, cached: bool = True) -> dict[int, object]:
    """Everything about each real sample of the first epoch."""
    found = {}
    for rank in range(processes):
        loader = make_loader(plan, rank=rank, cached=cached)
        for step in islice(loader.steps(), loader.sampler.steps_per_epoch):
            for batch in step.batches:
                for i, sample in enumerate(batch.ids.tolist()):
                    if batch.weight[i] > 0:
                        parts = [batch.sizes.original[i], batch.sizes.crop[i], batch.sizes.target[i], batch.weight[i]]
                        values = batch.latents if cached else batch.pixels
                        found[sample] = to_plain_data([values[i], batch.captions[i], batch.entry_seeds[i], *parts])
    return found


def test_a_sample_is_the_same_with_one_process_or_two(plan):
    one = plan(RICH.replace("batch_size = 2", "batch_size = 4"))
    two = plan(RICH, processes=2)
    assert by_id(one, 1) == by_id(two, 2)
    one, two = plan(AUGMENTED.replace("batch_size = 2", "batch_size = 4")), plan(AUGMENTED, processes=2)
    assert by_id(one, 1, cached=False) == by_id(two, 2, cached=False)


def test_cached_is_uncached(plan):
    plan = plan()
    live, cached = make_loader(plan), make_loader(plan, cached=True)
    for a, b in islice(zip(live.steps(), cached.steps(), strict=True), 30):
        for with_pixels, with_latents in zip(a.batches, b.batches, strict=True):
            assert with_pixels.latents is None
            assert with_latents.pixels is None
            assert torch.equal(with_pixels.entry_seeds, with_latents.entry_seeds)
            made = encode(with_pixels.pixels, with_pixels.entry_seeds.tolist())
            torch.testing.assert_close(made, with_latents.latents, rtol=0, atol=1e-6)


def test_shapes_types_and_ranges(plan):
    for step in islice(make_loader(plan()).steps(), 12):
        for batch in step.batches:
            count = len(batch.captions)
            height, width = batch.sizes.target[0].tolist()
            assert batch.pixels.shape == (count, 3, height, width)
            assert batch.pixels.dtype == torch.float32
            assert -1 <= batch.pixels.min() < batch.pixels.max() <= 1
            assert batch.pixels.is_contiguous()
            for tensor in (batch.ids, batch.entry_seeds):
                assert (tensor.dtype, tensor.shape) == (torch.int64, (count,))
            for tensor in (batch.sizes.original, batch.sizes.crop, batch.sizes.target):
                assert tensor.shape == (count, 2)
            assert batch.mask is None
            assert batch.extras.multiplier is None
            assert batch.text_dropped == {}


def test_pixels_are_those_of_the_file(find, tmp_path):
    path = tmp_path / "t" / "1_a" / "x.png"
    path.parent.mkdir(parents=True)
    rgb = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(rgb).save(path)
    plan = find("--train_data_dir", tmp_path / "t", "--resolution", 64)
    (batch,) = next(make_loader(plan).steps()).batches
    expected = torch.from_numpy(rgb.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
    torch.testing.assert_close(batch.pixels, expected)
    assert batch.captions == ["a"]


def test_size_conditioning_follows_the_mirror(plan):
    text = f"[[datasets]]\nresolution = [128, 64]\nbatch_size = 4\n{SUBSET}b'\nflip_aug = true\nnum_repeats = 8\n"
    plan = plan(text)
    item = plan.datasets[0].subsets[0].items[0]
    left, top, right, _ = crop_box(item.size, (128, 64))
    seen = set()
    for step in islice(make_loader(plan).steps(), 6):
        for batch in step.batches:
            assert batch.sizes.original.tolist() == [[120, 50]] * len(batch.captions)
            assert batch.sizes.target.tolist() == [[64, 128]] * len(batch.captions)
            seen |= {tuple(crop) for crop in batch.sizes.crop.tolist()}
    assert seen == {(int(top), int(left)), (int(top), int(128 - right))}


def test_half_of_the_samples_are_mirrored(plan):
    text = f"[[datasets]]\nresolution = 64\n{SUBSET}b'\nflip_aug = true\nnum_repeats = 100\n"
    seeds: Counter[int] = Counter()
    loader = make_loader(plan(text), cached=True)
    for step in islice(loader.steps(), loader.sampler.steps_per_epoch):
        for batch in step.batches:
            seeds.update(batch.entry_seeds.tolist())
    assert len(seeds) == 6  # three images, plain and flipped
    assert all(30 < count < 70 for count in seeds.values())


def test_regularization_images_have_their_weight(plan, find):
    plan = plan()
    weighted = find("--dataset_config", find.root / "dataset.toml", "--prior_loss_weight", 0.25)
    assert plan.samples_per_epoch == weighted.samples_per_epoch
    loader = make_loader(weighted)
    counts: Counter[float] = Counter()
    for step in islice(loader.steps(), loader.sampler.steps_per_epoch):
        for batch in step.batches:
            counts.update(batch.weight.tolist())
            for weight, caption in zip(batch.weight.tolist(), batch.captions, strict=True):
                if caption:
                    assert (weight == 0.25) == caption.endswith("reg")
    regular = sum(sum(subset.repeats) for subset in weighted.datasets[0].subsets if subset.settings.is_reg)
    assert counts == {0.25: regular, 1.0: weighted.samples_per_epoch - regular}


def test_adapter_strengths_come_from_the_dataset(plan):
    text = f"[[datasets]]\nresolution = 64\nnetwork_multiplier = 0.5\n{SUBSET}a'\n"
    text += f"[[datasets]]\nresolution = 64\n{SUBSET}b'\n"
    found = set()
    for step in islice(make_loader(plan(text)).steps(), 8):
        for batch in step.batches:
            assert batch.extras.multiplier.shape == (len(batch.captions),)
            found |= {(caption.split(", ")[-1], strength) for caption, strength in
                      zip(batch.captions, batch.extras.multiplier.tolist(), strict=True)}  # fmt: skip
    assert found == {("a", 0.5), ("b", 1.0)}


PRESERVED = f"""
[[datasets]]
resolution = 64
batch_size = 2
{SUBSET}a'
{SUBSET}b'
custom_attributes = {{ diff_output_preservation = true }}
{SUBSET}reg'
is_reg = true
{{reg}}
"""


@pytest.mark.parametrize(
    ("reg", "option", "preserved"),
    [
        ("", (), {"b"}),
        ("", ("--preserve_reg_images",), {"b", "reg"}),
        ("custom_attributes = { mood = 'calm' }", ("--preserve_reg_images",), {"b", "reg"}),
        ("custom_attributes = { diff_output_preservation = false }", ("--preserve_reg_images",), {"b"}),
    ],
)
def test_samples_are_preserved_by_subset(plan, reg, option, preserved):
    found = {False: set(), True: set()}
    alone = 0
    loader = make_loader(plan(PRESERVED.replace("{reg}", reg), "--caption_extension", ".txt", *option))
    for step in islice(loader.steps(), 2 * loader.sampler.steps_per_epoch):
        for batch in step.batches:
            marks = [False] * len(batch.captions) if batch.preserve is None else batch.preserve.tolist()
            alone += batch.preserve is None
            assert batch.preserve is None or any(marks)
            for caption, mark in zip(batch.captions, marks, strict=True):
                found[mark].add(caption.split(", ")[-1])
    assert found == {True: preserved, False: {"a", "b", "reg"} - preserved}
    assert alone


def test_timestep_offsets_by_subset(plan):
    """In batches that mix subsets, too; None where no sample has one."""
    text = PRESERVED.replace("{reg}", "").replace(
        "diff_output_preservation = true", "timestep_sampling = {offset = -0.5}"
    )
    loader = make_loader(plan(text, "--caption_extension", ".txt"))
    found = set()
    for step in islice(loader.steps(), 2 * loader.sampler.steps_per_epoch):
        for batch in step.batches:
            offsets = batch.timestep_offset
            found |= {
                (caption.split(", ")[-1], 0.0 if offsets is None else offsets[i].item())
                for i, caption in enumerate(batch.captions)
            }
    assert found == {("a", 0.0), ("b", -0.5), ("reg", 0.0)}


def test_some_samples_of_a_batch(plan):
    """Every field has the values of the samples at the positions."""
    text = (
        PRESERVED.replace("{reg}", "") + "[[datasets]]\nresolution = 64\nnetwork_multiplier = 0.5\n" + f"{SUBSET}a'\n"
    )
    loader = make_loader(plan(text, "--caption_extension", ".txt"), cached=True)
    batches = chain.from_iterable(step.batches for step in loader.steps())
    batch = next(candidate for candidate in batches if candidate.preserve is not None and len(candidate.captions) == 2)
    positions = torch.tensor([1])
    part = batch.take(positions)
    assert part.captions == [batch.captions[1]]
    for name in ("ids", "latents", "weight", "entry_seeds", "preserve"):
        assert torch.equal(vars(part)[name], vars(batch)[name][positions]), name
    assert torch.equal(part.extras.multiplier, batch.extras.multiplier[positions])
    assert torch.equal(part.sizes.original, batch.sizes.original[positions])
    assert (part.mask, part.pixels, part.text, part.extras.images) == (None, None, {}, {})


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_named_and_threads_end(plan, workers, tmp_path):
    plan = plan()
    for path in (tmp_path / "b").glob("*.png"):
        path.write_bytes(path.read_bytes()[:300])
    steps = make_loader(plan, workers=workers).steps()
    with pytest.raises(UserError, match=r"b.img\d.png") as error:
        list(steps)
    assert error.value.code == "image-decode-failed"
    assert not [thread for thread in threading.enumerate() if "sfumato" in thread.name]


def test_closing_ends_the_threads(plan):
    steps = make_loader(plan(), workers=3).steps()
    next(steps)
    assert [thread for thread in threading.enumerate() if "sfumato-loader" in thread.name]
    steps.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert not [thread for thread in threading.enumerate() if "sfumato" in thread.name]


def test_an_entry_that_is_lost_during_the_run_is_an_error(plan):
    loader = make_loader(plan(), cached=True)
    loader.caches.close()
    with pytest.raises(UserError, match=r"latents of .*\.png") as error:
        next(loader.steps())
    assert error.value.code == "cache-entry-unreadable"


def test_image_files_are_not_changed(plan, tmp_path):
    plan = plan()
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in Path(tmp_path / "a").iterdir()}
    collect_steps(make_loader(plan, cached=True), 5)
    collect_steps(make_loader(plan), 5)
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in Path(tmp_path / "a").iterdir()} == before
