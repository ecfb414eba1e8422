"""Full training as a user runs it, at toy size: what learns, what is saved, and exact resume."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from families.toys import ToyShelf
from sfumato.config import ModelOptions, NoiseOptions
from sfumato.errors import UserError
from sfumato.families._source import open_source
from sfumato.families.base import find_family
from sfumato.formats.state import load_state
from training import losses, pictures, run, same, weights

Toy = Mapping[str, Path]
UNET, AVERAGE = "model.diffusion_model.", "model_ema."
TEXT = {"sd": ("cond_stage_model.",), "sdxl": ("conditioner.embedders.0.", "conditioner.embedders.1.")}
STILL = {  # tensors of text encoders that no gradient reaches: tables, and what lies behind the layer that is read
    "sd": ("position_ids",),
    "sdxl": ("position_ids", "logit_scale", "embedders.0.transformer.text_model.encoder.layers.1.", "final_layer_norm"),
}


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("images"))


@pytest.fixture(params=["sd", "sdxl", "flux"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def toy(family: str, toy_shelf: ToyShelf) -> Toy:
    return toy_shelf.paths(family)


@pytest.fixture
def sd(toy_shelf: ToyShelf) -> Toy:
    return toy_shelf.paths("sd")


def full(toy: Toy, images: Path, output: Path, **options: Any) -> Path:
    return run(toy, images, output, **{"method": "full", "network_dim": None, "learning_rate": "1e-4", **options})


def before(toy: Toy) -> dict[str, torch.Tensor]:
    """The checkpoint that training starts from, without the average of its weights."""
    found = load_file(toy["pretrained_model_name_or_path"])
    return {name: tensor for name, tensor in found.items() if not name.startswith(AVERAGE)}


def changed(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> set[str]:
    assert set(first) == set(second)
    return {name for name in first if not torch.equal(first[name], second[name])}


def test_the_denoiser_learns_and_nothing_else(toy: Toy, family: str, images: Path, tmp_path: Path) -> None:
    """Every one of its tensors, in the file's own layout; all others keep their bytes."""
    old = before(toy)
    new = weights(full(toy, images, tmp_path, max_train_steps=2))
    assert changed(old, new) == {name for name in old if family == "flux" or name.startswith(UNET)}
    assert all(tensor.dtype == old[name].dtype and tensor.isfinite().all() for name, tensor in new.items())


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_text_encoders_learn_where_asked(toy: Toy, family: str, images: Path, tmp_path: Path) -> None:
    old = before(toy)
    new = weights(full(toy, images, tmp_path, train_text_encoder=True, max_train_steps=2))
    moved = changed(old, new)
    text = {name for name in old if name.startswith(TEXT[family])}
    assert moved >= {name for name in old if name.startswith(UNET)}
    assert moved <= text | {name for name in old if name.startswith(UNET)}
    reached = {name for name in text if not any(part in name for part in STILL[family])}
    assert moved & text == reached


@pytest.mark.parametrize(
    ("options", "moved"),
    [
        ({"learning_rate_te": 0}, {"denoiser"}),
        ({"learning_rate": 0, "learning_rate_te": "1e-4"}, {"clip_l", "clip_g"}),
        ({"unet_lr": 0, "learning_rate_te1": 0}, {"clip_g"}),
        ({"learning_rate_te2": 0, "learning_rate_te": "1e-5"}, {"denoiser", "clip_l"}),
    ],
)
def test_a_rate_of_0_leaves_a_part_as_it_is(
    toy_shelf: ToyShelf, images: Path, tmp_path: Path, options: dict, moved: set[str]
) -> None:
    toy = toy_shelf.paths("sdxl")
    old = before(toy)
    new = weights(full(toy, images, tmp_path, train_text_encoder=True, max_train_steps=1, save_state=True, **options))
    prefixes = {"denoiser": UNET, "clip_l": TEXT["sdxl"][0], "clip_g": TEXT["sdxl"][1]}
    found = changed(old, new)
    assert {part for part, prefix in prefixes.items() if any(name.startswith(prefix) for name in found)} == moved
    assert found == {name for name in found if name.startswith(tuple(prefixes[part] for part in moved))}
    state, _ = load_state(tmp_path / "lora-state")
    assert {name.partition(".")[0] for name in state["weights"]} == moved


def test_each_part_has_its_own_rate(toy_shelf: ToyShelf, images: Path, tmp_path: Path) -> None:
    rates = {"learning_rate": "1e-5", "learning_rate_te1": "2e-6", "learning_rate_te2": "3e-6"}
    output = full(toy_shelf.paths("sdxl"), images, tmp_path, train_text_encoder=True, max_train_steps=1, **rates)
    (row,) = losses(output)
    assert {name: rate for name, rate in row.items() if name.startswith("lr/")} == {
        "lr/denoiser": 1e-5, "lr/clip_l": 2e-6, "lr/clip_g": 3e-6,
    }  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {"train_text_encoder": True, "lr_scheduler": "cosine"},
        pytest.param({"gradient_accumulation_steps": 3, "train_batch_size": 2}, marks=pytest.mark.slow),
    ],
)
def test_resume_is_exact(sd: Toy, images: Path, tmp_path: Path, options: dict) -> None:
    """20 steps = 7, resume, 6, resume, 7, bit for bit."""
    straight = full(sd, images, tmp_path / "straight", max_train_steps=20, **options)
    parts = tmp_path / "parts"
    common = {"max_train_steps": 20, "save_state": True, **options}
    full(sd, images, parts, **common, save_every_n_steps=7)
    forget(parts, keep="lora-step00000007")
    full(sd, images, parts, **common, save_every_n_steps=13, resume=parts / "lora-step00000007-state")
    forget(parts, keep="lora-step00000013")
    full(sd, images, parts, **common, resume=parts)
    assert same(weights(straight), weights(parts))
    assert losses(straight) == losses(parts)


def forget(output: Path, keep: str) -> None:
    """What a run leaves that was killed after this save."""
    for path in output.iterdir():
        if path.is_dir() and not path.name.startswith(keep):
            shutil.rmtree(path)
        elif path.suffix == ".safetensors" and not path.name.startswith(keep):
            path.unlink()


def test_gradient_checkpointing_changes_nothing(toy: Toy, images: Path, tmp_path: Path) -> None:
    plain = full(toy, images, tmp_path / "plain", max_train_steps=2)
    less = full(toy, images, tmp_path / "less", max_train_steps=2, gradient_checkpointing=True)
    assert same(weights(plain), weights(less))


def test_weights_stay_whole_under_mixed_precision(sd: Toy, images: Path, tmp_path: Path) -> None:
    """Steps far below what bfloat16 can hold still count; the frozen encoder keeps its bytes, loaded in half or not."""
    old = before(sd)
    new = weights(full(sd, images, tmp_path, mixed_precision="bf16", learning_rate="1e-7", max_train_steps=2))
    alone = "middle_block.1.transformer_blocks.0.attn1.to_"  # at the toy's middle one token attends to itself alone
    large = {name for name in old if name.startswith(UNET) and name.endswith("weight") and alone not in name}
    assert changed(old, new) >= large
    assert all((new[name] - old[name]).abs().max() < 1e-6 for name in old)
    assert all(new[name].dtype == old[name].dtype for name in old)


def test_saved_in_half(sd: Toy, images: Path, tmp_path: Path) -> None:
    old = before(sd)
    new = weights(full(sd, images, tmp_path, save_precision="fp16", learning_rate="1e-12", max_train_steps=1))
    assert all(torch.equal(new[name], old[name].half()) for name in old if old[name].is_floating_point())
    assert all(torch.equal(new[name], old[name]) for name in old if not old[name].is_floating_point())


def test_the_file_says_what_it_is(toy: Toy, family: str, images: Path, tmp_path: Path) -> None:
    output = full(toy, images, tmp_path, max_train_steps=1, metadata_author="me")
    with safe_open(output / "lora.safetensors", "pt") as file:
        found = file.metadata()
    named = {"sd": "stable-diffusion-v1", "sdxl": "stable-diffusion-xl-v1-base", "flux": "flux-1-dev"}
    assert found["modelspec.architecture"] == named[family]
    assert (found["modelspec.author"], found["ss_steps"]) == ("me", "1")
    assert not any(name.startswith(("ss_network", "sshs_")) for name in found)
    assert not any(str(place) in text for text in found.values() for place in (tmp_path, images))
    with safe_open(toy["pretrained_model_name_or_path"], "pt") as file:
        before = file.metadata() or {}
    assert all(found[name] == before[name] for name in before)


def test_text_encoders_in_files_of_their_own_are_refused(toy_shelf: ToyShelf, images: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="clip_l of this model lies in a file of its own"):
        full(toy_shelf.paths("flux"), images, tmp_path, train_text_encoder=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"learning_rate": 0}, "every learning rate is 0"),
        ({"train_text_encoder": True, "learning_rate_te2": "1e-5"}, "--learning_rate_te2: this model has only one"),
        ({"train_text_encoder": True, "cache_text_encoder_outputs": True}, "nothing to keep"),
        ({"block_lr": "1e-5,0"}, "--block_lr has 2 values, this model needs 25"),
    ],
)
def test_what_cannot_be(sd: Toy, images: Path, tmp_path: Path, options: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        full(sd, images, tmp_path, **options)


def test_the_model_that_training_starts_from_is_never_overwritten(sd: Toy, images: Path, tmp_path: Path) -> None:
    copy = tmp_path / "lora-step00000002.safetensors"
    shutil.copy(sd["pretrained_model_name_or_path"], copy)
    content = copy.read_bytes()
    with pytest.raises(UserError, match="would take the place of lora-step00000002"):
        full({**sd, "pretrained_model_name_or_path": copy}, images, tmp_path)
    assert copy.read_bytes() == content


def test_previews_do_not_disturb(sd: Toy, images: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 2\n")
    plain = full(sd, images, tmp_path / "plain", train_text_encoder=True)
    options = {"sample_prompts": prompts, "sample_every_n_steps": 2, "sample_at_first": True}
    shown = full(sd, images, tmp_path / "shown", train_text_encoder=True, **options)
    assert same(weights(plain), weights(shown))
    assert len(list((shown / "sample").iterdir())) == 3


# ---------------------------------------------------------------- folders of diffusers'


def loaded(path: Path, toy: Toy) -> dict[str, dict[str, torch.Tensor]]:
    """Every network's weights, under our names."""
    words = tuple(str(folder) for name, folder in toy.items() if name.startswith("tokenizer"))
    options = ModelOptions(pretrained_model_name_or_path=str(path), tokenizer=words)
    source = open_source(options)
    family = find_family(None, source)
    blueprint = family.read(source, options, NoiseOptions())
    model = family.load(blueprint, options, dtype=torch.float32, device=torch.device("cpu"))
    modules = {"vae": model.vae, **{name: part.module for name, part in model.parts.items()}}
    return {name: dict(module.state_dict()) for name, module in modules.items()}


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
    assert losses(one) == losses(two)
    pipe: Any = DiffusionPipeline.from_pretrained(two / "lora")
    assert type(pipe).__name__ == {"sd": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}[family]
    single = loaded(one / "lora.safetensors", toy)
    folder = loaded(two / "lora", toy)
    theirs = {"denoiser": pipe.unet, "vae": pipe.vae, "clip": pipe.text_encoder, "clip_l": pipe.text_encoder}
    theirs["clip_g"] = pipe.components.get("text_encoder_2")
    for name, state in single.items():
        assert same(state, folder[name])
        others = {key.removeprefix("text_model."): weight for key, weight in theirs[name].state_dict().items()}
        assert same({key.removeprefix("text_model."): weight for key, weight in state.items()}, others)
