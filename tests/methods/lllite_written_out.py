"""The versions of ControlNet-LLLite over the tensors of a file, as sd-scripts computes them, in functions of torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.formats.controlled import ControlledLayer

TRUNK = "lllite_conditioning1"


class VersionOne:
    """Every module reads the control image by itself."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def get(self, name: str) -> tuple[Tensor, Tensor]:
        return self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]

    def change(self, name: str, x: Tensor, image: Tensor) -> Tensor:
        """What is added to the input x (B, N, C) of a layer."""
        read = image
        for i in (i for i in (0, 2, 4) if f"{name}.conditioning1.{i}.weight" in self.tensors):
            weight, bias = self.get(f"{name}.conditioning1.{i}")
            read = F.conv2d(F.relu(read) if i else read, weight, bias, stride=weight.shape[-1])
        tokens = read.flatten(2).permute(0, 2, 1)
        down = F.relu(F.linear(x, *self.get(f"{name}.down.0")))
        middle = F.relu(F.linear(torch.cat([tokens, down], dim=2), *self.get(f"{name}.mid.0")))
        return F.linear(middle, *self.get(f"{name}.up.0"))


class VersionTwo:
    """One trunk reads it for all of them."""

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
        h = F.conv2d(h, *self.get(f"{TRUNK}.lat_conv2"), stride=2)
        return self.finish(F.silu(self.norm(h, f"{TRUNK}.lat_norm2")))

    def finish(self, h: Tensor) -> Tensor:
        number = 0
        while f"{TRUNK}.resblocks.{number}.conv1.weight" in self.tensors:
            block = f"{TRUNK}.resblocks.{number}"
            inner = F.conv2d(F.silu(self.norm(h, f"{block}.norm1")), *self.get(f"{block}.conv1"), padding=1)
            h = h + F.conv2d(F.silu(self.norm(inner, f"{block}.norm2")), *self.get(f"{block}.conv2"), padding=1)
            number += 1
        h = self.read_scales(h) if f"{TRUNK}.aspp.proj.0.weight" in self.tensors else h
        h = F.conv2d(h, *self.get(f"{TRUNK}.proj"))
        tokens = F.layer_norm(h.flatten(2).transpose(1, 2), h.shape[1:2], *self.get(f"{TRUNK}.out_norm"))
        return tokens.transpose(1, 2).reshape(h.shape)

    def read_scales(self, h: Tensor) -> Tensor:
        seen = []
        for number, dilation in enumerate((1, 2, 4, 8)):
            branch, around = f"{TRUNK}.aspp.branches.{number}", 0 if dilation == 1 else dilation
            wide = F.conv2d(h, *self.get(f"{branch}.0"), padding=around, dilation=dilation)
            seen.append(F.silu(self.norm(wide, f"{branch}.1")))
        whole = F.conv2d(F.adaptive_avg_pool2d(h, 1), *self.get(f"{TRUNK}.aspp.global_conv.0"))
        whole = F.silu(self.norm(whole, f"{TRUNK}.aspp.global_conv.1"))
        seen.append(F.interpolate(whole, size=h.shape[-2:], mode="bilinear"))
        h = F.conv2d(torch.cat(seen, 1), *self.get(f"{TRUNK}.aspp.proj.0"))
        return F.silu(self.norm(h, f"{TRUNK}.aspp.proj.1"))

    def resize(self, grid: Tensor, size: tuple[int, int]) -> Tensor:
        """To the tokens of a layer: (B, N, C)."""
        return F.interpolate(grid, size=size, mode="area").flatten(2).transpose(1, 2)

    def change(self, name: str, x: Tensor, seen: Tensor) -> Tensor:
        """Image tokens x (B, N, C), seen (B, N, image channels)."""
        seen = seen + self.tensors[f"{name}.depth_embed"]
        scale, shift = F.linear(seen, *self.get(f"{name}.cond_to_film")).chunk(2, dim=-1)
        middle = F.linear(
            torch.cat([seen, F.silu(F.linear(x, *self.get(f"{name}.down")))], -1), *self.get(f"{name}.mid")
        )
        return F.linear(F.silu(middle * (1 + scale) + shift), *self.get(f"{name}.up"))


Change = Callable[[ControlledLayer, Tensor], Tensor]


def find_change(tensors: Mapping[str, Tensor], control: Tensor, size: tuple[int, int]) -> Change:
    """What a file of any version adds to the tokens (B, N, C) of an image of this size that a layer reads.

    control: pixels, or the latents that version 2.1 reads.
    """
    if not any(name.startswith(f"{TRUNK}.") for name in tensors):
        one = VersionOne(tensors)
        return lambda layer, x: one.change(layer.name, x, control)
    two = VersionTwo(tensors)
    grid = two.read_latents(control) if f"{TRUNK}.lat_conv1.weight" in tensors else two.read_image(control)

    def change(layer: ControlledLayer, x: Tensor) -> Tensor:
        height, width = (-(-side // layer.token_side) for side in size)
        return two.change(layer.name, x, two.resize(grid, (height, width)))

    return change


@contextmanager
def changed_inputs(
    network: nn.Module, layers: Mapping[str, ControlledLayer], change: Change, size: tuple[int, int], text: int
) -> Iterator[None]:
    """A context in which the layers read what a file makes of their inputs. layers: those of the file. size: of the
    image. text: tokens before those of the image.
    """
    handles = []
    for layer in layers.values():

        def add(module: nn.Module, args: tuple[Any, ...], layer: ControlledLayer = layer) -> tuple[Any, ...]:
            start = text if layer.follows_text else 0
            count = math.prod(-(-side // layer.token_side) for side in size)
            before, own, after = args[0].tensor_split((start, start + count), dim=1)
            return (torch.cat([before, own + change(layer, own), after], dim=1), *args[1:])

        handles.append(network.get_submodule(layer.path).register_forward_pre_hook(add))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
