"""`sfumato lora convert`: a LoRA under the names of another program. No model is needed: the names give the layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from sfumato.adapters.kinds import get_class, read_adapter_file
from sfumato.common.text import plural
from sfumato.errors import UserError
from sfumato.families.base import Family
from sfumato.families.part import PartSpec
from sfumato.formats.adapter_file import AdapterFile
from sfumato.formats.adapter_kind import LayerMatch, describe_kinds
from sfumato.formats.adapter_layers import collect_groups
from sfumato.formats.checkpoint import SAVE_DTYPES
from sfumato.formats.groups import make_adapter_name
from sfumato.formats.peft_config import DIFFUSERS_KEY
from sfumato.tools.adapter_files.models import KnownFiles, match_files
from sfumato.tools.adapter_files.outputs import check_output, find_widest_dtype, write_adapter
from sfumato.tools.adapter_files.written_values import find_largest

Program = Literal["kohya", "diffusers", "aitoolkit", "comfyui"]


@dataclass(frozen=True, kw_only=True)
class Route:
    """One name in the file, its layers, and what other programs call these."""

    match: LayerMatch
    diffusers_names: tuple[str, ...]  # of each layer
    in_diffusers: bool  # whether its pipeline loads it
    comfyui_name: str  # of all; the name in the file where that has another layout

    @property
    def part(self) -> str:
        return self.match.view.part


def export_lora(
    source: Path,
    target: Path,
    *,
    program: Program,
    family: str | None = None,
    without: Collection[str] = (),
    precision: str | None = None,
) -> None:
    """Write the LoRA `source`, a file or folder of any program, as another one loads it; prints what was written.

    diffusers' names have no place for alpha: alpha / rank is multiplied into the second matrix. Metadata is kept.
    without: parts to skip. precision: a choice of --save_precision; None keeps each tensor's own.
    Raises UserError for names that fit no layer, and where the program would not load the file or needs no other one.
    """
    check_output(target, [source], suffixes=(".safetensors",))
    file = read_adapter_file(source)
    known = find_known(file, family, without)
    routes = make_routes(known, without)
    if program == "kohya":
        tensors = convert_to_kohya(file, known, routes, precision)
    elif program in ("diffusers", "aitoolkit"):
        check_loadable(file.path, routes)
        tensors = convert_to_diffusers(file.path, routes, precision)
    else:
        check_need(file.path, routes)
        tensors = rename_for_comfyui(file.path, routes, precision)
    metadata = {name: value for name, value in file.metadata.items() if name != DIFFUSERS_KEY}
    named = write_adapter(target, tensors, {"format": "pt", **metadata}, None)
    print(f"{named}: {summarize_routes(routes, tensors, program)}")
    if program in ("diffusers", "aitoolkit") and not any(route.comfyui_name != route.match.name for route in routes):
        print(f"note: this file is for diffusers alone; ComfyUI and other programs read {source} as it is")


# ---------------------------------------------------------------- names


def find_known(file: AdapterFile, family: str | None, without: Collection[str]) -> KnownFiles:
    """The layers of every name, by the family given or the one that knows all names; UserError as `match_files`."""
    return match_files([file], family, list_written=lambda known: make_signature(make_routes(known, without)))


def make_routes(known: KnownFiles, without: Collection[str]) -> list[Route]:
    """Every name of the file with what other programs call its layers, but for those of some parts."""
    return drop_parts([make_route(known.family, known.specs, match) for match in known.matches[0]], without)


def make_route(family: type[Family], specs: Mapping[str, PartSpec], match: LayerMatch) -> Route:
    view = match.view
    component, spec = family.components[view.part], specs[view.part]
    layers = [component.key_map.locate(path).original for path in view.paths]
    ours = spec.adapter_map.locate(view.paths[0])
    same_layers = ours.siblings == view.paths and (ours.op == "swap") == (len(view.rows[0]) == 2)
    prefix = component.comfyui_prefix or spec.adapter_prefix
    return Route(
        match=match,
        diffusers_names=tuple(f"{component.folder}.{layer}" for layer in layers),
        in_diffusers=component.takes_lora,
        comfyui_name=make_adapter_name(prefix, ours.original) if same_layers else match.name,
    )


def make_signature(routes: Sequence[Route]) -> Sequence[object]:
    """What is written: which rows under which name."""
    return sorted((route.match.name, route.diffusers_names, route.match.view.rows) for route in routes)


def drop_parts(routes: Sequence[Route], without: Collection[str]) -> list[Route]:
    """The routes of all parts but those of --without."""
    parts = dict.fromkeys(route.part for route in routes)
    for part in without:
        if part not in parts:
            raise UserError(
                f"--without {part}: the file has no such part",
                code="lora-part-missing",
                fix=f"its parts: {', '.join(parts)}",
            )
    remaining = [route for route in routes if route.part not in without]
    if not remaining:
        raise UserError(
            "--without removes every part of the file", code="lora-without-parts", fix="give --without fewer parts"
        )
    return remaining


def check_loadable(path: Path, routes: Sequence[Route]) -> None:
    """UserError for layers that diffusers' pipelines would ignore."""
    ignored = [route.part for route in routes if not route.in_diffusers]
    if ignored:
        parts = dict.fromkeys(ignored)
        raise UserError(
            f"{path}: diffusers' pipelines load no LoRA of {', '.join(parts)}, which has {len(ignored)} of the"
            f" {len(routes)} in the file",
            code="lora-part-not-loadable",
            fix=f"--without {','.join(parts)} writes the rest, which then works without them",
        )


def check_need(path: Path, routes: Sequence[Route]) -> None:
    """UserError where ComfyUI reads the file as it is."""
    if all(route.comfyui_name == route.match.name for route in routes):
        raise UserError(
            f"{path} needs no export: ComfyUI reads its names as they are",
            code="export-not-needed",
            fix="use the file itself",
        )


def summarize_routes(routes: Sequence[Route], tensors: Collection[str], program: Program) -> str:
    """Parts with their numbers of LoRA, in the file's order, and what they make in the other program."""
    counts = Counter((describe_kinds(route.match.kinds), route.part) for route in routes)
    parts = ", ".join(f"{count} {kinds} of {part}" for (kinds, part), count in counts.items())
    layers = sum(len(route.diffusers_names) for route in routes)
    written = f"{plural(layers, 'layer')} in diffusers, " if program in ("diffusers", "aitoolkit") else ""
    return f"{parts}; {written}{plural(len(tensors), 'tensor')}"


# ---------------------------------------------------------------- tensors


def convert_to_diffusers(path: Path, routes: Sequence[Route], precision: str | None) -> dict[str, Tensor]:
    """The tensors of each layer, under diffusers' names."""
    converted: dict[str, Tensor] = {}
    for route in routes:
        for name, tensors in zip(route.diffusers_names, divide_layers(path, route.match), strict=True):
            for end, tensor in tensors.items():
                converted[f"{name}.{end}"] = _convert_tensor(path, route.match, tensor, precision)
    return converted


def divide_layers(path: Path, match: LayerMatch) -> list[dict[str, Tensor]]:
    """Of each layer of one name the tensors that PEFT has; UserError for a kind that it does not know."""
    layers: list[dict[str, Tensor]] = [{} for _ in match.view.paths]
    for kind in match.kinds:
        found = get_class(kind).to_peft(match)
        if found is None:
            raise UserError(
                f"{path}: diffusers' pipelines load no {describe_kinds(match.kinds)} like that of {match.name}",
                code="export-kind-unknown",
                fix="--to comfyui"
                if get_class(kind).of_norms
                else f"--to comfyui, or make a LoRA of it: sfumato lora merge {path} --new_rank N --save_to FILE",
            )
        for tensors, more in zip(layers, found, strict=True):
            tensors |= more
    return layers


def _convert_tensor(path: Path, match: LayerMatch, tensor: Tensor, precision: str | None) -> Tensor:
    """In the wanted dtype, or in that of the file's matrices."""
    own = max((each.dtype for each in match.tensors.values() if each.ndim > 1), key=lambda dtype: -dtype.itemsize)
    dtype = SAVE_DTYPES[precision] or own
    return _cast(path, match.name, tensor, dtype)


def _cast(path: Path, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous; UserError for values that the dtype cannot hold."""
    converted = tensor.to(dtype).contiguous()
    if find_largest(converted) == float("inf"):
        raise UserError(
            f"{path}: {name} has values beyond {dtype}", code="lora-overflows-dtype", fix="--save_precision float"
        )
    return converted


def convert_to_kohya(
    file: AdapterFile, known: KnownFiles, routes: Sequence[Route], precision: str | None
) -> dict[str, Tensor]:
    """The tensors of each layer group, in sd-scripts' layout: layers that it has fused become one LoRA, exactly."""
    parts = {route.part for route in routes}
    dtype = SAVE_DTYPES[precision] or find_widest_dtype([file])
    converted: dict[str, Tensor] = {}
    for adapter in collect_groups(known.matches[0], known.groups):
        if adapter.group.part in parts:
            for name, tensor in adapter.make_tensors().items():
                final = dtype if tensor.ndim else tensor.dtype
                converted[f"{adapter.group.name}.{name}"] = _cast(file.path, adapter.group.name, tensor, final)
    if parts == {match.view.part for match in known.matches[0]} and converted.keys() == set(file.keys):
        raise UserError(
            f"{file.path} needs no conversion: it has the names of the kohya format",
            code="kohya-names-already",
            fix="use the file itself",
        )
    return converted


def rename_for_comfyui(path: Path, routes: Sequence[Route], precision: str | None) -> dict[str, Tensor]:
    """The matrices and alpha of each name, under the names of the kohya format with ComfyUI's prefixes."""
    dtype = SAVE_DTYPES[precision]
    renamed: dict[str, Tensor] = {}
    for route in routes:
        for name, tensor in route.match.tensors.items():
            renamed[f"{route.comfyui_name}.{name}"] = _cast(path, route.match.name, tensor, dtype or tensor.dtype)
    return renamed
