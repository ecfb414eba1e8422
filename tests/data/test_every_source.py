"""Every kind of source in one run: each picture exactly as often as asked, for any number of workers and processes."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from data.conftest import write
from data.test_loader import loader_of, told
from data.test_sources import metadata, png, shard

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


def samples(name: str, side: str, repeats: int, *, names: str = "abc") -> dict[tuple[str, tuple[int, int]], int]:
    """(caption, height and width of the bucket) -> how often; side: "" for 64, "2" for twice as large."""
    larger = {(64, 64): (128, 128), (96, 32): (192, 80), (32, 96): (80, 192)} if side else {}
    buckets = {each: SIZES[WIDE[each]] for each in names}
    shapes = {each: larger.get(size, size) for each, size in buckets.items()}
    return {(f"{name} {each}", (shapes[each][1], shapes[each][0])): repeats for each in names}


EXPECTED = Counter(
    {
        **samples("folder", "", 3),  # 9
        **samples("pair", "", 2),  # 6
        ("thing", (64, 64)): 15,  # as many as there are to train on in that dataset
        **samples("folder", "larger", 1),
        **samples("json", "", 2, names="de"),
        **samples("jsonl", "", 1, names="fg"),
        ("archive 0", (64, 64)): 2,
        ("archive 1", (64, 64)): 2,
    }
)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for number, name in enumerate("abc"):
        write(Path("folder") / f"{name}.png", WIDE[name], number, f"folder {name}")
        write(Path("pairs") / f"{name}.png", WIDE[name], 10 + number, f"pair {name}")
        write(Path("masks") / f"{name}.png", WIDE[name], 20 + number)
    for number, name in enumerate("xy"):
        write(Path("reg") / f"{name}.png", (64, 64), 30 + number, "thing")
    for number, name in enumerate("defg"):
        write(Path("named") / f"{name}.png", WIDE[name], 40 + number)
    metadata(Path("one.json"), {f"{name}.png": {"caption": f"json {name}"} for name in "de"})
    metadata(Path("two.jsonl"), {f"{name}.png": {"caption": f"jsonl {name}"} for name in "fg"})
    for number in range(2):
        shard(Path("shards") / f"{number}.tar", {"deep/0.png": png(50 + number), "deep/0.txt": f"archive {number}"})
    Path("set.toml").write_text(TOML, encoding="utf-8")
    Path("every_bird.py").write_text(CLASS, encoding="utf-8")
    return tmp_path


def epoch(plan, *, processes: int, workers: int, cached: bool, accumulation: int, number: int = 0):
    """(samples that count, everything about each of them by id, copies that do not count) of one epoch."""
    seen, facts, copies = Counter(), {}, 0
    ranks = []
    for rank in range(processes):
        loader = loader_of(plan, workers=workers, rank=rank, cached=cached, accumulation=accumulation)
        steps = loader.steps(number * loader.order.steps_per_epoch)
        ranks.append(list(islice(steps, loader.order.steps_per_epoch)))
        steps.close()  # pyright: ignore[reportAttributeAccessIssue]
    for together in zip(*ranks, strict=True):
        assert sum((batch.weight > 0).sum() for step in together for batch in step.batches) == together[0].real_samples
        for batches in zip(*(step.batches for step in together), strict=True):
            assert len({tuple(batch.sizes.target.flatten().tolist()) for batch in batches}) == 1
            for batch in batches:
                shown = batch.pixels if batch.latents is None else batch.latents
                for i, (caption, sample) in enumerate(zip(batch.captions, batch.ids.tolist(), strict=True)):
                    if batch.weight[i] == 0:
                        copies += 1
                        continue
                    assert sample not in facts
                    height, width = batch.sizes.target[i].tolist()
                    seen[caption, (height, width)] += 1
                    mask = None if batch.mask is None or bool((batch.mask[i] == 1).all()) else batch.mask[i]
                    facts[sample] = told([caption, shown[i], batch.sizes.original[i], mask, batch.weight[i]])
    return seen, facts, copies


@pytest.mark.parametrize("cached", [False, True])
def test_every_source_gives_each_picture_exactly_its_repeats(find, data, cached):
    """The same samples, bit for bit, from one process or two with any number of workers; copies fill up two only."""
    options = ("--dataset_config", "set.toml", *(() if cached else ("--masked_loss",)))
    text = (
        TOML if not cached else TOML.replace('conditioning_data_dir = "masks"\n', "").replace("alpha_mask = true", "")
    )
    Path("set.toml").write_text(text, encoding="utf-8")
    found = []
    for processes, workers in ((1, 0), (1, 3), (2, 0), (2, 2)):
        Path("set.toml").write_text(text.replace("batch_size = 2", f"batch_size = {2 // processes}"), encoding="utf-8")
        plan = find(*options, processes=processes, bucket_step=16)
        assert plan.samples_per_epoch == EXPECTED.total()
        for number in range(2):
            seen, facts, copies = epoch(
                plan, processes=processes, workers=workers, cached=cached, accumulation=3, number=number
            )
            assert seen == EXPECTED
            assert (copies > 0) == (processes == 2)
            assert sorted(facts) == list(range(number * EXPECTED.total(), (number + 1) * EXPECTED.total()))
            found.append((number, facts))
    assert all(facts == found[number][1] for number, facts in found)


@pytest.mark.parametrize(("processes", "workers"), [(1, 0), (1, 3), (2, 0), (2, 2)])
def test_a_class_of_ones_own_gives_each_picture_exactly_its_repeats(find, data, processes, workers):
    argv = ["--dataset_class", "every_bird.Birds", "--resolution", 64, "--dataset_repeats", 3, "--train_batch_size", 2]
    buckets = ["--enable_bucket", "--min_bucket_reso", 32, "--bucket_reso_steps", 16]
    plan = find(*argv, *buckets, processes=processes, bucket_step=16)
    seen, _, _ = epoch(plan, processes=processes, workers=workers, cached=False, accumulation=2)
    assert seen == Counter(samples("bird", "", 3, names="defg"))
