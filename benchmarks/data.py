"""Finding the data, caching latents without an encoder, reading them back: time, CPU time, memory.

    python benchmarks/data.py [IMAGES] [--photos 200] [--latents 5000] [--repeat 3] [--only WORD] [--folder DIR]
        [--json FILE]

IMAGES small images with captions are listed cold (no index) and warm (every size and time checked again);
`stat` lists and stats the same files and does nothing else: nothing that checks them can be faster. The same images
named by a metadata file (`json`), and in tar archives of 10,000 (`tar`); `order` is the order of one epoch at batch
size 1 and its first 1000 steps. A million images: `1000000 --only index` writes two million files (8 GB, some minutes)
and keeps them where --folder says, for the next time. Photos are JPEGs
of 600 to 1500 pixels a side, brought to 512-pixel buckets with an encoder that does nothing, at batches
of 1 and 8 (`mean_batch`: how many are really together), and with one that takes 20 ms an image (`slow`): that row is
near the slower of decoding and encoding, not near their sum. Latents are those of
512-pixel images in float32. `load` is the same photos as training takes them, plain and with random crops, colors
and masks. Every row runs in a fresh process with the files in the system's cache, the rows interleaved; median and
spread of the repeats. Memory is the peak beyond what the process had before the work.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

if TYPE_CHECKING:
    from sfumato.config import Config
    from sfumato.data.plans import DataPlan

Figures = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=int, nargs="?", default=100_000, help="small images to list")
    parser.add_argument("--photos", type=int, default=200, help="photos to cache")
    parser.add_argument("--latents", type=int, default=5000, help="cache entries to read")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--only", default="", help="the rows with this word in their name")
    parser.add_argument("--folder", type=Path, help="where the files are kept; a temporary folder by default")
    parser.add_argument("--json", type=Path, help="write the table as JSON, too")
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        print(json.dumps(ROWS[args.row](args.folder)))
        return
    rows = [row for row in ROWS if args.only in row]
    with open_folder(args.folder) as folder:
        make_missing(folder, rows, args)
        runs: dict[str, list[Figures]] = {row: [] for row in rows}
        for _ in range(args.repeat):
            for row, results in runs.items():
                results.append(run_in_fresh_process(row, folder))
    table = [summarize(row, results) for row, results in runs.items()]
    print_table(table)
    if args.json:
        args.json.write_text(json.dumps(table, indent=1))


@contextmanager
def open_folder(folder: Path | None) -> Iterator[Path]:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="sfumato-bench-") as temporary:
        yield Path(temporary)


def make_missing(folder: Path, rows: list[str], args: argparse.Namespace) -> None:
    """The files that these rows need, unless they are there."""
    makers: dict[str, Callable[[], None]] = {
        "small": lambda: make_small_images(folder / "small" / "1_a", args.images),
        "meta.jsonl": lambda: make_metadata(folder),
        "tar": lambda: make_archives(folder),
        "photos": lambda: make_photos(folder / "photos" / "1_a", args.photos),
        "latents": lambda: make_latents(folder / "latents", args.latents),
    }
    for name, make in makers.items():
        needed = any(name in NEEDS[row.split()[0]] for row in rows)
        if needed and not (folder / name).exists():
            make()


def run_in_fresh_process(row: str, folder: Path) -> Figures:
    command = [sys.executable, __file__, "--row", row, "--folder", str(folder)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def summarize(row: str, runs: list[Figures]) -> dict[str, object]:
    """Median of each figure, and how far the seconds were apart."""
    medians = {}
    for name in runs[0]:
        medians[name] = statistics.median(run[name] for run in runs)
    seconds = [run["seconds"] for run in runs]
    return {"row": row, **medians, "fastest": min(seconds), "slowest": max(seconds)}


def print_table(table: list[dict[str, object]]) -> None:
    names = ("seconds", "fastest", "slowest", "cpu", "items", "per_second", "cpu_ms_each", "megabytes", "mean_batch")
    print(f"{'row':<14}" + "".join(f"{name:>13}" for name in names))
    for line in table:
        print(f"{line['row']!s:<14}" + "".join(f"{line.get(name, float('nan')):>13,.2f}" for name in names))


@contextmanager
def measure(figures: Figures) -> Iterator[None]:
    """Wall and CPU seconds of the block, and its memory at the peak."""
    before = memory("VmRSS")
    wall, cpu = time.perf_counter(), time.process_time()
    yield
    figures["seconds"], figures["cpu"] = time.perf_counter() - wall, time.process_time() - cpu
    figures["megabytes"] = memory("VmHWM") - before


def memory(kind: str) -> float:
    """VmRSS: now, VmHWM: at the peak; nan where the system does not report it."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(kind)), float("nan"))


def per_item(figures: Figures, items: int) -> Figures:
    each = figures["cpu"] / items * 1000
    return {**figures, "items": items, "per_second": items / figures["seconds"], "cpu_ms_each": each}


def stat(folder: Path) -> Figures:
    figures: Figures = {}
    with measure(figures), os.scandir(folder / "small" / "1_a") as entries:
        files = sum(1 for entry in entries if entry.stat().st_size)
    return per_item(figures, files // 2)


def index(folder: Path, source: str = "small", *, warm: bool) -> Figures:
    """Sizes, captions, buckets and steps of the small images."""
    config = make_config(folder, source)
    if not warm:
        shutil.rmtree(folder / "index", ignore_errors=True)
    figures = Figures()
    with measure(figures):
        plan = find_plan(config)
    return per_item(figures, plan.num_train_images)


def sample_order(folder: Path) -> Figures:
    """From the plan to the first 1000 steps."""
    from itertools import islice

    from sfumato.data.batch_sampler import BatchSampler

    plan, figures = find_plan(make_config(folder, "small")), Figures()
    with measure(figures):
        steps = sum(1 for _ in islice(BatchSampler(plan, seed=0).steps(), 1000))
    return per_item(figures, steps)


def make_config(folder: Path, source: str) -> Config:
    from sfumato.config import load_config

    (folder / "model.safetensors").touch()
    shards = f"{(folder / 'tar').as_posix()}/{{0000..{find_last_tar(folder)}}}.tar"
    tar = f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{shards}'"
    (folder / "tar.toml").write_text(tar)
    words = {
        "small": ["--train_data_dir", folder / "small"],
        "json": ["--train_data_dir", folder / "small" / "1_a", "--in_json", folder / "meta.jsonl"],
        "tar": ["--dataset_config", folder / "tar.toml"],
    }[source]
    argv = [*words, "--resolution", "512", "--enable_bucket", "--output_dir", folder / "out"]
    argv += ["--pretrained_model_name_or_path", folder / "model.safetensors"]
    argv += ["--cache_dir", folder / "index", "--caption_extension", ".txt"]
    return load_config([str(word) for word in argv])


def find_last_tar(folder: Path) -> str:
    return max((path.stem for path in (folder / "tar").glob("*.tar")), default="0000")


def find_plan(config: Config) -> DataPlan:
    from sfumato.data.find.discover import find_data
    from sfumato.errors import Problems

    problems = Problems()
    plan = find_data(config, bucket_step=64, problems=problems)
    problems.raise_all()
    return plan


def caching(folder: Path, *, batch_size: int, encoding: float = 0.0) -> Figures:
    """All of latent caching but the encoder: read, hash, decode, resize, stack, write."""
    import torch

    from sfumato.config import load_config
    from sfumato.data.cache.entries import ContentHashes, LatentKeys, TensorCache
    from sfumato.data.cache.filling import fill_latents, list_latent_items
    from sfumato.data.cache.store import DiskStore
    from sfumato.data.find.discover import find_data
    from sfumato.errors import Problems

    (folder / "model.safetensors").touch()
    argv = ["--train_data_dir", str(folder / "photos"), "--resolution", "512", "--enable_bucket"]
    argv += ["--pretrained_model_name_or_path", str(folder / "model.safetensors"), "--output_dir", str(folder / "out")]
    problems, figures, batches = Problems(), Figures(), []
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        config = load_config([*argv, "--cache_dir", cache])
        plan = find_data(config, bucket_step=64, problems=problems)
        problems.raise_all()
        store = DiskStore(Path(cache))
        names = LatentKeys(fingerprint="none", dtype=torch.float32, hashes=ContentHashes(store))

        def encode(pixels: torch.Tensor, seeds: object) -> torch.Tensor:
            batches.append(len(pixels))
            time.sleep(encoding * len(pixels))
            return torch.zeros(len(pixels), 4, pixels.shape[2] // 8, pixels.shape[3] // 8)

        places = list_latent_items(plan)
        with measure(figures):
            fill_latents(TensorCache(store), names, places, encode, batch_size=batch_size)
        store.close()
    return {**per_item(figures, len(places)), "mean_batch": statistics.mean(batches)}


def loading(folder: Path, *options: str) -> Figures:
    """An epoch of batches of pixels, as training without cached latents takes them, from two threads."""
    from itertools import islice

    import torch

    from sfumato.config import load_config
    from sfumato.data.batch_sampler import BatchSampler
    from sfumato.data.cache.entries import ContentHashes, LatentKeys
    from sfumato.data.cache.store import MemoryStore
    from sfumato.data.caches import Caches
    from sfumato.data.find.discover import find_data
    from sfumato.data.loader import Loader, LoaderSettings
    from sfumato.data.masks import MaskKeys
    from sfumato.errors import Problems

    (folder / "model.safetensors").touch()
    argv = ["--train_data_dir", str(folder / "photos"), "--resolution", "512", "--enable_bucket", *options]
    argv += ["--pretrained_model_name_or_path", str(folder / "model.safetensors"), "--output_dir", str(folder / "out")]
    argv += ["--on_missing_caption", "empty", "--cache_dir", str(folder / "index")]
    problems, figures = Problems(), Figures()
    order = BatchSampler(find_data(load_config(argv), bucket_step=64, problems=problems), seed=1)
    problems.raise_all()
    hashes = ContentHashes(MemoryStore())
    keys = LatentKeys(fingerprint="none", dtype=torch.float32, hashes=hashes)
    caches = Caches(latent_keys=keys, mask_keys=MaskKeys(downscale=8, hashes=hashes))
    loader = Loader(order, caches, LoaderSettings(max_train_steps=order.steps_per_epoch, workers=2))
    with measure(figures):
        for _ in islice(loader.steps(), order.steps_per_epoch):
            pass
    return per_item(figures, order.samples_per_epoch)


def reading(folder: Path) -> Figures:
    """Latents by key, in random order, in one thread."""
    from sfumato.data.cache.entries import TensorCache, make_key
    from sfumato.data.cache.store import DiskStore

    cache = TensorCache(DiskStore(folder / "latents"))
    count = int((folder / "latents" / "count").read_text())
    keys = [make_key("bench", str(i)) for i in range(count)]
    random.Random(0).shuffle(keys)
    figures = Figures()
    with measure(figures):
        assert all(cache.get(key) is not None for key in keys)
    return per_item(figures, count)


ENCODING = 0.02  # seconds that the slow encoder takes for an image, without CPU time

ROWS: dict[str, Callable[[Path], Figures]] = {
    "stat": stat,
    "index cold": lambda folder: index(folder, warm=False),
    "index warm": lambda folder: index(folder, warm=True),
    "json cold": lambda folder: index(folder, "json", warm=False),
    "json warm": lambda folder: index(folder, "json", warm=True),
    "tar cold": lambda folder: index(folder, "tar", warm=False),
    "tar warm": lambda folder: index(folder, "tar", warm=True),
    "order": sample_order,
    "caching b1": lambda folder: caching(folder, batch_size=1),
    "caching b8": lambda folder: caching(folder, batch_size=8),
    "caching b8 slow": lambda folder: caching(folder, batch_size=8, encoding=ENCODING),
    "load": loading,
    "load changed": lambda folder: loading(folder, "--random_crop", "--color_aug", "--flip_aug", "--alpha_mask"),
    "read latents": reading,
}


NEEDS = {  # first word of a row -> files
    "stat": ("small",), "index": ("small",), "order": ("small",), "json": ("small", "meta.jsonl"),
    "tar": ("small", "tar"), "caching": ("photos",), "load": ("photos",), "read": ("latents",),
}  # fmt: skip


def make_metadata(folder: Path) -> None:
    with (folder / "meta.jsonl").open("w") as file:
        for path in (folder / "small" / "1_a").iterdir():
            if path.suffix != ".txt":
                caption = path.with_suffix(".txt").read_text()
                file.write(json.dumps({"image_path": path.name, "caption": caption}) + "\n")


def make_archives(folder: Path) -> None:
    (folder / "tar").mkdir()
    names = sorted(path.name for path in (folder / "small" / "1_a").iterdir())
    for number, start in enumerate(range(0, len(names), 20_000)):
        with tarfile.open(folder / "tar" / f"{number:04}.tar", "w") as archive:
            for name in names[start : start + 20_000]:
                archive.add(folder / "small" / "1_a" / name, name)


def make_small_images(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    contents = []
    for i in range(40):
        size = int(rng.integers(64, 160)), int(rng.integers(64, 160))
        kind = "PNG" if i % 4 == 0 else "JPEG"
        contents.append((kind.lower().replace("jpeg", "jpg"), encode_image(make_noise(rng, size), kind, quality=60)))
    for i in range(count):
        ending, data = contents[i % 40]
        (folder / f"img{i:07d}.{ending}").write_bytes(data)
        (folder / f"img{i:07d}.txt").write_text(f"1girl, solo, long hair, number {i}, smile, looking at viewer")


def make_photos(folder: Path, count: int) -> None:
    """Smooth with a little noise, as photos are: 100 to 600 kB."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(1)
    for i in range(count):
        size = int(rng.integers(600, 1500)), int(rng.integers(600, 1500))
        smooth = make_noise(rng, (size[0] // 16, size[1] // 16)).resize(size, Image.Resampling.BICUBIC)
        grain = rng.integers(-10, 10, (size[1], size[0], 1))
        photo = Image.fromarray((np.asarray(smooth) + grain).clip(0, 255).astype(np.uint8))
        (folder / f"photo{i}.jpg").write_bytes(encode_image(photo, "JPEG", quality=90))


def make_latents(folder: Path, count: int) -> None:
    import torch

    from sfumato.data.cache.entries import LATENTS, TensorCache, make_key
    from sfumato.data.cache.store import DiskStore

    store = DiskStore(folder)
    for i in range(count):
        TensorCache(store).put(make_key("bench", str(i)), {LATENTS: torch.randn(4, 64, 64)})
    store.close()
    (folder / "count").write_text(str(count))


def make_noise(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


def encode_image(image: Image.Image, kind: str, **options: int) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


if __name__ == "__main__":
    main()
