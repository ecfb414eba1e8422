"""Attention stays in the compute dtype where autocast widens norms, as it does on CUDA and not on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rehearsing import needs_rehearsal, rehearsal
from sfumato.demo import toy_flux
from sfumato.families import _flux_keys
from sfumato.families._attention_norms import ATTENTION_NORMS, keep_attention_dtype
from sfumato.memory.rehearsal.device import Rehearsal

__all__ = ["rehearsal"]
BF16, F32 = torch.bfloat16, torch.float32


def make_network() -> Any:
    torch.manual_seed(0)
    return _flux_keys.build(toy_flux.make_flux_config(False)).requires_grad_(False)


def list_norms(network: nn.Module) -> list[nn.Module]:
    return [module for name, module in network.named_modules() if name.rpartition(".")[2] in ATTENTION_NORMS]


def make_inputs(device: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    draw, config = torch.Generator().manual_seed(1), toy_flux.make_flux_config(False)
    sizes = {
        "hidden_states": (1, 16, config["in_channels"]),
        "encoder_hidden_states": (1, 4, config["joint_attention_dim"]),
        "pooled_projections": (1, config["pooled_projection_dim"]),
    }
    inputs = {name: torch.randn(size, generator=draw).to(dtype) for name, size in sizes.items()}
    ids = torch.arange(16).view(16, 1).expand(16, 3).to(dtype)
    inputs |= {"img_ids": ids, "txt_ids": torch.zeros(4, 3, dtype=dtype), "timestep": torch.tensor([0.5])}
    return {name: tensor.to(device) for name, tensor in inputs.items()}


@needs_rehearsal
@pytest.mark.parametrize(("hooked", "dtype"), [(True, BF16), (False, F32)])
def test_attention_gives_the_compute_dtype(rehearsal: Rehearsal, hooked: bool, dtype: torch.dtype) -> None:
    """Under CUDA's autocast rules; without the hooks diffusers' attention gives float32."""
    network = make_network().to(rehearsal.device, BF16)
    if not hooked:
        for norm in list_norms(network):
            norm._forward_hooks.clear()
    seen: list[torch.dtype] = []
    for block in network.single_transformer_blocks:
        block.attn.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    with torch.autocast(rehearsal.device.type, BF16):
        network(**make_inputs(rehearsal.device, BF16))
    assert set(seen) == {dtype}


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_nothing_changes_without_autocast(dtype: torch.dtype) -> None:
    """Bit for bit what diffusers' own network gives."""
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

    ours = make_network().to(dtype)
    theirs: Any = FluxTransformer2DModel.from_config(toy_flux.make_flux_config(False))
    theirs.load_state_dict(ours.state_dict())
    theirs = theirs.to(dtype)
    inputs = make_inputs("cpu", dtype)
    inputs["timestep"] = torch.tensor([0.0], dtype=dtype)  # no time is rounded
    with torch.no_grad():
        assert torch.equal(ours(**inputs).sample, theirs(**inputs).sample)


def test_predictions_are_no_worse_than_with_float32_norms() -> None:
    """Against the network in float64, CUDA's way and this one differ by the rounding of bfloat16 alone."""
    exact, narrow, wide = make_network().double(), make_network().to(BF16), make_network().to(BF16)
    exact.load_state_dict(narrow.state_dict())
    for norm in list_norms(wide):  # as autocast on CUDA does
        norm._forward_hooks.clear()
        norm.float().register_forward_pre_hook(lambda module, args: (args[0].float(),))
    with torch.no_grad():
        target = exact(**make_inputs("cpu", torch.float64)).sample
        errors: list[float] = []
        for network in (narrow, wide):
            with torch.autocast("cpu", BF16):
                errors.append(float((network(**make_inputs("cpu", BF16)).sample - target).norm() / target.norm()))
    assert 0 < errors[0] < 1.25 * errors[1]
    assert errors[0] < 4 * torch.finfo(BF16).eps


def test_other_norms_are_left_alone() -> None:
    network = nn.ModuleDict({"norm_q": nn.RMSNorm(4), "norm_added_k": nn.RMSNorm(4), "norm_out": nn.RMSNorm(4)})
    keep_attention_dtype(network)
    hooked = {name for name, norm in network.items() if norm._forward_hooks}
    assert hooked == {"norm_q", "norm_added_k"}
