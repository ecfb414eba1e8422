"""The ControlNet of a model: from its own file, or a new one that begins as a copy of the denoiser."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Generator, Tensor

from sfumato.common.seeds import seed_of
from sfumato.common.text import list_some
from sfumato.config import ModelOptions
from sfumato.errors import UserError
from sfumato.families._file_kinds import option_context
from sfumato.families.base import FAMILIES, Family
from sfumato.families.blueprint import Blueprint
from sfumato.families.control_net import CONTROL_NET, ControlNetSupport, FileLayout, name_control_net
from sfumato.families.hub_models import find_network_path
from sfumato.families.part import Network, PartSpec
from sfumato.families.source import Source, drop_private_fields
from sfumato.families.weights import Weights, on_meta
from sfumato.formats.composed import ComposedFile
from sfumato.formats.keymap import KeyMap, make_identity_map, matches

_OPTION = "controlnet_model_name_or_path"


def add_control_net(
    family: type[Family], blueprint: Blueprint, model: ModelOptions, seed: int, number: int = 0
) -> Blueprint:
    """The blueprint with a ControlNet: that of the option's file or folder, or a new one.

    seed: of what is drawn for a new one. number: of those before it. Raises UserError where the family has none, or the
    file is for another model.
    """
    support = family.control_net
    if support is None:
        known = [name for name in FAMILIES.names if FAMILIES.get(name).control_net]
        raise UserError(
            f"there are no ControlNets for {blueprint.title} here: {family.no_control_net}",
            code="control-net-unsupported",
            fix=f"take a model of one of these families: {', '.join(known)}",
        )
    for option, reason in support.unsupported_options.items():
        if vars(model)[option]:
            raise UserError(
                f"--{option} cannot be combined with a ControlNet: {reason}",
                code="control-net-option-conflict",
                fix="remove it",
            )
    denoiser, given = blueprint.networks["denoiser"], model.controlnet_model_name_or_path
    halvings = blueprint.latents.downscale.bit_length() - 1
    if given is None:
        network = make_control_net(support, denoiser, seed, halvings)
        check_halvings(support, network, halvings, "a new ControlNet for this model")
    else:
        with option_context(_OPTION):
            source = Source(find_network_path(given))
            network = read_control_net(support, denoiser, source, halvings)
            check_halvings(support, network, halvings, str(source.path))
    part = name_control_net(number)
    network = replace(network, spec=replace(network.spec, name=part))
    return replace(blueprint, networks={**blueprint.networks, part: network})


def read_control_net(support: ControlNetSupport, denoiser: Network, source: Source, halvings: int) -> Network:
    """In diffusers' names, or those of another program. Raises UserError for another kind of network.

    halvings: of the autoencoder.
    """
    file = source.open_lone()
    declared = source.read_config("." if source.is_folder else CONTROL_NET)
    if declared.get("_class_name", support.class_name) != support.class_name:
        raise UserError(
            f"{source.path} is a {declared['_class_name']}, a {support.class_name} is expected",
            code="control-net-kind-mismatch",
        )
    layout = choose_layout(support, denoiser, list(file.header.tensors))
    weights = Weights(file=file, key_map=layout.key_map, prefix=layout.prefix, row_split=support.row_split)
    config = support.make_config(denoiser.config, halvings)
    if declared:
        config |= {**support.declared_defaults, **drop_private_fields(declared)}
    elif support.guess_config is not None:
        config |= support.guess_config(denoiser.config, weights.read_shapes())
    if fault := support.find_fault(config):
        raise UserError(f"{source.path}: {fault}", code="control-net-variant-unsupported")
    network = Network(
        spec=make_control_net_spec(support, layout.key_map), config=config, weights=weights, option=_OPTION
    )
    check_control_net_shapes(support, network, denoiser, source)
    return network


def choose_layout(support: ControlNetSupport, denoiser: Network, keys: Sequence[str]) -> FileLayout:
    """The first layout with a rule for every key; diffusers' own names otherwise."""
    for layout in support.list_layouts(denoiser.config):
        names = [key.removeprefix(layout.prefix) for key in keys if key.startswith(layout.prefix)]
        if names and all(layout.key_map.find_ours(name) or layout.key_map.is_dropped(name) for name in names):
            return layout
    return FileLayout("", make_identity_map())


def check_control_net_shapes(support: ControlNetSupport, network: Network, denoiser: Network, source: Source) -> None:
    """Raise UserError where the file lacks tensors of the network, or some have other shapes than the denoiser's."""
    found, base = network.weights.read_shapes(), denoiser.weights.read_shapes()
    expected = {name: tensor.shape for name, tensor in build_on_meta(support, network.config).items()}
    missing = [name for name in expected if name not in found]
    fault = f"lacks {list_some(missing)}" if missing else ""
    for name in (name for name in expected if name in found and name not in support.constant_tensors):
        wanted = base[name] if name in base else expected[name]
        if tuple(found[name]) != tuple(wanted):
            fault = fault or f"has {name} of shape {tuple(found[name])}, this model has {tuple(wanted)}"
    if fault:
        raise UserError(
            f"{source.path} is no ControlNet for this model: it {fault}",
            code="control-net-model-mismatch",
            fix="take one that was trained for the base model's family",
        )


def check_halvings(support: ControlNetSupport, network: Network, halvings: int, title: str) -> None:
    """Raise UserError where one that reads pixels does not bring them to the latents' size."""
    own = support.count_halvings(network.config)
    if not support.takes_latents(network.config) and own != halvings:
        raise UserError(
            f"{title} makes the control image {2**own} times smaller, and the model's latents are {2**halvings} times "
            "smaller than images",
            code="control-net-halvings",
            fix="take one that was trained with an autoencoder like this model's",
        )


def make_control_net(support: ControlNetSupport, denoiser: Network, seed: int, halvings: int) -> Network:
    """A new one, whose outputs are 0: copies of the denoiser's weights, zeros, and what is drawn for the image."""
    config = support.make_config(denoiser.config, halvings)
    shapes = {name: tensor.shape for name, tensor in build_on_meta(support, config).items()}
    copied, stored = denoiser.weights.read_shapes(), denoiser.weights

    def make(name: str) -> Tensor:
        if any(matches(pattern, name) for pattern in support.drawn):
            return draw_uniform(name, shapes, seed)
        if name in copied and tuple(copied[name]) == tuple(shapes[name]):
            return stored.read(name, dtype=torch.float32)
        return torch.zeros(shapes[name])

    file = ComposedFile(stored.file.header.path, shapes, make, stored.file.close)
    identity = make_identity_map()
    return Network(
        spec=make_control_net_spec(support, identity), config=config, weights=Weights(file=file, key_map=identity)
    )


def draw_uniform(name: str, shapes: Mapping[str, Sequence[int]], seed: int) -> Tensor:
    """A weight or a bias as torch draws it for a new layer: uniform within 1 / sqrt(inputs of an output)."""
    bound = 1 / math.sqrt(math.prod(shapes[name.rpartition(".")[0] + ".weight"][1:]))
    generator = Generator().manual_seed(seed_of(seed, f"new ControlNet: {name}"))
    return torch.empty(tuple(shapes[name])).uniform_(-bound, bound, generator=generator)


def build_on_meta(support: ControlNetSupport, config: Mapping[str, Any]) -> dict[str, Tensor]:
    return dict(on_meta(lambda: support.build(config)).state_dict())


def make_control_net_spec(support: ControlNetSupport, key_map: KeyMap) -> PartSpec:
    """Nothing of a ControlNet is adapted."""
    return PartSpec(
        name=CONTROL_NET,
        key_map=key_map,
        key_prefix="",
        adapter_map=make_identity_map(),
        adapter_prefix="lora_controlnet",
        blocks=support.blocks,
        constant_tensors=support.constant_tensors,
    )
