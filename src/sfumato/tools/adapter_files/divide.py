"""A file for each number of ranks of an adapter whose first ranks are an adapter alone (DyLoRA)."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from sfumato.adapters.kinds import get_class, read_adapter_file
from sfumato.adapters.low_rank import cut_ranks
from sfumato.errors import UserError
from sfumato.tools.adapter_files.outputs import check_output, make_adapter_metadata_from, write_adapter


def divide_ranks(source: Path, output: Path, unit: int) -> list[str]:
    """Write output-0004.safetensors and so on: the first `unit` ranks, twice as many, ..., below the largest rank.

    alpha stays as it is, as in sd-scripts. The lines of the report. UserError for other kinds, and for a unit that
    leaves nothing to write.
    """
    check_output(output, [source])
    file = read_adapter_file(source)
    ranks: dict[str, int] = {}
    for name, kinds in file.kinds.items():
        factors = get_class(kinds[-1]).to_factors(file.layers[name]) if len(kinds) == 1 else None
        if factors is None:
            raise UserError(
                f"{source}: {name} has no ranks that could be cut",
                code="divide-kind-unsupported",
                fix="give an adapter of low rank",
            )
        ranks[name] = len(factors[0])
    largest = max(ranks.values())
    if unit >= largest:
        raise UserError(
            f"--unit {unit} is not below the rank of {source}, which is {largest}",
            code="divide-unit-too-large",
            fix=f"--unit {max(1, largest // 4)}",
        )
    lines: list[str] = []
    for rank in range(unit, largest, unit):
        tensors: dict[str, Tensor] = {}
        dims: list[tuple[int, float]] = []
        for name, layer in file.layers.items():
            cut = cut_ranks(layer, rank)
            dims.append((min(rank, ranks[name]), float(cut["alpha"])))
            tensors |= {f"{name}.{end}": tensor.contiguous() for end, tensor in cut.items()}
        path = output.with_name(f"{output.stem}-{rank:04d}{output.suffix}")
        metadata = make_adapter_metadata_from(path, [file], dims)
        lines.append(f"{write_adapter(path, tensors, metadata, None)}: rank {rank}")
    return lines
