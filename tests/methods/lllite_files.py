"""Help for tests of LLLite's second version: files whose weights are drawn, and its structure written out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from sfumato.adapters.control_modules import ControlModules
from sfumato.adapters.lllite_file import read_lllite_file
from sfumato.adapters.lllite_shared import SharedLLLite
from sfumato.adapters.lllite_trunk import LLLiteSizes
from sfumato.families.base import Family

TRUNK = "lllite_conditioning1"


def read_layers(model: Family, file: Path) -> ControlModules:
    list_layers = type(model).list_controlled_layers
    assert list_layers is not None
    return read_lllite_file(file, list_layers(model.blueprint), model.latents)


def write_drawn_file(model: Family, path: Path, **more: Any) -> Path:
    """Modules of every layer of the model, all of whose weights are drawn. more: sizes of the trunk."""
    list_layers = type(model).list_controlled_layers
    assert list_layers is not None
    sizes = LLLiteSizes(width=8, image_width=4, trunk_width=6, residual_blocks=2, has_pyramid=True, **more)
    made = SharedLLLite(list_layers(model.blueprint), sizes)
    draw = torch.Generator().manual_seed(2)
    state = {name: torch.randn(tensor.shape, generator=draw) / 3 for name, tensor in made.parts.state_dict().items()}
    save_file(state, path)
    return path


class WrittenOut:
    """sd-scripts' structure over the tensors of a file, in functions of torch."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def get(self, name: str) -> tuple[Tensor, Tensor]:
        return self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]

    def norm(self, x: Tensor, name: str) -> Tensor:
        channels = x.shape[1]
        groups = next(g for g in (8, 4, 2, 1) if channels % g == 0)
        return F.group_norm(x, groups, *self.get(name))

    def read_image(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C, H / 16, W / 16)"""
        h = F.silu(self.norm(F.conv2d(image, *self.get(f"{TRUNK}.conv1"), stride=4), f"{TRUNK}.norm1"))
        h = F.silu(self.norm(F.conv2d(h, *self.get(f"{TRUNK}.conv2"), padding=1), f"{TRUNK}.norm2"))
        h = F.silu(self.norm(F.conv2d(h, *self.get(f"{TRUNK}.conv3"), stride=4), f"{TRUNK}.norm3"))
        return self.finish(h)

    def read_latents(self, latents: Tensor, mask: Tensor | None = None) -> Tensor:
        """Version 2.1: (B, C, 2 h, 2 w) and a mask (B, 1, 16 h, 16 w) of 1 and -1 -> (B, C, h, w)"""
        if mask is not None:
            m = F.silu(F.conv2d(mask, *self.get(f"{TRUNK}.mask_conv1"), stride=2))
            m = F.silu(F.conv2d(m, *self.get(f"{TRUNK}.mask_conv2"), stride=2, padding=1))
            latents = torch.cat([latents, F.conv2d(m, *self.get(f"{TRUNK}.mask_conv3"), stride=2, padding=1)], 1)
        h = F.silu(self.norm(F.conv2d(latents, *self.get(f"{TRUNK}.lat_conv1"), padding=1), f"{TRUNK}.lat_norm1"))
        return self.finish(
            F.silu(self.norm(F.conv2d(h, *self.get(f"{TRUNK}.lat_conv2"), stride=2), f"{TRUNK}.lat_norm2"))
        )

    def finish(self, h: Tensor) -> Tensor:
        for number in range(2):
            block = f"{TRUNK}.resblocks.{number}"
            inner = F.conv2d(F.silu(self.norm(h, f"{block}.norm1")), *self.get(f"{block}.conv1"), padding=1)
            h = h + F.conv2d(F.silu(self.norm(inner, f"{block}.norm2")), *self.get(f"{block}.conv2"), padding=1)
        seen = []
        for number, dilation in enumerate((1, 2, 4, 8)):
            branch, around = f"{TRUNK}.aspp.branches.{number}", 0 if dilation == 1 else dilation
            wide = F.conv2d(h, *self.get(f"{branch}.0"), padding=around, dilation=dilation)
            seen.append(F.silu(self.norm(wide, f"{branch}.1")))
        whole = F.conv2d(F.adaptive_avg_pool2d(h, 1), *self.get(f"{TRUNK}.aspp.global_conv.0"))
        whole = F.silu(self.norm(whole, f"{TRUNK}.aspp.global_conv.1"))
        seen.append(F.interpolate(whole, size=h.shape[-2:], mode="bilinear"))
        h = F.conv2d(torch.cat(seen, 1), *self.get(f"{TRUNK}.aspp.proj.0"))
        h = F.conv2d(F.silu(self.norm(h, f"{TRUNK}.aspp.proj.1")), *self.get(f"{TRUNK}.proj"))
        tokens = F.layer_norm(h.flatten(2).transpose(1, 2), h.shape[1:2], *self.get(f"{TRUNK}.out_norm"))
        return tokens.transpose(1, 2).reshape(h.shape)

    def change(self, name: str, x: Tensor, seen: Tensor) -> Tensor:
        """Image tokens x (B, N, C), seen (B, N, image channels)."""
        seen = seen + self.tensors[f"{name}.depth_embed"]
        scale, shift = F.linear(seen, *self.get(f"{name}.cond_to_film")).chunk(2, dim=-1)
        middle = F.linear(
            torch.cat([seen, F.silu(F.linear(x, *self.get(f"{name}.down")))], -1), *self.get(f"{name}.mid")
        )
        return F.linear(F.silu(middle * (1 + scale) + shift), *self.get(f"{name}.up"))
