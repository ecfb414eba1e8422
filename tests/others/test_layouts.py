"""LoRA files in other programs' layouts: a model with the file gives what a closed-form change of its weights gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from _pytest.mark import ParameterSet
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from families.toys import ToyShelf
from others import writers
from others.models import (
    LayerChange,
    assert_same_output,
    compute_changed,
    compute_output,
    compute_with_file,
    draw_change,
    draw_changes,
    load_toy,
)
from sfumato.families.base import Family
from sfumato.formats.groups import LayerGroup

FAMILIES = ("sd", "sd 2", "sdxl", "sd3", "flux", "chroma", "lumina")
Models = Callable[[str], Family]
MODULE_WRITERS: dict[str, Callable[[Mapping[str, LayerChange], str], dict[str, Tensor]]] = {
    "AI-toolkit": writers.write_ai_toolkit,
    "SimpleTuner": writers.write_simpletuner,
    "old diffusers": writers.write_old_diffusers,
    "linear layers": writers.write_linear_layers,
    "kohya with diffusers' names": lambda changes, network: writers.write_kohya(changes),
    "LyCORIS' wrapper": lambda changes, network: writers.write_lycoris(changes),
    "OneTrainer": lambda changes, network: writers.write_onetrainer(changes),
    "PEFT": lambda changes, network: writers.write_peft(changes),
}
ORIGINAL_WRITERS = {
    "kohya": writers.write_kohya,
    "ComfyUI": writers.write_comfyui,
    "ComfyUI, checkpoint's names": writers.write_comfyui_checkpoint_names,
    "diffusion-pipe": writers.write_diffusion_pipe,
    "bare": writers.write_bare,
}
# Family and part -> what stands before the names of an encoder's layers in files of other programs.
ENCODER_PREFIXES = [
    ("sd", "clip", ("lora_te_", "lora_te1_", "text_encoder.", "text_encoders.clip_l.transformer.")),
    ("sd 2", "clip", ("lora_te_", "text_encoder.", "text_encoders.clip_h.transformer.")),
    ("sdxl", "clip_l", ("lora_te1_", "text_encoder.", "text_encoders.clip_l.transformer.")),
    ("sdxl", "clip_g", ("lora_te2_", "text_encoder_2.", "text_encoders.clip_g.transformer.")),
    ("sd3", "clip_l", ("lora_te1_", "text_encoder.", "text_encoders.clip_l.transformer.")),
    ("sd3", "clip_g", ("lora_te2_", "text_encoder_2.", "text_encoders.clip_g.transformer.")),
    ("sd3", "t5", ("lora_te3_", "text_encoder_3.", "text_encoders.t5xxl.transformer.")),
    ("flux", "clip_l", ("lora_te1_", "text_encoder.", "text_encoders.clip_l.transformer.")),
    ("flux", "t5", ("lora_te3_", "lora_te2_", "text_encoder_2.", "text_encoders.t5xxl.transformer.")),
    ("chroma", "t5", ("lora_te3_", "lora_te1_", "lora_te_", "text_encoder.", "text_encoders.t5xxl.transformer.")),
    ("lumina", "gemma2", ("lora_te_", "text_encoder.", "text_encoders.gemma2_2b.transformer.")),
]


def make_pairs(families: Sequence[str], layouts: Iterable[str]) -> list[ParameterSet]:
    """Every pair; by default each layout is tried with one family, the others in the full tier."""
    pairs: list[ParameterSet] = []
    for i, layout in enumerate(layouts):
        for j, family in enumerate(families):
            marks = [] if j == (i + 2) % len(families) else [pytest.mark.full]
            pairs.append(pytest.param(family, layout, marks=marks))
    return pairs


@pytest.fixture(scope="module")
def models(toy_shelf: ToyShelf) -> Models:
    """Each family's toy, loaded once."""
    loaded: dict[str, Family] = {}

    def load(name: str) -> Family:
        if name not in loaded:
            family, _, variant = name.partition(" ")
            loaded[name] = load_toy(toy_shelf, family, variant)
        return loaded[name]

    return load


def list_groups(model: Family, part: str = "denoiser") -> list[LayerGroup]:
    return [group for group in model.parts[part].groups(every=True) if not group.is_norm]  # of which no LoRA is


def list_paths(model: Family, part: str = "denoiser") -> list[str]:
    return [path for group in list_groups(model, part) for path in group.paths]


def get_network(model: Family) -> str:
    return type(model).components["denoiser"].folder


@pytest.mark.parametrize(("family", "writer"), make_pairs(FAMILIES, MODULE_WRITERS))
def test_diffusers_names(family: str, writer: str, models: Models, tmp_path: Path) -> None:
    """Each layer has a LoRA of its own, those too that the original fuses: their ranks stand side by side."""
    model = models(family)
    changes = draw_changes(model.denoiser, list_paths(model), alpha=2.0)
    file = writers.write(tmp_path / "a.safetensors", MODULE_WRITERS[writer](changes, get_network(model)))
    expected = compute_changed(model, "denoiser", changes)
    assert_same_output(compute_with_file(model, file), expected, compute_output(model))


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_attention_processors(family: str, models: Models, tmp_path: Path) -> None:
    model = models(family)
    paths = [path for path in list_paths(model) if ".attn1." in path or ".attn2." in path]
    changes = draw_changes(model.denoiser, paths)
    for network in ("unet", ""):
        state = writers.write_processors(changes, network)
        state = {key.removeprefix("."): tensor for key, tensor in state.items()}
        assert len(state) == 2 * len(paths)
        file = writers.write(tmp_path / f"a{network}.safetensors", state)
        expected = compute_changed(model, "denoiser", changes)
        assert_same_output(compute_with_file(model, file), expected, compute_output(model))


def draw_original(model: Family, seed: int = 0) -> tuple[dict[str, LayerChange], dict[str, LayerChange]]:
    """A LoRA of every name in the checkpoint's layout, and the same as changes of each layer."""
    part = model.parts["denoiser"]
    named: dict[str, LayerChange] = {}
    changes: dict[str, LayerChange] = {}
    for group in list_groups(model):
        location = part.spec.key_map.locate(group.paths[0])
        layers = [part.module.get_submodule(path) for path in location.siblings]
        parts = [draw_change(layer, seed + i, alpha=2.0) for i, layer in enumerate(layers)]
        ups = [change.up for change in parts]
        if location.op == "swap":
            ups = [torch.cat([up[len(up) // 2 :], up[: len(up) // 2]]) for up in ups]
        named[location.original] = LayerChange(parts[0].down, torch.cat(ups), 2.0)
        for path, change in zip(location.siblings, parts, strict=True):
            changes[path] = LayerChange(parts[0].down, change.up, 2.0)
        seed += 10
    return named, changes


@pytest.mark.parametrize(("family", "writer"), make_pairs(FAMILIES, ORIGINAL_WRITERS))
def test_original_names(family: str, writer: str, models: Models, tmp_path: Path) -> None:
    """One LoRA for what the original fuses; UNets of Stable Diffusion 1, too, in the checkpoint's names."""
    model = models(family)
    named, changes = draw_original(model)
    file = writers.write(tmp_path / "a.safetensors", ORIGINAL_WRITERS[writer](named))
    expected = compute_changed(model, "denoiser", changes)
    assert_same_output(compute_with_file(model, file), expected, compute_output(model))


@pytest.mark.parametrize(("family", "part", "prefixes"), ENCODER_PREFIXES)
def test_text_encoders(family: str, part: str, prefixes: tuple[str, ...], models: Models, tmp_path: Path) -> None:
    model = models(family)
    spec, paths = model.parts[part].spec, list_paths(model, part)
    changes = draw_changes(model.parts[part].module, paths, alpha=2.0)
    expected = compute_changed(model, part, changes)
    for i, prefix in enumerate(prefixes):
        original = {spec.adapter_map.locate(path).original: change for path, change in changes.items()}
        if prefix.endswith("_"):
            state = writers.write_kohya(original, prefix[:-1])
        else:
            state = writers.write_ai_toolkit(original if i % 2 else changes, prefix[:-1])
        file = writers.write(tmp_path / f"{i}.safetensors", state)
        assert_same_output(compute_with_file(model, file, part), expected, compute_output(model, part))


def test_xlabs(models: Models, tmp_path: Path) -> None:
    """Of the fused layers of single blocks it adapts three of four."""
    model = models("flux")
    state: dict[str, Tensor] = {}
    changes: dict[str, LayerChange] = {}
    rules = {
        "double_blocks.0.processor.qkv_lora1": [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"],
        "double_blocks.0.processor.qkv_lora2": [f"transformer_blocks.0.attn.add_{x}_proj" for x in "qkv"],
        "double_blocks.0.processor.proj_lora1": ["transformer_blocks.0.attn.to_out.0"],
        "double_blocks.0.processor.proj_lora2": ["transformer_blocks.0.attn.to_add_out"],
        "single_blocks.0.processor.qkv_lora": [f"single_transformer_blocks.0.attn.to_{x}" for x in "qkv"],
        "single_blocks.0.processor.proj_lora": ["single_transformer_blocks.0.proj_out"],
    }
    for i, (name, paths) in enumerate(rules.items()):
        layers = [model.denoiser.get_submodule(path) for path in paths]
        parts = [draw_change(layer, 10 * i + j) for j, layer in enumerate(layers)]
        state[f"{name}.down.weight"] = parts[0].down
        state[f"{name}.up.weight"] = torch.cat([change.up for change in parts])
        changes |= {
            path: LayerChange(parts[0].down, change.up, change.alpha) for path, change in zip(paths, parts, strict=True)
        }
    file = writers.write(tmp_path / "a.safetensors", state)
    assert_same_output(
        compute_with_file(model, file), compute_changed(model, "denoiser", changes), compute_output(model)
    )


def test_a_convolution_in_three_matrices(models: Models, tmp_path: Path) -> None:
    """LyCORIS' LoCon with Tucker decomposition, which also adapts the first and the last convolution."""
    model = models("sd")
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}
    hooks: list[RemovableHandle] = []
    plain = compute_output(model)
    for path in ("conv_in", "conv_out", "down_blocks.0.resnets.0.conv1"):
        conv = model.denoiser.get_submodule(path)
        assert isinstance(conv, nn.Conv2d)
        down = torch.randn(3, conv.in_channels, 1, 1, generator=generator) * 0.1
        up = torch.randn(conv.out_channels, 3, 1, 1, generator=generator) * 0.1
        middle = torch.randn(3, 3, 3, 3, generator=generator) * 0.3
        name = f"lora_unet_{path.replace('.', '_')}"
        state |= {
            f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.lora_mid.weight": middle,
            f"{name}.alpha": torch.tensor([1.5]),
        }  # fmt: skip
        hooks.append(conv.register_forward_hook(partial(add_three_convolutions, (down, middle, up), 0.5)))
    expected = compute_output(model)
    for hook in hooks:
        hook.remove()
    file = writers.write(tmp_path / "a.safetensors", state)
    assert_same_output(compute_with_file(model, file), expected, plain)


def add_three_convolutions(
    weights: tuple[Tensor, Tensor, Tensor], scale: float, conv: nn.Conv2d, args: tuple[Tensor], output: Tensor
) -> Tensor:
    down, middle, up = weights
    low = F.conv2d(F.conv2d(args[0], down), middle, stride=conv.stride, padding=conv.padding)  # pyright: ignore
    return output + scale * F.conv2d(low, up)


def test_strength(models: Models, tmp_path: Path) -> None:
    model = models("flux")
    changes = draw_changes(model.denoiser, list_paths(model))
    file = writers.write(tmp_path / "a.safetensors", writers.write_ai_toolkit(changes, "transformer"))
    half = {path: LayerChange(change.down, change.up, change.alpha / 2) for path, change in changes.items()}
    expected = compute_changed(model, "denoiser", half)
    assert_same_output(compute_with_file(model, file, strength=0.5), expected, compute_output(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn])
def test_types(dtype: torch.dtype, models: Models, tmp_path: Path) -> None:
    model = models("flux")
    changes = draw_changes(model.denoiser, list_paths(model))
    state = {key: tensor.to(dtype) for key, tensor in writers.write_kohya(changes).items()}
    rounded = {
        path: LayerChange(change.down.to(dtype).float(), change.up.to(dtype).float(), change.alpha)
        for path, change in changes.items()
    }
    file = writers.write(tmp_path / "a.safetensors", state)
    assert_same_output(
        compute_with_file(model, file), compute_changed(model, "denoiser", rounded), compute_output(model)
    )
