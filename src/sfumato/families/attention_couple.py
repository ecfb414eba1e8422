"""Attention Couple: a UNet whose rows are the parts of one image, each with a text and adapters of its own.

After every layer the features of all parts are combined, each with its weight at each place, so that all go on with the
same image: only what a layer makes of the text, or an adapter of the features, differs from part to part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


@contextmanager
def couple_parts(unet: Any, weights: Tensor) -> Iterator[None]:
    """A context in which a diffusers UNet combines the parts of a batch, (parts * B) rows, part after part.

    weights: (parts, 1, h, w), the share of each part at each place, 1 in all.
    """
    sizes: list[tuple[int, int]] = []  # (h, w) of the features whose places are the tokens of the layers to come

    def remember(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        features = args[0] if args else kwargs["hidden_states"]
        sizes[:] = [tuple(features.shape[-2:])]

    def combine(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        features = output if isinstance(output, Tensor) else output[0]
        mixed = mix_parts(features, weights, sizes[0] if features.dim() == 3 else None)
        return mixed if isinstance(output, Tensor) else (mixed, *output[1:])

    transformers, layers = list_coupled_layers(unet)
    handles = [layer.register_forward_pre_hook(remember, with_kwargs=True) for layer in transformers]
    handles += [layer.register_forward_hook(combine) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def mix_parts(features: Tensor, weights: Tensor, size: tuple[int, int] | None) -> Tensor:
    """Every part's rows become the weighted sum over the parts.

    features: (parts * B, C, h, w), or (parts * B, h * w, C) with this size, or (parts * B, C) without places, where a
    part counts by its share of the area.
    """
    rows = features.unflatten(0, (len(weights), -1))
    if features.dim() == 2:
        shares = weights.mean((1, 2, 3))[:, None, None]
    elif size is None:
        shares = F.adaptive_avg_pool2d(weights, (features.shape[-2], features.shape[-1]))[:, None]
    else:
        shares = F.adaptive_avg_pool2d(weights, size).flatten(2).transpose(1, 2)[:, None]
    mixed = (rows * shares.to(features)).sum(0, keepdim=True)
    return mixed.expand_as(rows).flatten(0, 1)


def list_coupled_layers(unet: Any) -> tuple[Sequence[nn.Module], Sequence[nn.Module]]:
    """The modules whose features become tokens, and all after which the parts are combined."""
    from diffusers.models.attention import FeedForward
    from diffusers.models.attention_processor import Attention
    from diffusers.models.downsampling import Downsample2D
    from diffusers.models.embeddings import TimestepEmbedding
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.transformers.transformer_2d import Transformer2DModel
    from diffusers.models.upsampling import Upsample2D

    kinds = (Attention, FeedForward, Downsample2D, TimestepEmbedding, ResnetBlock2D, Transformer2DModel, Upsample2D)
    modules = list(unet.modules())
    transformers = [module for module in modules if isinstance(module, Transformer2DModel)]
    return transformers, [*(module for module in modules if isinstance(module, kinds)), unet.conv_in, unet.conv_out]
