"""Training as a user runs it, at toy size: exact resume, caches, previews, and files that other programs load."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from families.toys import ToyShelf
from sfumato.errors import UserError
from sfumato.formats.state import load_state
from sfumato.sample import generate_batch
from toy_runs import (
    REPORT,
    SEVERAL_TOKENS,
    equal_tensors,
    make_images,
    read_metrics,
    read_weights,
    train_toy,
)

FAMILIES = ("sd", "sdxl", "flux", "chroma", "sd3", "lumina")
UNREACHED = {  # the text is read off the layer before it
    "sdxl": "lora_te1_text_model_encoder_layers_1_",
    "lumina": "lora_te_layers_2_",
}
Toy = Mapping[str, Path]


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session", params=FAMILIES)
def toy(request: pytest.FixtureRequest, toy_shelf: ToyShelf) -> Toy:
    return toy_shelf.paths(request.param)


@pytest.fixture(scope="session")
def sd(toy_shelf: ToyShelf) -> Toy:
    return toy_shelf.paths("sd")


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.full
def test_equal_runs_give_equal_files(sd: Toy, images: Path, tmp_path: Path) -> None:
    first, second = train_toy(sd, images, tmp_path / "1"), train_toy(sd, images, tmp_path / "2")
    assert equal_tensors(read_weights(first), read_weights(second))
    assert read_metrics(first) == read_metrics(second)
    ours, theirs = metadata(first / "lora.safetensors"), metadata(second / "lora.safetensors")
    changed = {name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)}
    assert changed <= {
        "ss_session_id", "ss_training_started_at", "ss_training_finished_at", "modelspec.date", "sshs_legacy_hash",
    }  # fmt: skip


def test_every_tensor_learns(toy: Toy, images: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Up matrices start at zero and move at once; the loss is finite and the rates are those asked for."""
    output = train_toy(toy, images, tmp_path, unet_lr="2e-3", max_train_steps=3, **SEVERAL_TOKENS)
    ups = {name: tensor for name, tensor in read_weights(output).items() if name.endswith("lora_up.weight")}
    still = [name for name, tensor in ups.items() if not tensor.any()]
    unreached = UNREACHED.get(request.node.callspec.params["toy"], "none")
    assert ups
    assert still == [name for name in ups if name.startswith(unreached)]
    assert all(0 < row["loss/current"] < 100 and row["lr/denoiser"] == 2e-3 for row in read_metrics(output))


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param(
            {"gradient_accumulation_steps": 3, "train_batch_size": 2, "lr_scheduler": "cosine"}, marks=pytest.mark.full
        ),
    ],
)
def test_resume_is_exact(sd: Toy, images: Path, tmp_path: Path, options: dict) -> None:
    """12 steps = 4, resume, 5, resume, 3, bit for bit, with any number of loader workers."""
    straight = train_toy(sd, images, tmp_path / "straight", max_train_steps=12, max_data_loader_n_workers=2, **options)
    parts = tmp_path / "parts"
    common = {"max_train_steps": 12, "save_state": True, **options}
    train_toy(sd, images, parts, **common, save_every_n_steps=4, max_data_loader_n_workers=0)
    forget(parts, keep="lora-step00000004")
    train_toy(sd, images, parts, **common, save_every_n_steps=9, resume=parts / "lora-step00000004-state")
    forget(parts, keep="lora-step00000009")
    train_toy(sd, images, parts, **common, resume=parts)
    assert equal_tensors(read_weights(straight), read_weights(parts))
    assert read_metrics(straight) == read_metrics(parts)


def forget(output: Path, keep: str) -> None:
    """What a run leaves that was killed after this save."""
    import shutil

    for path in output.iterdir():
        if path.is_dir() and not path.name.startswith(keep):
            shutil.rmtree(path)
        elif path.suffix == ".safetensors" and not path.name.startswith(keep):
            path.unlink()


@pytest.mark.full
def test_nothing_left_to_do(sd: Toy, images: Path, tmp_path: Path) -> None:
    train_toy(sd, images, tmp_path, save_state=True)
    before = (tmp_path / "lora.safetensors").stat().st_mtime_ns
    train_toy(sd, images, tmp_path, resume=tmp_path)
    assert (tmp_path / "lora.safetensors").stat().st_mtime_ns == before


def test_state_holds_what_trains_and_nothing_else(sd: Toy, images: Path, tmp_path: Path) -> None:
    train_toy(sd, images, tmp_path, save_state=True, network_train_unet_only=True)
    state, info = load_state(tmp_path / "lora-state")
    assert all("lora_unet_" in name for name in state["weights"])
    size = sum(tensor.numel() for tensor in state["weights"].values())
    assert size == sum(t.numel() for n, t in read_weights(tmp_path).items() if not n.endswith("alpha"))
    assert info["options"]["network_train_unet_only"] == "True"


@pytest.mark.full
@pytest.mark.fast_for("[sdxl", "[flux")
def test_cached_is_uncached(toy: Toy, images: Path, tmp_path: Path) -> None:
    plain = train_toy(toy, images, tmp_path / "plain", network_train_unet_only=True, flip_aug=True)
    latents = train_toy(
        toy, images, tmp_path / "latents", network_train_unet_only=True, flip_aug=True, cache_latents=True
    )
    cache = {"cache_latents_to_disk": True, "cache_text_encoder_outputs_to_disk": True, "cache_dir": tmp_path / "cache"}
    disk = train_toy(toy, images, tmp_path / "disk", network_train_unet_only=True, flip_aug=True, **cache)
    again = train_toy(toy, images, tmp_path / "again", network_train_unet_only=True, flip_aug=True, **cache)
    for other in (latents, disk, again):
        assert equal_tensors(read_weights(plain), read_weights(other))
        assert read_metrics(plain) == read_metrics(other)


@pytest.mark.full
@pytest.mark.fast_for("[sd]", "[lumina")
def test_previews_do_not_disturb(toy: Toy, images: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("# a comment\na cat --w 64 --h 64 --s 2 --d 5 --n a dog --l 3\na red cup --w 64 --h 64 --s 2\n")
    plain = train_toy(toy, images, tmp_path / "plain")
    options = {"sample_prompts": prompts, "sample_every_n_steps": 2, "sample_at_first": True}
    shown = train_toy(toy, images, tmp_path / "shown", **options)
    assert equal_tensors(read_weights(plain), read_weights(shown))
    assert read_metrics(plain) == read_metrics(shown)
    made = sorted(path.name[: len("lora_000002_00")] for path in (shown / "sample").iterdir())
    assert made == [f"lora_{step:06d}_{i:02d}" for step in (0, 2, 4) for i in (0, 1)]


@pytest.mark.full
def test_previews_of_cached_text(toy: Toy, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same pictures; the encoders are put away by then, so prompts were read before."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a (cat:1.2) --w 64 --h 64 --s 2 --d 5 --n a dog --l 3")
    options = {"sample_prompts": prompts, "sample_every_n_steps": 2, "network_train_unet_only": True}
    plain = train_toy(toy, images, tmp_path / "plain", **options)

    def forbidden(*_: object) -> None:
        raise AssertionError("an encoder was asked")

    def watched(model: Any, *rest: Any) -> list[torch.Tensor]:
        with monkeypatch.context() as patch:
            patch.setattr(type(model), "encode_text", forbidden)
            return generate_batch(model, *rest)

    monkeypatch.setattr("sfumato.training.previews.generate_batch", watched)
    cached = train_toy(toy, images, tmp_path / "cached", **options, cache_text_encoder_outputs=True)
    first, second = (sorted((folder / "sample").iterdir()) for folder in (plain, cached))
    assert len(first) == len(second) == 2
    for one, other in zip(first, second, strict=True):
        assert Image.open(one).tobytes() == Image.open(other).tobytes()


def test_previews_are_made_together_where_they_can_be(
    sd: Toy, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts and seeds may differ; size, steps and guidance may not."""
    prompts = tmp_path / "prompts.txt"
    lines = ["a cat --w 64 --h 64 --s 2", "a red dog --w 64 --h 64 --s 2 --d 9", "a cup --w 64 --h 64 --s 3"]
    prompts.write_text("\n".join([*lines, "a table --w 64 --h 64 --s 2 --n a cat", "a photo --w 64 --h 128 --s 2"]))
    made: list[list[str]] = []

    def watched(model: Any, method: Any, group: Any, frozen: Any) -> list[torch.Tensor]:
        made.append([picture.prompt for picture in group])
        return generate_batch(model, method, group, frozen)

    monkeypatch.setattr("sfumato.training.previews.generate_batch", watched)
    options = {"sample_prompts": prompts, "sample_at_first": True, "max_train_steps": 1}
    output = train_toy(sd, images, tmp_path / "out", **options, sample_batch_size=2)
    assert made == [["a cat", "a red dog"], ["a table"], ["a cup"], ["a photo"]]
    found = sorted((output / "sample").iterdir())
    assert [Image.open(path).text["prompt"] for path in found] == ["a cat", "a red dog", "a cup", "a table", "a photo"]


def test_a_failed_preview_is_a_warning(sd: Toy, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> torch.Tensor:
        raise UserError("no such image", code="image-missing")

    monkeypatch.setattr("sfumato.training.previews.generate_batch", fails)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --s 1 --w 64 --h 64")
    train_toy(sd, images, tmp_path / "out", sample_prompts=prompts, sample_every_n_steps=2)
    assert (tmp_path / "out" / "lora.safetensors").is_file()


def test_a_fault_in_the_prompts_is_reported_before_the_first_step(sd: Toy, images: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --ss no_such_sampler")
    with pytest.raises(UserError) as caught:
        train_toy(sd, images, tmp_path / "out", sample_prompts=prompts, sample_every_n_steps=2)
    assert caught.value.code == "prompt-sampler-unknown"


@pytest.mark.full
@pytest.mark.fast_for("sdxl", "flux")
@pytest.mark.parametrize("only", ["unet", "text_encoder"])
def test_one_part_only(toy: Toy, images: Path, tmp_path: Path, only: str) -> None:
    on_request = only == "text_encoder" and toy["pretrained_model_name_or_path"].stem == "toy_chroma"
    asked = ["train_t5xxl=True"] if on_request else None  # its only encoder
    output = train_toy(toy, images, tmp_path, network_args=asked, **{f"network_train_{only}_only": True})
    prefix = "lora_unet_" if only == "unet" else "lora_te"
    assert all(name.startswith(prefix) for name in read_weights(output))


@pytest.mark.full
def test_going_on_from_weights(toy: Toy, images: Path, tmp_path: Path) -> None:
    first = train_toy(toy, images, tmp_path / "first", network_alpha=3)
    file = first / "lora.safetensors"
    second = train_toy(
        toy, images, tmp_path / "second", network_weights=file, dim_from_weights=True, learning_rate="1e-12"
    )
    before, after = read_weights(first), read_weights(second)
    assert set(before) == set(after)
    assert all(torch.allclose(before[name], after[name], atol=1e-7) for name in before)
    assert {float(tensor) for name, tensor in after.items() if name.endswith("alpha")} == {3.0}


@pytest.mark.full
@pytest.mark.fast_for("[sdxl", "[sd3")
def test_gradient_checkpointing_changes_nothing(toy: Toy, images: Path, tmp_path: Path) -> None:
    plain = train_toy(toy, images, tmp_path / "plain")
    less = train_toy(toy, images, tmp_path / "less", gradient_checkpointing=True)
    assert equal_tensors(read_weights(plain), read_weights(less))


@pytest.mark.fast_for("[sd]", "[flux")
def test_bf16(toy: Toy, images: Path, tmp_path: Path) -> None:
    output = train_toy(toy, images, tmp_path, mixed_precision="bf16", save_precision="fp16", max_train_steps=2)
    assert all(tensor.dtype == torch.float16 and tensor.isfinite().all() for tensor in read_weights(output).values())


@pytest.mark.full
def test_keeping_only_the_last_saves(sd: Toy, images: Path, tmp_path: Path) -> None:
    options = {"save_every_n_steps": 2, "save_last_n_steps": 4, "save_last_n_steps_state": 2, "save_state": True}
    train_toy(sd, images, tmp_path, max_train_steps=10, **options)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [
        "lora-state", "lora-step00000004.safetensors", "lora-step00000006-state", "lora-step00000006.safetensors",
        "lora-step00000008-state", "lora-step00000008.safetensors", *REPORT,
        "lora.run.jsonl", "lora.safetensors",
    ]  # fmt: skip


def test_metadata_keys_are_those_of_the_field(sd: Toy, images: Path, tmp_path: Path) -> None:
    golden = json.loads((Path(__file__).parent / "goldens" / "metadata_keys.json").read_text())
    found = metadata(train_toy(sd, images, tmp_path) / "lora.safetensors")
    conditions = golden["when"]
    wanted = set(golden["train_network_keys"]) - {"ss_datasets", "ss_network_args", "ss_vae_name", "ss_vae_hash"}
    wanted -= {"ss_new_vae_hash"}
    assert wanted == {name for name in found if name.startswith("ss_")}
    assert found["ss_network_dim"] == "2"
    assert found["ss_base_model_version"] == "sd_v1"
    assert conditions
    assert not any(str(tmp_path) in value or str(images) in value for value in found.values())


def test_captions_that_are_cut_are_reported_before_the_first_step(sd: Toy, tmp_path: Path, capfd) -> None:
    images = make_images(tmp_path / "images", 3)
    (images / "2_cat" / "1.txt").write_text("a cat, " * 60)
    train_toy(sd, images, tmp_path / "out", max_train_steps=1)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "captions" in line]
    assert all(value in line for value in ("1 of 3", "75 tokens", "180"))
    train_toy(sd, images, tmp_path / "out", max_train_steps=1, max_token_length=225)
    assert "captions" not in capfd.readouterr().err
