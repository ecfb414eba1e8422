"""Images that vanish, are cut or get another size while a run trains."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch

from data.conftest import make_image, write_image
from data.loaders import make_loader
from sfumato.data.cache.entries import CacheItem, ContentHashes, LatentKeys
from sfumato.data.cache.store import MemoryStore
from sfumato.data.find.traits import CONVERTED
from sfumato.errors import UserError

SET = """
[[datasets]]
resolution = 64
batch_size = 2
enable_bucket = true
min_bucket_reso = 32
bucket_reso_steps = 32
[[datasets.subsets]]
image_dir = '{root}/a'
class_tokens = "cat"
"""


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def resize(path: Path) -> None:
    make_image((80, 64)).save(path)


def empty(path: Path) -> None:
    path.write_bytes(b"")


FAULTS: dict[str, Callable[[Path], None]] = {
    "image-file-unreadable": Path.unlink,
    "image-decode-failed": cut,
    "image-size-changed": resize,
    "image-file-empty": empty,
}


@pytest.fixture
def plan(find, tmp_path):
    for i in range(4):
        write_image(tmp_path / "a" / f"{i}.png", (64, 64), i)
    write_image(tmp_path / "a" / "wide.png", (128, 32), 9)
    return find.toml(SET, bucket_step=32)


@pytest.mark.parametrize("code", FAULTS)
def test_by_default_the_error_names_the_file(plan, tmp_path, code):
    FAULTS[code](tmp_path / "a" / "2.png")
    with pytest.raises(UserError) as error:
        list(islice(make_loader(plan).steps(), 3))
    assert error.value.code == code
    assert "2.png" in str(error.value)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("code", FAULTS)
def test_another_image_of_the_same_size_takes_its_place(plan, tmp_path, code, workers, caplog):
    before = list(islice(make_loader(plan, accumulation=1).steps(), 6))
    FAULTS[code](tmp_path / "a" / "2.png")
    after = list(islice(make_loader(plan, accumulation=1, skip_bad_images=True, workers=workers).steps(), 6))
    changed = 0
    for one, other in zip(before, after, strict=True):
        (one,), (other,) = one.batches, other.batches
        assert torch.equal(one.ids, other.ids)
        assert torch.equal(one.weight, other.weight)
        changed += sum(not torch.equal(a, b) for a, b in zip(one.pixels, other.pixels, strict=True))
    assert changed == 2  # in each of two epochs
    assert sum("takes its place" in record.message for record in caplog.records) == 1


def test_where_no_other_image_has_the_size_the_sample_is_empty(plan, tmp_path):
    (tmp_path / "a" / "wide.png").unlink()
    steps = list(islice(make_loader(plan, accumulation=1, skip_bad_images=True).steps(), 3))
    (empty_step,) = [step for step in steps if tuple(step.batches[0].pixels.shape[2:]) == (32, 128)]
    assert empty_step.batches[0].weight.tolist() == [0.0]
    assert sorted(len(step.batches[0].ids) for step in steps) == [1, 2, 2]


def test_where_all_images_are_gone_the_run_stops(plan, tmp_path):
    for path in (tmp_path / "a").iterdir():
        path.unlink()
    with pytest.raises(UserError) as error:
        next(make_loader(plan, skip_bad_images=True).steps())
    assert error.value.code == "image-file-unreadable"


def test_only_images_whose_colors_are_converted_have_keys_of_their_own(plan):
    keys = LatentKeys(fingerprint="vae", dtype=torch.float32, hashes=ContentHashes(MemoryStore()))
    _, subset, item = next(plan.iterate_used())
    plain = CacheItem(item.image, item.center_transform(subset.settings.images))
    converted = plain._replace(image=item.image._replace(traits=CONVERTED))
    assert keys.make_key(plain) != keys.make_key(converted)
    assert keys.make_key(plain) == keys.make_key(plain._replace(image=item.image._replace(traits=1)))
