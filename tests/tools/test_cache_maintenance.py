"""The cache counted, checked and pruned after it was filled, at toy size; the folder of images stays unchanged."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from families.toys import ToyShelf
from sfumato.cli.dataset_cache import DatasetCacheOptions, make_cache_config
from sfumato.cli.main import main
from sfumato.config.command import read_command
from sfumato.tools.cache_maintenance import prune_cache
from tools.cache_helpers import CACHED, change_letter, counts, fill
from toy_runs import make_images


@pytest.fixture(scope="module")
def sdxl(toy_shelf: ToyShelf) -> Mapping[str, Path]:
    return toy_shelf.paths("sdxl")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return make_images(tmp_path / "images")


def tree(folder: Path) -> dict[str, tuple[str, int]]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns) for path in files}


def test_the_image_folder_stays_unchanged(
    sdxl: Mapping[str, Path], images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bytes and times of every file, after every command; and nothing new beside them."""
    before = tree(images)
    fill(sdxl, images, tmp_path / "cache", flip_aug=True)
    options = ["--train_data_dir", images, "--resolution", 64, "--cache_dir", tmp_path / "cache"]
    for words in (["--stats"], ["--verify"], ["--prune", "--yes"]):
        assert main(["dataset", "cache", *map(str, [*words, *options])]) == 0
    assert "no faults found" in capsys.readouterr().out
    assert tree(images) == before


@pytest.mark.parametrize("damage", ["bit", "cut"])
def test_a_damaged_cache_is_found_repaired_and_never_used(
    sdxl: Mapping[str, Path], images: Path, tmp_path: Path, codes: list[str], damage: str
) -> None:
    cache = tmp_path / "cache"
    fill(sdxl, images, cache)
    (shard,) = (cache / "shards").iterdir()
    if damage == "bit":
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)
    else:
        os.truncate(shard, shard.stat().st_size - 100)
    option = ["--cache_dir", str(cache)]
    assert main(["dataset", "cache", "--verify", *option]) == 2
    assert codes == ["cache-entries-invalid"]
    made = sum(encoded for _, encoded in counts(fill(sdxl, images, cache)).values())
    assert made == 1
    assert main(["dataset", "cache", "--prune", "--yes", *option]) == 0
    assert main(["dataset", "cache", "--verify", *option]) == 0
    assert set(counts(fill(sdxl, images, cache)).values()) == {CACHED}


def test_a_changed_image_with_its_old_time_is_found(
    sdxl: Mapping[str, Path], images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], codes: list[str]
) -> None:
    """Size and time are those of the cached file; --verify reads it nevertheless, and --prune forgets its hash."""
    path = images / "2_cat" / "1.png"
    Image.open(path).save(path, compress_level=0)
    cache = tmp_path / "cache"
    fill(sdxl, images, cache)
    facts = path.stat()
    pixels = np.array(Image.open(path))
    pixels[3, 4, 0] ^= 1
    Image.fromarray(pixels).save(path, compress_level=0)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert path.stat().st_size == facts.st_size
    assert counts(fill(sdxl, images, cache))["latents"] == CACHED
    words = ["--train_data_dir", str(images), "--resolution", "64", "--cache_dir", str(cache)]
    words += ["--caption_extension", ".txt"]
    assert main(["dataset", "cache", "--verify", *words]) == 2
    assert codes == ["cache-entries-invalid"]
    assert str(path) in capsys.readouterr().out
    assert main(["dataset", "cache", "--prune", "--yes", *words]) == 0
    assert main(["dataset", "cache", "--verify", *words]) == 0
    assert counts(fill(sdxl, images, cache))["latents"] == (4, 1)


def test_pruning_asks_first(
    sdxl: Mapping[str, Path], images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    fill(sdxl, images, cache)
    change_letter(images)
    fill(sdxl, images, cache)
    option = ["--cache_dir", str(cache)]
    assert main(["dataset", "cache", "--prune", *option]) == 0
    printed = capsys.readouterr().out
    assert "text features           2 entries" in printed
    assert "--yes" in printed
    config = make_cache_config(read_command([*option, "--prune"], DatasetCacheOptions))
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr("sys.stdin", Terminal())
        prune_cache(config, yes=False, unused_days=None, ask=lambda _: "n")
        assert "nothing deleted" in capsys.readouterr().out
        prune_cache(config, yes=False, unused_days=None, ask=lambda _: "y")
    assert "deleted; " in capsys.readouterr().out
    assert main(["dataset", "cache", "--prune", *option]) == 0
    assert "nothing to delete" in capsys.readouterr().out


class Terminal:
    """Standard input of a user at a terminal."""

    def isatty(self) -> bool:
        return True


def test_a_missing_cache_is_an_error(tmp_path: Path, codes: list[str]) -> None:
    assert main(["dataset", "cache", "--stats", "--cache_dir", str(tmp_path / "nowhere")]) == 2
    assert codes == ["cache-folder-missing"]
    assert not (tmp_path / "nowhere").exists()
