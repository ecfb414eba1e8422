"""Files of LoKr and DoRA by other programs: a model with the file gives what the writer meant, compared by outputs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from families.toys import ToyShelf
from others.models import assert_same_output, changed, compute_output, compute_with_file, list_layers, load_toy
from others.test_libraries import other_network
from sfumato.families.base import Family

FLUX = ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k", "transformer_blocks.0.ff.net.0.proj",
        "single_transformer_blocks.0.attn.to_v", "single_transformer_blocks.0.proj_out")  # fmt: skip


@pytest.fixture(scope="module")
def flux(toy_shelf: ToyShelf) -> Family:
    return load_toy(toy_shelf, "flux")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) + seed)) * 0.2


def multiply(first: Tensor, second: Tensor) -> Tensor:
    """The Kronecker product, of kernels too."""
    return torch.kron(first.reshape(*first.shape, *[1] * (second.ndim - 2)), second.contiguous())


def draw_lokr(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a LoKr of rank 2 with alpha 3, and its change of the weight."""
    rows, columns, *kernel = weight.shape
    first, a, b = draw(4, 4), draw(rows // 4, 2), draw(2, columns // 4, *kernel, seed=1)
    tensors = {"lokr_w1": first, "lokr_w2_a": a, "lokr_w2_b": b.flatten(1), "alpha": torch.tensor(3.0)}
    return tensors, 1.5 * multiply(first, torch.einsum("kr,r...->k...", a, b))


def decompose(weight: Tensor, delta: Tensor, scale: Tensor) -> Tensor:
    """DoRA's change: the lengths of W + D are `scale`, along the axes where it has 1."""
    whole = weight + delta
    axes = [axis for axis in range(whole.ndim) if scale.shape[axis] == 1]
    return whole * scale / whole.square().sum(dim=axes, keepdim=True).sqrt() - weight


@pytest.mark.parametrize("rows", [None, True, False])
def test_lycoris_wrapper_in_diffusers_names(rows: bool | None, flux: Family, tmp_path: Path) -> None:
    """Layers that are fused in the original have products of their own; with lengths of rows, or of columns."""
    state: dict[str, Tensor] = {}
    deltas: dict[str, Tensor] = {}
    for path, layer in list_layers(flux.denoiser, list(FLUX)).items():
        weight = layer.weight.detach()
        tensors, delta = draw_lokr(weight)
        if rows is not None:
            scale = draw(len(weight), 1).abs() + 1 if rows else draw(1, weight.shape[1]).abs() + 1
            tensors["dora_scale"], delta = scale, decompose(weight, delta, scale)
        deltas[path] = delta
        state |= {f"lycoris_{path.replace('.', '_')}.{name}": tensor for name, tensor in tensors.items()}
    save_file(state, tmp_path / "a.safetensors")
    plain = compute_output(flux)
    with changed(flux.denoiser, deltas):
        expected = compute_output(flux)
    assert_same_output(compute_with_file(flux, tmp_path / "a.safetensors"), expected, plain)


def test_old_lengths_of_a_fused_layer(flux: Family, tmp_path: Path) -> None:
    """LyCORIS before 3.0 on the original's fused qkv: one length of each column over all three layers."""
    paths = [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"]
    weights = [layer.weight.detach() for layer in list_layers(flux.denoiser, paths).values()]
    stacked = torch.cat(weights)
    down, up, scale = draw(3, stacked.shape[1]), draw(len(stacked), 3), draw(1, stacked.shape[1]).abs() + 1
    delta = decompose(stacked, up @ down / 3, scale)
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    save_file(
        {
            f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.dora_scale": scale,
            f"{name}.alpha": torch.tensor(1.0),
        },
        tmp_path / "a.safetensors",
    )  # fmt: skip
    plain = compute_output(flux)
    with changed(flux.denoiser, dict(zip(paths, delta.split([len(w) for w in weights]), strict=True))):
        expected = compute_output(flux)
    assert_same_output(compute_with_file(flux, tmp_path / "a.safetensors"), expected, plain)


def test_convolutions_of_lycoris(toy_shelf: ToyShelf, tmp_path: Path) -> None:
    """In the kohya format; the kernel is flattened in the file."""
    model = load_toy(toy_shelf, "sd")
    state: dict[str, Tensor] = {}
    deltas: dict[str, Tensor] = {}
    for path in ("down_blocks.0.resnets.0.conv1", "mid_block.attentions.0.proj_in"):
        layer: Any = model.denoiser.get_submodule(path)
        tensors, deltas[path] = draw_lokr(layer.weight.detach())
        scale = draw(len(layer.weight), *[1] * (layer.weight.ndim - 1)).abs() + 1
        deltas[path] = decompose(layer.weight.detach(), deltas[path], scale)
        tensors["dora_scale"] = scale
        state |= {f"lora_unet_{path.replace('.', '_')}.{name}": tensor for name, tensor in tensors.items()}
    save_file(state, tmp_path / "a.safetensors")
    plain = compute_output(model)
    with changed(model.denoiser, deltas):
        expected = compute_output(model)
    assert_same_output(compute_with_file(model, tmp_path / "a.safetensors"), expected, plain)


@pytest.mark.parametrize("options", [
    {"r": 2, "alpha": 3}, {"r": 100, "alpha": 50}, {"r": 2, "alpha": 3, "decompose_both": True, "decompose_factor": 4},
    {"r": 100, "alpha": 50, "rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_k": 20}},
])  # fmt: skip
def test_lokr_folders_of_peft(options: dict[str, Any], flux: Family, tmp_path: Path) -> None:
    """Its scale is in adapter_config.json, for two whole matrices, too."""
    peft = pytest.importorskip("peft")
    module = copy.deepcopy(flux.denoiser)
    adapted: Any = peft.get_peft_model(module, peft.LoKrConfig(target_modules=["to_q", "to_k", "proj_out"], **options))
    for i, (name, parameter) in enumerate(adapted.named_parameters()):
        if "lokr" in name:
            nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(i))
    adapted.save_pretrained(tmp_path)
    with other_network(flux, "denoiser", adapted.base_model.model):
        expected = compute_output(flux)
    assert_same_output(compute_with_file(flux, tmp_path), expected, compute_output(flux))
