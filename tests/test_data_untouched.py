"""No command writes into an image folder, whatever kind of source it is, and every source trains."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest

from data.conftest import write_image
from data.dataset_files import write_archive, write_metadata
from sfumato.cli.main import COMMANDS, main
from sfumato.compat.launch import main as launch
from sfumato.demo.toy import write_toy

WITHOUT_DATA = {"toy", "demo"}  # they make their own images
PLUGIN = """
class Cats:
    def __iter__(self):
        yield from ({"image": f"data/1_a/{i}.png", "caption": f"cat {i}"} for i in range(4))
"""
TOML = """
[general]
resolution = 64
caption_extension = ".txt"
[[datasets]]
[[datasets.subsets]]
image_dir = "data/1_a"
conditioning_data_dir = "masks"
flip_aug = true
[[datasets]]
[[datasets.subsets]]
image_dir = "shards/{0..1}.tar"
num_repeats = 2
[[datasets]]
[[datasets.subsets]]
metadata_file = "data/meta.jsonl"
image_dir = "data/1_a"
"""
SOURCES = {
    "folders": ["--train_data_dir", "data", "--reg_data_dir", "reg", "--caption_extension", ".txt"],
    "file": ["--dataset_config", "set.toml", "--masked_loss"],
    "metadata": ["--in_json", "data/meta.jsonl", "--train_data_dir", "data/1_a"],
    "class": ["--dataset_class", "trained_cats.Cats"],
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_toy("sd", tmp_path_factory.mktemp("toy"))


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for i in range(4):
        write_image(tmp_path / "data" / "1_a" / f"{i}.png", (64, 64), i, caption=f"cat {i}")
        write_image(tmp_path / "masks" / f"{i}.png", (64, 64), i + 9)
    write_image(tmp_path / "reg" / "1_b" / "0.png", (64, 64), 5, caption="thing")
    write_metadata(tmp_path / "data" / "meta.jsonl", {f"{i}": {"caption": f"cat {i}", "tags": "x"} for i in range(4)})
    for s in range(2):
        image = (tmp_path / "data" / "1_a" / f"{s}.png").read_bytes()
        write_archive(tmp_path / "shards" / f"{s}.tar", {"a/x.png": image, "a/x.txt": "in an archive"})
    (tmp_path / "trained_cats.py").write_text(PLUGIN)
    (tmp_path / "set.toml").write_text(TOML)
    return tmp_path


def read_tree(root: Path) -> dict[str, tuple[str, int, int]]:
    """Content, time and mode of everything in the data folders."""
    contents: dict[str, tuple[str, int, int]] = {}
    roots = [root / name for name in ("data", "masks", "reg", "shards")]
    paths: list[Path] = []
    for folder in roots:
        paths += [folder, *folder.rglob("*")]
    for path in sorted(paths):
        stat = path.stat()
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        contents[str(path)] = (content, stat.st_mtime_ns, stat.st_mode)
    return contents


def arguments(toy: dict[str, Path], source: str) -> list[str]:
    """Everything that writes is enabled: caches, states, logs."""
    needed = ["--pretrained_model_name_or_path", str(toy["pretrained_model_name_or_path"]), "--output_dir", "out"]
    needed += ["--max_train_steps", "2", "--network_dim", "2", "--cache_latents_to_disk", "--cache_dir", "cache"]
    needed += [
        "--save_state",
        "--logging_dir",
        "log",
        "--network_train_unet_only",
        "--cache_text_encoder_outputs_to_disk",
    ]
    return [*needed, *SOURCES[source], *([] if source == "file" else ["--resolution", "64"])]


ENTRIES: dict[str, Callable[[list[str]], int]] = {
    **{name: lambda argv, name=name: main([name, *argv]) for name in sorted(set(COMMANDS) - WITHOUT_DATA)},
    "sd-scripts' script": lambda argv: launch(["train_network", *argv]),
}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("source", SOURCES)
def test_images_are_not_changed(toy, data, entry, source):
    before = read_tree(data)
    code = ENTRIES[entry](arguments(toy, source))  # 2 where a command has no such options
    assert read_tree(data) == before
    assert code in (0, 2)
    assert code == 0 or entry not in ("train", "plan")
    assert (data / "out").exists() == (entry not in ("plan", "dataset") and code == 0)


DATASET_COMMANDS = (
    ("cache",),
    ("cache", "--verify"),
    ("cache", "--stats"),
    ("cache", "--prune", "--yes"),
    ("inspect", "--html", "page.html"),
)
SCRIPTS = ("tools/cache_latents", "tools/cache_text_encoder_outputs")


@pytest.mark.parametrize("source", SOURCES)
def test_caching_and_inspecting_do_not_change_images(toy, data, source):
    before = read_tree(data)
    for words in DATASET_COMMANDS:
        assert main(["dataset", *words, *arguments(toy, source)]) == 0, words
    for script in SCRIPTS:
        assert launch([script, *arguments(toy, source)]) == 0, script
    assert read_tree(data) == before
    assert {path.name for path in data.iterdir()} & {"cache", "page.html", "out"} == {"cache", "page.html"}


@pytest.mark.parametrize("source", SOURCES)
def test_showing_a_dataset_does_not_change_images(toy, data, source):
    before = read_tree(data)
    assert main(["train", *arguments(toy, source), "--debug_dataset"]) == 0
    assert read_tree(data) == before
    assert [path.name for path in (data / "out").iterdir()] == ["last.dataset.html"]
