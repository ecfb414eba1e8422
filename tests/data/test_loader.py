"""Batches: the same for any number of workers, processes and caches, and from any step on."""

from __future__ import annotations

import hashlib
import tarfile
import threading
from collections import Counter
from dataclasses import fields
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.data.batch import Batch, pad_stack
from sfumato.data.buckets import crop_box
from sfumato.data.cache.entries import (
    ContentHashes,
    LatentNames,
    TensorCache,
    TextNames,
    fill_latents,
    fill_text,
    latent_places,
)
from sfumato.data.cache.store import DiskStore, MemoryStore
from sfumato.data.loader import Loader, TextFeatures
from sfumato.data.masks import MaskNames
from sfumato.data.order import Order
from sfumato.errors import UserError

SUBSET = "[[datasets.subsets]]\nimage_dir = '{root}/"
RICH = f"""
[general]
enable_bucket = true
resolution = 128
min_bucket_reso = 64
max_bucket_reso = 256
batch_size = 2
caption_extension = ".txt"
[[datasets]]
{SUBSET}a'
num_repeats = 2
flip_aug = true
shuffle_caption = true
caption_dropout_rate = 0.2
{SUBSET}b'
caption_tag_dropout_rate = 0.3
caption_prefix = "photo,"
{SUBSET}reg'
is_reg = true
class_tokens = "thing"
[[datasets]]
resolution = 64
{SUBSET}a'
"""


def encode(pixels, seeds):
    noise = torch.stack([torch.randn(1, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    return torch.nn.functional.avg_pool2d(pixels, 8) + noise[:, :, None, None]


def features(captions):
    found = []
    for caption in captions:
        seed = int.from_bytes(hashlib.blake2b(caption.encode(), digest_size=7).digest(), "little")
        found.append({"hidden": torch.randn(len(caption) % 7 + 1, 3, generator=torch.Generator().manual_seed(seed))})
    return found


@pytest.fixture
def plan(find, pictures, tmp_path):
    def make(text: str = RICH, *argv, **options):
        if not (tmp_path / "a").exists():
            pictures(tmp_path / "a", 5, size=(80, 64))
            pictures(tmp_path / "b", 3, size=(50, 120), seed=1)
            pictures(tmp_path / "reg", 2, size=(64, 64), seed=2)
        return find.toml(text, *argv, **options)

    return make


def loader_of(plan, *, workers=0, rank=0, cached=False, text=None, seed=7, accumulation=2, steps=100) -> Loader:
    store = MemoryStore()
    names = LatentNames(fingerprint="vae", dtype=torch.float32, hashes=ContentHashes(store))
    latents = TensorCache(store) if cached else None
    if latents:
        fill_latents(latents, names, latent_places(plan), encode, batch_size=3)
    order = Order(plan, seed=seed, accumulation=accumulation, rank=rank)
    masks = MaskNames(downscale=8, hashes=names.hashes)
    return Loader(order, names=names, masks=masks, max_train_steps=steps, latents=latents, text=text, workers=workers)


def told(value: object) -> object:
    """A batch as plain data, for comparing bit by bit."""
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), tuple(value.shape), value.numpy().tobytes())
    if isinstance(value, dict):
        return {name: told(each) for name, each in value.items()}
    if hasattr(value, "__dataclass_fields__"):
        return {field.name: told(vars(value)[field.name]) for field in fields(value)}  # pyright: ignore
    return tuple(map(told, value)) if isinstance(value, list | tuple) else value


def taken(loader: Loader, count: int, first: int = 0) -> list[object]:
    steps = loader.steps(first)
    found = [told(step) for step in islice(steps, count)]
    steps.close()  # pyright: ignore[reportAttributeAccessIssue]
    return found


@pytest.mark.parametrize("cached", [False, True])
def test_any_number_of_workers_gives_the_same(plan, cached):
    plan = plan()
    expected = taken(loader_of(plan, cached=cached), 25)
    for workers in (1, 2, 5):
        assert taken(loader_of(plan, cached=cached, workers=workers), 25) == expected


AUGMENTED = RICH.replace("flip_aug = true", "flip_aug = true\ncolor_aug = true\nrandom_crop = true\nalpha_mask = true")


@pytest.mark.parametrize("buckets", ["true", "false"])
def test_augmented_pictures_are_the_same_for_any_number_of_workers_and_from_any_step_on(plan, buckets):
    text = AUGMENTED.replace("enable_bucket = true", f"enable_bucket = {buckets}")
    plan = plan(text)
    expected = taken(loader_of(plan), 25)
    assert taken(loader_of(plan, workers=3), 25) == expected
    assert taken(loader_of(plan, workers=2), 15, first=10) == expected[10:]
    assert taken(loader_of(plan, seed=8), 25) != expected


@pytest.mark.parametrize("first", [1, 6, 13])
def test_starting_later_gives_the_tail(plan, first):
    loader = loader_of(plan(), workers=2)
    assert taken(loader, 20 - first, first) == taken(loader, 20)[first:]


@pytest.mark.parametrize("workers", [0, 3])
def test_pictures_in_archives_are_loaded_as_those_in_folders(find, pictures, tmp_path, workers):
    paths = pictures(tmp_path / "a", 4, size=(80, 64))
    for i, half in enumerate((paths[:2], paths[2:])):
        with tarfile.open(tmp_path / f"{i}.tar", "w") as archive:
            for path in half:
                archive.add(path, path.name)
                archive.add(path.with_suffix(".txt"), path.with_suffix(".txt").name)
    text = f"[[datasets]]\nresolution = 64\nbatch_size = 2\n{SUBSET}a'\nnum_repeats = 3\n"
    folders = loader_of(find.toml(text), workers=0)
    archives = loader_of(find.toml(text.replace("/a'", "/{0..1}.tar'")), workers=workers)
    assert taken(archives, 8) == taken(folders, 8)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("workers", [0, 3])
def test_every_image_exactly_its_repeats(plan, processes, workers):
    plan = plan(processes=processes)
    seen: Counter[tuple[int, int]] = Counter()
    weights = 0.0
    for rank in range(processes):
        loader = loader_of(plan, workers=workers, rank=rank)
        for step in islice(loader.steps(), loader.order.steps_per_epoch):
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
        loader = loader_of(plan, rank=rank, cached=cached)
        for step in islice(loader.steps(), loader.order.steps_per_epoch):
            for batch in step.batches:
                for i, sample in enumerate(batch.ids.tolist()):
                    if batch.weight[i] > 0:
                        parts = [batch.sizes.original[i], batch.sizes.crop[i], batch.sizes.target[i], batch.weight[i]]
                        shown = batch.latents if cached else batch.pixels
                        found[sample] = told([shown[i], batch.captions[i], batch.entry_seeds[i], *parts])
    return found


def test_a_sample_is_the_same_with_one_process_or_two(plan):
    one = plan(RICH.replace("batch_size = 2", "batch_size = 4"))
    two = plan(RICH, processes=2)
    assert by_id(one, 1) == by_id(two, 2)
    one, two = plan(AUGMENTED.replace("batch_size = 2", "batch_size = 4")), plan(AUGMENTED, processes=2)
    assert by_id(one, 1, cached=False) == by_id(two, 2, cached=False)


def test_cached_is_uncached(plan):
    plan = plan()
    live, cached = loader_of(plan), loader_of(plan, cached=True)
    for a, b in islice(zip(live.steps(), cached.steps(), strict=True), 30):
        for with_pixels, with_latents in zip(a.batches, b.batches, strict=True):
            assert with_pixels.latents is None
            assert with_latents.pixels is None
            assert torch.equal(with_pixels.entry_seeds, with_latents.entry_seeds)
            made = encode(with_pixels.pixels, with_pixels.entry_seeds.tolist())
            torch.testing.assert_close(made, with_latents.latents, rtol=0, atol=1e-6)


def test_shapes_types_and_ranges(plan):
    for step in islice(loader_of(plan()).steps(), 12):
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


def test_pixels_are_the_pictures_own(find, tmp_path):
    path = tmp_path / "t" / "1_a" / "x.png"
    path.parent.mkdir(parents=True)
    rgb = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(rgb).save(path)
    plan = find("--train_data_dir", tmp_path / "t", "--resolution", 64)
    (batch,) = next(loader_of(plan).steps()).batches
    expected = torch.from_numpy(rgb.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
    torch.testing.assert_close(batch.pixels, expected)
    assert batch.captions == ["a"]


def test_size_conditioning_follows_the_mirror(plan):
    text = f"[[datasets]]\nresolution = [128, 64]\nbatch_size = 4\n{SUBSET}b'\nflip_aug = true\nnum_repeats = 8\n"
    plan = plan(text)
    item = plan.datasets[0].subsets[0].items[0]
    left, top, right, _ = crop_box(item.size, (128, 64))
    seen = set()
    for step in islice(loader_of(plan).steps(), 6):
        for batch in step.batches:
            assert batch.sizes.original.tolist() == [[120, 50]] * len(batch.captions)
            assert batch.sizes.target.tolist() == [[64, 128]] * len(batch.captions)
            seen |= {tuple(crop) for crop in batch.sizes.crop.tolist()}
    assert seen == {(int(top), int(left)), (int(top), int(128 - right))}


def test_half_of_the_samples_are_mirrored(plan):
    text = f"[[datasets]]\nresolution = 64\n{SUBSET}b'\nflip_aug = true\nnum_repeats = 100\n"
    seeds: Counter[int] = Counter()
    loader = loader_of(plan(text), cached=True)
    for step in islice(loader.steps(), loader.order.steps_per_epoch):
        for batch in step.batches:
            seeds.update(batch.entry_seeds.tolist())
    assert len(seeds) == 6  # three images, plain and mirrored
    assert all(30 < count < 70 for count in seeds.values())


def test_regularisation_images_carry_their_weight(plan, find):
    plan = plan()
    weighted = find("--dataset_config", find.root / "dataset.toml", "--prior_loss_weight", 0.25)
    assert plan.samples_per_epoch == weighted.samples_per_epoch
    loader = loader_of(weighted)
    counts: Counter[float] = Counter()
    for step in islice(loader.steps(), loader.order.steps_per_epoch):
        for batch in step.batches:
            counts.update(batch.weight.tolist())
            for weight, caption in zip(batch.weight.tolist(), batch.captions, strict=True):
                if caption:
                    assert (weight == 0.25) == caption.endswith("reg")
    regular = sum(sum(subset.repeats) for subset in weighted.datasets[0].subsets if subset.settings.is_reg)
    assert counts == {0.25: regular, 1.0: weighted.samples_per_epoch - regular}


def test_text_encoders_are_dropped_by_chance_and_sample(plan):
    """Each encoder at its rate, independently, and the same for a sample however the steps are cut."""
    text = f"[[datasets]]\nresolution = 64\n{SUBSET}b'\nnum_repeats = 300\n"
    found: dict[int, dict[tuple[int, str], bool]] = {}
    for accumulation in (1, 3):
        loader = loader_of(plan(text), cached=True, accumulation=accumulation)
        loader.text_dropout = {"first": 0.25, "second": 0.5}
        drops = found.setdefault(accumulation, {})
        for step in islice(loader.steps(), loader.order.steps_per_epoch):
            for batch in step.batches:
                for name, dropped in batch.text_dropped.items():
                    assert dropped.dtype == torch.bool
                    drops |= {(i, name): bool(each) for i, each in zip(batch.ids.tolist(), dropped, strict=True)}
    shared = found[1].keys() & found[3].keys()
    assert len(shared) > 1000
    assert all(found[1][each] == found[3][each] for each in shared)
    ids = {sample for sample, _ in found[1]}
    first, second, both = (
        sum(all(found[1][sample, name] for name in names) for sample in ids) / len(ids)
        for names in (("first",), ("second",), ("first", "second"))
    )
    assert abs(first - 0.25) < 0.05
    assert abs(second - 0.5) < 0.06
    assert abs(both - 0.125) < 0.04


def test_captions_change_with_the_epoch_not_with_history(plan):
    text = (
        f"[[datasets]]\nresolution = 64\n{SUBSET}a'\ncaption_dropout_every_n_epochs = 2\ncaption_extension = '.txt'\n"
    )
    loader = loader_of(plan(text), accumulation=1)
    per_epoch = loader.order.steps_per_epoch
    for step in islice(loader.steps(), 4 * per_epoch):
        empty = {caption == "" for batch in step.batches for caption in batch.captions}
        assert empty == {step.epoch % 2 == 1}  # epochs count from 1 for captions


def test_the_warm_up_counts_optimizer_steps(plan):
    text = f"[[datasets]]\nresolution = 64\n{SUBSET}a'\ntoken_warmup_step = 4\ncaption_extension = '.txt'\n"
    loader = loader_of(plan(text), accumulation=2)
    lengths = [
        {len(caption.split(", ")) for batch in step.batches for caption in batch.captions}
        for step in islice(loader.steps(), 6)
    ]
    assert lengths == [{1}, {1}, {2}, {2}, {3}, {3}]


def test_adapter_strengths_come_from_the_dataset(plan):
    text = f"[[datasets]]\nresolution = 64\nnetwork_multiplier = 0.5\n{SUBSET}a'\n"
    text += f"[[datasets]]\nresolution = 64\n{SUBSET}b'\n"
    found = set()
    for step in islice(loader_of(plan(text)).steps(), 8):
        for batch in step.batches:
            assert batch.extras.multiplier.shape == (len(batch.captions),)
            found |= {(caption.split(", ")[-1], strength) for caption, strength in
                      zip(batch.captions, batch.extras.multiplier.tolist(), strict=True)}  # fmt: skip
    assert found == {("a", 0.5), ("b", 1.0)}


HELD = f"""
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
    ("reg", "option", "held"),
    [
        ("", (), {"b"}),
        ("", ("--preserve_reg_images",), {"b", "reg"}),
        ("custom_attributes = { mood = 'calm' }", ("--preserve_reg_images",), {"b", "reg"}),
        ("custom_attributes = { diff_output_preservation = false }", ("--preserve_reg_images",), {"b"}),
    ],
)
def test_samples_are_held_to_the_untrained_model_by_subset(plan, reg, option, held):
    found = {False: set(), True: set()}
    alone = 0
    loader = loader_of(plan(HELD.replace("{reg}", reg), "--caption_extension", ".txt", *option))
    for step in islice(loader.steps(), 2 * loader.order.steps_per_epoch):
        for batch in step.batches:
            marks = [False] * len(batch.captions) if batch.preserve is None else batch.preserve.tolist()
            alone += batch.preserve is None
            assert batch.preserve is None or any(marks)
            for caption, mark in zip(batch.captions, marks, strict=True):
                found[mark].add(caption.split(", ")[-1])
    assert found == {True: held, False: {"a", "b", "reg"} - held}
    assert alone


def test_some_samples_of_a_batch(plan):
    """Each as it would be alone: every field follows the places."""
    text = HELD.replace("{reg}", "") + "[[datasets]]\nresolution = 64\nnetwork_multiplier = 0.5\n" + f"{SUBSET}a'\n"
    loader = loader_of(plan(text, "--caption_extension", ".txt"), cached=True)
    batches = (batch for step in loader.steps() for batch in step.batches)
    batch = next(each for each in batches if each.preserve is not None and len(each.captions) == 2)
    places = torch.tensor([1])
    some = batch.take(places)
    assert some.captions == [batch.captions[1]]
    for name in ("ids", "latents", "weight", "entry_seeds", "preserve"):
        assert torch.equal(vars(some)[name], vars(batch)[name][places]), name
    assert torch.equal(some.extras.multiplier, batch.extras.multiplier[places])
    assert torch.equal(some.sizes.original, batch.sizes.original[places])
    assert (some.mask, some.pixels, some.text, some.extras.control) == (None, None, {}, None)


def test_cached_text_is_padded_and_stacked(plan, tmp_path):
    text = f"[[datasets]]\nresolution = 64\nbatch_size = 3\n{SUBSET}a'\ncaption_extension = '.txt'\n"
    text += "caption_dropout_rate = 0.3\n"
    plan = plan(text)
    names = TextNames(fingerprint="clip")
    cache = TensorCache(DiskStore(tmp_path / "text"))
    captions = [item.picture.caption for item in plan.datasets[0].subsets[0].items]
    fill_text(cache, names, ["", *captions], features)
    loader = loader_of(plan, text={"clip": TextFeatures(cache=cache, names=names)}, workers=2)
    for step in islice(loader.steps(), 5):
        for batch in step.batches:
            assert list(batch.text) == ["clip"]
            expected = pad_stack([each["hidden"] for each in features(batch.captions)])
            assert torch.equal(batch.text["clip"]["hidden"], expected)


def test_text_that_is_missing_is_told(plan):
    cache = TensorCache(MemoryStore())
    loader = loader_of(plan(), text={"clip": TextFeatures(cache=cache, names=TextNames(fingerprint="clip"))})
    with pytest.raises(UserError, match="cached text features of"):
        next(loader.steps())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_named_and_threads_end(plan, workers, tmp_path):
    plan = plan()
    for path in (tmp_path / "b").glob("*.png"):
        path.write_bytes(path.read_bytes()[:300])
    steps = loader_of(plan, workers=workers).steps()
    with pytest.raises(UserError, match=r"b.img\d.png is damaged"):
        list(steps)
    assert not [thread for thread in threading.enumerate() if "sfumato" in thread.name]


def test_closing_ends_the_threads(plan):
    steps = loader_of(plan(), workers=3).steps()
    next(steps)
    assert [thread for thread in threading.enumerate() if "sfumato-loader" in thread.name]
    steps.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert not [thread for thread in threading.enumerate() if "sfumato" in thread.name]


def test_an_entry_that_breaks_during_the_run_is_told(plan):
    loader = loader_of(plan(), cached=True)
    assert loader.latents is not None
    loader.latents.store.close()
    with pytest.raises(UserError, match=r"cached latents of .* cannot be read any more"):
        next(loader.steps())


def test_pictures_are_left_as_they_are(plan, tmp_path):
    plan = plan()
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in Path(tmp_path / "a").iterdir()}
    taken(loader_of(plan, cached=True), 5)
    taken(loader_of(plan), 5)
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in Path(tmp_path / "a").iterdir()} == before


@pytest.mark.parametrize(
    ("shapes", "result"),
    [([(3,), (3,)], (2, 3)), ([(2, 5), (4, 5), (1, 5)], (3, 4, 5)), ([(2, 3), (3, 2)], (2, 3, 3)), ([(), ()], (2,))],
)
def test_pad_stack(shapes, result):
    items = [torch.rand(shape, requires_grad=True) for shape in shapes]
    stacked = pad_stack(items)
    assert stacked.shape == result
    assert stacked.sum().item() == pytest.approx(sum(item.sum().item() for item in items), rel=1e-5)
    stacked.sum().backward()
    assert all(torch.equal(item.grad, torch.ones_like(item)) for item in items)


def test_masks_are_padded_with_false():
    stacked = pad_stack([torch.ones(2, dtype=torch.bool), torch.ones(3, dtype=torch.bool)])
    assert stacked.tolist() == [[True, True, False], [True, True, True]]


def test_the_contract_has_these_fields():
    assert {"ids", "latents", "pixels", "captions", "text", "text_dropped", "sizes", "extras", "weight", "mask",
            "preserve", "entry_seeds"} == {field.name for field in fields(Batch)}  # fmt: skip
