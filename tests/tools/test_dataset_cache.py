"""Caches filled without training, at toy size: what is made, what a change makes again, what training finds."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from families.toys import ToyShelf
from sfumato.config import load_config
from sfumato.data.cache.entries import LATENTS
from sfumato.data.cache.maintenance import read_records
from sfumato.data.cache.store import DiskStore
from sfumato.errors import UserError
from sfumato.families.part import Part
from sfumato.tools import cache_plan
from sfumato.tools.ignored_options import describe_ignored_options
from tools.cache_helpers import CACHED, CREATED, change_letter, change_pixel, counts, fill
from toy_runs import build_toy_run, equal_tensors, make_arguments, make_images, read_metrics, read_weights, train_toy
from warm_python import run_ranks


@pytest.fixture(scope="module", params=["sd", "sdxl", "flux"])
def toy(request: pytest.FixtureRequest, toy_shelf: ToyShelf) -> Mapping[str, Path]:
    return toy_shelf.paths(request.param)


@pytest.fixture(scope="module")
def sdxl(toy_shelf: ToyShelf) -> Mapping[str, Path]:
    return toy_shelf.paths("sdxl")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return make_images(tmp_path / "images")


@pytest.mark.full
@pytest.mark.fast_for("[sd]")
def test_training_finds_everything_and_trains_the_same(
    toy: Mapping[str, Path], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = counts(fill(toy, images, tmp_path / "cache"))
    assert made.pop("latents") == (0, 5)
    assert set(made.values()) == {(0, 5)}
    assert counts(fill(toy, images, tmp_path / "cache"))["latents"] == (5, 0)
    options = {"network_train_unet_only": True, "max_train_steps": 3}
    plain = train_toy(toy, images, tmp_path / "plain", **options)
    monkeypatch.setattr("sfumato.training.cache_encoders.encode_images", never)
    monkeypatch.setattr("sfumato.training.cache_encoders.encode_captions", never)
    disk = {"cache_latents_to_disk": True, "cache_text_encoder_outputs_to_disk": True, "cache_dir": tmp_path / "cache"}
    cached = train_toy(toy, images, tmp_path / "cached", **options, **disk)
    assert read_metrics(plain) == read_metrics(cached)
    assert equal_tensors(read_weights(plain), read_weights(cached))


def never(*_: object, **__: object) -> None:
    raise AssertionError("everything is cached")


def test_only_what_encodes_is_loaded(
    toy: Mapping[str, Path], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    real = Part.load

    def watched(part: Part) -> None:
        loaded.append(part.spec.name)
        real(part)

    monkeypatch.setattr(Part, "load", watched)
    for option, expected in (("cache_latents", {"vae"}), ("cache_text_encoder_outputs", None)):
        loaded.clear()
        caches = fill(toy, images, tmp_path / "cache", **{option: True})
        assert set(loaded) == (expected or set(caches.text))


def change_weight(toy: Mapping[str, Path], folder: Path, start: str) -> dict[str, Path]:
    """The toy with one number of one network changed by a little."""
    path = toy["pretrained_model_name_or_path"]
    tensors = load_file(path)
    name = next(name for name in sorted(tensors) if name.startswith(start) and tensors[name].is_floating_point())
    tensors[name].view(-1)[0] += 0.01
    copy = folder / path.name
    shutil.copytree(path.parent, folder, dirs_exist_ok=True)
    save_file(tensors, copy)
    return {**toy, "pretrained_model_name_or_path": copy}


@pytest.mark.fast_for("[nothing", "[letter", "[vae", "[resolution", "[second")
@pytest.mark.parametrize(
    ("change", "latents", "clip_l", "clip_g"),
    [
        ("nothing", CACHED, CACHED, CACHED),
        ("pixel", (4, 1), CACHED, CACHED),
        ("letter", CACHED, (4, 1), (4, 1)),
        ("vae", CREATED, CACHED, CACHED),
        ("first encoder", CACHED, CREATED, CACHED),
        ("second encoder", CACHED, CACHED, CREATED),
        ("resolution", (3, 2), CACHED, CACHED),  # three are 64x64 and have that very bucket at both
        ("tokens", CACHED, CREATED, CREATED),
        ("precision", CREATED, CREATED, CREATED),
        ("weighted", CACHED, CREATED, CREATED),
        ("prefix", CACHED, CREATED, CREATED),
        ("flip", CACHED, CACHED, CACHED),  # and five mirrored ones, see below
        ("batch", CACHED, CACHED, CACHED),
        ("filter", CACHED, CACHED, CACHED),  # nothing is resized
    ],
)
def test_a_change_makes_exactly_its_entries_again(
    sdxl: Mapping[str, Path], images: Path, tmp_path: Path, change: str, latents, clip_l, clip_g
) -> None:
    cache = tmp_path / "cache"
    fill(sdxl, images, cache)
    toy, options = sdxl, {}
    if change == "pixel":
        change_pixel(images)
    elif change == "letter":
        change_letter(images)
    elif change in (parts := {
        "vae": "first_stage_model.encoder.",
        "first encoder": "conditioner.embedders.0.transformer.text_model.encoder.",
        "second encoder": "conditioner.embedders.1.model.transformer.",
    }):  # fmt: skip
        toy = change_weight(sdxl, tmp_path / "changed", parts[change])
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
    assert again is None or set(again.values()) == {CACHED}  # the old entries are still there


def test_machines_make_a_part_each(sdxl: Mapping[str, Path], images: Path, tmp_path: Path) -> None:
    made = []
    for i in range(3):
        caches = fill(sdxl, images, tmp_path / f"cache{i}", machine=(i, 3))
        made.append(sum(count.created for count in caches.counts.values()))
    assert sum(made) == 15
    assert max(made) < 15
    together = tmp_path / "together" / "shards"
    together.mkdir(parents=True)
    for i in range(3):
        for shard in (tmp_path / f"cache{i}" / "shards").iterdir():
            shutil.copy(shard, together)
    assert set(counts(fill(sdxl, images, tmp_path / "together")).values()) == {CACHED}


@pytest.mark.full
def test_processes_share_the_work(sdxl: Mapping[str, Path], images: Path, tmp_path: Path) -> None:
    """Two processes of one launch: each entry is made once, and one process alone makes the same."""
    argv = make_arguments(sdxl, images, tmp_path / "out", cache_dir=tmp_path / "cache", console_log_level=None)
    launcher = Path(__file__).parents[2] / "launchers" / "tools" / "cache_latents.py"
    run_ranks(launcher, "--sdxl", *argv)
    assert counts(fill(sdxl, images, tmp_path / "cache"))["latents"] == CACHED
    fill(sdxl, images, tmp_path / "alone", cache_latents=True)
    both, alone = (DiskStore(tmp_path / name) for name in ("cache", "alone"))
    keys = [record.key for record in read_records(both, check=True) if record.content_type == LATENTS]
    assert len(keys) == 5
    assert all(both.get(key) == alone.get(key) is not None for key in keys)
    assert len(list((tmp_path / "cache" / "shards").iterdir())) >= 2


VARIED = {
    "network_train_unet_only": True, "shuffle_caption": True, "caption_dropout_rate": 0.3, "keep_tokens": 1,
    "caption_tag_dropout_rate": 0.2, "cache_text_encoder_outputs": True, "text_cache_variants": 3,
}  # fmt: skip


@pytest.mark.full
def test_variants_train_and_resume_exactly(sdxl: Mapping[str, Path], images: Path, tmp_path: Path) -> None:
    """Twelve steps are five and seven, with text on disk or in memory, and other workers; the metadata says so."""
    from safetensors import safe_open

    options = {**VARIED, "max_train_steps": 12}
    straight = train_toy(sdxl, images, tmp_path / "straight", **options, max_data_loader_n_workers=2)
    parts = tmp_path / "parts"
    disk = {"cache_text_encoder_outputs_to_disk": True, "cache_dir": tmp_path / "cache", "save_state": True}
    train_toy(sdxl, images, parts, **options, **disk, save_every_n_steps=5, max_data_loader_n_workers=0)
    train_toy(sdxl, images, parts, **options, **disk, resume=parts / "lora-step00000005-state")
    assert read_metrics(straight) == read_metrics(parts)
    assert equal_tensors(read_weights(straight), read_weights(parts))
    with safe_open(parts / "lora.safetensors", "pt") as file:
        assert file.metadata()["ss_text_cache_variants"] == "3"
    uncached = {**options, "text_cache_variants": None, "cache_text_encoder_outputs": None}
    plain = train_toy(sdxl, images, tmp_path / "plain", **uncached)
    assert read_metrics(plain) != read_metrics(straight)


@pytest.mark.full
def test_every_variant_is_used_and_none_is_live(
    sdxl: Mapping[str, Path], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cached variants are what an encoder makes of the captions that the batches carry."""
    from sfumato.families.encoding import FrozenTextEncoders

    for i, path in enumerate(sorted((images / "2_cat").glob("*.txt"))):
        path.write_text(f"cat {i}, red, small, blurred, close, facing left")
    (tmp_path / "prompts.txt").write_text("a cat")
    kept = {"sample_prompts": tmp_path / "prompts.txt", "sample_every_n_steps": 100}  # encoders stay for previews
    run_ = build_toy_run(sdxl, images, tmp_path / "out", **VARIED, **kept, max_train_steps=40)
    seen: dict[str, set[str]] = {}
    live = FrozenTextEncoders(run_.model)
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


def test_a_single_variant_refuses_varying_captions_before_loading(
    sdxl: Mapping[str, Path], images: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"shuffle_caption.*--text_cache_variants"):
        train_toy(sdxl, images, tmp_path / "out", **{**VARIED, "text_cache_variants": 1, "caption_tag_dropout_rate": 0})


def test_ignored_options_are_named(sdxl: Mapping[str, Path], images: Path, tmp_path: Path) -> None:
    config = load_config(make_arguments(sdxl, images, tmp_path / "out", noise_offset=0.1, mixed_precision="bf16"))
    (line,) = describe_ignored_options(
        config, themes=cache_plan.CACHING_THEMES, options=cache_plan.CACHING_OPTIONS, purpose="caching"
    )
    assert "--noise_offset" in line
    assert "--learning_rate" in line
    assert "--mixed_precision" not in line
    assert "--resolution" not in line
