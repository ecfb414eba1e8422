"""What full training saves: files and folders, what they hold, and what they never replace."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from families.toys import ToyShelf
from methods.full_training import UNET, Toy, before, full, loaded
from sfumato.errors import UserError
from sfumato.methods.full import FullMethod
from toy_runs import REPORT, equal_tensors, read_metrics, read_weights


@pytest.mark.full
def test_saved_in_half(sd: Toy, images: Path, tmp_path: Path) -> None:
    old = before(sd)
    new = read_weights(full(sd, images, tmp_path, save_precision="fp16", learning_rate="1e-12", max_train_steps=1))
    assert all(torch.equal(new[name], old[name].half()) for name in old if old[name].is_floating_point())
    assert all(torch.equal(new[name], old[name]) for name in old if not old[name].is_floating_point())


def test_the_file_says_what_it_is(toy: Toy, family: str, images: Path, tmp_path: Path) -> None:
    output = full(toy, images, tmp_path, max_train_steps=1, metadata_author="me")
    with safe_open(output / "lora.safetensors", "pt") as file:
        found = file.metadata()
    architectures = {
        "sd": "stable-diffusion-v1",
        "sdxl": "stable-diffusion-xl-v1-base",
        "flux": "flux-1-dev",
        "chroma": "chroma",
    }
    assert found["modelspec.architecture"] == architectures[family]
    assert (found["modelspec.author"], found["ss_steps"]) == ("me", "1")
    assert not any(name.startswith(("ss_network", "sshs_")) for name in found)
    assert not any(str(place) in text for text in found.values() for place in (tmp_path, images))
    with safe_open(toy["pretrained_model_name_or_path"], "pt") as file:
        before = file.metadata() or {}
    assert all(found[name] == before[name] for name in before)


def test_the_model_that_training_starts_from_is_never_overwritten(sd: Toy, images: Path, tmp_path: Path) -> None:
    copy = tmp_path / "lora-step00000002.safetensors"
    shutil.copytree(sd["pretrained_model_name_or_path"].parent, tmp_path, dirs_exist_ok=True)  # tokenizers, too
    shutil.copy(sd["pretrained_model_name_or_path"], copy)
    content = copy.read_bytes()
    with pytest.raises(UserError, match="lora-step00000002") as error:
        full({**sd, "pretrained_model_name_or_path": copy}, images, tmp_path)
    assert error.value.code == "output-replaces-source"
    assert copy.read_bytes() == content


@pytest.mark.full
@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_both_formats_hold_the_same_model(
    toy_shelf: ToyShelf, family: str, layout: Any, images: Path, tmp_path: Path
) -> None:
    """diffusers reads the folder, and its modules have the weights that the single file has."""
    from diffusers import DiffusionPipeline

    toy = toy_shelf.paths(family, layout)
    options = {"train_text_encoder": True, "max_train_steps": 1}
    one = full(toy, images, tmp_path / "one", save_model_as="safetensors", **options)
    two = full(toy, images, tmp_path / "two", save_model_as="diffusers", **options)
    assert read_metrics(one) == read_metrics(two)
    pipe: Any = DiffusionPipeline.from_pretrained(two / "lora")
    assert type(pipe).__name__ == {"sd": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}[family]
    single = loaded(one / "lora.safetensors", toy)
    folder = loaded(two / "lora", toy)
    theirs = {"denoiser": pipe.unet, "vae": pipe.vae, "clip": pipe.text_encoder, "clip_l": pipe.text_encoder}
    theirs["clip_g"] = pipe.components.get("text_encoder_2")
    for name, state in single.items():
        assert equal_tensors(state, folder[name])
        others = {key.removeprefix("text_model."): weight for key, weight in theirs[name].state_dict().items()}
        assert equal_tensors({key.removeprefix("text_model."): weight for key, weight in state.items()}, others)


def test_a_folder_keeps_what_did_not_train(toy_shelf: ToyShelf, images: Path, tmp_path: Path) -> None:
    """Bytes of weights, tokenizers, configurations; a save is a folder where the model came from one."""
    toy = toy_shelf.paths("sd", "diffusers")
    source = toy["pretrained_model_name_or_path"]
    output = full(toy, images, tmp_path, max_train_steps=2, save_every_n_steps=1)
    assert (output / "lora-step00000001" / "model_index.json").is_file()
    files = sorted(path.relative_to(source) for path in source.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(output / "lora") for path in (output / "lora").rglob("*") if path.is_file())
    weights = Path("unet", "diffusion_pytorch_model.safetensors")
    assert not equal_tensors(load_file(source / weights), load_file(output / "lora" / weights))
    for path in set(files) - {weights}:
        first, second = (source / path).read_bytes(), (output / "lora" / path).read_bytes()
        assert (
            path.suffix == ".json"
            or first == second
            or equal_tensors(load_file(source / path), load_file(output / "lora" / path))
        )
    with safe_open(output / "lora" / weights, "pt") as file:
        assert file.metadata()["modelspec.architecture"] == "stable-diffusion-v1"


def test_a_folder_of_something_else_is_never_replaced(sd: Toy, images: Path, tmp_path: Path) -> None:
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="lora") as error:
        full(sd, images, tmp_path, save_model_as="diffusers")
    assert error.value.code == "output-replaces-other"
    assert (tmp_path / "lora" / "letter.txt").read_text() == "dear"


def test_models_that_are_one_file_cannot_be_a_folder(toy_shelf: ToyShelf, images: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--save_model_as diffusers") as error:
        full(toy_shelf.paths("flux"), images, tmp_path, save_model_as="diffusers")
    assert error.value.code == "model-folder-unsupported"


@pytest.mark.full
def test_only_the_last_saves_stay(sd: Toy, images: Path, tmp_path: Path) -> None:
    options = {"save_every_n_steps": 1, "save_last_n_steps": 1, "save_model_as": "diffusers", "max_train_steps": 5}
    full(sd, images, tmp_path, **options)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["lora", "lora-step00000003", "lora-step00000004", *REPORT, "lora.run.jsonl"]


@pytest.mark.full
@pytest.mark.parametrize(("family", "save_model_as"), [("sd", "safetensors"), ("sdxl", "diffusers")])
def test_a_lost_source_does_not_cost_the_run(
    toy: Toy, family: str, save_model_as: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint is deleted while training runs; the save is complete."""
    copy = tmp_path / "copy.safetensors"
    shutil.copy(toy["pretrained_model_name_or_path"], copy)
    tokenizers = [str(folder) for name, folder in toy.items() if name.startswith("tokenizer")]
    options = {"max_train_steps": 1, "save_model_as": save_model_as, "tokenizer": tokenizers}
    safe = full({"pretrained_model_name_or_path": copy}, images, tmp_path / "safe", **options)
    step = FullMethod.before_step

    def lose(method: FullMethod, number: int) -> None:
        copy.unlink()
        step(method, number)

    monkeypatch.setattr(FullMethod, "before_step", lose)
    lost = full({"pretrained_model_name_or_path": copy}, images, tmp_path / "lost", **options)
    name = "lora" if save_model_as == "diffusers" else "lora.safetensors"
    first, second = loaded(safe / name, toy), loaded(lost / name, toy)
    assert first.keys() == second.keys()
    assert all(equal_tensors(first[network], second[network]) for network in first)


@pytest.mark.full
def test_a_disk_without_space_is_an_error_before_the_first_step(
    sd: Toy, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint of the toy's size for each save that stays, and three times what trains for each state."""
    size = sum(tensor.nbytes for tensor in before(sd).values())
    unet = sum(tensor.nbytes for name, tensor in before(sd).items() if name.startswith(UNET))
    needed = 5 * size + 2 * 3 * unet  # all of 1 to 4 and the last one; a state stays for a step, the newest beside it
    options = {"max_train_steps": 5, "save_every_n_steps": 1, "save_state": True, "save_last_n_steps_state": 1}

    def free(count: int) -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=count))

    free(needed - 1000)
    with pytest.raises(UserError, match="5 saves"):
        full(sd, images, tmp_path, **options)
    free(2 * needed)
    full(sd, images, tmp_path, **options)
