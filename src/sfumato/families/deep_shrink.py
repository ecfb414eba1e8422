"""Deep Shrink: a UNet whose features are smaller from some block on in the first steps, for images of large sizes.

Sizes beyond those that a model was trained with repeat their subject; with smaller features it is laid out once. The
blocks are counted as in original checkpoints (input_blocks): the first layer, then each layer and each downsampling.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DEFAULT_DEPTH, DEFAULT_TIMESTEP, DEFAULT_RATIO = 3, 650, 0.5


@dataclass(frozen=True, kw_only=True)
class DeepShrink:
    """Where and when; timesteps count from 1000 down to 0."""

    ds_depth_1: int = DEFAULT_DEPTH  # the input block before which features are made smaller
    ds_timesteps_1: int = DEFAULT_TIMESTEP  # down to this timestep
    ds_depth_2: int | None = None  # after that this one, down to the second timestep
    ds_timesteps_2: int = DEFAULT_TIMESTEP
    ds_ratio: float = DEFAULT_RATIO  # smaller side / larger side

    def find_depth(self, timestep: float) -> int | None:
        """The block at this timestep; None: none."""
        if timestep >= self.ds_timesteps_1:
            return self.ds_depth_1
        return self.ds_depth_2 if timestep >= self.ds_timesteps_2 else None


@contextmanager
def shrink_features(unet: Any, settings: DeepShrink) -> Iterator[None]:
    """A context in which a diffusers UNet makes its features smaller, and as large as its skip connections again."""
    inputs, outputs = list_input_blocks(unet), list_output_layers(unet)
    depth: list[int | None] = [None]  # at the timestep of this call
    skips: list[torch.Size] = []  # sizes (h, w) that the output blocks have still to join
    whole: list[torch.Size] = []  # the size of the input

    def start(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        depth[0] = settings.find_depth(float(kwargs["timestep"].flatten()[0]))
        skips.clear()
        whole[:] = [(args[0] if args else kwargs["sample"]).shape[-2:]]

    def shrink(number: int) -> Any:
        def change(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if depth[0] != number:
                return None
            smaller = F.interpolate(args[0].float(), scale_factor=settings.ds_ratio, mode="bicubic")
            return (smaller.to(args[0].dtype), *args[1:])

        return change

    def remember(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        skips.extend(state.shape[-2:] for state in ((output,) if isinstance(output, Tensor) else output[1]))

    def join(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return resize_like(output, skips.pop()) if skips and depth[0] is not None else None

    def finish(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return resize_like(output, whole[0])  # the first layer's input may have been made smaller

    handles = [unet.register_forward_pre_hook(start, with_kwargs=True), unet.register_forward_hook(finish)]
    handles += [layer.register_forward_pre_hook(shrink(number)) for number, layer in enumerate(inputs)]
    handles += [layer.register_forward_hook(remember) for layer in (unet.conv_in, *unet.down_blocks)]
    handles += [layer.register_forward_hook(join) for layer in outputs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def resize_like(output: Any, size: torch.Size) -> Any:
    """A layer's output, a tensor or a tuple that begins with it, with the features resized where their size differs."""
    features = output if isinstance(output, Tensor) else output[0]
    if features.shape[-2:] == size:
        return output
    larger = F.interpolate(features.float(), size=size, mode="bicubic").to(features.dtype)
    return larger if isinstance(output, Tensor) else (larger, *output[1:])


def list_input_blocks(unet: Any) -> Sequence[nn.Module]:
    """The first module of each input block."""
    blocks: list[nn.Module] = [unet.conv_in]
    for block in unet.down_blocks:
        blocks += [*block.resnets, *(block.downsamplers or ())]
    return blocks


def list_output_layers(unet: Any) -> Sequence[nn.Module]:
    """Every module whose output the next layer joins with a skip connection, in order: the middle comes first."""
    layers: list[nn.Module] = [unet.mid_block]
    for block in unet.up_blocks:
        steps: list[nn.Module] = list(block.attentions if hasattr(block, "attentions") else block.resnets)
        if block.upsamplers:
            steps[-1] = block.upsamplers[-1]
        layers += steps
    return layers[:-1]
