"""LoRA that PEFT and diffusers have written themselves: our networks give with them what those libraries' give."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from families.toys import ToyShelf
from others.models import assert_same_output, compute_output, compute_with_file, load_toy
from sfumato.adapters.kinds import read_adapter_file
from sfumato.errors import UserError
from sfumato.families.base import Family

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


@pytest.fixture(
    scope="module", params=["flux", *(pytest.param(name, marks=pytest.mark.full) for name in ("sd", "sd3", "lumina"))]
)
def model(request: pytest.FixtureRequest, toy_shelf: ToyShelf) -> Family:
    return load_toy(toy_shelf, request.param)


@pytest.fixture(scope="module")
def flux(toy_shelf: ToyShelf) -> Family:
    return load_toy(toy_shelf, "flux")


def draw_lora(module: nn.Module, *, std: float = 0.2) -> None:
    """Values for the LoRA that PEFT has added, whose second matrices are zero at first."""
    with torch.no_grad():
        for i, (name, parameter) in enumerate(module.named_parameters()):
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)) * std)


@contextmanager
def other_network(model: Family, part: str, network: nn.Module) -> Iterator[None]:
    """A context with another network in the place of a part's own."""
    own = model.parts[part].module
    model.parts[part]._module = network
    try:
        yield
    finally:
        model.parts[part]._module = own


def save_with_peft(model: Family, part: str, folder: Path, **config: Any) -> Any:
    """A folder of PEFT's, and what the network gives with PEFT's own layers."""
    from peft import LoraConfig, get_peft_model

    module: Any = copy.deepcopy(model.parts[part].module)
    adapted: Any = get_peft_model(module, LoraConfig(**config))
    draw_lora(adapted)
    adapted.save_pretrained(folder)
    with other_network(model, part, adapted.base_model.model):
        return compute_output(model, part)


CONFIGS: dict[str, Mapping[str, Any]] = {
    "alpha": {"r": 4, "lora_alpha": 6},
    "rank stabilized": {"r": 4, "lora_alpha": 3, "use_rslora": True},
    "patterns": {
        "r": 4, "lora_alpha": 6, "rank_pattern": {"to_q": 2, "to_out.0": 3}, "alpha_pattern": {"to_v": 1, "to_q": 5},
    },
    "DoRA": {"r": 4, "lora_alpha": 6, "use_dora": True},
    "fan in": {"r": 2, "lora_alpha": 2, "fan_in_fan_out": False},
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_peft_folders(name: str, model: Family, tmp_path: Path) -> None:
    expected = save_with_peft(model, "denoiser", tmp_path, target_modules=ATTENTION, **CONFIGS[name])
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert_same_output(compute_with_file(model, tmp_path), expected, compute_output(model))
    file = tmp_path / "adapter_model.safetensors"  # named itself: the configuration is beside it
    assert_same_output(compute_with_file(model, file), expected, compute_output(model))


def test_a_peft_folder_of_a_text_encoder(flux: Family, tmp_path: Path) -> None:
    expected = save_with_peft(flux, "clip_l", tmp_path, target_modules=["q_proj", "fc1"], r=3, lora_alpha=5)
    assert_same_output(compute_with_file(flux, tmp_path, "clip_l"), expected, compute_output(flux, "clip_l"))


def test_folders_of_several_networks(flux: Family, tmp_path: Path) -> None:
    """One folder each, whose names say what they are for."""
    save_with_peft(flux, "denoiser", tmp_path / "transformer", target_modules=ATTENTION, r=2, lora_alpha=3)
    expected = save_with_peft(flux, "clip_l", tmp_path / "text_encoder", target_modules=["q_proj"], r=2, lora_alpha=4)
    assert_same_output(compute_with_file(flux, tmp_path, "clip_l"), expected, compute_output(flux, "clip_l"))
    layers = read_adapter_file(tmp_path).layers
    assert {name.partition(".")[0] for name in layers} == {"transformer", "text_encoder"}
    assert float(layers["transformer.transformer_blocks.0.attn.to_q"]["alpha"]) == 3


@pytest.mark.parametrize(("peft", "code"), [
    ({"lora_bias": True}, "adapter-kind-unsupported"),
    ({"modules_to_save": ["x_embedder"]}, "adapter-with-whole-weights"),
    ({"init_lora_weights": "olora"}, "peft-init-changes-model"),
])  # fmt: skip
def test_peft_folders_that_need_more(peft: Mapping[str, Any], code: str, flux: Family, tmp_path: Path) -> None:
    save_with_peft(flux, "denoiser", tmp_path, target_modules=["to_q"], r=2, **peft)
    with pytest.raises(UserError) as error:
        read_adapter_file(tmp_path)
    assert (error.value.code, str(tmp_path) in str(error.value)) == (code, True)


@pytest.mark.parametrize("metadata", [False, True])
@pytest.mark.parametrize(
    "family", ["flux", *(pytest.param(name, marks=pytest.mark.full) for name in ("sd", "sdxl", "sd3", "lumina"))]
)
def test_diffusers_savers(family: str, metadata: bool, toy_shelf: ToyShelf, tmp_path: Path) -> None:
    """Without its own metadata alpha is the rank; with them it is what they say."""
    from diffusers import DiffusionPipeline
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig, get_peft_model_state_dict

    model = load_toy(toy_shelf, family)
    folder = toy_shelf.paths(family, "diffusers")["pretrained_model_name_or_path"]
    pipe: Any = DiffusionPipeline.from_pretrained(folder)
    name = type(model).components["denoiser"].folder
    network: Any = copy.deepcopy(model.denoiser)
    network.add_adapter(LoraConfig(r=4, lora_alpha=6 if metadata else 4, target_modules=ATTENTION))
    draw_lora(network)
    layers = {f"{name}_lora_layers": get_peft_model_state_dict(network)}
    facts = _collate_lora_metadata({name: network}) if metadata else {}
    type(pipe).save_lora_weights(tmp_path, **layers, **facts)
    plain = compute_output(model)
    with other_network(model, "denoiser", network):
        expected = compute_output(model)
    assert_same_output(compute_with_file(model, tmp_path), expected, plain)


def test_diffusers_loads_from_the_same_file(flux: Family, toy_shelf: ToyShelf, tmp_path: Path) -> None:
    """A file with alpha as tensors beside the matrices, by diffusers' own pipeline."""
    from diffusers import DiffusionPipeline

    folder = toy_shelf.paths("flux", "diffusers")["pretrained_model_name_or_path"]
    state: dict[str, torch.Tensor] = {}
    for path in ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.proj_mlp"):
        weight: Any = flux.denoiser.get_submodule(path).weight
        state[f"transformer.{path}.lora_A.weight"] = torch.randn(4, weight.shape[1]) * 0.3
        state[f"transformer.{path}.lora_B.weight"] = torch.randn(len(weight), 4) * 0.3
        state[f"transformer.{path}.alpha"] = torch.tensor(2.0)
    save_file(state, tmp_path / "a.safetensors")
    pipe: Any = DiffusionPipeline.from_pretrained(folder)
    pipe.load_lora_weights(tmp_path, weight_name="a.safetensors")
    plain = compute_output(flux)
    found = compute_with_file(flux, tmp_path / "a.safetensors")
    with other_network(flux, "denoiser", pipe.transformer):
        expected = compute_output(flux)
    assert_same_output(found, expected, plain)


def test_what_diffusers_stores_is_read_as_it_reads_it(tmp_path: Path) -> None:
    """Several networks in one file, each with an alpha of its own."""
    keys = {"transformer.a.b": 4, "text_encoder.c.d": 2}
    state: dict[str, torch.Tensor] = {}
    for key, rank in keys.items():
        state |= {f"{key}.lora_A.weight": torch.ones(rank, 3), f"{key}.lora_B.weight": torch.ones(5, rank)}
    facts = {"transformer.lora_alpha": 8, "transformer.r": 4, "text_encoder.lora_alpha": 3, "text_encoder.r": 2,
             "text_encoder.alpha_pattern": {"c.d": 7}}  # fmt: skip
    save_file(state, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(facts)})
    layers = read_adapter_file(tmp_path / "a.safetensors").layers
    assert {name: float(tensors["alpha"]) for name, tensors in layers.items()} == {
        "transformer.a.b": 8.0, "text_encoder.c.d": 7.0,
    }  # fmt: skip
    assert len(load_file(tmp_path / "a.safetensors")) == 4
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert "lora_adapter_metadata" in file.metadata()
