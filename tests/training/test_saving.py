"""When and in which formats a run saves: the files that are there in the end, as other programs read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from families.toys import ToyShelf
from sfumato.cli.main import main
from sfumato.formats.checkpoint import open_checkpoint
from toy_runs import equal_tensors, make_images, read_weights, train_toy


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return make_images(tmp_path / "images", 2)


@pytest.mark.parametrize("kind", ["pt", pytest.param("ckpt", marks=pytest.mark.full)])
def test_an_adapter_as_torch_pickles_it(kind: str, toy_shelf: ToyShelf, tmp_path: Path, images: Path) -> None:
    """A flat dict of tensors that torch reads without trust, the same as in safetensors; training goes on from it."""
    toy, options = toy_shelf.paths("sd"), {"max_train_steps": 2, "save_precision": "fp16", "save_every_n_steps": 1}
    plain = train_toy(toy, images, tmp_path / "plain", **options)
    output = train_toy(toy, images, tmp_path / "out", **options, save_model_as=kind)
    assert sorted(path.name for path in output.iterdir() if path.suffix == f".{kind}") == [
        f"lora-step00000001.{kind}", f"lora.{kind}",
    ]  # fmt: skip
    found = torch.load(output / f"lora.{kind}", weights_only=True)
    assert equal_tensors(found, read_weights(plain))
    assert {tensor.dtype for tensor in found.values()} == {torch.float16}
    given = {"dim_from_weights": True, "learning_rate": "1e-12", "max_train_steps": 1, "network_dim": None}
    more = train_toy(toy, images, tmp_path / "more", network_weights=output / f"lora.{kind}", **given)
    assert all(torch.allclose(tensor, found[name].float(), atol=1e-7) for name, tensor in read_weights(more).items())


@pytest.mark.full
@pytest.mark.parametrize("layout", ["original", "diffusers"])
def test_a_whole_model_as_torch_pickles_it(layout: Any, toy_shelf: ToyShelf, tmp_path: Path, images: Path) -> None:
    """The tensors of the safetensors file, under state_dict, with the epoch and step beside them; it can be read."""
    toy = toy_shelf.paths("sd", layout)
    words = [path for name, path in toy_shelf.paths("sd").items() if name.startswith("tokenizer")]
    options = {"method": "full", "network_dim": None, "max_train_steps": 2, "tokenizer": words}
    plain = train_toy(toy, images, tmp_path / "plain", **options, save_model_as="safetensors")
    output = train_toy(toy, images, tmp_path / "out", **options, save_model_as="ckpt", save_state=True)
    found = torch.load(output / "lora.ckpt", weights_only=True)
    assert equal_tensors(found["state_dict"], read_weights(plain))
    assert (found["epoch"], found["global_step"]) == (1, 2)
    assert found["modelspec.architecture"] == "stable-diffusion-v1"
    assert not [path for path in output.iterdir() if path.suffix == ".tmp"]
    with open_checkpoint(output / "lora.ckpt") as file:
        assert file.header.metadata["ss_steps"] == "2"
    words = [str(word) for word in ("--tokenizer", *words)]
    argv = ["generate", "--ckpt", str(output / "lora.ckpt"), *words, "--prompt", "a cat --w 64 --h 64 --s 1"]
    assert main([*argv, "--outdir", str(tmp_path / "drawn")]) == 0


@pytest.mark.full
def test_saves_after_listed_steps_and_epochs(toy_shelf: ToyShelf, tmp_path: Path, images: Path) -> None:
    """They stay though older ones go; the last step and what lies behind the end need no save of their own."""
    output = train_toy(
        toy_shelf.paths("sd"), images, tmp_path / "out", max_train_steps=10, save_at_steps=[1, 4, 10, 50],
        save_at_epochs=[1], save_every_n_steps=2, save_last_n_steps=1, save_state=True,
    )  # fmt: skip
    names = [path.name.removesuffix(".safetensors") for path in output.iterdir()]
    saves = sorted(name for name in names if "report" not in name and "run.json" not in name)
    kept = ["lora", "lora-000001", "lora-step00000001", "lora-step00000004", "lora-step00000008"]
    assert saves == sorted([*kept, *(f"{name}-state" for name in kept)])


@pytest.mark.full
def test_a_state_at_the_end_alone(toy_shelf: ToyShelf, tmp_path: Path, images: Path) -> None:
    """The state of --save_state_on_train_end goes on where one that was saved on the way does."""
    toy = toy_shelf.paths("sd")
    output = train_toy(
        toy, images, tmp_path / "out", max_train_steps=3, save_every_n_steps=1, save_state_on_train_end=True
    )
    states = [path.name for path in output.iterdir() if path.name.endswith("-state")]
    assert states == ["lora-state"]
    on = train_toy(toy, images, tmp_path / "on", max_train_steps=5, resume=output / "lora-state")
    assert equal_tensors(
        read_weights(on), read_weights(train_toy(toy, images, tmp_path / "straight", max_train_steps=5))
    )


def test_what_is_kept_is_said_before_the_first_step(toy_shelf: ToyShelf, tmp_path: Path, images: Path) -> None:
    log = tmp_path / "log.txt"
    train_toy(
        toy_shelf.paths("sd"), images, tmp_path / "out", max_train_steps=2, save_at_steps=[1], save_every_n_epochs=1,
        save_last_n_epochs=2, console_log_level="INFO", console_log_file=log,
    )  # fmt: skip
    told = log.read_text()
    for line in ("saving every epoch; the last 2 epochs are kept", "saving after step 1; these are kept"):
        assert 0 < told.index(line) < told.index("saved ")
