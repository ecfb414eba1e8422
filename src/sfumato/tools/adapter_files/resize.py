"""Adapters of low rank at a smaller rank: exactly the nearest, from the singular values of rank x rank matrices."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sfumato.adapters.kinds import get_class, read_adapter_file
from sfumato.adapters.low_rank import (
    Factors,
    RankMethod,
    decompose_product,
    find_needed_rank,
    make_low_rank_tensors,
    make_peft_tensors,
)
from sfumato.errors import UserError
from sfumato.formats.adapter_file import AdapterFile
from sfumato.formats.adapter_keys import ALPHA
from sfumato.formats.adapter_kind import describe_kinds
from sfumato.formats.checkpoint import TOOL_DTYPES
from sfumato.tools.adapter_files.outputs import (
    check_output,
    describe_ranks,
    find_widest_dtype,
    make_adapter_metadata_from,
    write_adapter,
)
from sfumato.track.progress_task import ProgressTask


@dataclass(frozen=True, kw_only=True)
class ResizeRequest:
    """Which file to make smaller, and how."""

    source: Path
    output: Path
    new_rank: int  # with a method the largest
    new_conv_rank: int | None = None  # of kernels larger than 1; None: new_rank
    method: RankMethod | None = None
    param: float | None = None  # of the method
    precision: str | None = None
    device: str = "cpu"
    verbose: bool = False  # whether each layer has a line in the report
    minimal_metadata: bool = False


@dataclass(frozen=True, kw_only=True)
class ResizedLayer:
    """One layer of the result."""

    name: str
    tensors: dict[str, Tensor]
    rank: int
    old_rank: int
    alpha: float
    norm: float  # of the change before
    error: float  # relative, of the change

    def make_line(self) -> str:
        return f"{self.name}: rank {self.old_rank} -> {self.rank}, norm {self.norm:.4g}, error {self.error:.3%}"


@torch.no_grad()
def resize_adapter(request: ResizeRequest) -> list[str]:
    """Write the file with at most the new rank in each layer; the lines of the report.

    alpha / rank of each layer stays as it is, and so do norms, which have no rank. UserError for kinds that have no
    ranks of this kind, and for a method without its number.
    """
    check_output(request.output, [request.source])
    check_method(request.method, request.param)
    file = read_adapter_file(request.source)
    ranked = {name: not get_class(kinds[0]).of_norms for name, kinds in file.kinds.items()}
    layers: list[ResizedLayer] = []
    with ProgressTask(request.output.name, "layers") as progress:
        for name in filter(ranked.get, file.layers):
            layers.append(resize_layer(file, name, request))
            progress(len(layers), sum(ranked.values()))
    if not layers:
        raise make_no_rank_error(file, next(iter(file.layers)), request)
    tensors = {f"{layer.name}.{end}": tensor for layer in layers for end, tensor in layer.tensors.items()}
    for name in (name for name, has_rank in ranked.items() if not has_rank):
        tensors |= {f"{name}.{end}": tensor for end, tensor in file.layers[name].items()}
    dtype = TOOL_DTYPES[request.precision] or find_widest_dtype([file])
    dims = [(layer.rank, layer.alpha) for layer in layers]
    how = f", {request.method} {request.param:g}" if request.method else ""
    metadata = make_adapter_metadata_from(
        request.output, [file], dims, minimal=request.minimal_metadata, comment=f"resized to {request.new_rank}{how}"
    )
    written = write_adapter(request.output, tensors, metadata, dtype)
    lines = [layer.make_line() for layer in layers] if request.verbose else []
    lines += file.describe_passed_over()
    return [*lines, f"{written}: {summarize_layers(layers)}"]


def make_no_rank_error(file: AdapterFile, name: str, request: ResizeRequest) -> UserError:
    of_norms = get_class(file.kinds[name][0]).of_norms
    return UserError(
        f"{file.path}: {name} is of the kind {describe_kinds(file.kinds[name])}, which has no rank that could be cut",
        code="resize-kind-unsupported",
        fix="" if of_norms else f"sfumato lora merge {file.path} --new_rank {request.new_rank} --save_to FILE",
    )


def check_method(method: RankMethod | None, param: float | None) -> None:
    """UserError for a method without its number, or with one that it cannot have."""
    if method is None:
        return
    if param is None or param <= 0 or (method == "sv_ratio" and param < 1) or (method != "sv_ratio" and param > 1):
        limits = "a number from 1 on" if method == "sv_ratio" else "a number above 0, at most 1"
        raise UserError(
            f"--dynamic_method {method} needs {limits}", code="rank-method-number", fix="--dynamic_param NUMBER"
        )


def resize_layer(file: AdapterFile, name: str, request: ResizeRequest) -> ResizedLayer:
    """One layer under its name in the file; without alpha where the file has none."""
    tensors, kinds = file.layers[name], file.kinds[name]
    found = get_class(kinds[-1]).to_factors(tensors) if len(kinds) == 1 else None
    if found is None:
        raise make_no_rank_error(file, name, request)
    factors = Factors(*(matrix.to(request.device) for matrix in found))
    old_rank, kernel = len(factors.down), find_kernel(file, name)
    svd = decompose_product(factors)
    limit = (request.new_conv_rank or request.new_rank) if max(kernel, default=1) > 1 else request.new_rank
    rank = find_needed_rank(svd, request.method, request.param, limit)
    cut, scale = svd.truncate(rank), float(tensors[ALPHA]) / old_rank or 1.0
    has_alpha = any(key.endswith(".alpha") for key in file.keys)
    made = (
        make_low_rank_tensors(Factors(cut.down, cut.up / scale), kernel, scale * rank)
        if has_alpha
        else make_peft_tensors(cut, kernel)
    )
    return ResizedLayer(
        name=name,
        tensors={end: tensor.cpu() for end, tensor in made.items()},
        rank=rank,
        old_rank=old_rank,
        alpha=scale * rank if has_alpha else float(rank),
        norm=svd.norm,
        error=svd.measure_error(rank),
    )


def find_kernel(file: AdapterFile, name: str) -> tuple[int, ...]:
    """The size of the kernel, () of a linear layer."""
    return file.find_weight_shape(name)[2:]


def summarize_layers(layers: list[ResizedLayer]) -> str:
    norm = sum(layer.norm**2 for layer in layers)
    lost = sum((layer.error * layer.norm) ** 2 for layer in layers)
    average = sum(layer.rank for layer in layers) / len(layers)
    return (
        f"{describe_ranks([layer.rank for layer in layers])} ({average:.1f} on average), "
        f"relative error of all changes {(lost / norm) ** 0.5 if norm else 0.0:.3%}"
    )
