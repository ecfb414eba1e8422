"""Merging adapters into a checkpoint: what they change is read, changed and written one tensor at a time."""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import torch

from sfumato.adapters.kinds import read_adapter_file
from sfumato.common import files
from sfumato.common.text import plural
from sfumato.errors import UserError
from sfumato.families.checkpoint_saving import SOURCE_METADATA
from sfumato.families.part import Network
from sfumato.formats.adapter_file import AdapterFile
from sfumato.formats.adapter_kind import describe_kinds
from sfumato.formats.checkpoint import TOOL_DTYPES, Checkpoint
from sfumato.formats.checkpoint_writer import catch_disk_full
from sfumato.formats.shards import SHARD_NAME, WEIGHT_ENDINGS
from sfumato.tools.adapter_files.block_weights import find_block_weight, parse_block_weights
from sfumato.tools.adapter_files.changes import Strong, TensorChange, iterate_changed_file, plan_changes
from sfumato.tools.adapter_files.models import ENCODER_OPTIONS, ToolModel, match_model, open_tool_model
from sfumato.tools.adapter_files.outputs import check_output, make_spec_entries, name_output, write_checkpoint


@dataclass(frozen=True, kw_only=True)
class MergeRequest:
    """What to merge, where to and how."""

    model: str
    output: Path | None  # None: only text encoders are written
    adapters: Sequence[Path]
    ratios: Sequence[float]  # one for each adapter; empty: 1
    encoders: Mapping[str, str | None] = field(default_factory=dict)  # option -> file
    encoder_outputs: Mapping[str, Path | None] = field(default_factory=dict)  # the same option -> file to write
    block_weights: Sequence[str] = ()  # JSON lists, one for each adapter
    skipped_parts: Collection[str] = ()  # parts that stay as they are
    precision: str | None = None  # of TOOL_DTYPES; None keeps each tensor's own
    family: str | None = None
    minimal_metadata: bool = False


def merge_into_model(request: MergeRequest) -> list[str]:
    """Write the model with its adapters' changes; a line for each file that was written.

    The changes are sums of those that each adapter makes alone in the unchanged model, as when all are attached. All
    that is not changed is copied byte for byte unless a precision is given. Raises UserError before anything is
    written: for adapters of another model, and where one changes a part that is not written.
    """
    outputs = find_outputs(request)
    ratios = find_ratios(request.ratios, len(request.adapters))
    adapters = [read_adapter_file(path) for path in request.adapters]
    with closing(open_tool_model(request.model, request.encoders, request.family)) as model:
        found = select_changes(request, model, adapters, ratios)
        planned = plan_changes(model.networks, chain.from_iterable(found))
        check_written(planned, model, outputs)
        lines = [describe_merged(*each) for each in zip(adapters, found, ratios, strict=True)]
        lines += [line for file in adapters for line in file.describe_passed_over()]
        for option, output in outputs.items():
            lines += write_merged(request, model, adapters, planned, option, output)
    return lines


def find_outputs(request: MergeRequest) -> dict[str, Path]:
    """Option ("" for the model) -> file to write; UserError for one without its input, or none at all."""
    outputs = {"": request.output} if request.output else {}
    for option, output in request.encoder_outputs.items():
        if output and not request.encoders.get(option):
            raise UserError(
                f"--{option}_save_to needs --{option}", code="merge-encoder-input-missing", fix=f"--{option} FILE"
            )
        outputs |= {option: output} if output else {}
    if not outputs:
        raise UserError("no file to write is given", code="merge-output-missing", fix="--save_to FILE")
    inputs = [*request.adapters, Path(request.model), *(Path(each) for each in request.encoders.values() if each)]
    for option, output in outputs.items():
        is_folder = Path(request.encoders[option] or "" if option else request.model).is_dir()
        check_output(output, inputs, is_folder=is_folder)
    return outputs


def find_ratios(ratios: Sequence[float], count: int) -> Sequence[float]:
    """One for each file; UserError where there are others."""
    if ratios and len(ratios) != count:
        raise UserError(
            f"--ratios has {plural(len(ratios), 'number')} for {plural(count, 'file')}",
            code="merge-ratio-count",
            fix="give one for each",
        )
    return ratios or [1.0] * count


def select_changes(
    request: MergeRequest, model: ToolModel, adapters: Sequence[AdapterFile], ratios: Sequence[float]
) -> list[list[Strong]]:
    """For each adapter its layers and their strengths; UserError where it changes a part whose weights are not here."""
    found: list[list[Strong]] = []
    lists = parse_block_weights(request.block_weights, len(adapters))
    for file, ratio, weights in zip(adapters, ratios, lists, strict=True):
        matches = [match for match in match_model(file, model) if match.view.part not in request.skipped_parts]
        absent = dict.fromkeys(match.view.part for match in matches if match.view.part not in model.networks)
        if absent:
            raise _make_absent_error(file, list(absent))
        own: list[Strong] = []
        for match in matches:
            spec = model.networks[match.view.part].spec
            own.append(Strong(match, ratio * find_block_weight(weights, match, spec)))
        found.append([each for each in own if each.strength])
    return found


def _make_absent_error(file: AdapterFile, parts: Sequence[str]) -> UserError:
    options = [ENCODER_OPTIONS.get(part, part) for part in parts]
    given = " ".join(f"--{option} FILE --{option}_save_to FILE" for option in options)
    return UserError(
        f"{file.path} also changes {', '.join(parts)}, whose weights are not in the model's file",
        code="merge-part-missing",
        fix=f"{given}, or --without {','.join(parts)}, which then stays as it is",
    )


def check_written(
    planned: Mapping[int, Mapping[str, TensorChange]], model: ToolModel, outputs: Mapping[str, Path]
) -> None:
    """UserError where something changes in a file that would not be written."""
    for part, network in model.networks.items():
        option = find_option(model, network)
        if id(network.weights.file) in planned and option not in outputs:
            name = f"--{option}_save_to" if option else "--save_to"
            raise UserError(
                f"the adapters also change {part}, and no file to write is given for it",
                code="merge-part-not-written",
                fix=f"{name} FILE, or --without {part}",
            )


def find_option(model: ToolModel, network: Network) -> str:
    """The option that named the file of a network; empty for the model's own."""
    source = model.source
    if source.is_folder:
        inside = source.path in network.weights.file.header.path.parents
    else:
        inside = network.weights.file is source.file
    return "" if inside else network.option


def describe_merged(file: AdapterFile, found: Sequence[Strong], ratio: float) -> str:
    counts: dict[tuple[str, str], int] = {}
    for match, _ in found:
        key = describe_kinds(match.kinds), match.view.part
        counts[key] = counts.get(key, 0) + 1
    parts = ", ".join(f"{count} {kinds} of {part}" for (kinds, part), count in counts.items())
    return f"{file.path} x {ratio:g}: {parts or 'nothing'}"


# ---------------------------------------------------------------- writing


def write_merged(
    request: MergeRequest,
    model: ToolModel,
    adapters: Sequence[AdapterFile],
    planned: Mapping[int, Mapping[str, TensorChange]],
    option: str,
    output: Path,
) -> list[str]:
    """Write the model's file or folder, or that of a text encoder; the lines of the report."""
    dtype = TOOL_DTYPES[request.precision]
    networks = [network for network in model.networks.values() if find_option(model, network) == option]
    sources = {id(network.weights.file): network.weights.file for network in networks}
    changed = sum(len(planned.get(number, {})) for number in sources)
    named = name_output(output)
    folder = Path(request.encoders[option] or "") if option else model.source.path
    if folder.is_dir():
        parts = {number: file for number, file in sources.items() if dtype or number in planned}
        lines = _write_folder(request, adapters, folder, output, parts, planned, dtype)
    else:
        ((number, file),) = sources.items()
        entries = iterate_changed_file(file, planned.get(number, {}), dtype)
        lines = write_checkpoint(output, entries, _make_metadata(request, output, file, adapters), dtype)
    return [*lines, f"{named}: {plural(changed, 'tensor')} changed"]


def _write_folder(
    request: MergeRequest,
    adapters: Sequence[AdapterFile],
    folder: Path,
    output: Path,
    sources: Mapping[int, Checkpoint],
    planned: Mapping[int, Mapping[str, TensorChange]],
    dtype: torch.dtype | None,
) -> list[str]:
    """A copy of a folder in diffusers' layout, in which the given networks are one file each.

    The report's lines about inputs that are not finite.
    """
    lines: list[str] = []
    rewritten = set(chain.from_iterable(file.paths() for file in sources.values()))
    places = {path.parent for path in rewritten}

    def skip(place: str, names: list[str]) -> set[str]:
        here = Path(place)
        indexes = {name for name in names if here in places and name.endswith(".index.json")}
        return indexes | {name for name in names if here in places and name.endswith(WEIGHT_ENDINGS)}

    with catch_disk_full(output), files.write_folder_atomically(output) as temporary:
        shutil.copytree(folder, temporary, ignore=skip, dirs_exist_ok=True)
        for number, file in sources.items():
            first = file.paths()[0]
            shard = SHARD_NAME.fullmatch(first.name)
            name = f"{shard[1]}{shard[4]}" if shard else first.name
            name = re.sub("^pytorch_model", "model", name)  # transformers' name of a safetensors file
            place = temporary / first.parent.relative_to(folder) / Path(name).with_suffix(".safetensors").name
            entries = iterate_changed_file(file, planned.get(number, {}), dtype)
            lines += write_checkpoint(place, entries, _make_metadata(request, output, file, adapters), dtype)
    return lines


def _make_metadata(
    request: MergeRequest, output: Path, file: Checkpoint, adapters: Sequence[AdapterFile]
) -> dict[str, str]:
    """What reading the file needs, what it says of the model, and what was merged."""
    source = file.header.metadata
    kept = {name: value for name, value in source.items() if name in SOURCE_METADATA or name.startswith("modelspec.")}
    if request.minimal_metadata:
        return {name: value for name, value in kept.items() if name in SOURCE_METADATA} | {"format": "pt"}
    merged = ", ".join([Path(request.model).stem, *(adapter.path.stem for adapter in adapters)])
    spec = make_spec_entries(output, ())
    return {"format": "pt", **kept, **spec, "modelspec.merged_from": merged}
