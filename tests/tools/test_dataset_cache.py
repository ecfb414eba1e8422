"""Caches filled without training, at toy size: what is made, what a change makes new, what training finds there."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sfumato.cli.dataset import cache_config
from sfumato.cli.main import main
from sfumato.config import Config, load_config
from sfumato.data.cache.entries import LATENTS
from sfumato.data.cache.maintenance import survey
from sfumato.data.cache.store import DiskStore
from sfumato.data.plans import DataPlan
from sfumato.demo.toy import write_toy
from sfumato.errors import UserError
from sfumato.families.base import Family
from sfumato.tools import dataset_cache
from sfumato.training.caching import Caches
from training import arguments, losses, pictures, run, same, weights

SHARED = {
    "max_train_steps",
    "output_name",
    "learning_rate",
    "network_dim",
    "output_dir",
    "seed",
}  # fmt: skip  -- of training only
TEXT = {"sd": ("text_encoder",), "sdxl": ("clip_l", "clip_g"), "flux": ("clip_l", "t5")}


@pytest.fixture(scope="module", params=["sd", "sdxl", "flux"])
def toy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    return write_toy(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    return write_toy("sdxl", tmp_path_factory.mktemp("sdxl"))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return pictures(tmp_path / "images")


def fill(toy: Mapping[str, Path], images: Path, cache: Path, **options) -> Caches:
    """What `sfumato dataset cache` does with these options, to the end of its process."""
    argv = arguments(toy, images, cache / "out", cache_dir=cache, **options)
    caches = dataset_cache.fill_caches(cache_config(argv, (), {}, upkeep=False))
    caches.close()
    return caches


def counts(caches: Caches) -> dict[str, tuple[int, int]]:
    """Kind -> found, made."""
    return {kind: tuple(count) for kind, count in caches.counts.items()}


def tree(folder: Path) -> dict[str, tuple[str, int]]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns) for path in files}


def test_training_finds_everything_and_trains_the_same(
    toy: Mapping[str, Path], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = counts(fill(toy, images, tmp_path / "cache"))
    assert made.pop("latents") == (0, 5)
    assert set(made.values()) == {(0, 5)}
    assert counts(fill(toy, images, tmp_path / "cache"))["latents"] == (5, 0)
    options = {"network_train_unet_only": True, "max_train_steps": 3}
    plain = run(toy, images, tmp_path / "plain", **options)
    monkeypatch.setattr("sfumato.training.caching.encode_images", never)
    monkeypatch.setattr("sfumato.training.caching.encode_captions", never)
    disk = {"cache_latents_to_disk": True, "cache_text_encoder_outputs_to_disk": True, "cache_dir": tmp_path / "cache"}
    cached = run(toy, images, tmp_path / "cached", **options, **disk)
    assert losses(plain) == losses(cached)
    assert same(weights(plain), weights(cached))


def never(*_: object, **__: object) -> None:
    raise AssertionError("everything is cached")


def test_only_what_encodes_is_loaded(
    toy: Mapping[str, Path], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[dict[str, bool]] = []
    real = dataset_cache.fill

    def watched(config: Config, data: DataPlan, model: Family, *more: Any, **named: Any) -> Caches:
        loaded.append({name: not next(part.module.parameters()).is_meta for name, part in model.parts.items()})
        return real(config, data, model, *more, **named)

    monkeypatch.setattr(dataset_cache, "fill", watched)
    fill(toy, images, tmp_path / "cache", cache_latents=True)
    fill(toy, images, tmp_path / "cache", cache_text_encoder_outputs=True)
    assert not any(loaded[0].values())
    assert loaded[1] == {name: name != "denoiser" for name in loaded[0]}


def change_a_pixel(images: Path) -> None:
    path = images / "2_cat" / "1.png"
    pixels = np.array(Image.open(path))
    pixels[3, 4, 0] ^= 1
    Image.fromarray(pixels).save(path)


def change_a_letter(images: Path) -> None:
    path = images / "2_cat" / "2.txt"
    path.write_text(path.read_text().replace("cat", "car"))


def changed_weight(toy: Mapping[str, Path], folder: Path, start: str) -> dict[str, Path]:
    """The toy with one number of one network changed by a little."""
    path = toy["pretrained_model_name_or_path"]
    tensors = load_file(path)
    name = next(name for name in sorted(tensors) if name.startswith(start) and tensors[name].is_floating_point())
    tensors[name].view(-1)[0] += 0.01
    copy = folder / path.name
    shutil.copytree(path.parent, folder, dirs_exist_ok=True)
    save_file(tensors, copy)
    return {**toy, "pretrained_model_name_or_path": copy}


NOTHING, FIVE = (5, 0), (0, 5)


@pytest.mark.parametrize(
    ("change", "latents", "clip_l", "clip_g"),
    [
        ("nothing", NOTHING, NOTHING, NOTHING),
        ("pixel", (4, 1), NOTHING, NOTHING),
        ("letter", NOTHING, (4, 1), (4, 1)),
        ("vae", FIVE, NOTHING, NOTHING),
        ("first encoder", NOTHING, FIVE, NOTHING),
        ("second encoder", NOTHING, NOTHING, FIVE),
        ("resolution", (3, 2), NOTHING, NOTHING),  # three are 64x64 and have that very bucket at both
        ("tokens", NOTHING, FIVE, FIVE),
        ("precision", FIVE, FIVE, FIVE),
        ("weighted", NOTHING, FIVE, FIVE),
        ("prefix", NOTHING, FIVE, FIVE),
        ("flip", NOTHING, NOTHING, NOTHING),  # and five mirrored ones, see below
        ("batch", NOTHING, NOTHING, NOTHING),
        ("filter", NOTHING, NOTHING, NOTHING),  # nothing is resized
    ],
)
def test_a_change_makes_exactly_what_it_touches_new(
    sdxl: Mapping[str, Path], images: Path, tmp_path: Path, change: str, latents, clip_l, clip_g
) -> None:
    cache = tmp_path / "cache"
    fill(sdxl, images, cache)
    toy, options = sdxl, {}
    if change == "pixel":
        change_a_pixel(images)
    elif change == "letter":
        change_a_letter(images)
    elif change in (parts := {
        "vae": "first_stage_model.encoder.",
        "first encoder": "conditioner.embedders.0.transformer.text_model.encoder.",
        "second encoder": "conditioner.embedders.1.model.transformer.",
    }):  # fmt: skip
        toy = changed_weight(sdxl, tmp_path / "changed", parts[change])
    else:
        options = {
            "nothing": {},
            "resolution": {"resolution": 96},
            "tokens": {"max_token_length": 150},
            "precision": {"mixed_precision": "bf16"},
            "weighted": {"weighted_captions": True},
            "prefix": {"caption_prefix": "photo"},
            "flip": {"flip_aug": True},
            "filter": {"resize_interpolation": "nearest"},
            "batch": {"vae_batch_size": 3, "text_encoder_batch_size": 4, "train_batch_size": 2, "shuffle": None},
        }[change]
    if change == "flip":
        latents = (5, 5)
    found = counts(fill(toy, images, cache, **options))
    assert found == {"latents": latents, "text of clip_l": clip_l, "text of clip_g": clip_g}
    again = counts(fill(sdxl, images, cache)) if change not in ("pixel", "letter") else None
    assert again is None or set(again.values()) == {NOTHING}  # the old entries are still there


def test_the_pictures_folder_stays_as_it_is(sdxl: Mapping[str, Path], images: Path, tmp_path: Path, capsys) -> None:
    """Bytes and times of every file, after every command; and nothing new beside them."""
    before = tree(images)
    fill(sdxl, images, tmp_path / "cache", flip_aug=True)
    options = ["--train_data_dir", images, "--resolution", 64, "--cache_dir", tmp_path / "cache"]
    for words in (["--stats"], ["--verify"], ["--prune", "--yes"]):
        assert main(["dataset", "cache", *map(str, [*words, *options])]) == 0
    assert "all whole" in capsys.readouterr().out
    assert tree(images) == before


def test_machines_make_a_part_each(sdxl: Mapping[str, Path], images: Path, tmp_path: Path) -> None:
    made = []
    for i in range(3):
        argv = arguments(sdxl, images, tmp_path / "out", cache_dir=tmp_path / f"cache{i}")
        caches = dataset_cache.fill_caches(cache_config(argv, (), {}, upkeep=False), machine=(i, 3))
        made.append(sum(count.encoded for count in caches.counts.values()))
    assert sum(made) == 15
    assert max(made) < 15
    together = tmp_path / "together" / "shards"
    together.mkdir(parents=True)
    for i in range(3):
        for shard in (tmp_path / f"cache{i}" / "shards").iterdir():
            shutil.copy(shard, together)
    assert set(counts(fill(sdxl, images, tmp_path / "together")).values()) == {NOTHING}


@pytest.mark.slow
def test_processes_share_the_work(sdxl: Mapping[str, Path], images: Path, tmp_path: Path) -> None:
    """Two processes of one launch: each entry is made once, and one process alone makes the same."""
    argv = arguments(sdxl, images, tmp_path / "out", cache_dir=tmp_path / "cache", console_log_level=None)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launcher = Path(__file__).parents[2] / "launchers" / "tools" / "cache_latents.py"
    subprocess.run([*command, str(launcher), "--sdxl", *argv], check=True, timeout=300, env=dict(os.environ))
    assert counts(fill(sdxl, images, tmp_path / "cache"))["latents"] == NOTHING
    fill(sdxl, images, tmp_path / "alone", cache_latents=True)
    both, alone = (DiskStore(tmp_path / name) for name in ("cache", "alone"))
    keys = [record.key for record in survey(both, read=True) if record.kind == LATENTS]
    assert len(keys) == 5
    assert all(both.get(key) == alone.get(key) is not None for key in keys)
    assert len(list((tmp_path / "cache" / "shards").iterdir())) >= 2


VARIED = {
    "network_train_unet_only": True, "shuffle_caption": True, "caption_dropout_rate": 0.3, "keep_tokens": 1,
    "caption_tag_dropout_rate": 0.2, "cache_text_encoder_outputs": True, "text_cache_variants": 3,
}  # fmt: skip


@pytest.mark.slow
def test_variants_train_and_resume_exactly(sdxl: Mapping[str, Path], images: Path, tmp_path: Path) -> None:
    """Twelve steps are five and seven, with text on disk or in memory, and other workers; the file tells of it."""
    from safetensors import safe_open

    options = {**VARIED, "max_train_steps": 12}
    straight = run(sdxl, images, tmp_path / "straight", **options, max_data_loader_n_workers=2)
    parts = tmp_path / "parts"
    disk = {"cache_text_encoder_outputs_to_disk": True, "cache_dir": tmp_path / "cache", "save_state": True}
    run(sdxl, images, parts, **options, **disk, save_every_n_steps=5, max_data_loader_n_workers=0)
    run(sdxl, images, parts, **options, **disk, resume=parts / "lora-step00000005-state")
    assert losses(straight) == losses(parts)
    assert same(weights(straight), weights(parts))
    with safe_open(parts / "lora.safetensors", "pt") as file:
        assert file.metadata()["ss_text_cache_variants"] == "3"
    plain = run(sdxl, images, tmp_path / "plain", **{**options, "text_cache_variants": None, VARIED_CACHE: None})
    assert losses(plain) != losses(straight)


VARIED_CACHE = "cache_text_encoder_outputs"


def test_every_variant_is_used_and_none_is_live(
    sdxl: Mapping[str, Path], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cached variants are what an encoder makes of the very captions that the batches carry."""
    from sfumato.families.encoding import FrozenText
    from sfumato.training.setup_run import open_run

    for i, path in enumerate(sorted((images / "2_cat").glob("*.txt"))):
        path.write_text(f"cat {i}, red, small, blurred, close, facing left")
    (tmp_path / "prompts.txt").write_text("a cat")
    kept = {"sample_prompts": tmp_path / "prompts.txt", "sample_every_n_steps": 100}  # encoders stay for previews
    run_ = open_run(load_config(arguments(sdxl, images, tmp_path / "out", **VARIED, **kept, max_train_steps=40)))
    assert run_ is not None
    seen: dict[str, set[str]] = {}
    live = FrozenText(run_.model)
    for step in run_.loader.steps():
        for batch in step.batches:
            for part, features in batch.text.items():
                right = live.encode(part, batch.captions)
                assert all(torch.equal(features[name], right[name]) for name in right)
            for caption in batch.captions:
                seen.setdefault(caption.split(", ")[0], set()).add(caption)
        if step.index == 39:
            break
    assert "" in seen
    assert all(len(captions) <= 3 for first, captions in seen.items() if first)
    assert sum(len(captions) for captions in seen.values()) > 6


def test_one_of_each_refuses_what_varies_before_anything_is_loaded(
    sdxl: Mapping[str, Path], images: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"shuffle_caption makes ever new captions.*--text_cache_variants"):
        run(sdxl, images, tmp_path / "out", **{**VARIED, "text_cache_variants": 1, "caption_tag_dropout_rate": 0})


@pytest.mark.parametrize("damage", ["bit", "cut"])
def test_a_damaged_cache_is_found_healed_and_never_used(
    sdxl: Mapping[str, Path], images: Path, tmp_path: Path, capsys, damage: str
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
    place = ["--cache_dir", str(cache)]
    capsys.readouterr()
    assert main(["dataset", "cache", "--verify", *place]) == 2
    assert "damaged" in capsys.readouterr().err
    made = sum(encoded for _, encoded in counts(fill(sdxl, images, cache)).values())
    assert made == 1
    assert main(["dataset", "cache", "--prune", "--yes", *place]) == 0
    assert main(["dataset", "cache", "--verify", *place]) == 0
    assert set(counts(fill(sdxl, images, cache)).values()) == {NOTHING}


def test_a_changed_picture_with_its_old_time_is_found(sdxl: Mapping[str, Path], images: Path, tmp_path: Path, capsys):
    """Size and time say it is the same file; --verify reads it all the same, and --prune makes it known as new."""
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
    assert counts(fill(sdxl, images, cache))["latents"] == NOTHING
    words = ["--train_data_dir", str(images), "--resolution", "64", "--cache_dir", str(cache)]
    words += ["--caption_extension", ".txt"]
    assert main(["dataset", "cache", "--verify", *words]) == 2
    assert "1 pictures that changed though size and time did not" in capsys.readouterr().err
    assert main(["dataset", "cache", "--prune", "--yes", *words]) == 0
    assert main(["dataset", "cache", "--verify", *words]) == 0
    assert counts(fill(sdxl, images, cache))["latents"] == (4, 1)


def test_pruning_asks_first(sdxl: Mapping[str, Path], images: Path, tmp_path: Path, capsys) -> None:
    cache = tmp_path / "cache"
    fill(sdxl, images, cache)
    change_a_letter(images)
    fill(sdxl, images, cache)
    place = ["--cache_dir", str(cache)]
    assert main(["dataset", "cache", "--prune", *place]) == 0
    told = capsys.readouterr().out
    assert "text features           2 entries" in told
    assert "nothing was dropped; --yes drops without asking" in told
    config = cache_config(place, (), {}, upkeep=True)
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr("sys.stdin", Terminal())
        dataset_cache.prune_cache(config, yes=False, unused_days=None, ask=lambda _: "n")
        assert "nothing was dropped" in capsys.readouterr().out
        dataset_cache.prune_cache(config, yes=False, unused_days=None, ask=lambda _: "y")
    assert "dropped; " in capsys.readouterr().out
    assert main(["dataset", "cache", "--prune", *place]) == 0
    assert "nothing to drop" in capsys.readouterr().out


class Terminal:
    def isatty(self) -> bool:
        return True


def test_a_cache_that_is_not_there_is_told(tmp_path: Path, capsys) -> None:
    assert main(["dataset", "cache", "--stats", "--cache_dir", str(tmp_path / "nowhere")]) == 2
    assert "there is no cache in" in capsys.readouterr().err
    assert not (tmp_path / "nowhere").exists()


def test_options_that_caching_does_not_read_are_named(sdxl: Mapping[str, Path], images: Path, tmp_path: Path) -> None:
    config = load_config(arguments(sdxl, images, tmp_path / "out", noise_offset=0.1, mixed_precision="bf16"))
    (line,) = dataset_cache.idle(config)
    assert "--noise_offset" in line
    assert "--learning_rate" in line
    assert "--mixed_precision" not in line
    assert "--resolution" not in line
