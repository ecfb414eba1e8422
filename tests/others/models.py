"""Toy models for the tests of other programs' files: changed in closed form or by adapters, and put back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from families.loading import load_family
from families.toys import ToyShelf
from sfumato.config import NoiseOptions
from sfumato.data.batch import Sizes
from sfumato.families import register_families
from sfumato.families.base import Family, find_family
from sfumato.families.encoding import encode_with_grad
from sfumato.families.source import open_source
from sfumato.methods.inference_adapters import InferenceAdapters
from sfumato.tools.export_lora import export_lora

PROMPT = "a red cup of coffee"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class LayerChange:
    """A LoRA of one layer: alpha / rank * up @ down."""

    down: Tensor
    up: Tensor
    alpha: float

    def compute_delta(self, weight: Tensor) -> Tensor:
        product = self.up.flatten(1).double() @ self.down.flatten(1).double()
        return (self.alpha / len(self.down) * product).reshape(weight.shape).to(weight.dtype)


def load_toy(toy_shelf: ToyShelf, family: str, variant: str = "") -> Family:
    register_families()
    options = toy_shelf.options(family, variant=variant)
    source = open_source(options)
    cls = find_family(None, source)
    return load_family(cls, cls.read(source, options, NoiseOptions()), options)


def list_layers(module: nn.Module, paths: Iterator[str] | list[str]) -> dict[str, nn.Linear | nn.Conv2d]:
    found = dict(module.named_modules())
    layers: dict[str, nn.Linear | nn.Conv2d] = {}
    for path in paths:
        layer = found[path]
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        layers[path] = layer
    return layers


def draw_change(layer: nn.Module, seed: int, *, rank: int = 3, alpha: float | None = None) -> LayerChange:
    """Random matrices for a layer; alpha None: the rank."""
    weight: Any = layer.weight
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, *weight.shape[1:], generator=generator) * 0.2
    up = torch.randn(len(weight), rank, *[1] * (weight.ndim - 2), generator=generator) * 0.2
    return LayerChange(down, up, float(rank if alpha is None else alpha))


def draw_changes(module: nn.Module, paths: list[str], **settings: Any) -> dict[str, LayerChange]:
    layers = list_layers(module, paths)
    return {path: draw_change(layer, i, **settings) for i, (path, layer) in enumerate(sorted(layers.items()))}


@torch.no_grad()
def compute_output(model: Family, part: str = "denoiser") -> Tensor:
    """What a network gives for a fixed input."""
    if part != "denoiser":
        features = encode_with_grad(model, part, [PROMPT])
        return torch.cat([tensor.float().flatten() for name, tensor in sorted(features.items()) if name != "mask"])
    text = {name: encode_with_grad(model, name, [PROMPT]) for name in model.text_parts}
    conditioning = model.condition(text, Sizes.from_size(1, 64, 64), None)
    x = torch.randn(1, model.latents.channels, 8, 8, generator=torch.Generator().manual_seed(0))
    return model.predict(x, torch.tensor([600.0]), conditioning)


@contextmanager
def changed(module: nn.Module, deltas: Mapping[str, Tensor]) -> Iterator[None]:
    """The module with these sums on its weights; path -> what to add."""
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with torch.no_grad():
        for path, delta in deltas.items():
            weight: Any = module.get_submodule(path).weight
            weight.add_(delta)
    try:
        yield
    finally:
        module.load_state_dict(before)


def compute_changed(model: Family, part: str, changes: Mapping[str, LayerChange]) -> Tensor:
    """The output with changes in closed form."""
    module = model.parts[part].module
    layers = list_layers(module, list(changes))
    with changed(module, {path: change.compute_delta(layers[path].weight) for path, change in changes.items()}):
        return compute_output(model, part)


def compute_with_file(model: Family, path: Path, part: str = "denoiser", strength: float = 1.0) -> Tensor:
    """The output with a file attached, as `generate` does; the adapters have no effect afterwards."""
    adapters = InferenceAdapters(model, [(path, strength)])
    found = compute_output(model, part)
    for engine in chain.from_iterable(file.engines for file in adapters.files):
        engine.multiplier = 0.0
    return found


def find_text_parts(model: Family, tensors: Mapping[str, Tensor]) -> list[str]:
    """The text encoders that a file changes."""
    starts = {name: f"{model.parts[name].spec.adapter_prefix}_" for name in model.text_parts}
    return [name for name, start in starts.items() if any(key.startswith(start) for key in tensors)]


@contextmanager
def attached_by_diffusers(model: Family, file: Path, target: Path) -> Iterator[None]:
    """A context in which the denoiser has PEFT's layers, from an export; the text encoders have our own."""
    part, denoiser = model.parts["denoiser"], cast("Any", model.parts["denoiser"].module)
    tensors = load_file(file)
    others = {name: tensor for name, tensor in tensors.items() if not name.startswith(part.spec.adapter_prefix)}
    export_lora(file, target, program="diffusers", without=find_text_parts(model, others))
    denoiser.load_lora_adapter(load_file(target), prefix=model.components["denoiser"].folder)
    try:
        if not others:
            yield
            return
        save_file(others, target)
        adapters = InferenceAdapters(model, [(target, 1.0)])
        yield
        adapters.detach()
    finally:
        denoiser.unload_lora()


def assert_same_output(found: Tensor, expected: Tensor, plain: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max().clamp(min=1)))
    assert (plain - expected).abs().max() > 1e-3, "the adapter must matter"
