"""Reference images in batches: found by name, fitted to their images, cached beside them, dropped together."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.loaders import encode, make_caches
from sfumato.data.batch import Batch
from sfumato.data.batch_sampler import BatchSampler
from sfumato.data.cache.entries import REFERENCE, ContentHashes, LatentKeys, TensorCache, make_key
from sfumato.data.cache.filling import fill_latents, list_latent_items
from sfumato.data.cache.store import MemoryStore
from sfumato.data.find.inspect import inspect_plan
from sfumato.data.fingerprint import compare_fingerprints, fingerprint_data
from sfumato.data.loader import Loader, LoaderSettings
from sfumato.data.plans import DataPlan
from sfumato.data.references import fit_references, list_reference_items
from sfumato.errors import UserError
from sfumato.tools.dataset_images import make_page_images

SIZES = [(64, 64), (128, 32), (32, 128), (64, 64)]
TEXT = """
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
[[datasets.subsets]]
image_dir = '{root}/a'
reference_data_dirs = ['{root}/before', '{root}/style']
"""


def write(path: Path, size: tuple[int, int], seed: int) -> None:
    path.parent.mkdir(exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    path.with_suffix(".txt").write_text(path.stem)


@pytest.fixture
def root(tmp_path, find):
    """Four images; of each the first reference is the image itself, the second is square."""
    find.bucket_step = 32
    for i, size in enumerate(SIZES):
        write(tmp_path / "a" / f"{i}.png", size, i)
        write(tmp_path / "before" / f"{i}.png", size, i)
        write(tmp_path / "style" / f"{i}.png", (80, 80), 10 + i)
    return tmp_path


def load_batches(plan: DataPlan, *, cached: bool = False, dropout: float = 0.0) -> list[Batch]:
    """Those of six epochs."""
    store = MemoryStore()
    caches = make_caches(store)
    if cached:
        caches.latents, keys = TensorCache(store), caches.latent_keys
        fill_latents(caches.latents, keys, list_latent_items(plan), encode)
        fill_latents(
            caches.latents,
            replace(keys, role=REFERENCE),
            list_reference_items(plan, control=False),
            lambda pixels, seeds: encode(pixels, [0] * len(pixels)),
        )
    sampler = BatchSampler(plan, seed=7)
    loader = Loader(sampler, caches, LoaderSettings(max_train_steps=9, workers=0, reference_dropout=dropout))
    return [step.batches[0] for step in islice(loader.steps(), 6 * sampler.steps_per_epoch)]


def test_a_reference_is_cropped_and_mirrored_with_its_image(find, root):
    """The first are the images themselves, bit for bit, with random crops, too; the second have the bucket's size."""
    for text in (TEXT, TEXT.replace("flip_aug", "random_crop = true\nflip_aug").replace("= 64", "= 80")):
        plan = find.toml(text)
        assert plan.num_references == 2
        for batch in load_batches(plan):
            images = batch.extras.images
            assert list(images) == ["reference_1", "reference_2"]
            assert torch.equal(images["reference_1"].pixels, batch.pixels)
            assert images["reference_2"].pixels.shape == batch.pixels.shape
            assert images["reference_1"].present is None
    assert any("has another shape" in note for note in plan.notes)
    colored = find.toml(TEXT.replace("flip_aug", "color_aug = true\nflip_aug"))
    pairs = [(batch.extras.images["reference_1"].pixels, batch.pixels) for batch in load_batches(colored)]
    assert any(not torch.equal(reference, pixels) for reference, pixels in pairs)


def test_cached_references_are_those_of_the_files(find, root):
    plan = find.toml(TEXT)
    for live, cached in zip(load_batches(plan), load_batches(plan, cached=True), strict=True):
        for role, image in live.extras.images.items():
            zero = torch.randn(1, generator=torch.Generator().manual_seed(0))
            expected = torch.nn.functional.avg_pool2d(image.pixels, 8) + zero
            torch.testing.assert_close(cached.extras.images[role].latents, expected)


def test_keys_of_images_are_those_of_before(find, root):
    """The role is in a reference's key alone."""
    plan, names = (
        find.toml(TEXT),
        LatentKeys(fingerprint="vae", dtype=torch.float32, hashes=ContentHashes(MemoryStore())),
    )
    item = list_latent_items(plan)[0]
    facts = ("latents", "vae", "torch.float32", item.transform.cache_name(item.image.size))
    assert names.make_key(item) == make_key(*facts, names.hashes.hash_image(item.image))
    assert replace(names, role=REFERENCE).make_key(item) != names.make_key(item)


def test_dropped_references_are_marked_and_stay_so(find, root):
    """Each sample by itself; a batch in which all are dropped has no reference at all."""
    plan = find.toml(TEXT)
    found = {None: 0, "some": 0, "none": 0}
    for first, again in zip(load_batches(plan, dropout=0.5), load_batches(plan, dropout=0.5), strict=True):
        images = first.extras.images
        assert images.keys() == again.extras.images.keys()
        present = images["reference_1"].present if images else None
        found["none" if not images else None if present is None else "some"] += 1
        if present is not None:
            assert torch.equal(present, images["reference_2"].present)
            assert torch.equal(present, again.extras.images["reference_1"].present)
            assert torch.equal(images["reference_1"].pixels[present], first.pixels[present])
    assert found["some"]
    assert found["none"]
    assert all(not batch.extras.images for batch in load_batches(plan, dropout=1.0))


def test_a_dropout_rate_without_references(find, root):
    plain = TEXT[: TEXT.index("reference_data_dirs")]
    line = "--reference_dropout_rate has no effect: there are no reference images"
    assert line in find.toml(plain, "--reference_dropout_rate", 0.5).notes
    assert not any("reference_dropout_rate" in note for note in find.toml(TEXT, "--reference_dropout_rate", 0.5).notes)
    with pytest.raises(UserError):
        find.toml(plain, "--reference_dropout_rate", 0.5, "--strict")


def test_a_subset_without_references_shares_batches_with_one_that_has_them(find, root):
    for i in range(2):
        write(root / "b" / f"{i}.png", (64, 64), 20 + i)
    plan = find.toml(TEXT + "[[datasets.subsets]]\nimage_dir = '{root}/b'\n")
    marks = [batch.extras.images["reference_1"].present for batch in load_batches(plan) if batch.extras.images]
    assert any(mark is not None for mark in marks)


def test_other_references_are_other_data(find, root):
    before = fingerprint_data(find.toml(TEXT))
    assert not list(compare_fingerprints(before, fingerprint_data(find.toml(TEXT))))
    write(root / "style" / "0.png", (90, 80), 77)
    (line,) = compare_fingerprints(before, fingerprint_data(find.toml(TEXT)))
    assert "reference images" in line
    plain = find.toml(TEXT[: TEXT.index("reference_data_dirs")])
    assert "reference images" not in fingerprint_data(plain)["datasets"]["dataset 1"]["subsets"]["a"]


def test_inspection_shows_them_and_reads_them(find, root):
    damaged = root / "style" / "2.png"
    data = damaged.read_bytes()
    damaged.write_bytes(data[:3000] + bytes(3000) + data[6000:])
    plan = find.toml(TEXT, decoding=False)
    (dataset,) = inspect_plan(plan, {}, cache_dir=root / "cache")
    (subset,) = dataset.subsets
    assert str(root / "before") in subset.references
    assert list(subset.damaged) == [str(damaged)]


def test_the_page_shows_them_before_their_image(find, root):
    plan = find.toml(TEXT)
    (dataset,) = inspect_plan(plan, {}, cache_dir=root / "cache")
    (subset,) = dataset.subsets
    for shown, item in zip(make_page_images(subset, len(subset.plan.items)), subset.plan.items, strict=True):
        width, height = item.choice.bucket
        rules = subset.plan.settings.images
        references = fit_references(item, rules, item.center_transform(rules))
        assert shown.image.size == ((len(references) + 1) * width, height)
        for i, reference in enumerate(references):
            part = shown.image.crop((i * width, 0, (i + 1) * width, height))
            assert part.tobytes() == Image.fromarray(reference.read_pixels()).tobytes()


def test_an_image_needs_every_reference(find, root):
    (root / "style" / "1.png").unlink()
    with pytest.raises(UserError) as raised:
        find.toml(TEXT)
    assert raised.value.code == "conditioning-image-missing"
    assert "1.png" in str(raised.value)
    assert str(root / "style") in str(raised.value)


NAMED = TEXT.replace("image_dir = '{root}/a'", "image_dir = '{root}/a'\nmetadata_file = '{root}/data.jsonl'")
NAMED = NAMED[: NAMED.index("reference_data_dirs")].replace("caption_extension = '.txt'", "")


def write_lines(root: Path, *fields: dict[str, str]) -> None:
    lines = [{"image_path": f"{i}.png", "caption": "a", **own} for i, own in enumerate(fields)]
    (root / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))


@pytest.mark.parametrize("field", ["reference_1", "control_path", "control_path_0"])
def test_a_metadata_file_names_references(find, root, field):
    """Relative to image_dir or anywhere; one file may be the reference of several images."""
    write_lines(root, {field: "0.png"}, {field: str(root / "style" / "1.png")}, {field: "0.png"})
    (dataset,) = find.toml(NAMED).datasets
    paths = [[row.path for row in item.references] for item in dataset.subsets[0].items]
    first = str(root / "a" / "0.png")
    assert paths == [[first], [str(root / "style" / "1.png")], [first]]


def test_several_references_by_their_numbers(find, root):
    write_lines(root, *[{"reference_2": f"../style/{i}.png", "reference_1": f"{3 - i}.png"} for i in range(4)])
    (dataset,) = find.toml(NAMED).datasets
    assert [[Path(row.path).parts[-2:] for row in item.references] for item in dataset.subsets[0].items] == [
        [("a", f"{3 - i}.png"), ("style", f"{i}.png")] for i in range(4)
    ]


@pytest.mark.parametrize(
    ("second", "code"),
    [
        ({}, "metadata-references-incomplete"),
        ({"reference_1": "absent.png"}, "metadata-references-missing"),
    ],
)
def test_faults_of_named_references(find, root, second, code):
    write_lines(root, {"reference_1": "0.png"}, second)
    with pytest.raises(UserError) as raised:
        find.toml(NAMED)
    assert raised.value.code == code
