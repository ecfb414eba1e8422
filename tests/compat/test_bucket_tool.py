"""The way of guides for fine-tuning: captions and tags into one file, cleaned, buckets prepared, trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data.conftest import write_image
from sfumato.compat.launch import main as launch
from sfumato.data.buckets import Buckets
from sfumato.demo.toy import write_toy
from toy_runs import read_metrics

SIZES = {"wide": (160, 64), "high": (64, 150), "square": (96, 96), "large": (300, 290)}
RESOLUTION, SHORTEST, LONGEST = (128, 128), 64, 256


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "images"
    for seed, (name, size) in enumerate(SIZES.items()):
        write_image(folder / f"{name}.png", size, seed)
        (folder / f"{name}.caption").write_text(f"a cartoon woman number {seed}\n")
        (folder / f"{name}.txt").write_text("1girl, long_hair\n")
    return folder


def run(*words: object) -> None:
    assert launch([str(word) for word in words]) == 0


def list_tree(folder: Path) -> dict[str, tuple[int, int]]:
    found = {path: path.stat() for path in sorted(folder.rglob("*")) if path.is_file()}
    return {str(path): (stat.st_size, stat.st_mtime_ns) for path, stat in found.items()}


@pytest.mark.full
@pytest.mark.parametrize("full_path", [False, True])
def test_from_captions_to_training(images: Path, tmp_path: Path, full_path: bool) -> None:
    toy = write_toy("sd", tmp_path / "toy")
    paths = ["--full_path"] if full_path else []
    run("finetune/merge_captions_to_metadata.py", *paths, images, "meta.json")
    run("finetune/merge_dd_tags_to_metadata.py", *paths, "--in_json", "meta.json", images, "meta.json")
    run("finetune/clean_captions_and_tags.py", "meta.json", "meta_clean.json")
    checkpoint = toy["pretrained_model_name_or_path"]
    before = list_tree(images)
    run(
        "finetune/prepare_buckets_latents", images, "meta_clean.json", "meta_lat.json", checkpoint, "--batch_size", 2,
        "--max_resolution", "128,128", "--min_bucket_reso", SHORTEST, "--max_bucket_reso", LONGEST,
        "--mixed_precision", "no", *paths,
    )  # fmt: skip
    assert list_tree(images) == before
    cached = list_tree(tmp_path / "cache" / "sfumato" / "shards")
    assert cached
    entries = json.loads(Path("meta_lat.json").read_text())
    buckets = Buckets(resolution=RESOLUTION, shortest=SHORTEST, longest=LONGEST)
    found = {Path(key).stem: tuple(entry["train_resolution"]) for key, entry in entries.items()}
    assert found == {name: buckets.choose(size).bucket for name, size in SIZES.items()}
    assert len(set(found.values())) == 3
    assert all(entry["caption"].startswith("a girl") for entry in entries.values())
    assert all(entry["tags"] == "1girl, long hair" for entry in entries.values())

    run(
        "fine_tune", "--pretrained_model_name_or_path", checkpoint, "--train_data_dir", images, "--in_json",
        "meta_lat.json", "--output_dir", "out", "--output_name", "tuned", "--resolution", "128,128", "--enable_bucket",
        "--min_bucket_reso", SHORTEST, "--max_bucket_reso", LONGEST, "--cache_latents_to_disk", "--max_train_steps", 2,
        "--learning_rate", "1e-4", "--console_log_level", "WARNING",
    )  # fmt: skip
    assert len(read_metrics(tmp_path / "out", "tuned")) == 2
    assert list_tree(tmp_path / "cache" / "sfumato" / "shards") == cached


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["absent", "m.json", "o.json", "model"], "option-path-missing"),
        (["images", "absent.json", "o.json", "model"], "option-path-missing"),
        (["images", "m.json", "o.json", "absent.safetensors"], None),
    ],
)
def test_faults_write_nothing(images: Path, tmp_path: Path, words: list[str], code: str | None) -> None:
    Path("m.json").write_text('{"wide": {"caption": "a cat"}}')
    assert launch(["finetune/prepare_buckets_latents", *words]) == 2
    assert not Path("o.json").exists()
