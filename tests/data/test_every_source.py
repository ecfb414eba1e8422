"""Every kind of source in one run: each image exactly as often as configured, with any workers and processes."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from data.conftest import write_image
from data.dataset_files import encode_png, write_archive, write_metadata
from data.loaders import make_loader, to_plain_data

TOML = """
[general]
caption_extension = ".txt"
enable_bucket = true
resolution = 64
min_bucket_reso = 32
max_bucket_reso = 128
bucket_reso_steps = 16
batch_size = 2

[[datasets]]
[[datasets.subsets]]
image_dir = "folder"
num_repeats = 3
flip_aug = true
[[datasets.subsets]]
image_dir = "pairs"
conditioning_data_dir = "masks"
num_repeats = 2
[[datasets.subsets]]
image_dir = "reg"
is_reg = true
num_repeats = 2

[[datasets]]
resolution = 128
max_bucket_reso = 256
[[datasets.subsets]]
image_dir = "folder"

[[datasets]]
[[datasets.subsets]]
metadata_file = "one.json"
image_dir = "named"
num_repeats = 2
[[datasets.subsets]]
metadata_file = "two.jsonl"
image_dir = "named"

[[datasets]]
[[datasets.subsets]]
image_dir = "shards/{0..1}.tar"
num_repeats = 2
alpha_mask = true
"""
CLASS = """
class Birds:
    def __iter__(self):
        yield from ({"image": f"named/{name}.png", "caption": f"bird {name}"} for name in "defg")
"""
WIDE = {"a": (64, 64), "b": (96, 40), "c": (64, 64), "d": (40, 96), "e": (96, 40), "f": (64, 64), "g": (40, 96)}
SIZES = {(64, 64): (64, 64), (96, 40): (96, 32), (40, 96): (32, 96)}  # to the buckets that they fall into


def list_samples(name: str, side: str, repeats: int, *, names: str = "abc") -> dict[tuple[str, tuple[int, int]], int]:
    """(caption, height and width of the bucket) -> repeats. side: "" for 64, else twice as large."""
    larger = {(64, 64): (128, 128), (96, 32): (192, 80), (32, 96): (80, 192)} if side else {}
    buckets = {key: SIZES[WIDE[key]] for key in names}
    shapes = {key: larger.get(size, size) for key, size in buckets.items()}
    return {(f"{name} {key}", (shapes[key][1], shapes[key][0])): repeats for key in names}


EXPECTED = Counter(
    {
        **list_samples("folder", "", 3),  # 9
        **list_samples("pair", "", 2),  # 6
        ("thing", (64, 64)): 15,  # as many as there are to train on in that dataset
        **list_samples("folder", "larger", 1),
        **list_samples("json", "", 2, names="de"),
        **list_samples("jsonl", "", 1, names="fg"),
        ("archive 0", (64, 64)): 2,
        ("archive 1", (64, 64)): 2,
    }
)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for number, name in enumerate("abc"):
        write_image(Path("folder") / f"{name}.png", WIDE[name], number, f"folder {name}")
        write_image(Path("pairs") / f"{name}.png", WIDE[name], 10 + number, f"pair {name}")
        write_image(Path("masks") / f"{name}.png", WIDE[name], 20 + number)
    for number, name in enumerate("xy"):
        write_image(Path("reg") / f"{name}.png", (64, 64), 30 + number, "thing")
    for number, name in enumerate("defg"):
        write_image(Path("named") / f"{name}.png", WIDE[name], 40 + number)
    write_metadata(Path("one.json"), {f"{name}.png": {"caption": f"json {name}"} for name in "de"})
    write_metadata(Path("two.jsonl"), {f"{name}.png": {"caption": f"jsonl {name}"} for name in "fg"})
    for number in range(2):
        write_archive(
            Path("shards") / f"{number}.tar", {"deep/0.png": encode_png(50 + number), "deep/0.txt": f"archive {number}"}
        )
    Path("set.toml").write_text(TOML, encoding="utf-8")
    Path("every_bird.py").write_text(CLASS, encoding="utf-8")
    return tmp_path


def run_epoch(plan, *, processes: int, workers: int, cached: bool, accumulation: int, number: int = 0):
    """(real samples, the contents of each by id, number of padding samples) of one epoch."""
    counts, contents, padding = Counter(), {}, 0
    ranks = []
    for rank in range(processes):
        loader = make_loader(plan, workers=workers, rank=rank, cached=cached, accumulation=accumulation)
        steps = loader.steps(number * loader.sampler.steps_per_epoch)
        ranks.append(list(islice(steps, loader.sampler.steps_per_epoch)))
        steps.close()  # pyright: ignore[reportAttributeAccessIssue]
    for rank_steps in zip(*ranks, strict=True):
        real = 0
        for step in rank_steps:
            real += sum(int((batch.weight > 0).sum()) for batch in step.batches)
        assert real == rank_steps[0].real_samples
        for batches in zip(*(step.batches for step in rank_steps), strict=True):
            assert len({tuple(batch.sizes.target.flatten().tolist()) for batch in batches}) == 1
            for batch in batches:
                images = batch.pixels if batch.latents is None else batch.latents
                for i, (caption, sample) in enumerate(zip(batch.captions, batch.ids.tolist(), strict=True)):
                    if batch.weight[i] == 0:
                        padding += 1
                        continue
                    assert sample not in contents
                    height, width = batch.sizes.target[i].tolist()
                    counts[caption, (height, width)] += 1
                    mask = None if batch.mask is None or bool((batch.mask[i] == 1).all()) else batch.mask[i]
                    contents[sample] = to_plain_data(
                        [caption, images[i], batch.sizes.original[i], mask, batch.weight[i]]
                    )
    return counts, contents, padding


@pytest.mark.parametrize("cached", [False, True])
def test_every_source_gives_each_image_exactly_its_repeats(find, data, cached):
    """The same samples, bit for bit, from one process or two with any number of workers; only two need padding."""
    options = ("--dataset_config", "set.toml", *(() if cached else ("--masked_loss",)))
    text = (
        TOML if not cached else TOML.replace('conditioning_data_dir = "masks"\n', "").replace("alpha_mask = true", "")
    )
    Path("set.toml").write_text(text, encoding="utf-8")
    results = []
    for processes, workers in ((1, 0), (1, 3), (2, 0), (2, 2)):
        Path("set.toml").write_text(text.replace("batch_size = 2", f"batch_size = {2 // processes}"), encoding="utf-8")
        plan = find(*options, processes=processes, bucket_step=16)
        assert plan.samples_per_epoch == EXPECTED.total()
        for number in range(2):
            counts, contents, padding = run_epoch(
                plan, processes=processes, workers=workers, cached=cached, accumulation=3, number=number
            )
            assert counts == EXPECTED
            assert (padding > 0) == (processes == 2)
            assert sorted(contents) == list(range(number * EXPECTED.total(), (number + 1) * EXPECTED.total()))
            results.append((number, contents))
    assert all(contents == results[number][1] for number, contents in results)


@pytest.mark.parametrize(("processes", "workers"), [(1, 0), (1, 3), (2, 0), (2, 2)])
def test_a_dataset_class_gives_each_image_exactly_its_repeats(find, data, processes, workers):
    argv = ["--dataset_class", "every_bird.Birds", "--resolution", 64, "--dataset_repeats", 3, "--train_batch_size", 2]
    buckets = ["--enable_bucket", "--min_bucket_reso", 32, "--bucket_reso_steps", 16]
    plan = find(*argv, *buckets, processes=processes, bucket_step=16)
    counts, _, _ = run_epoch(plan, processes=processes, workers=workers, cached=False, accumulation=2)
    assert counts == Counter(list_samples("bird", "", 3, names="defg"))
