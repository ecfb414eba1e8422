"""`sfumato lora export`: a LoRA under the names of another program. No model is needed, the names tell its layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sfumato.adapters.lora import LoRA
from sfumato.errors import Problems, UserError
from sfumato.families import register_all
from sfumato.families.adapter_names import groups_of
from sfumato.families.base import FAMILIES, Family
from sfumato.formats.checkpoint import PRECISIONS, open_checkpoint, write_safetensors
from sfumato.formats.groups import LayerGroup
from sfumato.formats.hashes import with_hashes
from sfumato.formats.lora import check_names, read_adapter_file

Entries = dict[str, dict[str, Tensor]]  # of an adapter file: name -> suffix -> tensor
MATRICES = ("lora_down.weight", "lora_up.weight")


@dataclass(frozen=True, kw_only=True)
class Route:
    """One name in the file, and the names of its layers in diffusers."""

    part: str
    group: LayerGroup
    names: tuple[str, ...]
    taken: bool  # by diffusers' pipeline


Routes = dict[str, Route]


def export_lora(
    source: Path,
    target: Path,
    *,
    family: str | None = None,
    without: Collection[str] = (),
    precision: str | None = None,
) -> None:
    """Write the LoRA file `source`, in the field's names, as diffusers' pipelines load it; prints what was written.

    alpha / rank is multiplied into the second matrix, since diffusers' names have no place for it. Metadata is kept.
    without: parts that are left out. precision: a choice of --save_precision; None keeps each tensor's own.
    Raises UserError for names that fit no layer, and for parts that diffusers would not load.
    """
    check_paths(source, target)
    entries = read_adapter_file(source)
    with open_checkpoint(source) as file:
        metadata = file.header.metadata
    routes = routes_of(source, entries, family, without)
    tensors = {
        key: tensor
        for name, route in routes.items()
        for key, tensor in renamed(source, entries[name], route, precision)
    }
    replaced = target.exists()
    write_safetensors(target, tensors, with_hashes({"format": "pt", **metadata}, tensors))
    print(f"{target}{' (replaced)' if replaced else ''}: {summary(routes)}")


def check_paths(source: Path, target: Path) -> None:
    problems = Problems()
    if target.suffix != ".safetensors":
        problems.add(f"{target} must end in .safetensors", fix=f"{target.with_suffix('.safetensors')}")
    if target.is_dir():
        problems.add(f"{target} is a folder", fix="name the file to write")
    if source.exists() and target.exists() and source.samefile(target):
        problems.add(f"{source} would be written over itself", fix="name another file to write")
    problems.raise_all()


# ---------------------------------------------------------------- names


def routes_of(path: Path, entries: Entries, family: str | None, without: Collection[str]) -> Routes:
    """Every name of the file with the layers behind it, by the family given or the one that knows all names.

    Families may share names, as long as what is written is the same. Raises UserError for names that fit no layer and
    for layers that diffusers would leave alone.
    """
    register_all()
    check_whole(path, entries)
    shapes = {name: shape for name, tensors in entries.items() if (shape := weight_shape(tensors))}
    found = {name: family_routes(FAMILIES.get(name), shapes) for name in ([family] if family else FAMILIES.names)}
    check_names(path, entries, max(found.values(), key=len))
    whole = {name: chosen(routes, without) for name, routes in found.items() if len(routes) == len(entries)}
    first, *others = whole.values()
    check_taken(path, first)
    if any(signature(other) != signature(first) for other in others):
        raise UserError(f"{path} could be for several kinds of models", fix=f"--family {' or '.join(whole)}")
    return first


def family_routes(family: type[Family], shapes: Mapping[str, Sequence[int]]) -> Routes:
    """The names that one family knows."""
    found: Routes = {}
    for part, spec in family.adapted(shapes).items():
        component = family.components[part]
        own = {name: shape for name, shape in shapes.items() if name.startswith(spec.adapter_prefix + "_")}
        for name, group in groups_of(spec, own).items():
            places = (component.key_map.locate(path).original for path in group.paths)
            names = tuple(f"{component.folder}.{place}" for place in places)
            found[name] = Route(part=part, group=group, names=names, taken=component.takes_lora)
    return found


def signature(routes: Routes) -> tuple[object, ...]:
    """What a file becomes: which rows of which name go where."""
    return tuple(sorted((name, route.names, route.group.rows, route.taken) for name, route in routes.items()))


def check_whole(path: Path, entries: Entries) -> None:
    """Both matrices of every LoRA."""
    problems = Problems()
    if not entries:
        problems.add(f"{path} holds no tensors")
    for name, tensors in entries.items():
        there = [suffix for suffix in MATRICES if suffix in tensors]
        if len(there) == 1:
            problems.add(f"{path}: {name} has {there[0]} alone of its two matrices")
    problems.raise_all()


def weight_shape(tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
    """The shape of the weight that a LoRA of a linear layer or a convolution changes; () of anything else."""
    if not all(suffix in tensors for suffix in MATRICES):
        return ()
    down, up = (tensors[suffix] for suffix in MATRICES)
    return (up.shape[0], *down.shape[1:]) if down.ndim == up.ndim in (2, 4) else ()


def chosen(routes: Routes, without: Collection[str]) -> Routes:
    """Routes of the parts that are not left out."""
    parts = dict.fromkeys(route.part for route in routes.values())
    for part in without:
        if part not in parts:
            raise UserError(f"--without {part}: the file has no such part", fix=f"its parts: {', '.join(parts)}")
    kept = {name: route for name, route in routes.items() if route.part not in without}
    if not kept:
        raise UserError("--without leaves nothing to write", fix="leave fewer parts out")
    return kept


def check_taken(path: Path, routes: Routes) -> None:
    lost = dict.fromkeys(route.part for route in routes.values() if not route.taken)
    if lost:
        count = sum(not route.taken for route in routes.values())
        raise UserError(
            f"{path}: diffusers' pipelines load no LoRA for {', '.join(lost)}, where {count} of {len(routes)} lie",
            fix=f"--without {','.join(lost)} writes the rest, which then works without them",
        )


def summary(routes: Routes) -> str:
    """Parts with their numbers of LoRA, in the file's order, and the layers they make in diffusers."""
    counts = Counter(route.part for route in routes.values())
    layers = sum(len(route.names) for route in routes.values())
    told = ", ".join(f"{count} LoRA of {part}" for part, count in counts.items())
    return f"{told}; {layers} layers in diffusers"


# ---------------------------------------------------------------- tensors


def renamed(
    path: Path, tensors: Mapping[str, Tensor], route: Route, precision: str | None
) -> Iterator[tuple[str, Tensor]]:
    """The two matrices of each layer behind one name, under diffusers' names."""
    adapter = LoRA.from_tensors(route.group, tensors)  # checks the shapes
    down, up = (tensors[suffix] for suffix in MATRICES)
    dtype = PRECISIONS[precision] or down.dtype
    down, up = down.reshape(adapter.lora_down.shape), up.reshape(adapter.lora_up.shape).float()
    ups = [route.group.take(up, i) for i in range(len(route.names))]
    for name, up, ranks in zip(route.names, ups, own_ranks(ups), strict=True):
        scaled = (up[:, ranks] * adapter.scale).to(dtype)
        if not scaled.isfinite().all():
            raise UserError(f"{path}: {route.group.name} has values beyond {dtype}", fix="--save_precision float")
        yield f"{name}.lora_A.weight", down[ranks].to(dtype).contiguous()
        yield f"{name}.lora_B.weight", scaled.contiguous()


def own_ranks(ups: Sequence[Tensor]) -> list[slice]:
    """Which ranks each layer needs: its own share where layers were trained one by one, else all of them."""
    count, rank = len(ups), ups[0].shape[1]
    share = rank // count
    alone = [slice(i * share, (i + 1) * share) for i in range(count)]
    if count == 1 or rank % count or not any(up.any() for up in ups):
        return [slice(None)] * count
    others = (torch.cat([up[:, : own.start], up[:, own.stop :]], dim=1) for up, own in zip(ups, alone, strict=True))
    return [slice(None)] * count if any(each.any() for each in others) else alone
