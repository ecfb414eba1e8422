"""Kinds of adapters in files: a file of another kind is named, metadata, and `sfumato lora convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from families.toys import ToyShelf
from others.models import compute_output, compute_with_file, load_toy
from sfumato.cli.main import main
from sfumato.errors import UserError
from sfumato.families.base import Family
from toy_runs import build_toy_run, make_images, train_toy

LYCORIS = "lycoris.kohya"
LOKR: dict[str, Any] = {"network_module": "networks.lokr", "network_args": ["factor=4"]}
DORA: dict[str, Any] = {"network_module": LYCORIS, "network_args": ["algo=locon", "dora_wd=True", "conv_dim=1"]}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"), 3)


def test_a_file_of_another_kind_is_named(toy_shelf: ToyShelf, images: Path, tmp_path: Path) -> None:
    toy = toy_shelf.paths("flux")
    train_toy(toy, images, tmp_path / "a", max_train_steps=1, **LOKR)
    file = tmp_path / "a" / "lora.safetensors"
    with pytest.raises(UserError) as error:
        build_toy_run(toy, images, tmp_path / "b", network_weights=file)
    assert error.value.code == "network-weights-of-other-kind"
    assert "--network_module lokr" in error.value.fix


@pytest.mark.full
def test_lora_convert(toy_shelf: ToyShelf, images: Path, tmp_path: Path, codes: list[str]) -> None:
    """diffusers loads DoRA with the same output, PEFT's kinds alone; what it does not know is refused."""
    from diffusers import DiffusionPipeline

    toy = toy_shelf.paths("flux")
    options = {"network_train_unet_only": True, "max_train_steps": 2, "learning_rate": "1e-2"}
    train_toy(toy, images, tmp_path / "dora", network_args=["dora_wd=True"], **options)
    source, target = tmp_path / "dora" / "lora.safetensors", tmp_path / "theirs.safetensors"
    assert main(["lora", "convert", str(source), str(target), "--to", "diffusers"]) == 0
    model = load_toy(toy_shelf, "flux")
    plain, ours = compute_output(model), compute_with_file(model, source)
    pipe: Any = DiffusionPipeline.from_pretrained(toy_shelf.paths("flux", "diffusers")["pretrained_model_name_or_path"])
    pipe.load_lora_weights(tmp_path, weight_name="theirs.safetensors")
    with other_denoiser(model, pipe.transformer):
        torch.testing.assert_close(compute_output(model), ours, rtol=0, atol=1e-5 * float(ours.abs().max()))
    assert (ours - plain).abs().max() > 1e-4
    train_toy(toy, images, tmp_path / "lokr", **LOKR | options)
    source = tmp_path / "lokr" / "lora.safetensors"
    assert main(["lora", "convert", str(source), str(tmp_path / "no.safetensors"), "--to", "diffusers"]) == 2
    assert codes == ["export-kind-unknown"]
    assert not (tmp_path / "no.safetensors").exists()


def other_denoiser(model: Family, network: Any) -> Any:
    from others.test_libraries import other_network

    return other_network(model, "denoiser", network)


def test_the_metadata_name_module_and_arguments(toy_shelf: ToyShelf, images: Path, tmp_path: Path) -> None:
    train_toy(toy_shelf.paths("sd"), images, tmp_path, max_train_steps=1, **DORA)
    with safe_open(tmp_path / "lora.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_network_module"] == LYCORIS
    assert '"dora_wd": "True"' in metadata["ss_network_args"]
