"""What a plan says of memory: what the options need here, the attention, and how the networks' weights are kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator

import torch

from sfumato.common.text import plural
from sfumato.config import Config
from sfumato.errors import Problems
from sfumato.families.base import Family
from sfumato.families.blueprint import Blueprint
from sfumato.families.part import Part
from sfumato.memory.attention import check_attention
from sfumato.memory.blocks import check_compiler
from sfumato.memory.low_precision import choose_format
from sfumato.memory.precision import MIXED_PRECISION
from sfumato.quantization.choice import describe_precision


def check_memory_options(config: Config, problems: Problems) -> None:
    """Add a problem for what cannot be done here."""
    with problems.catch():
        check_compiler(config.memory)


def describe_memory(
    config: Config, family: type[Family], blueprint: Blueprint, trained: Collection[str]
) -> Iterator[str]:
    """What a report says of attention and weights. Raises UserError for a kernel that cannot be had."""
    yield from check_attention(config.memory, blueprint)
    yield from describe_formats(config, family, blueprint, trained)


def describe_formats(
    config: Config, family: type[Family], blueprint: Blueprint, trained: Collection[str]
) -> Iterator[str]:
    """A line for each network that keeps weights in fewer bits; from the file's headers alone."""
    wanted = {name: choose_format(name, config.memory, blueprint.text_parts) for name in blueprint.networks}
    chosen = {name for name, own in wanted.items() if own is not None}
    if chosen and not chosen - {*trained}:
        yield "the options about weights in fewer bits have no effect: every network that they are for trains"
    for name, network in blueprint.networks.items():
        if name in trained or network.is_absent or not (name in chosen or network.weights.has_formats):
            continue
        dtype = network.dtype or MIXED_PRECISION[config.memory.mixed_precision]
        dtype = family.choose_dtype(name, dtype, config.model)
        part = Part(network, family.builders(blueprint)[name], dtype=dtype, device=torch.device("meta"))
        part.format = wanted[name]
        if part.weight_formats:
            yield f"{name}: {describe_kept_weights(part)}"


def describe_kept_weights(part: Part) -> str:
    """How many weights are kept in which formats, and what stays as it is."""
    formats = part.weight_formats
    shapes = {name: tensor.shape for name, tensor in part.module.state_dict().items()}
    counts = Counter(own.label for own in formats.values())
    small = sum(own.count_bytes(shapes[name]) for name, own in formats.items())
    rest = sum(shape.numel() for name, shape in shapes.items() if name not in formats) * part.dtype.itemsize
    listed = ", ".join(f"{plural(count, 'weight')} in {label}" for label, count in counts.items())
    return (
        f"{listed}, {small / 1e9:.2f} GB; biases, norms, embeddings and layers outside the blocks in "
        f"{describe_precision(part.dtype, None)}, {rest / 1e9:.2f} GB"
    )
