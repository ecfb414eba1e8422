"""Compiled blocks of diffusers' networks: graphs are as many as there are kinds of blocks, not as there are blocks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from sfumato.config.memory import MemoryOptions
from sfumato.families import _flux_keys, _unet
from sfumato.memory.blocks import wrap_blocks

WIDTH = 16
COMPILED = MemoryOptions(compile=True, compile_backend="count", gradient_checkpointing=True)


def make_flux(blocks: int) -> tuple[nn.Module, Callable[[], Tensor], tuple[str, ...]]:
    """A transformer of so many blocks of each kind; a call of it; its blocks.

    From the second single block on the input is part of a larger tensor, with other strides.
    """
    network = FluxTransformer2DModel(
        in_channels=4, num_layers=blocks, num_single_layers=blocks, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    inputs = {
        "hidden_states": torch.ones(2, 6, 4, dtype=torch.float64),
        "encoder_hidden_states": torch.ones(2, 3, WIDTH, dtype=torch.float64),
        "pooled_projections": torch.ones(2, WIDTH, dtype=torch.float64),
        "timestep": torch.tensor([0.1, 0.9], dtype=torch.float64),
        "img_ids": torch.arange(18.0).reshape(6, 3),
        "txt_ids": torch.zeros(3, 3),
    }
    return network, lambda: network(**inputs).sample, _flux_keys.spec("").blocks


def make_unet(blocks: int) -> tuple[nn.Module, Callable[[], Tensor], tuple[str, ...]]:
    """A UNet of two levels with so many blocks each; a call of it; its blocks.

    From the third block on no level has channels that its blocks before did not have.
    """
    network = UNet2DConditionModel(
        block_out_channels=(8, WIDTH), layers_per_block=blocks, cross_attention_dim=WIDTH, norm_num_groups=4,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    noisy = torch.arange(512.0, dtype=torch.float64).reshape(2, 4, 8, 8) / 512
    text = torch.ones(2, 3, WIDTH, dtype=torch.float64)
    return network, lambda: network(noisy, torch.tensor([1, 2]), text).sample, _unet.BLOCKS


def differentiate(network: nn.Module, call: Callable[[], Tensor]) -> dict[str, Tensor]:
    """The output, and every parameter's gradient."""
    network.zero_grad()
    output = call()
    output.square().sum().backward()
    gradients = {name: each.grad for name, each in network.named_parameters() if each.grad is not None}
    return {"": output.detach(), **gradients}


@pytest.mark.full
@pytest.mark.parametrize(("make", "counts", "most"), [(make_flux, (2, 4), 3), (make_unet, (3, 5), 12)])
def test_more_blocks_need_no_more_graphs(
    make: Callable[[int], tuple[nn.Module, Callable[[], Tensor], tuple[str, ...]]],
    counts: tuple[int, int],
    most: int,
    graphs: list[int],
) -> None:
    """And outputs and gradients are those of the plain network."""
    found: list[int] = []
    for blocks in counts:
        torch._dynamo.reset()
        graphs.clear()
        torch.manual_seed(0)
        network, call, patterns = make(blocks)
        network.double()
        plain = differentiate(network, call)
        wrapped = wrap_blocks(network, patterns, COMPILED)
        compiled = differentiate(network, call)
        assert len(wrapped.blocks) > blocks
        assert compiled.keys() == plain.keys()
        for name, value in plain.items():
            torch.testing.assert_close(compiled[name], value, rtol=1e-9, atol=1e-9, msg=name)
        found.append(len(graphs))
    assert found[0] == found[1] <= most
    assert torch._dynamo.utils.counters["frames"]["total"] == torch._dynamo.utils.counters["frames"]["ok"]
