"""`sfumato model quantize`: the layers of a checkpoint in eight bits, one tensor at a time, and what that changes."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sfumato.common.text import format_bytes, plural
from sfumato.errors import UserError
from sfumato.families.checkpoint_saving import SOURCE_METADATA, TensorEntries, TensorEntry, iterate_pair, iterate_stored
from sfumato.families.part import Network
from sfumato.formats.checkpoint import TOOL_DTYPES, Checkpoint
from sfumato.formats.groups import make_meta_layers
from sfumato.formats.keymap import matches
from sfumato.formats.scaled import DESCRIPTION, METADATA, SCALE_NAMES
from sfumato.tools.adapter_files.inspect import find_block_path, split_numbers
from sfumato.tools.adapter_files.models import ToolModel, open_tool_model
from sfumato.tools.adapter_files.outputs import (
    check_output,
    make_spec_entries,
    name_output,
    write_checkpoint,
)
from sfumato.tools.quantized_layers import (
    LAYOUTS,
    Bits,
    LayerWeight,
    QuantizedFor,
    QuantizedLayout,
    fit_layout,
    round_weight,
)

MOST_WORST = 5  # layers with the largest errors that are named
SCALE_NAME = SCALE_NAMES[1]
HEADER_VERSION = "1.0"  # of the descriptions in the metadata


@dataclass(frozen=True, kw_only=True)
class QuantizeRequest:
    """What to write in eight bits, and for whom."""

    source: str
    output: Path
    bits: Bits
    program: QuantizedFor
    parts: Sequence[str] = ("denoiser",)
    precision: str | None = None  # of all other tensors, of TOOL_DTYPES; None keeps theirs
    family: str | None = None
    verbose: bool = False  # whether each layer has a line in the report


@torch.no_grad()
def quantize_model(request: QuantizeRequest) -> list[str]:
    """Write the model with the layers of its blocks in eight bits; all else is copied. The lines of the report.

    UserError for a folder, for parts that the file does not have, and for weights that are not finite.
    """
    check_output(request.output, [Path(request.source)])
    with closing(open_tool_model(request.source, {}, request.family)) as model:
        if model.source.is_folder:
            raise UserError(
                f"{request.source} is a folder; one file is written in eight bits",
                code="quantize-folder",
                fix=f"sfumato model convert {request.source} FILE.safetensors, then that file",
            )
        file = model.source.file
        layers = select_layers(request, model)
        errors: dict[str, float] = {}
        entries = iterate_quantized(file, layers, TOOL_DTYPES[request.precision], errors)
        metadata = make_quantized_metadata(request, file, layers)
        before = sum(info.nbytes for info in file.header.tensors.values())
        named = name_output(request.output)
        warnings = write_checkpoint(request.output, entries, metadata, None)
    size = f"{format_bytes(request.output.stat().st_size)}, from {format_bytes(before)}"
    head = f"{model.source.name}: {model.family.name}, {plural(len(layers), 'weight')} in {describe_layout(request)}"
    return [head, *render_errors(layers, errors, verbose=request.verbose), *warnings, f"{named}: {size}"]


def describe_layout(request: QuantizeRequest) -> str:
    layout = LAYOUTS[request.program, request.bits]
    label = layout.format.label
    return label.replace("each row", "each weight") if layout.one_scale else label


# ---------------------------------------------------------------- layers


def select_layers(request: QuantizeRequest, model: ToolModel) -> dict[str, LayerWeight]:
    """By key, the weights of layers in the repeated blocks, as training keeps them; UserError where there are none."""
    layout = LAYOUTS[request.program, request.bits]
    layers: dict[str, LayerWeight] = {}
    for part in request.parts:
        if part not in model.networks:
            raise UserError(
                f"{model.source.path} has no {part}",
                code="quantize-part-missing",
                fix=f"of {', '.join(model.networks)}",
            )
        for layer in iterate_layer_weights(model.networks[part], layout):
            layers[layer.key] = layer
    if not layers:
        raise UserError(f"{model.source.path} has no layers in blocks", code="quantize-nothing")
    return layers


def iterate_layer_weights(network: Network, layout: QuantizedLayout) -> Iterator[LayerWeight]:
    weights, spec = network.weights, network.spec
    blocks = "|".join(f"{block}.{{*}}" for block in spec.blocks)
    for path in make_meta_layers(weights.read_shapes()):
        original = weights.stored_keys.get(f"{path}.weight")
        if original is None or not matches(blocks, path):
            continue
        key = weights.prefix + original
        if not key.endswith(".weight"):  # three in one, whose scale no reader would look for
            continue
        shape = weights.file.header.tensors[key].shape
        if len(shape) == 2 or (len(shape) == 4 and layout.takes_convolutions):
            block = find_block_path(spec, path)
            yield LayerWeight(key=key, block=f"{spec.name}.{block}", layout=fit_layout(layout, shape), shape=shape)


# ---------------------------------------------------------------- writing


def iterate_quantized(
    file: Checkpoint, layers: Mapping[str, LayerWeight], dtype: torch.dtype | None, errors: dict[str, float]
) -> TensorEntries:
    """Every tensor of the file; of a layer its numbers, its scales, and what describes them.

    errors: filled by key when the numbers are made.
    """
    for key, entry in iterate_stored(file):
        if key not in layers:
            if dtype is not None and entry.spec[0].is_floating_point:
                yield key, replace(entry, spec=(dtype, entry.spec[1]))
            else:
                yield key, entry
            continue
        layer = layers[key]
        specs = (layer.layout.format.dtype, layer.shape), (torch.float32, layer.scale_shape)
        make = partial(make_numbers, file, layer, errors)
        yield from iterate_pair((key, f"{layer.module}.{SCALE_NAME}"), specs, make, entry.origins)
        text = torch.tensor(list(json.dumps(layer.description).encode()), dtype=torch.uint8)
        yield f"{layer.module}.{DESCRIPTION}", TensorEntry((torch.uint8, text.shape), text.clone)


def make_numbers(file: Checkpoint, layer: LayerWeight, errors: dict[str, float]) -> tuple[Tensor, Tensor]:
    rounded = round_weight(file.read(layer.key, dtype=torch.float32), layer)
    errors[layer.key] = rounded.error
    return rounded.numbers, rounded.scales


def make_quantized_metadata(
    request: QuantizeRequest, file: Checkpoint, layers: Mapping[str, LayerWeight]
) -> dict[str, str]:
    """What the source says of the model, and how its layers are stored, which some readers look for here alone."""
    source = file.header.metadata
    kept = {name: value for name, value in source.items() if name in SOURCE_METADATA or name.startswith("modelspec.")}
    described = {layer.module: layer.description for layer in layers.values()}
    quantization = json.dumps({"format_version": HEADER_VERSION, "layers": described})
    return {"format": "pt", **kept, **make_spec_entries(request.output, ()), METADATA: quantization}


# ---------------------------------------------------------------- report


def render_errors(layers: Mapping[str, LayerWeight], errors: Mapping[str, float], *, verbose: bool) -> list[str]:
    """A line for each block with the errors of its layers, and the layers that lose most; all of them if verbose."""
    blocks: dict[str, list[float]] = defaultdict(list)
    for key, layer in layers.items():
        blocks[layer.block].append(errors[key])
    lines = ["", f"  {'block':<44}{'weights':>9}{'error':>9}{'largest':>9}"]
    for block, found in sorted(blocks.items(), key=lambda item: split_numbers(item[0])):
        lines.append(format_errors(block, found))
    lines += [format_errors("all", list(errors.values())), ""]
    worst = sorted(errors, key=lambda key: -errors[key])
    lines += [f"  {errors[key]:.3%} {key}" for key in (sorted(errors) if verbose else worst[:MOST_WORST])]
    return [*lines, ""]


def format_errors(title: str, errors: Sequence[float]) -> str:
    """The relative error of an average weight, and the largest."""
    average = (sum(error**2 for error in errors) / len(errors)) ** 0.5
    return f"  {title:<44}{len(errors):>9}{average:>9.3%}{max(errors):>9.3%}"
