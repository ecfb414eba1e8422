"""`sfumato model quantize`: the layers of a checkpoint in eight bits, one tensor at a time, and what that changes."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from sfumato.adapters.low_rank import sum_squares
from sfumato.common.text import format_bytes
from sfumato.errors import UserError
from sfumato.families.checkpoint_saving import SOURCE_METADATA, TensorEntries, TensorEntry, iterate_pair, iterate_stored
from sfumato.families.part import Network
from sfumato.formats.checkpoint import TOOL_DTYPES, Checkpoint
from sfumato.formats.groups import make_meta_layers
from sfumato.formats.keymap import matches
from sfumato.formats.scaled import DESCRIPTION, GROUP, METADATA, ROTATED, SCALE_NAMES, divide_by_scale
from sfumato.quantization.choice import FLOAT8, FLOAT8_BLOCK, INT8_BLOCK
from sfumato.quantization.rotation import LARGEST_GROUP, choose_group, rotate
from sfumato.quantization.scaled_blocks import ScaledBlocks
from sfumato.tools.adapter_files.inspect import find_block_path, split_numbers
from sfumato.tools.adapter_files.models import ToolModel, open_tool_model
from sfumato.tools.adapter_files.outputs import (
    check_output,
    find_largest,
    make_spec_entries,
    name_output,
    write_checkpoint,
)

QuantizedFor = Literal["comfyui", "training"]
Bits = Literal["fp8", "int8", "int8_rotated"]
MANY_NUMBERS = 1 << 18  # that are rounded at a time, in the processor's cache
MOST_WORST = 5  # layers with the largest errors that are named
SCALE_NAME = SCALE_NAMES[1]
HEADER_VERSION = "1.0"  # of the descriptions in the metadata


@dataclass(frozen=True, kw_only=True)
class QuantizedLayout:
    """How the weights of layers are written."""

    label: str  # its name in the descriptions
    format: ScaledBlocks  # block: the most columns with one scale
    one_scale: bool = False  # whether a whole weight has one scale
    takes_convolutions: bool = False  # whether the reader knows their weights in eight bits


# ComfyUI's layouts, by the names that its files have for them; those for training are those of --fp8_scaled and
# --int8_base, under names that ComfyUI refuses instead of misreading the scales.
LAYOUTS: Mapping[tuple[QuantizedFor, Bits], QuantizedLayout] = {
    ("comfyui", "fp8"): QuantizedLayout(label="float8_e4m3fn", format=ScaledBlocks(dtype=FLOAT8), one_scale=True),
    ("comfyui", "int8"): QuantizedLayout(label="int8_tensorwise", format=ScaledBlocks(dtype=torch.int8)),
    ("comfyui", "int8_rotated"): QuantizedLayout(
        label="int8_tensorwise", format=ScaledBlocks(dtype=torch.int8, rotation=LARGEST_GROUP)
    ),
    ("training", "fp8"): QuantizedLayout(
        label="float8_rows", format=ScaledBlocks(dtype=FLOAT8, block=FLOAT8_BLOCK), takes_convolutions=True
    ),
    ("training", "int8"): QuantizedLayout(
        label="int8_rows", format=ScaledBlocks(dtype=torch.int8, block=INT8_BLOCK), takes_convolutions=True
    ),
    ("training", "int8_rotated"): QuantizedLayout(
        label="int8_rows",
        format=ScaledBlocks(dtype=torch.int8, block=INT8_BLOCK, rotation=LARGEST_GROUP),
        takes_convolutions=True,
    ),
}


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


class Rounded(NamedTuple):
    """A weight in eight bits."""

    numbers: Tensor
    scales: Tensor
    error: float  # of what they mean, relative


@dataclass(frozen=True, kw_only=True)
class LayerWeight:
    """A weight that is written in eight bits."""

    key: str  # in the file
    block: str  # part and path of its block
    layout: QuantizedLayout  # its block and rotation are those of this weight
    shape: tuple[int, ...]

    @property
    def module(self) -> str:
        return self.key.removesuffix(".weight")

    @property
    def scale_shape(self) -> tuple[int, ...]:
        if self.layout.one_scale:
            return ()
        block = self.layout.format.block
        return (self.shape[0], -(-count_weight_columns(self.shape) // block) if block else 1)

    @property
    def description(self) -> dict[str, Any]:
        """What tells readers how the weight is stored."""
        own = self.layout.format
        described: dict[str, Any] = {"format": self.layout.label}
        described |= {"group_size": own.block} if own.block else {}
        return described | ({ROTATED: True, GROUP: own.rotation} if own.rotation else {})


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
        write_checkpoint(request.output, entries, metadata, None)
    size = f"{format_bytes(request.output.stat().st_size)}, from {format_bytes(before)}"
    head = f"{model.source.name}: {model.family.name}, {len(layers)} weights in {describe_layout(request)}"
    return [head, *render_errors(layers, errors, verbose=request.verbose), f"{named}: {size}"]


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


def fit_layout(layout: QuantizedLayout, shape: Sequence[int]) -> QuantizedLayout:
    """The layout with the columns of a weight's blocks, which are as even as can be, and its rotation.

    A file tells the number of its blocks, not their width: 320 columns in three blocks are read as 107, 107 and 106.
    """
    columns, own = count_weight_columns(shape), layout.format
    count = -(-columns // own.block) if own.block else 1
    group = choose_group(columns) if own.rotation else 1
    fitted = replace(own, block=-(-columns // count) if count > 1 else 0, rotation=group if group > 1 else 0)
    return replace(layout, format=fitted)


def count_weight_columns(shape: Sequence[int]) -> int:
    """Of a weight, the kernel's included."""
    return torch.Size(shape[1:]).numel()


# ---------------------------------------------------------------- rounding


def round_weight(weight: Tensor, layer: LayerWeight) -> Rounded:
    """A weight (N, ...) in float32 -> its numbers and scales; UserError where it is not finite."""
    if find_largest(weight) == float("inf"):
        raise UserError(
            f"{layer.key} has values that are not finite (NaN or infinite)",
            code="quantize-not-finite",
            fix="use another save of the model",
        )
    own = layer.layout.format
    numbers, scales = torch.empty(weight.shape, dtype=own.dtype), torch.empty(layer.scale_shape)
    if layer.layout.one_scale:
        numbers, scales = divide_by_scale(weight, own.dtype, ())
    plain = replace(own, rotation=0)
    lost = whole = 0.0
    for part in iterate_row_slices(weight):
        # Errors are measured before rows are turned back, which changes no norm.
        rows = weight[part].flatten(1)
        rows = rotate(rows, own.rotation) if own.rotation else rows
        if layer.layout.one_scale:
            found = numbers[part].flatten(1).float() * scales
        else:
            stored = plain.encode(rows)
            numbers.flatten(1)[part], scales[part] = stored["numbers"], stored["scales"]
            found = plain.decode(stored, rows.shape, torch.float32)
        lost += sum_squares(found.sub_(rows))
        whole += sum_squares(rows)
    return Rounded(numbers, scales, (lost / whole) ** 0.5 if whole else 0.0)


def iterate_row_slices(weight: Tensor) -> Iterator[slice]:
    """Some rows at a time, so that there is no second copy of a large weight."""
    step = max(1, MANY_NUMBERS // count_weight_columns(weight.shape))
    for start in range(0, len(weight), step):
        yield slice(start, start + step)


def iterate_quantized(
    file: Checkpoint, layers: Mapping[str, LayerWeight], dtype: torch.dtype | None, errors: dict[str, float]
) -> TensorEntries:
    """Every tensor of the file; of a layer its numbers, its scales, and what describes them.

    errors: filled by key when the numbers are made.
    """
    for key, entry in iterate_stored(file):
        if key not in layers:
            if dtype is not None and entry.spec[0].is_floating_point:
                yield key, TensorEntry((dtype, entry.spec[1]), partial(file.read, key, dtype=dtype))
            else:
                yield key, entry
            continue
        layer = layers[key]
        specs = (layer.layout.format.dtype, layer.shape), (torch.float32, layer.scale_shape)
        make = partial(make_numbers, file, layer, errors)
        yield from iterate_pair((key, f"{layer.module}.{SCALE_NAME}"), specs, make)
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
