"""Adapters made one: the weighted sum of their changes, exact where all are of low rank, else the nearest of a rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Generator, Tensor

from sfumato.adapters.kinds import get_class, read_adapter_file
from sfumato.adapters.low_rank import (
    Factors,
    Svd,
    decompose,
    decompose_product,
    join_factors,
    make_low_rank_tensors,
)
from sfumato.errors import UserError
from sfumato.families.part import Network
from sfumato.formats.adapter_file import AdapterFile
from sfumato.formats.adapter_kind import LayerMatch, describe_kinds
from sfumato.formats.adapter_layers import GroupAdapter, collect_groups
from sfumato.formats.checkpoint import TOOL_DTYPES
from sfumato.formats.groups import LayerGroup, is_pointwise
from sfumato.tools.adapter_files.block_weights import find_block_weight, parse_block_weights
from sfumato.tools.adapter_files.changes import find_low_rank, restore_on
from sfumato.tools.adapter_files.merge import find_ratios
from sfumato.tools.adapter_files.models import (
    ENCODER_OPTIONS,
    Encoders,
    KnownFiles,
    match_base_model,
    match_files,
    open_tool_model,
)
from sfumato.tools.adapter_files.outputs import (
    check_output,
    describe_ranks,
    find_widest_dtype,
    make_adapter_metadata_from,
    write_adapter,
)
from sfumato.track.progress_task import ProgressTask

NO_NETWORKS: Mapping[str, Network] = {}


@dataclass(frozen=True, kw_only=True)
class JoinRequest:
    """Which adapters to add up, and what the sum is written as."""

    adapters: Sequence[Path]
    output: Path
    ratios: Sequence[float] = ()  # one for each adapter; empty: 1
    block_weights: Sequence[str] = ()  # JSON lists, one for each adapter
    new_rank: int | None = None  # None: the sum of all ranks, which is exact
    new_conv_rank: int | None = None  # of kernels larger than 1; None: new_rank
    shuffle: bool = False  # whether the ranks are written in a random order
    precision: str | None = None  # of TOOL_DTYPES; None: the widest of the files
    family: str | None = None
    device: str = "cpu"
    minimal_metadata: bool = False
    base_model: str | None = None  # whose weights are read, for kinds whose change depends on them
    encoders: Encoders = field(default_factory=dict)  # beside it


@dataclass(kw_only=True)
class Sum:
    """What the changes of a group add up to: factors, or a whole matrix where one of them has none."""

    factors: list[Factors]
    matrix: Tensor | None = None  # (rows, columns * kernel), without the factors

    def decompose(self) -> Svd:
        if self.matrix is None:
            return decompose_product(join_factors(self.factors))
        for down, up in self.factors:
            self.matrix.addmm_(up, down)
        return decompose(self.matrix)


@torch.no_grad()
def join_adapters(request: JoinRequest) -> list[str]:
    """Write one adapter that changes a model as all of them do together; the lines of the report.

    Raises UserError for files of different models, and for kinds that only a whole matrix or the model itself can sum.
    """
    own = [Path(each) for each in (request.base_model, *request.encoders.values()) if each]
    check_output(request.output, [*request.adapters, *own])
    ratios = find_ratios(request.ratios, len(request.adapters))
    files = [read_adapter_file(path) for path in request.adapters]
    tensors: dict[str, Tensor] = {}
    dims: list[tuple[int, float]] = []
    errors: list[float] = []
    with ExitStack() as stack:
        known, networks = find_layers_of(request, files, stack)
        strengths = find_strengths(known, ratios, request.block_weights)
        progress = stack.enter_context(ProgressTask(request.output.name, "layers"))
        for done, group in enumerate(known.groups, 1):
            total = sum_changes(group, known, strengths, request.device, networks)
            if total is None:
                continue
            factors, error = reduce_sum(total, group, request)
            errors.append(error)
            dims.append((len(factors.down), float(len(factors.down))))
            made = make_low_rank_tensors(factors, group.layers[0].weight.shape[2:], len(factors.down))
            tensors |= {f"{group.name}.{name}": tensor.cpu() for name, tensor in made.items()}
            progress(done, len(known.groups))
    if not dims:
        raise UserError(
            "the strength of every layer is 0: nothing is left to write",
            code="join-nothing-left",
            fix="--ratios and --lbws with numbers other than 0",
        )
    dtype = TOOL_DTYPES[request.precision] or find_widest_dtype(files)
    metadata = make_adapter_metadata_from(request.output, files, dims, minimal=request.minimal_metadata)
    written = write_adapter(request.output, tensors, metadata, dtype)
    lines = [f"{path} x {ratio:g}" for path, ratio in zip(request.adapters, ratios, strict=True)]
    lines += [line for file in files for line in file.describe_passed_over()]
    how = "exact" if max(errors, default=0.0) < 1e-5 else f"relative error up to {max(errors):.2%}"
    return [*lines, f"{written}: {describe_ranks([rank for rank, _ in dims])}, {how}"]


def find_layers_of(
    request: JoinRequest, files: Sequence[AdapterFile], stack: ExitStack
) -> tuple[KnownFiles, Mapping[str, Network]]:
    """The layers of all files, and the networks of the base model, whose file is open as long as the stack."""
    if request.base_model is None:
        return match_files(files, request.family), NO_NETWORKS
    model = open_tool_model(request.base_model, request.encoders, request.family)
    stack.enter_context(closing(model))
    return match_base_model(files, model), model.networks


def find_strengths(known: KnownFiles, ratios: Sequence[float], lists: Sequence[str]) -> dict[LayerMatch, float]:
    """The strength of each name of each file."""
    strengths: dict[LayerMatch, float] = {}
    for found, ratio, weights in zip(known.matches, ratios, parse_block_weights(lists, len(ratios)), strict=True):
        for match in found:
            spec = known.specs[match.view.part]
            strengths[match] = ratio * find_block_weight(weights, match, spec)
    return strengths


def sum_changes(
    group: LayerGroup,
    known: KnownFiles,
    strengths: Mapping[LayerMatch, float],
    device: str,
    networks: Mapping[str, Network],
) -> Sum | None:
    """The weighted changes of a group by all files; None where none changes it."""
    total = Sum(factors=[])
    for found in known.matches:
        for adapter in collect_groups(found, [group]):
            if len({strengths[match] for match in adapter.matches}) == 1:
                _add_whole(total, adapter, strengths[adapter.matches[0]], device, networks)
                continue
            for match in adapter.matches:  # of several strengths: one after the other
                _add_whole(total, GroupAdapter(group, (match,)), strengths[match], device, networks)
    return total if total.factors or total.matrix is not None else None


def _add_whole(
    total: Sum, adapter: GroupAdapter, strength: float, device: str, networks: Mapping[str, Network]
) -> None:
    if strength == 0:
        return
    match = LayerMatch(adapter.group.name, adapter.group, adapter.kinds, adapter.make_tensors())
    factors = find_low_rank(match)
    if factors:
        total.factors.append(Factors(factors.down.to(device), factors.up.to(device) * strength))
        return
    if adapter.group.layers[0].weight.ndim < 2:
        raise UserError(
            f"{match.name} is a norm, for which no low rank has a place",
            code="adapter-change-of-norm",
            fix="merge it into a model with --model",
        )
    matrix = form_matrix(match, networks).to(device) * strength
    total.matrix = matrix if total.matrix is None else total.matrix + matrix


def form_matrix(
    match: LayerMatch, networks: Mapping[str, Network] = NO_NETWORKS, *, with_biases: bool = True
) -> Tensor:
    """The whole change of all layers behind a name: (rows, columns * kernel), float32, in the rows of its layout; of a
    norm (rows, 1).

    networks: of the base model, by part. UserError for kinds whose change depends on weights that are not among them,
    and for changes of biases unless these do not count.
    """
    network = networks.get(match.view.part)
    if network is None and any(get_class(kind).reads_weights for kind in match.kinds):
        option = ENCODER_OPTIONS.get(match.view.part)
        raise UserError(
            f"{match.name} is of the kind {describe_kinds(match.kinds)}, whose change depends on the model's weights",
            code="adapter-change-needs-model",
            fix="merge it with --base_model FILE"
            + (f" --{option} FILE" if option else "")
            + " --new_rank N, which gives a file of low rank",
        )
    adapter = restore_on(match, {}, network)
    if with_biases and any(adapter.bias_delta(i) is not None for i in range(len(match.view.paths))):
        raise UserError(
            f"{match.name} also changes the layer's bias, for which no low rank has a place",
            code="adapter-change-of-bias",
            fix="merge it into a model with --model",
        )
    matrix = match.view.stack_rows([adapter.delta(i).float() for i in range(len(match.view.paths))])
    return matrix.flatten(1) if matrix.ndim > 1 else matrix.unsqueeze(1)


def reduce_sum(total: Sum, group: LayerGroup, request: JoinRequest) -> tuple[Factors, float]:
    """The factors of a sum, and their relative error."""
    rank = request.new_rank
    if rank is not None and not is_pointwise(group.layers[0]):
        rank = request.new_conv_rank or rank
    if total.matrix is not None and rank is None:
        raise UserError(
            f"{group.name}: the change is a whole matrix, no sum of low rank",
            code="join-rank-missing",
            fix="--new_rank N, for the nearest of that rank",
        )
    limit = min(group.num_rows, group.layers[0].weight[0].numel())
    if rank is None and sum(len(each.down) for each in total.factors) <= limit:
        return _order_ranks(join_factors(total.factors), request), 0.0
    svd = total.decompose()
    rank = min(rank or limit, len(svd.s))
    return _order_ranks(svd.truncate(rank), request), svd.measure_error(rank)


def _order_ranks(factors: Factors, request: JoinRequest) -> Factors:
    if not request.shuffle:
        return factors
    order = torch.randperm(len(factors.down), generator=Generator().manual_seed(0)).to(factors.down.device)
    return Factors(factors.down[order], factors.up[:, order])
