"""Which networks are in memory when: each only while it is needed, and none whose every output is cached."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from families.loading import load_model
from families.toys import ToyShelf
from sfumato.families.encoding import FrozenTextEncoders, encode_captions
from sfumato.families.part import Part
from sfumato.families.weights import Weights
from sfumato.training import saving
from toy_runs import build_toy_run, equal_tensors, make_images, read_metrics, read_weights, train_toy

Toy = Mapping[str, Path]
CACHED = {"cache_latents_to_disk": True, "cache_text_encoder_outputs_to_disk": True, "network_train_unet_only": True}


@pytest.fixture(scope="module")
def flux(toy_shelf: ToyShelf) -> Toy:
    return toy_shelf.paths("flux")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return make_images(tmp_path / "images", 3)


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """+name for each network that is loaded, -name for each that is unloaded."""
    found: list[str] = []
    load, unload = Part.load, Part.unload

    def watched_load(part: Part) -> None:
        if not part.is_loaded:
            found.append(f"+{part.spec.name}")
        load(part)

    def watched_unload(part: Part) -> None:
        if part.is_loaded:
            found.append(f"-{part.spec.name}")
        unload(part)

    monkeypatch.setattr(Part, "load", watched_load)
    monkeypatch.setattr(Part, "unload", watched_unload)
    return found


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files of networks from which a tensor was read."""
    found: list[str] = []
    fill, read = Weights.fill_module, Weights.read

    def watched_fill(weights: Weights, *given: Any, **named: Any) -> None:
        found.append(weights.file.header.path.name)
        fill(weights, *given, **named)

    def watched_read(weights: Weights, *given: Any, **named: Any) -> torch.Tensor:
        found.append(weights.file.header.path.name)
        return read(weights, *given, **named)

    monkeypatch.setattr(Weights, "fill_module", watched_fill)
    monkeypatch.setattr(Weights, "read", watched_read)
    return found


def write_prompts(tmp_path: Path, words: str) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text(f"{words} --w 64 --h 64 --s 1 --l 1\n")
    return path


def test_one_network_after_the_other_and_none_a_second_time(
    flux: Toy, images: Path, tmp_path: Path, events: list[str], opened: list[str]
) -> None:
    """The second run reads the denoiser alone, though it will have previews."""
    options: dict[str, Any] = {**CACHED, "cache_dir": tmp_path / "cache"}
    options |= {"sample_prompts": write_prompts(tmp_path, "a cat"), "sample_every_n_steps": 2}
    build_toy_run(flux, images, tmp_path / "out", **options)
    assert events == ["+vae", "-vae", "+clip_l", "-clip_l", "+t5", "-t5", "+denoiser"]
    events.clear()
    opened.clear()
    build_toy_run(flux, images, tmp_path / "out", **options)
    assert events == ["+denoiser"]
    assert set(opened) == {flux["pretrained_model_name_or_path"].name}


def test_what_is_not_cached_stays(flux: Toy, images: Path, tmp_path: Path) -> None:
    run = build_toy_run(flux, images, tmp_path / "out", cache_latents=True, network_train_unet_only=True)
    assert {name for name, part in run.model.parts.items() if part.is_loaded} == {"denoiser", "clip_l", "t5"}


@pytest.mark.full
def test_previews_bring_networks_in_for_a_moment(
    flux: Toy, images: Path, tmp_path: Path, events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The autoencoder always, an encoder where the prompts have changed since training began; training goes on."""
    options = {**CACHED, "cache_dir": tmp_path / "cache", "max_train_steps": 4}
    plain = train_toy(flux, images, tmp_path / "plain", **options)
    events.clear()
    real = saving.save_due_previews

    def change_prompts(run: Any, step: int) -> None:
        real(run, step)
        if step == 2:
            write_prompts(tmp_path, "a dog")

    monkeypatch.setattr(saving, "save_due_previews", change_prompts)
    prompts = write_prompts(tmp_path, "a cat")
    shown = train_toy(flux, images, tmp_path / "shown", **options, sample_prompts=prompts, sample_every_n_steps=2)
    first, encoders = ["+vae", "-vae"], ["+clip_l", "-clip_l", "+t5", "-t5"]
    assert events[events.index("+denoiser") + 1 :] == [*first, *encoders, *first]
    assert equal_tensors(read_weights(plain), read_weights(shown))
    assert read_metrics(plain) == read_metrics(shown)
    assert len(list((shown / "sample").iterdir())) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hash_of_weights_is_that_of_the_loaded_network(toy_shelf: ToyShelf, dtype: torch.dtype) -> None:
    """Read from the file, where layers are stacked, prefixed and of another dtype; the same in each layout."""
    found: list[dict[str, str]] = []
    for layout in ("original", "diffusers"):
        model = load_model(toy_shelf.options("sdxl", layout), dtype)
        hashes: dict[str, str] = {}
        for name in ("vae", "clip_l", "clip_g"):
            part = model.parts[name]
            digest = hashlib.sha256(b"salt")
            for key, tensor in sorted(part.module.state_dict().items()):
                digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
            hashes[name] = part.hash_weights("salt")
            assert hashes[name] == digest.hexdigest()
        found.append(hashes)
    assert found[0] == found[1]


@pytest.mark.full
def test_base_weights_are_part_of_what_is_cached(flux: Toy, images: Path, tmp_path: Path) -> None:
    """Cached features are those of the encoder with the file merged, and those without it are not taken for them."""
    trained = train_toy(flux, images, tmp_path / "first", learning_rate=0.5, network_args=["train_t5xxl=True"])
    options = {**CACHED, "cache_dir": tmp_path / "cache", "max_train_steps": 2}
    without = train_toy(flux, images, tmp_path / "without", **options)
    merged = {"base_weights": trained / "lora.safetensors", "base_weights_multiplier": 0.5}
    cached = train_toy(flux, images, tmp_path / "cached", **options, **merged)
    live = train_toy(flux, images, tmp_path / "live", network_train_unet_only=True, max_train_steps=2, **merged)
    assert read_metrics(cached) == read_metrics(live)
    assert read_metrics(cached) != read_metrics(without)


def test_an_unloaded_network_comes_back_as_it_was(toy_shelf: ToyShelf) -> None:
    model = load_model(toy_shelf.options("flux"))
    for name, part in model.parts.items():
        before = {key: tensor.clone() for key, tensor in part.module.state_dict().items()}
        part.unload()
        assert all(tensor.is_meta for tensor in part.module.parameters())
        with part.hold():
            assert equal_tensors(before, part.module.state_dict()), name
            assert not part.module.training
            assert not any(parameter.requires_grad for parameter in part.module.parameters())
        assert not part.is_loaded


def test_features_in_memory_are_bound_by_bytes(toy_shelf: ToyShelf, events: list[str]) -> None:
    model = load_model(toy_shelf.options("sd"))
    model.parts["clip"].unload()
    features = encode_captions(model, "clip", ["a cat"])[0]
    text = FrozenTextEncoders(model, limit=2 * sum(tensor.nbytes for tensor in features.values()))
    loads: list[int] = []
    for caption in ("a cat", "a dog", "a dog", "a bird", "a bird", "a cat"):
        events.clear()
        text.encode("clip", [caption])
        loads.append(events.count("+clip"))
    assert loads == [1, 1, 0, 1, 0, 1]
    assert not model.parts["clip"].is_loaded
    text.remember("clip", "a cat", features, weighted=False, negative=False)  # again: it counts once
    events.clear()
    text.encode("clip", ["a bird", "a cat"])
    assert not events
