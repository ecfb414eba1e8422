"""`sfumato lora export`: a LoRA under the names of another program. No model is needed: the names give the layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from sfumato.adapters.lora import LoRA
from sfumato.errors import Problems, UserError
from sfumato.families import register_families
from sfumato.families.adapter_names import find_groups
from sfumato.families.base import FAMILIES, Family
from sfumato.formats.checkpoint import SAVE_DTYPES, open_checkpoint
from sfumato.formats.checkpoint_writer import write_safetensors
from sfumato.formats.groups import LayerGroup
from sfumato.formats.hashes import add_hashes
from sfumato.formats.lora import check_names, read_adapter_file

AdapterTensors = dict[str, dict[str, Tensor]]  # of an adapter file: name -> suffix -> tensor
MATRICES = ("lora_down.weight", "lora_up.weight")


@dataclass(frozen=True, kw_only=True)
class Route:
    """One name in the file, and the names of its layers in diffusers."""

    part: str
    group: LayerGroup
    names: tuple[str, ...]
    loadable: bool  # by diffusers' pipeline


Routes = dict[str, Route]


def export_lora(
    source: Path,
    target: Path,
    *,
    family: str | None = None,
    without: Collection[str] = (),
    precision: str | None = None,
) -> None:
    """Write the LoRA file `source`, in kohya format, as diffusers' pipelines load it; prints what was written.

    alpha / rank is multiplied into the second matrix, since diffusers' names have no place for it. Metadata is kept.
    without: parts to skip. precision: a choice of --save_precision; None keeps each tensor's own.
    Raises UserError for names that fit no layer, and for parts that diffusers would not load.
    """
    check_export_paths(source, target)
    entries = read_adapter_file(source)
    with open_checkpoint(source) as file:
        metadata = file.header.metadata
    routes = find_routes(source, entries, family, without)
    tensors: dict[str, Tensor] = {}
    for name, route in routes.items():
        tensors |= convert_layer(source, entries[name], route, precision)
    replaced = target.exists()
    write_safetensors(target, tensors, add_hashes({"format": "pt", **metadata}, tensors))
    print(f"{target}{' (replaced)' if replaced else ''}: {summarize_routes(routes)}")


def check_export_paths(source: Path, target: Path) -> None:
    problems = Problems()
    if target.suffix != ".safetensors":
        problems.add(
            f"{target} must end in .safetensors",
            code="export-not-safetensors",
            fix=f"{target.with_suffix('.safetensors')}",
        )
    if target.is_dir():
        problems.add(f"{target} is a folder", code="export-target-is-folder", fix="name the file to write")
    if source.exists() and target.exists() and source.samefile(target):
        problems.add(
            f"{source} would be overwritten by its export", code="export-over-source", fix="name another file to write"
        )
    problems.raise_all()


# ---------------------------------------------------------------- names


def find_routes(path: Path, entries: AdapterTensors, family: str | None, without: Collection[str]) -> Routes:
    """Every name of the file with its layers, by the family given or the one that knows all names.

    Families may share names, as long as what is written is the same. Raises UserError for names that fit no layer and
    for layers that diffusers would ignore.
    """
    register_families()
    check_matrices(path, entries)
    shapes = {name: shape for name, tensors in entries.items() if (shape := infer_weight_shape(tensors))}
    known = {name: find_family_routes(FAMILIES.get(name), shapes) for name in ([family] if family else FAMILIES.names)}
    check_names(path, entries, max(known.values(), key=len))
    complete = {name: drop_parts(routes, without) for name, routes in known.items() if len(routes) == len(entries)}
    first, *others = complete.values()
    check_loadable(path, first)
    if any(make_signature(other) != make_signature(first) for other in others):
        raise UserError(
            f"{path} fits several model families",
            code="lora-family-ambiguous",
            fix=f"--family {' or '.join(complete)}",
        )
    return first


def find_family_routes(family: type[Family], shapes: Mapping[str, Sequence[int]]) -> Routes:
    """The names that one family knows."""
    routes: Routes = {}
    for part, spec in family.adapter_specs(shapes).items():
        component = family.components[part]
        part_shapes = {name: shape for name, shape in shapes.items() if name.startswith(spec.adapter_prefix + "_")}
        for name, group in find_groups(spec, part_shapes).items():
            layers = (component.key_map.locate(path).original for path in group.paths)
            names = tuple(f"{component.folder}.{layer}" for layer in layers)
            routes[name] = Route(part=part, group=group, names=names, loadable=component.takes_lora)
    return routes


def make_signature(routes: Routes) -> tuple[object, ...]:
    """What is written: which rows under which name."""
    return tuple(sorted((name, route.names, route.group.rows, route.loadable) for name, route in routes.items()))


def check_matrices(path: Path, entries: AdapterTensors) -> None:
    """UserError where a LoRA has only one of its two matrices, or the file has none."""
    problems = Problems()
    if not entries:
        problems.add(f"{path} holds no tensors", code="lora-file-empty", fix="give a LoRA file")
    for name, tensors in entries.items():
        present = [suffix for suffix in MATRICES if suffix in tensors]
        if len(present) == 1:
            problems.add(
                f"{path}: {name} has {present[0]} but not the other of its two matrices",
                code="lora-matrix-missing",
                fix="save or download the file again",
            )
    problems.raise_all()


def infer_weight_shape(tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
    """The shape of the weight that a LoRA of a linear layer or a convolution changes; () of anything else."""
    if not all(suffix in tensors for suffix in MATRICES):
        return ()
    down, up = (tensors[suffix] for suffix in MATRICES)
    return (up.shape[0], *down.shape[1:]) if down.ndim == up.ndim in (2, 4) else ()


def drop_parts(routes: Routes, without: Collection[str]) -> Routes:
    """The routes of all parts but those of --without."""
    parts = dict.fromkeys(route.part for route in routes.values())
    for part in without:
        if part not in parts:
            raise UserError(
                f"--without {part}: the file has no such part",
                code="lora-part-missing",
                fix=f"its parts: {', '.join(parts)}",
            )
    remaining = {name: route for name, route in routes.items() if route.part not in without}
    if not remaining:
        raise UserError(
            "--without removes every part of the file", code="lora-without-parts", fix="give --without fewer parts"
        )
    return remaining


def check_loadable(path: Path, routes: Routes) -> None:
    """UserError for layers that diffusers' pipelines would ignore."""
    ignored = [route.part for route in routes.values() if not route.loadable]
    if ignored:
        parts = dict.fromkeys(ignored)
        raise UserError(
            f"{path}: diffusers' pipelines load no LoRA of {', '.join(parts)}, which has {len(ignored)} of the"
            f" {len(routes)} in the file",
            code="lora-part-not-loadable",
            fix=f"--without {','.join(parts)} writes the rest, which then works without them",
        )


def summarize_routes(routes: Routes) -> str:
    """Parts with their numbers of LoRA, in the file's order, and the layers they make in diffusers."""
    counts = Counter(route.part for route in routes.values())
    layers = sum(len(route.names) for route in routes.values())
    parts = ", ".join(f"{count} LoRA of {part}" for part, count in counts.items())
    return f"{parts}; {layers} layers in diffusers"


# ---------------------------------------------------------------- tensors


def convert_layer(path: Path, tensors: Mapping[str, Tensor], route: Route, precision: str | None) -> dict[str, Tensor]:
    """The two matrices of each layer behind one name, under diffusers' names."""
    adapter = LoRA.from_tensors(route.group, tensors)  # checks the shapes
    down, up = (tensors[suffix] for suffix in MATRICES)
    dtype = SAVE_DTYPES[precision] or down.dtype
    down, up = down.reshape(adapter.lora_down.shape), up.reshape(adapter.lora_up.shape).float()
    ups = [route.group.take_rows(up, i) for i in range(len(route.names))]
    converted = {}
    for name, layer_up, ranks in zip(route.names, ups, find_own_ranks(ups), strict=True):
        scaled = (layer_up[:, ranks] * adapter.scale).to(dtype)
        if not scaled.isfinite().all():
            raise UserError(
                f"{path}: {route.group.name} has values beyond {dtype}",
                code="lora-overflows-dtype",
                fix="--save_precision float",
            )
        converted[f"{name}.lora_A.weight"] = down[ranks].to(dtype).contiguous()
        converted[f"{name}.lora_B.weight"] = scaled.contiguous()
    return converted


def find_own_ranks(ups: Sequence[Tensor]) -> list[slice]:
    """Which ranks each layer needs: a share of its own where layers were trained one by one, else all of them.

    ups: the rows of `lora_up` of each layer, (rows, rank).
    """
    count, rank = len(ups), ups[0].shape[1]
    everything = [slice(None)] * count
    if count == 1 or rank % count or not any(up.any() for up in ups):
        return everything
    share = rank // count
    own_ranks = [slice(i * share, (i + 1) * share) for i in range(count)]
    for up, own in zip(ups, own_ranks, strict=True):
        if up[:, : own.start].any() or up[:, own.stop :].any():
            return everything
    return own_ranks
