"""Chroma's transformer: FLUX.1's blocks, modulated by one small network (the approximator), not a layer in each."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.common.quiet_imports import without_bitsandbytes
from sfumato.families import _flux_keys
from sfumato.families._attention_norms import keep_attention_dtype
from sfumato.families._flux_files import Transformer
from sfumato.families._flux_parts import keep_time_exact
from sfumato.families.part import PartSpec
from sfumato.formats.keymap import KeyMap, KeyRule

list_chroma_layers = _flux_keys.list_flux_layers
APPROXIMATOR = "distilled_guidance_layer"
_RULES = (
    *_flux_keys.BLOCK_RULES,
    *(KeyRule(f"{APPROXIMATOR}.{name}", (f"{APPROXIMATOR}.{name}",)) for name in ("in_proj", "out_proj")),
    KeyRule(f"{APPROXIMATOR}.layers.{{n}}.in_layer", (f"{APPROXIMATOR}.layers.{{n}}.linear_1",)),
    KeyRule(f"{APPROXIMATOR}.layers.{{n}}.out_layer", (f"{APPROXIMATOR}.layers.{{n}}.linear_2",)),
    KeyRule(f"{APPROXIMATOR}.norms.{{n}}.scale", (f"{APPROXIMATOR}.norms.{{n}}.weight",)),
)
CHROMA_KEYS = KeyMap(_RULES)
# img, txt; the approximator replaces FLUX.1's time, vector and guidance embedders
_IN_TARGETS = ("x_embedder", "time_in", "vector_in", "guidance_in", "context_embedder")


def spec(prefix: str) -> PartSpec:
    made = _flux_keys.make_part_spec(prefix, CHROMA_KEYS, _IN_TARGETS, _flux_keys.BLOCK_RANK_KINDS)
    return replace(made, other_targets=("proj_out", f"{APPROXIMATOR}.{{*}}"))


def config_from_shapes(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """ChromaTransformer2DModel's configuration from original keys and shapes."""
    layers = {key.split(".")[2] for key in shapes if key.startswith(f"{APPROXIMATOR}.layers.")}
    hidden, channels = shapes[f"{APPROXIMATOR}.in_proj.weight"]
    return _flux_keys.make_block_config(shapes) | {
        "approximator_num_channels": channels,
        "approximator_hidden_dim": hidden,
        "approximator_layers": len(layers),
    }


def build(config: Mapping[str, Any]) -> Any:
    with without_bitsandbytes():
        from diffusers.models.transformers.transformer_chroma import ChromaTransformer2DModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # about a name that diffusers itself uses
        network: Any = ChromaTransformer2DModel.from_config(dict(config))
    keep_time_exact(network)
    keep_attention_dtype(network)
    network.time_text_embed.guidance_proj.register_forward_pre_hook(partial(make_guidance, network.time_text_embed))
    for name, module in network.named_modules():
        if name.endswith(".attn"):
            module.register_forward_pre_hook(mask_keys_only, with_kwargs=True)
    return network


def make_guidance(owner: Any, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    """Zeros on the owner's device; diffusers makes them on the CPU, and their copy waits for the device."""
    return (torch.zeros(args[0].shape, dtype=args[0].dtype, device=owner.mod_proj.device),)


def mask_keys_only(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Mask padding as keys only: as queries, rows of padding would have nothing to attend to.

    diffusers' mask is (B, 1, L, L), keys times queries, of which the first query is never padding.
    """
    mask: Tensor | None = kwargs.get("attention_mask")
    return args, kwargs if mask is None else kwargs | {"attention_mask": mask[:, :, :1]}


CHROMA_TRANSFORMER = Transformer(
    class_name="ChromaTransformer2DModel",
    required_keys=("img_in.weight", "double_blocks.0.img_attn.qkv.weight", f"{APPROXIMATOR}.in_proj.weight"),
    keys=CHROMA_KEYS,
    row_split=_flux_keys.split_flux_rows,
    spec=spec,
    config=config_from_shapes,
)
