"""Files that the data's tests write (metadata, archives, a dataset class), and the contents of a plan."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

from data.conftest import make_image
from sfumato.data.plans import DataPlan, Item

RESOLUTION = ("--resolution", 64)
SUBSET = "[[datasets.subsets]]\nimage_dir = '{root}/"
ARCHIVES = """
[[datasets]]
resolution = 64
enable_bucket = true
min_bucket_reso = 16
batch_size = 2
[[datasets.subsets]]
image_dir = '{root}/set/{000..002}.tar'
num_repeats = 2
"""
DATASET_CLASSES = """
class Cats:
    def __init__(self, resolution, seed=0):
        self.resolution = resolution
    def __iter__(self):
        for i in range(3):
            yield {"image": f"a/img{i}.png", "caption": f"cat {i} at {self.resolution}"}

class Old:
    def __init__(self, tokenizer): ...
    def __iter__(self): return iter(())

class Odd:
    def __iter__(self): yield {"picture": "x"}

def no_class(): ...
"""


def list_items(plan: DataPlan) -> list[Item]:
    items: list[Item] = []
    for dataset in plan.datasets:
        for subset in dataset.subsets:
            items += subset.items
    return items


def list_captions(plan: DataPlan) -> dict[str, str]:
    """File name -> caption."""
    return {Path(item.image.path).name: item.image.caption for item in list_items(plan)}


def hash_tree(folder: Path) -> dict[str, tuple[str, int]]:
    """Content hash and time of every file below."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns) for path in files}


def write_metadata(path: Path, entries: dict[str, dict]) -> Path:
    if path.suffix == ".jsonl":
        lines = [json.dumps({"image_path": name, **fields}) for name, fields in entries.items()]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        path.write_text(json.dumps(entries, indent=1, ensure_ascii=False), encoding="utf-8")
    return path


def write_archive(path: Path, samples: dict[str, bytes | str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in samples.items():
            data = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def encode_png(seed: int, size: tuple[int, int] = (64, 64)) -> bytes:
    buffer = io.BytesIO()
    make_image(size, seed).save(buffer, "PNG")
    return buffer.getvalue()


def write_archives(root: Path, *, count: int = 3, images: int = 4) -> None:
    """000.tar ..., each with images of two sizes and two caption files for each."""
    for shard in range(count):
        samples: dict[str, bytes | str] = {}
        for i in range(images):
            key = f"{'very/long/' * 12}{shard}{i:03}"  # longer than the old tar header can hold
            samples[f"{key}.txt"] = f"caption {shard} {i}"
            samples[f"{key}.json"] = json.dumps({"caption": "not this one"})
            samples[f"{key}.png"] = encode_png(shard * 100 + i, (64, 64) if i % 2 else (128, 64))
        write_archive(root / f"{shard:03}.tar", samples)
