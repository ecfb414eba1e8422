"""Adapter files in the layouts of other programs, by the rules of their keys, from changes of single layers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from others.models import LayerChange

Changes = Mapping[str, LayerChange]  # a layer's name in the layout -> its change
State = dict[str, Tensor]


def write(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.clone().contiguous() for key, tensor in state.items()}, path, dict(metadata or {}))
    return path


def make_rows(changes: Changes, name: Callable[[str], str], down: str, up: str, alpha: str = "") -> State:
    """name: layer -> the start of its keys. down, up, alpha: the ends; without the last the scale is in up."""
    state: State = {}
    for layer, change in changes.items():
        scale = 1.0 if alpha else change.alpha / len(change.down)
        state[f"{name(layer)}.{down}"] = change.down
        state[f"{name(layer)}.{up}"] = change.up * scale
        if alpha:
            state[f"{name(layer)}.{alpha}"] = torch.tensor(change.alpha)
    return state


def flatten(prefix: str) -> Callable[[str], str]:
    return lambda layer: f"{prefix}_{layer.replace('.', '_')}"


def put_before(prefix: str) -> Callable[[str], str]:
    return lambda layer: f"{prefix}{layer}"


def write_kohya(changes: Changes, prefix: str = "lora_unet") -> State:
    """sd-scripts, musubi-tuner, AI-toolkit for UNets."""
    return make_rows(changes, flatten(prefix), "lora_down.weight", "lora_up.weight", "alpha")


def write_onetrainer(changes: Changes) -> State:
    return make_rows(changes, flatten("lora_transformer"), "lora_down.weight", "lora_up.weight", "alpha")


def write_lycoris(changes: Changes) -> State:
    """LyCORIS' wrapper, e.g. in SimpleTuner."""
    return make_rows(changes, flatten("lycoris"), "lora_down.weight", "lora_up.weight", "alpha")


def write_comfyui(changes: Changes) -> State:
    return make_rows(changes, put_before("diffusion_model."), "lora_down.weight", "lora_up.weight")


def write_comfyui_checkpoint_names(changes: Changes) -> State:
    return make_rows(changes, put_before("model.diffusion_model."), "lora_down.weight", "lora_up.weight", "alpha")


def write_diffusion_pipe(changes: Changes) -> State:
    return make_rows(changes, put_before("diffusion_model."), "lora_A.weight", "lora_B.weight")


def write_bare(changes: Changes) -> State:
    """Black Forest Labs' files."""
    return make_rows(changes, put_before(""), "lora_A.weight", "lora_B.weight")


def write_ai_toolkit(changes: Changes, network: str) -> State:
    """And diffusers' savers today."""
    return make_rows(changes, put_before(f"{network}."), "lora_A.weight", "lora_B.weight")


def write_simpletuner(changes: Changes, network: str) -> State:
    return make_rows(changes, put_before(f"{network}."), "lora_A.weight", "lora_B.weight", "alpha")


def write_old_diffusers(changes: Changes, network: str) -> State:
    return make_rows(changes, put_before(f"{network}."), "lora.down.weight", "lora.up.weight")


def write_linear_layers(changes: Changes, network: str) -> State:
    return make_rows(changes, put_before(f"{network}."), "lora_linear_layer.down.weight", "lora_linear_layer.up.weight")


def write_processors(changes: Changes, network: str) -> State:
    """The first LoRA of diffusers, which only attention layers had."""

    def name(layer: str) -> str:
        return f"{network}." + re.sub(r"\.(to_q|to_k|to_v|to_out)(\.0)?$", r".processor.\1_lora", layer)

    attention = {layer: change for layer, change in changes.items() if re.search(r"attn\d?\.to_(q|k|v|out\.0)$", layer)}
    return make_rows(attention, name, "down.weight", "up.weight")


def write_peft(changes: Changes) -> State:
    return make_rows(changes, put_before("base_model.model."), "lora_A.weight", "lora_B.weight")
