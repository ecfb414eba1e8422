"""Chroma's transformer: FLUX.1's blocks, modulated by a small network of its own instead of a layer in each."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from sfumato.families import _flux_keys
from sfumato.families._flux_parts import Transformer, keep_time_exact
from sfumato.families.base import PartSpec
from sfumato.formats.keymap import KeyMap, Rule

APPROXIMATOR = "distilled_guidance_layer"
RULES = (
    *_flux_keys.BLOCK_RULES,
    *(Rule(f"{APPROXIMATOR}.{name}", (f"{APPROXIMATOR}.{name}",)) for name in ("in_proj", "out_proj")),
    Rule(f"{APPROXIMATOR}.layers.{{n}}.in_layer", (f"{APPROXIMATOR}.layers.{{n}}.linear_1",)),
    Rule(f"{APPROXIMATOR}.layers.{{n}}.out_layer", (f"{APPROXIMATOR}.layers.{{n}}.linear_2",)),
    Rule(f"{APPROXIMATOR}.norms.{{n}}.scale", (f"{APPROXIMATOR}.norms.{{n}}.weight",)),
)
KEYS = KeyMap(RULES)
# img and txt; the approximator stands where FLUX.1 has time, vector and guidance, and is not adapted.
IN_TARGETS = ("x_embedder", "time_in", "vector_in", "guidance_in", "context_embedder")


def spec(prefix: str) -> PartSpec:
    return _flux_keys.part(prefix, KEYS, IN_TARGETS, _flux_keys.BLOCK_KINDS)


def config_from_shapes(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """ChromaTransformer2DModel's configuration, with any number of blocks and approximator layers."""
    layers = {key.split(".")[2] for key in shapes if key.startswith(f"{APPROXIMATOR}.layers.")}
    hidden, channels = shapes[f"{APPROXIMATOR}.in_proj.weight"]
    return _flux_keys.block_config(shapes) | {
        "approximator_num_channels": channels,
        "approximator_hidden_dim": hidden,
        "approximator_layers": len(layers),
    }


def build(config: Mapping[str, Any]) -> Any:
    from diffusers.models.transformers.transformer_chroma import ChromaTransformer2DModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # diffusers calls its own class by an old name
        network: Any = ChromaTransformer2DModel.from_config(dict(config))
    keep_time_exact(network)
    for name, module in network.named_modules():
        if name.endswith(".attn"):
            module.register_forward_pre_hook(only_keys, with_kwargs=True)
    return network


def only_keys(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Hide padding from the others and nothing from the padding itself, whose rows of attention would be empty.

    diffusers makes (B, 1, L, L) of the mask (B, L), keys times queries; its first query is a word.
    """
    mask: Tensor | None = kwargs.get("attention_mask")
    return args, kwargs if mask is None else kwargs | {"attention_mask": mask[:, :, :1]}


TRANSFORMER = Transformer(
    kind="ChromaTransformer2DModel",
    marks=("double_blocks.0.img_attn.qkv.weight", f"{APPROXIMATOR}.in_proj.weight"),
    keys=KEYS,
    rows=_flux_keys.rows,
    spec=spec,
    config=config_from_shapes,
)
