"""--frozen_lora: adapters that take part in training and previews, and of which nothing is trained or saved."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from families.toys import ToyShelf
from rehearsing import needs_rehearsal
from sfumato.config import load_config
from sfumato.config.frozen import FrozenAdapter, parse_frozen_adapter
from sfumato.errors import UserError
from sfumato.loss import training_loss
from sfumato.plan import make_run_plan
from sfumato.tools.rehearsal_stages import FROZEN
from sfumato.tools.rehearse import rehearse_plan
from sfumato.train import train_step
from sfumato.training.latents import load_latents
from toy_runs import build_toy_run, equal_tensors, make_arguments, make_images, read_metrics, read_weights, train_toy

Toy = Mapping[str, Path]
LOKR = {"network_module": "networks.lokr", "network_args": ["factor=4"], "learning_rate": "3e-2"}
ONLY = {"network_train_unet_only": True}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"), 3)


@pytest.fixture(scope="module")
def flux(toy_shelf: ToyShelf) -> Toy:
    return toy_shelf.paths("flux")


@pytest.fixture(scope="module")
def style(flux: Toy, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoKr of denoiser and text encoder."""
    output = tmp_path_factory.mktemp("style")
    return train_toy(flux, images, output, max_train_steps=2, **LOKR) / "lora.safetensors"


@pytest.fixture(scope="module")
def denoiser_style(flux: Toy, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("denoiser_style")
    return train_toy(flux, images, output, max_train_steps=2, **LOKR, **ONLY) / "lora.safetensors"


def measure_loss(toy: Toy, images: Path, output: Path, **options: Any) -> float:
    """Of the first batch, before anything is trained."""
    run = build_toy_run(toy, images, output, **options)
    step = next(run.loader.steps())
    run.context.randomness.seed_modules(0, 0, 0)
    with torch.no_grad():
        losses = [training_loss(run.context, b, load_latents(run, b), step.real_samples) for b in step.batches]
    return float(sum(losses))


@pytest.mark.parametrize(("text", "expected"), [
    ("a.safetensors", ("a.safetensors", 1.0, "both")),
    ("a.safetensors:0.8", ("a.safetensors", 0.8, "both")),
    ("a.safetensors:-.5:train", ("a.safetensors", -0.5, "train")),
    ("a.safetensors:sample", ("a.safetensors", 1.0, "sample")),
    (r"C:\loras\a.safetensors", (r"C:\loras\a.safetensors", 1.0, "both")),
    (r"C:\loras\a.safetensors:0.5:both", (r"C:\loras\a.safetensors", 0.5, "both")),
    ("C:/loras/a.safetensors:1", ("C:/loras/a.safetensors", 1.0, "both")),
    ("a:b.safetensors:nan", ("a:b.safetensors:nan", 1.0, "both")),  # reported as a path that does not exist
])  # fmt: skip
def test_what_is_written(text: str, expected: tuple[str, float, str]) -> None:
    found = parse_frozen_adapter(text)
    assert (str(found.path), found.strength, found.use) == expected
    assert parse_frozen_adapter(str(found)) == found


def test_given_several_times_all_count(style: Path, flux: Toy, images: Path, tmp_path: Path) -> None:
    argv = make_arguments(flux, images, tmp_path)
    config = load_config([*argv, "--frozen_lora", str(style), f"{style}:0.5", "--frozen_lora", f"{style}:2:train"])
    assert [each.strength for each in config.network.frozen_lora] == [1, 0.5, 2]
    with pytest.raises(UserError) as error:
        load_config([*argv, "--frozen_lora", "missing.safetensors:0.5"])
    assert (error.value.code, "missing.safetensors does not exist" in str(error.value)) == ("path-missing", True)


def test_it_is_in_the_forward_as_base_weights_are(flux: Toy, images: Path, style: Path, tmp_path: Path) -> None:
    """The loss of text and image alike, live and with cached features; and the cache of others is not used."""
    plain = measure_loss(flux, images, tmp_path)
    merged = measure_loss(flux, images, tmp_path, base_weights=style, base_weights_multiplier=0.5)
    frozen = measure_loss(flux, images, tmp_path, frozen_lora=f"{style}:0.5")
    assert frozen == pytest.approx(merged, rel=1e-5)
    assert abs(frozen - plain) > 1e-4 * plain
    caches = {"cache_text_encoder_outputs": True, "cache_dir": tmp_path / "cache", **ONLY}
    assert measure_loss(flux, images, tmp_path, **caches) == pytest.approx(plain, rel=1e-5)
    cached = measure_loss(flux, images, tmp_path, frozen_lora=f"{style}:0.5", **caches)
    assert cached == pytest.approx(merged, rel=1e-5)


@pytest.mark.full
def test_nothing_of_it_is_trained_saved_or_kept(flux: Toy, images: Path, style: Path, tmp_path: Path) -> None:
    before = style.read_bytes()
    run = build_toy_run(flux, images, tmp_path / "a", frozen_lora=str(style))
    engines = run.method.list_frozen()
    assert len(engines) == 2  # of denoiser and text encoder
    values = [parameter.clone() for engine in engines for parameter in engine.parameters()]
    train_step(run, next(run.loader.steps()))
    parameters = [parameter for engine in engines for parameter in engine.parameters()]
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(values, parameters, strict=True))
    output = train_toy(
        flux, images, tmp_path / "b", frozen_lora=str(style), max_train_steps=2, save_state=True,
        save_every_n_steps=1, no_metadata=True,
    )  # fmt: skip
    assert not [key for key in read_weights(output) if "lokr" in key]
    assert "lokr" not in str(load_file(output / "lora-step00000001-state" / "state.safetensors").keys())
    assert style.read_bytes() == before
    with safe_open(output / "lora.safetensors", "pt") as file:
        facts = json.loads(file.metadata()["sfumato.frozen_lora"])
    assert facts == [{"name": "lora.safetensors", "strength": 1.0, "use": "both"}]


def test_at_strength_0_it_is_bitwise_not_there(flux: Toy, images: Path, style: Path, tmp_path: Path) -> None:
    common = {"max_train_steps": 2}
    plain = train_toy(flux, images, tmp_path / "plain", **common)
    frozen = train_toy(flux, images, tmp_path / "frozen", **common, frozen_lora=f"{style}:0")
    assert equal_tensors(read_weights(plain), read_weights(frozen))
    assert read_metrics(plain) == read_metrics(frozen)


@pytest.mark.full
def test_resume_with_it_is_exact(flux: Toy, images: Path, style: Path, tmp_path: Path) -> None:
    common = {"max_train_steps": 4, "save_state": True, "frozen_lora": f"{style}:0.7"}
    straight = train_toy(flux, images, tmp_path / "straight", **common)
    parts = train_toy(flux, images, tmp_path / "parts", **common, save_every_n_steps=2)
    train_toy(flux, images, parts, **common, resume=parts / "lora-step00000002-state")
    assert equal_tensors(read_weights(straight), read_weights(parts))
    plain = train_toy(flux, images, tmp_path / "plain", **{**common, "frozen_lora": None})
    assert not equal_tensors(read_weights(straight), read_weights(plain))


@pytest.mark.full
def test_previews_with_what_is_for_previews(flux: Toy, images: Path, denoiser_style: Path, tmp_path: Path) -> None:
    """One for previews leaves the training as it is and changes the preview; one for training the reverse."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 2 --d 1")
    common = {"max_train_steps": 2, "sample_prompts": prompts, "sample_every_n_steps": 2, **ONLY}
    pixels, weights, commands = {}, {}, {}
    for use in ("none", "train", "sample"):
        frozen = {} if use == "none" else {"frozen_lora": f"{denoiser_style}:3:{use}"}
        output = train_toy(flux, images, tmp_path / use, **common, **frozen)
        with Image.open(next((output / "sample").glob("*.png"))) as image:
            pixels[use], commands[use] = image.tobytes(), image.info["command"]
        weights[use] = read_weights(output)
    assert equal_tensors(weights["sample"], weights["none"])
    assert not equal_tensors(weights["train"], weights["none"])
    assert pixels["sample"] != pixels["none"]
    assert "--network_mul 1.0 3.0" in commands["sample"]
    assert "--network_mul" not in commands["train"]


def test_a_text_encoder_cannot_change_between_training_and_previews(
    flux: Toy, images: Path, style: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        build_toy_run(flux, images, tmp_path, frozen_lora=f"{style}:0.5:train")
    assert error.value.code == "frozen-text-encoder-use"
    assert error.value.fix.endswith(":0.5:both")


def test_a_file_of_another_model(toy_shelf: ToyShelf, images: Path, style: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        build_toy_run(toy_shelf.paths("sd"), images, tmp_path, frozen_lora=str(style))
    assert error.value.code == "adapter-names-unmatched"


@pytest.mark.full
@needs_rehearsal
def test_plan_and_rehearsal_have_it(flux: Toy, images: Path, denoiser_style: Path, tmp_path: Path) -> None:
    argv = make_arguments(
        flux, images, tmp_path / "out", frozen_lora=f"{denoiser_style}:0.5", cache_latents=True,
        cache_text_encoder_outputs=True, **ONLY,
    )  # fmt: skip
    plan = make_run_plan(load_config(argv), processes=1)
    (line,) = [note for note in plan.notes if note.startswith("frozen: ")]
    assert "LoKr at strength 0.5 in training and previews" in line
    assert "layers of denoiser" in line
    stages = {stage.name: stage for stage in rehearse_plan(plan)}
    with safe_open(denoiser_style, "pt") as file:
        sizes = [file.get_tensor(key).numel() for key in file.keys() if not key.endswith("alpha")]  # noqa: SIM118
    assert stages["loading"].resident[FROZEN] == 4 * sum(sizes)


def test_what_is_used_when() -> None:
    assert FrozenAdapter(path=Path("a"), use="train").is_used(sampling=False)
    assert not FrozenAdapter(path=Path("a"), use="train").is_used(sampling=True)
    assert not FrozenAdapter(path=Path("a"), strength=0.0).is_used(sampling=True)
