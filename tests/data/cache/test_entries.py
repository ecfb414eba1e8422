"""Cache entries: their keys come from their content, so exactly what changed is created again."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.data.cache import entries as entries_module
from sfumato.data.cache import sharing as sharing_module
from sfumato.data.cache.entries import LATENTS, ContentHashes, LatentKeys, TensorCache, make_entry_seed, to_tensor
from sfumato.data.cache.filling import fill_latents, list_latent_items
from sfumato.data.cache.sharing import FillOptions
from sfumato.data.cache.store import DiskStore, MemoryStore
from sfumato.data.find.image_table import ImageRow
from sfumato.errors import UserError


def encode(pixels: torch.Tensor, seeds) -> torch.Tensor:
    """A stand-in for an encoder: means of 8x8 blocks, and the seed's noise."""
    means = torch.nn.functional.avg_pool2d(pixels, 8)
    noise = [torch.randn(means.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return means + 0.1 * torch.stack(noise)


class Counting:
    """Counts what reaches the encoder."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, pixels, seeds):
        self.batches.append(len(pixels))
        return encode(pixels, seeds)


class Disk:
    """Fills a disk cache from a plan, each time through a newly opened store, as a new run does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, plan, *, fingerprint: str = "vae", dtype=torch.float32, batch_size: int = 1, **options):
        store = DiskStore(self.folder)
        latent_keys = LatentKeys(fingerprint=fingerprint, dtype=dtype, hashes=ContentHashes(store))
        items = list_latent_items(plan)
        encoder, workers = options.pop("encode", encode), options.pop("workers", 2)
        counts = fill_latents(
            TensorCache(store),
            latent_keys,
            items,
            encoder,
            batch_size=batch_size,
            workers=workers,
            options=FillOptions(**options),
        )
        found = {item: TensorCache(store).get(latent_keys.make_key(item)) for item in items}
        store.close()
        return counts, found


@pytest.fixture
def disk(tmp_path):
    return Disk(tmp_path / "latents")


@pytest.fixture
def plan(find, write_images, tmp_path):
    write_images(tmp_path / "t" / "1_a", 4)
    write_images(tmp_path / "t" / "1_b", 2, seed=1)

    def make(*argv, resolution=64):
        return find("--train_data_dir", tmp_path / "t", "--resolution", resolution, *argv)

    return make


def test_a_second_run_encodes_nothing(plan, disk):
    assert disk(plan())[0] == (0, 6)
    assert disk(plan())[0] == (6, 0)


def test_entries_are_what_the_encoder_made_with_the_entrys_own_noise(plan, disk):
    _, found = disk(plan(), batch_size=3)
    for item, tensors in found.items():
        latent_keys = LatentKeys(fingerprint="vae", dtype=torch.float32, hashes=ContentHashes(MemoryStore()))
        alone = encode(to_tensor([item.read_pixels()]), [make_entry_seed(latent_keys.make_key(item))])[0]
        assert torch.equal(tensors[LATENTS], alone)


def change_a_pixel(folder: Path) -> None:
    path = folder / "t" / "1_a" / "img1.png"
    pixels = np.array(Image.open(path))
    pixels[3, 4, 0] ^= 1
    Image.fromarray(pixels).save(path)


def test_one_pixel_makes_one_entry_new(plan, disk, tmp_path):
    disk(plan())
    change_a_pixel(tmp_path)
    assert disk(plan())[0] == (5, 1)


@pytest.mark.parametrize(
    ("argv", "options", "new"),
    [
        ({"resolution": 128}, {}, 6),
        ({}, {"fingerprint": "another vae"}, 6),
        ({}, {"dtype": torch.bfloat16}, 6),
        ({"argv": ("--resize_interpolation", "nearest"), "resolution": 128}, {}, 6),
        ({"argv": ("--flip_aug",)}, {}, 6),  # the flipped ones, besides those that exist
        ({"argv": ("--shuffle_caption", "--train_batch_size", 3)}, {}, 0),
    ],
)
def test_exactly_what_depends_on_a_change_is_new(plan, disk, argv, options, new):
    disk(plan())
    counts, _ = disk(plan(*argv.get("argv", ()), resolution=argv.get("resolution", 64)), **options)
    assert counts.created == new
    assert disk(plan())[0] == (6, 0)  # and the old ones are still there


def test_another_filter_makes_new_what_is_resized_and_no_more(plan, disk, write_images, tmp_path):
    write_images(tmp_path / "t" / "1_c", 3, size=(100, 80), seed=2)
    assert disk(plan())[0] == (0, 9)
    assert disk(plan("--resize_interpolation", "nearest"))[0] == (6, 3)


def test_another_crop_makes_new_what_is_cropped_otherwise(plan, disk, write_images, tmp_path):
    write_images(tmp_path / "t" / "1_c", 3, size=(256, 64), seed=2)
    buckets = ("--enable_bucket", "--min_bucket_reso", 64, "--max_bucket_reso", 256)
    assert disk(plan("--bucket_no_upscale", "--enable_bucket", resolution=128))[0] == (0, 9)
    assert disk(plan(resolution=128))[0] == (0, 9)  # all enlarged
    assert disk(plan(*buckets, resolution=128))[0] == (9, 0)  # squares as without buckets, strips as never enlarged
    assert disk(plan(*buckets[:-1], 192, resolution=128))[0] == (6, 3)  # strips lose their ends


def test_touching_moving_and_renaming_cost_nothing(plan, disk, tmp_path):
    disk(plan())
    first = tmp_path / "t" / "1_a" / "img0.png"
    os.utime(first)
    first.rename(first.with_name("renamed.png"))
    first.with_suffix(".txt").rename(first.with_name("renamed.txt"))
    (tmp_path / "t" / "1_b").rename(tmp_path / "t" / "5_c")
    assert disk(plan())[0] == (6, 0)


def test_the_same_name_in_another_folder_is_another_entry(plan, disk, tmp_path):
    """img0 is in both folders; a .bmp of other content has the stem of a .png."""
    _, found = disk(plan())
    same_stem = [tensors[LATENTS] for item, tensors in found.items() if Path(item.image.path).stem == "img0"]
    assert not torch.equal(*same_stem)
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "t" / "1_a" / "img0.bmp")
    counts, found = disk(plan())
    assert counts == (6, 1)
    assert len({tensors[LATENTS].numpy().tobytes() for tensors in found.values()}) == 7


def test_the_same_content_twice_is_encoded_once(plan, disk, tmp_path):
    data = (tmp_path / "t" / "1_a" / "img0.png").read_bytes()
    (tmp_path / "t" / "1_b" / "copy.png").write_bytes(data)
    counting = Counting()
    counts, found = disk(plan(), encode=counting)
    assert len(found) == 7
    assert counts.created == sum(counting.batches) == 6


def test_flipped_entries_are_of_flipped_pixels(plan, disk):
    _, found = disk(plan("--flip_aug"), encode=lambda pixels, seeds: torch.nn.functional.avg_pool2d(pixels, 8))
    by_image = {}
    for item, tensors in found.items():
        by_image.setdefault(item.image.path, {})[item.transform.flip] = tensors[LATENTS]
    for pair in by_image.values():
        torch.testing.assert_close(pair[True], pair[False].flip(-1))


def test_batches_are_full_where_buckets_allow(find, write_images, tmp_path, disk):
    write_images(tmp_path / "t" / "1_a", 10, size=(64, 64))
    write_images(tmp_path / "t" / "1_b", 9, size=(256, 64), seed=1)
    argv = ("--enable_bucket", "--min_bucket_reso", 64, "--max_bucket_reso", 256, "--resolution", 128)
    counting = Counting()
    disk(find("--train_data_dir", tmp_path / "t", *argv), batch_size=8, encode=counting)
    assert counting.batches == [8, 2, 8, 1]


def test_eight_are_asked_for_and_nearly_eight_reached(find, write_images, tmp_path, disk):
    """Forty images of five shapes and their flipped versions: as few batches as possible."""
    for i, size in enumerate([(64, 64), (96, 64), (64, 96), (128, 64), (64, 128)]):
        write_images(tmp_path / "t" / f"1_{i}", 8, size=size, seed=i)
    argv = ("--enable_bucket", "--min_bucket_reso", 64, "--max_bucket_reso", 256, "--resolution", 128)
    plan = find("--train_data_dir", tmp_path / "t", *argv, "--bucket_reso_steps", 32, "--flip_aug", bucket_step=32)
    counting = Counting()
    disk(plan, batch_size=8, encode=counting)
    sizes = Counter(item.transform.bucket for item in list_latent_items(plan))
    assert len(counting.batches) == sum(-(-count // 8) for count in sizes.values())
    assert sum(counting.batches) / len(counting.batches) >= 7


@pytest.mark.parametrize("workers", [1, 4])
def test_workers_change_nothing(plan, tmp_path, workers):
    one = Disk(tmp_path / "one")(plan(), batch_size=2, workers=workers)[1]
    other = Disk(tmp_path / "other")(plan(), batch_size=2, workers=2)[1]
    assert all(torch.equal(one[item][LATENTS], other[item][LATENTS]) for item in one)


def test_latents_that_are_not_finite_name_the_image(plan, disk):
    def broken(pixels, seeds):
        return encode(pixels, seeds).log()

    with pytest.raises(UserError, match=r"img\d.png") as error:
        disk(plan(), encode=broken)
    assert error.value.code == "latents-not-finite"


def test_a_damaged_image_is_named_and_the_rest_is_kept(plan, disk, tmp_path):
    path = tmp_path / "t" / "1_b" / "img1.png"
    plan = plan()
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match=r"1_b.img1\.png") as error:
        disk(plan)
    assert error.value.code == "image-decode-failed"
    path.unlink()
    with pytest.raises(UserError, match=r"1_b.img1\.png") as error:
        disk(plan)
    assert error.value.code == "image-file-unreadable"


def test_progress_counts_to_the_end(plan, disk):
    reports = []
    disk(plan(), batch_size=2, progress=lambda done, total: reports.append((done, total)))
    assert reports[-1] == (6, 6)
    assert reports == sorted(reports)


def test_processes_share_the_work_and_each_waits_for_all(plan, tmp_path):
    plan = plan("--flip_aug")
    encoders = [Counting(), Counting()]
    results = {}

    def run(rank: int) -> None:
        results[rank] = Disk(tmp_path / "latents")(plan, encode=encoders[rank], rank=rank, processes=2)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    made = [sum(encoder.batches) for encoder in encoders]
    assert sum(made) == 12
    assert all(made)
    for _, found in results.values():
        assert all(tensors is not None for tensors in found.values())


def test_the_share_of_a_dead_process_is_created_by_the_others(plan, disk, monkeypatch):
    monkeypatch.setattr(sharing_module, "PEER_TIMEOUT", 0.3)
    counts, found = disk(plan(), rank=0, processes=2)
    assert counts.created == 6
    assert all(tensors is not None for tensors in found.values())


def test_memory_is_not_shared_so_every_process_makes_all(plan):
    store = MemoryStore()
    latent_keys = LatentKeys(fingerprint="vae", dtype=torch.float32, hashes=ContentHashes(store))
    counts = fill_latents(
        TensorCache(store), latent_keys, list_latent_items(plan()), encode, options=FillOptions(rank=1, processes=2)
    )
    assert counts == (0, 6)


def test_hashes_are_remembered_while_the_file_is_the_same(plan, tmp_path, monkeypatch):
    images = [item.image for item in list_latent_items(plan())]
    store = DiskStore(tmp_path / "hashes")
    first = [ContentHashes(store).hash_image(image) for image in images]
    reads = []
    original = ImageRow.read
    monkeypatch.setattr(ImageRow, "read", lambda image: reads.append(image) or original(image))
    assert [ContentHashes(store).hash_image(image) for image in images] == first
    assert not reads
    change_a_pixel(tmp_path)
    images = [item.image for item in list_latent_items(plan())]
    reads.clear()
    again = [ContentHashes(store).hash_image(image) for image in images]
    assert sum(a != b for a, b in zip(first, again, strict=True)) == 1
    assert len(reads) == 1


def test_a_damaged_entry_is_created_again(plan, disk, tmp_path, caplog):
    disk(plan())
    (shard,) = (tmp_path / "latents" / "shards").iterdir()
    data = bytearray(shard.read_bytes())
    data[-100] ^= 255  # in the last record's content
    shard.write_bytes(data)
    counts, found = disk(plan())
    assert counts == (6, 0)  # only reading finds it
    assert sum(tensors is None for tensors in found.values()) == 1
    assert "is damaged" in caplog.text
    counts, found = disk(plan())
    assert counts == (5, 1)
    assert all(tensors is not None for tensors in found.values())


def test_a_check_reads_everything_once_and_replaces_damaged_entries(plan, disk, tmp_path, caplog):
    disk(plan())
    (shard,) = (tmp_path / "latents" / "shards").iterdir()
    data = bytearray(shard.read_bytes())
    places = [i for i in range(len(data)) if data.startswith(b"sfR1", i)]
    for place in places[1::4]:  # a bit of every fourth record's content
        data[place + 60] ^= 16
    shard.write_bytes(data)
    before = disk(plan())[0]
    assert before.created == 0
    damaged = [place for place in places[1::4] if b'"latents"' in data[place : place + 200]]
    for path in (tmp_path / "latents").glob("index*"):
        path.unlink()
    counts, found = disk(plan(), check=True)
    assert counts == (6 - len(damaged), len(damaged))
    assert 0 < len(damaged) < 6
    assert all(tensors is not None for tensors in found.values())
    assert disk(plan(), check=True)[0] == (6, 0)


def test_machines_share_the_work_without_waiting(plan, tmp_path):
    """Each machine creates its share in its own cache; together the shards have all entries."""
    one = Disk(tmp_path / "one")(plan("--flip_aug"))[1]
    counts = [Disk(tmp_path / f"m{i}")(plan("--flip_aug"), machine=i, machines=3)[0] for i in range(3)]
    assert sum(each.created for each in counts) == 12
    assert all(0 < each.created < 12 for each in counts)
    shards = tmp_path / "together" / "shards"
    shards.mkdir(parents=True)
    for i in range(3):
        for shard in (tmp_path / f"m{i}" / "shards").iterdir():
            (shards / shard.name).write_bytes(shard.read_bytes())
    counts, found = Disk(tmp_path / "together")(plan("--flip_aug"))
    assert counts == (12, 0)
    assert all(torch.equal(found[item][LATENTS], one[item][LATENTS]) for item in one)


def test_images_are_decoded_while_the_encoder_works(plan, disk, monkeypatch):
    """The encoder of one batch waits until an image of the next has been read, which would hang if it came after."""
    decoded, waits = [], []
    original = entries_module.prepare_pixels

    def prepare(data, transform, *, size, path):
        decoded.append(path)
        return original(data, transform, size=size, path=path)

    def encode_slowly(pixels, seeds):
        made = 2 * (len(waits) + 1)
        until = time.monotonic() + 10
        while len(decoded) < min(made + 1, 6) and time.monotonic() < until:
            time.sleep(0.005)
        waits.append(time.monotonic() < until)
        return encode(pixels, seeds)

    monkeypatch.setattr(entries_module, "prepare_pixels", prepare)
    disk(plan(), batch_size=2, workers=1, encode=encode_slowly)
    assert waits == [True, True, True]


def test_seeds_are_valid_for_a_generator():
    assert make_entry_seed(b"\xff" * 20) == 2**63 - 1
    torch.Generator().manual_seed(make_entry_seed(b"\xff" * 20))
