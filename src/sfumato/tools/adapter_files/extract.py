"""An adapter from the difference of two models: the weights are read in pairs, one layer group at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from sfumato.adapters.low_rank import (
    RankMethod,
    decompose,
    decompose_randomly,
    find_needed_rank,
    make_kronecker_tensors,
    make_low_rank_tensors,
    make_norm_tensors,
    sum_squares,
)
from sfumato.common.text import plural
from sfumato.errors import UserError
from sfumato.families.part import Network
from sfumato.families.weights import Weights
from sfumato.formats.checkpoint import TOOL_DTYPES, TensorFile
from sfumato.formats.groups import LayerGroup, group_layers, is_norm, is_pointwise
from sfumato.tools.adapter_files.models import Encoders, ToolModel, list_input_paths, open_tool_model
from sfumato.tools.adapter_files.outputs import check_output, describe_ranks, make_extracted_metadata, write_adapter
from sfumato.tools.adapter_files.resize import check_method
from sfumato.tools.adapter_files.written_values import find_largest
from sfumato.track.progress_task import ProgressTask


@dataclass(frozen=True, kw_only=True)
class ExtractRequest:
    """Which models to compare, and what to make of the difference."""

    original: str
    tuned: str
    output: Path
    rank: int  # with a method the largest
    conv_rank: int | None = None  # of kernels larger than 1, which get nothing where it is None
    norms: bool = False  # whether the denoiser's norm layers get their differences
    method: RankMethod | None = None
    param: float | None = None  # of the method
    kronecker_factor: int | None = None  # one Kronecker product for each layer instead of ranks: the size of its first
    clamp_quantile: float = 1.0  # share of the values that are kept as they are
    min_diff: float = 0.0  # a text encoder whose weights differ by no more gets nothing
    exact: bool = False  # whether all singular values are computed
    encoders: Encoders = field(default_factory=dict)
    tuned_encoders: Encoders = field(default_factory=dict)
    precision: str | None = None
    device: str = "cpu"
    family: str | None = None
    minimal_metadata: bool = False


@dataclass(kw_only=True)
class PartResult:
    """What was found of one part."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    dims: list[tuple[int, float]] = field(default_factory=list)  # rank and alpha of each layer
    largest: float = 0.0  # of all differences
    square: float = 0.0  # sum of squares of all differences
    lost: float = 0.0  # the same of what the adapter lacks
    norms: int = 0  # norm layers that have their differences
    others: int = 0  # further tensors that differ, for which an adapter has no place

    def make_line(self, part: str) -> str:
        error = (self.lost / self.square) ** 0.5 if self.square else 0.0
        others = (
            f"; {plural(self.others, 'other tensor differs', 'other tensors differ')}, which it does not have"
            if self.others
            else ""
        )
        norms = f" and {plural(self.norms, 'norm layer')}" if self.norms else ""
        layers = describe_ranks([rank for rank, _ in self.dims], norms)
        return f"{part}: {layers}, relative error {error:.3%}{others}"


@torch.no_grad()
def extract_adapter(request: ExtractRequest) -> list[str]:
    """Write the adapter that makes the tuned model out of the original one, as nearly as its rank allows.

    The lines of the report; the errors there are exact, however the singular values were computed. UserError for models
    of different families or sizes, and where nothing differs.
    """
    paths = [
        *collect_inputs(request.original, request.encoders),
        *collect_inputs(request.tuned, request.tuned_encoders),
    ]
    check_output(request.output, paths)
    check_method(request.method, request.param)
    with ExitStack() as stack:
        original = stack.enter_context(closing(open_tool_model(request.original, request.encoders, request.family)))
        tuned = stack.enter_context(closing(open_tool_model(request.tuned, request.tuned_encoders, request.family)))
        pairs = pair_networks(original, tuned)
        results = extract_parts(request, pairs)
        base = original.family.name_base_model(original.networks["denoiser"])
    skipped = [part for part, result in results.items() if not result.tensors]
    found = {part: result for part, result in results.items() if result.tensors}
    if not found:
        raise UserError(
            f"{request.original} and {request.tuned} do not differ in any layer that an adapter may change",
            code="extract-nothing-differs",
            fix="give the model before and after training",
        )
    tensors = {name: tensor for result in found.values() for name, tensor in result.tensors.items()}
    dims = [dim for result in found.values() for dim in result.dims]
    metadata = make_extracted_metadata(request.output, base, dims, minimal=request.minimal_metadata)
    written = write_adapter(request.output, tensors, metadata, TOOL_DTYPES[request.precision])
    lines = [result.make_line(part) for part, result in found.items()]
    lines += [f"{part}: nothing differs by more than {request.min_diff:g}, it gets no layers" for part in skipped]
    return [*lines, f"{written}: {plural(len(dims), 'layer')}"]


def collect_inputs(model: str, encoders: Encoders) -> list[Path]:
    paths = [Path(model), *(Path(each) for each in encoders.values() if each)]
    return [file for path in paths if path.exists() for file in (path, *list_input_paths(path))]


def pair_networks(original: ToolModel, tuned: ToolModel) -> dict[str, tuple[Network, Network]]:
    """The parts that both models have; UserError where these differ in family or size."""
    if original.family is not tuned.family:
        raise UserError(
            f"{original.source.path} is a model of the family {original.family.name!r}, {tuned.source.path} of "
            f"{tuned.family.name!r}",
            code="extract-families-differ",
            fix="give two models of one family",
        )
    pairs: dict[str, tuple[Network, Network]] = {}
    for part, network in original.networks.items():
        if part in tuned.networks:
            pairs[part] = network, tuned.networks[part]
            before, after = (dict(each.weights.read_shapes()) for each in pairs[part])
            differing = [name for name in before if name in after and before[name] != after[name]]
            if differing:
                raise UserError(
                    f"{part} has another size in {tuned.source.path}: {differing[0]} is "
                    f"{tuple(after[differing[0]])} there and {tuple(before[differing[0]])} in {original.source.path}",
                    code="extract-sizes-differ",
                    fix="give a model and what was trained from it",
                )
    return pairs


def extract_parts(request: ExtractRequest, pairs: Mapping[str, tuple[Network, Network]]) -> dict[str, PartResult]:
    groups = {part: select_groups(network, request) for part, (network, _) in pairs.items()}
    total = sum(map(len, groups.values()))
    results: dict[str, PartResult] = {}
    done = 0
    with ProgressTask(request.output.name, "layers") as progress:
        for part, (before, after) in pairs.items():
            result = results[part] = PartResult()
            for group in groups[part]:
                if group.is_norm:
                    add_norm(result, group, before, after)
                else:
                    add_group(result, group, before, after, request)
                done += 1
                progress(done, total)
            result.others = count_other_changes(before, after, groups[part])
            if part != "denoiser" and result.largest <= request.min_diff:
                results[part] = PartResult()
    return results


def select_groups(network: Network, request: ExtractRequest) -> list[LayerGroup]:
    """The layer groups that get an adapter: those of a LoRA as trained by default, and convolutions if asked for."""
    spec, layers = network.spec, network.meta_layers
    targets = (*spec.targets, *spec.conv_targets) if request.conv_rank else spec.targets
    plain = {path: layer for path, layer in layers.items() if not is_norm(layer)}
    chosen = group_layers(plain, targets, part=spec.name, prefix=spec.adapter_prefix, adapter_map=spec.adapter_map)
    norms = [group for group in spec.groups(layers, every=True) if group.is_norm] if request.norms else []
    return [*chosen, *norms]


def find_stacked_key(network: Network, group: LayerGroup) -> str | None:
    """The key of the tensor that holds the weights of a group as adapter files stack them; None where none does."""
    weights = network.weights
    original = weights.stored_keys.get(f"{group.paths[0]}.weight")
    found = weights.key_map.find_ours(original) if original else None
    swaps = len(group.rows[0]) == 2
    is_stacked = found == (tuple(f"{path}.weight" for path in group.paths), "swap" if swaps else "")
    return weights.prefix + original if original and is_stacked else None


def read_stacked(network: Network, group: LayerGroup) -> Tensor:
    """The weights of a group in float32, stacked as in adapter files."""
    weights, key = network.weights, find_stacked_key(network, group)
    if key:
        return weights.file.read(key, dtype=torch.float32)
    return group.stack_rows([weights.read(f"{path}.weight", dtype=torch.float32) for path in group.paths])


def subtract_stacked(change: Tensor, network: Network, group: LayerGroup) -> None:
    """Subtract the weights of a group in place; where the file has them so, without a second tensor of their size."""
    file, key = network.weights.file, find_stacked_key(network, group)
    if key is None or not isinstance(file, TensorFile):
        change.sub_(read_stacked(network, group))
        return
    flat, start = change.reshape(-1), 0
    for piece in file.iterate_pieces(key):
        flat[start : start + len(piece)].sub_(piece.float())
        start += len(piece)


def add_group(result: PartResult, group: LayerGroup, before: Network, after: Network, request: ExtractRequest) -> None:
    """Add the adapter of one group; none where nothing differs."""
    change = read_stacked(after, group)
    subtract_stacked(change, before, group)
    change = change.to(request.device)
    square, largest = sum_squares(change), find_largest(change)
    if not largest < float("inf"):
        raise make_infinite_change_error(group)
    result.largest, result.square = max(result.largest, largest), result.square + square
    if largest == 0:
        return
    if request.kronecker_factor is not None:
        tensors, error = make_kronecker_tensors(group, change, request.kronecker_factor)
        dim = (1, 1.0)
    else:
        kernel, flat = change.shape[2:], change.flatten(1)
        limit = request.rank if is_pointwise(group.layers[0]) else (request.conv_rank or request.rank)
        limit = min(limit, *flat.shape)
        needs_all = request.exact or request.method == "sv_cumulative"
        svd = decompose(flat) if needs_all else decompose_randomly(flat, limit)
        rank = find_needed_rank(svd, request.method, request.param, limit)
        error, dim = svd.measure_error(rank), (rank, float(rank))
        tensors = make_low_rank_tensors(svd.truncate(rank, request.clamp_quantile), kernel, rank)
    result.lost += error**2 * square
    result.dims.append(dim)
    result.tensors |= {f"{group.name}.{name}": tensor.cpu() for name, tensor in tensors.items()}


def add_norm(result: PartResult, group: LayerGroup, before: Network, after: Network) -> None:
    """Add the differences of a norm layer; none where nothing differs."""
    found: list[Tensor | None] = []
    for name in (f"{group.paths[0]}.weight", f"{group.paths[0]}.bias"):
        known = name in before.weights.stored_keys and name in after.weights.stored_keys
        pair = [each.weights.read(name, dtype=torch.float32) for each in (after, before)] if known else None
        found.append(pair[0] - pair[1] if pair else None)
    weight, bias = found
    assert weight is not None, "groups are of weights"
    changes = [each for each in found if each is not None]
    largest = max(map(find_largest, changes))
    if not largest < float("inf"):
        raise make_infinite_change_error(group)
    result.largest, result.square = max(result.largest, largest), result.square + sum(map(sum_squares, changes))
    if largest:
        result.norms += 1
        result.tensors |= {f"{group.name}.{name}": each for name, each in make_norm_tensors(weight, bias).items()}


def make_infinite_change_error(group: LayerGroup) -> UserError:
    return UserError(
        f"{group.name}: the weights of one of the models are not finite (NaN or infinite)",
        code="extract-not-finite",
        fix="use another save of it",
    )


def count_other_changes(before: Network, after: Network, groups: Sequence[LayerGroup]) -> int:
    """How many tensors differ that no group has: norms, biases, embeddings, further layers."""
    covered = {f"{path}.weight" for group in groups for path in group.paths}
    covered |= {f"{group.paths[0]}.bias" for group in groups if group.is_norm}
    others = [name for name in before.weights.stored_keys if name not in covered and name in after.weights.stored_keys]
    return sum(differs(before.weights, after.weights, name) for name in others)


def differs(before: Weights, after: Weights, name: str) -> bool:
    """Whether a tensor has other values; in float32 where its dtypes differ."""
    first, second = before.read(name), after.read(name)
    if first.dtype != second.dtype:
        first, second = first.float(), second.float()
    return not torch.equal(first, second)
