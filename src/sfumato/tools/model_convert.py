"""Checkpoints between a single file and diffusers' folders, tensor by tensor; and one file of several networks."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from sfumato.common.text import plural
from sfumato.config import ModelOptions, NoiseOptions
from sfumato.errors import UserError
from sfumato.families import register_families
from sfumato.families.base import Family, find_family
from sfumato.families.checkpoint_saving import (
    TensorEntries,
    TensorEntry,
    close_files,
    count_saved_bytes,
    iterate_stored,
    list_saved_networks,
    save_single_file,
)
from sfumato.families.diffusers_folder import save_folder
from sfumato.families.part import Network
from sfumato.families.source import Source, open_source
from sfumato.formats.checkpoint import TOOL_DTYPES, open_checkpoint
from sfumato.tools.adapter_files.models import list_input_paths, open_tool_model
from sfumato.tools.adapter_files.outputs import (
    SUFFIXES,
    check_output,
    check_space,
    make_spec_entries,
    name_output,
    write_checkpoint,
)
from sfumato.tools.adapter_files.written_values import WrittenValues
from sfumato.track.progress_task import ProgressTask


@dataclass(frozen=True, kw_only=True)
class ConvertRequest:
    """What to convert: a path with a suffix is a file, any other a folder of diffusers."""

    source: str
    output: Path
    precision: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)  # further entries
    options: ModelOptions = field(default_factory=ModelOptions)
    family: str | None = None


def convert_model(request: ConvertRequest) -> list[str]:
    """Write the model in the other layout; the lines of the report.

    A whole model becomes a whole model; of models whose text encoders are files of their own, the denoiser's file is
    made. UserError where the family has no such layout.
    """
    is_file = request.output.suffix in SUFFIXES
    path = Path(request.source)
    check_output(request.output, [path, *(list_input_paths(path) if path.exists() else [])], is_folder=not is_file)
    register_families()
    options = request.options.model_copy(update={"pretrained_model_name_or_path": request.source})
    source = open_source(options)
    family = find_family(request.family, source)
    metadata = {"format": "pt", **make_spec_entries(request.output, ()), **request.metadata}
    named = name_output(request.output)
    if is_file and not has_whole_files(family):
        networks = family.read_networks(source, options)
        entries = iterate_network(networks["denoiser"])
        lines = write_checkpoint(request.output, entries, metadata, TOOL_DTYPES[request.precision])
        networks["denoiser"].weights.file.close()
        return [*lines, f"{named}: the denoiser of {source.name}"]
    lines = write_whole_model(request, family, source, options, metadata, is_file=is_file)
    return [*lines, f"{named}: all of {source.name}"]


def has_whole_files(family: type[Family]) -> bool:
    """Whether a single file of the family holds all of its networks, the text encoders too."""
    return "vae" in family.components


def write_whole_model(
    request: ConvertRequest,
    family: type[Family],
    source: Source,
    options: ModelOptions,
    metadata: Mapping[str, str],
    *,
    is_file: bool,
) -> list[str]:
    """The lines of the report about what was written."""
    blueprint = family.read(source, options, NoiseOptions())
    if not is_file and blueprint.pipeline is None:
        raise UserError(
            f"{source.name}: no folder of diffusers is written for this model",
            code="convert-folder-unsupported",
            fix=f"{request.output}.safetensors",
        )
    model = family(blueprint, options, dtype=torch.float32, device=torch.device("cpu"))
    check_space(
        request.output, count_saved_bytes(blueprint, list_saved_networks(blueprint), (), TOOL_DTYPES[request.precision])
    )
    save = save_single_file if is_file else save_folder
    with ProgressTask(request.output.name, "tensors") as progress:
        values = WrittenValues(progress)
        save(model, request.output, metadata, TOOL_DTYPES[request.precision], changed={}, watch=values.watch)
    close_files(blueprint)
    return values.list_warnings()


def iterate_network(network: Network) -> TensorEntries:
    """All tensors of a network under its original keys, without a prefix."""
    weights, key_map = network.weights, network.spec.key_map
    for original in dict.fromkeys(key_map.locate(ours).original for ours in weights.read_shapes()):
        found = key_map.find_ours(original)
        assert found is not None
        result = key_map.build(original, {name: weights.make_empty(name) for name in found[0]})
        make = partial(build_tensor, network, original)
        spec = result.dtype, tuple(result.shape)
        yield original, TensorEntry(spec, make, origins=weights.list_origins(found[0]))


def build_tensor(network: Network, original: str) -> torch.Tensor:
    """One original tensor of a network, from those of ours that it is made of."""
    found = network.spec.key_map.find_ours(original)
    assert found is not None
    return network.spec.key_map.build(original, {name: network.weights.read(name) for name in found[0]})


def check_networks(denoiser: Path, encoders: Mapping[str, Path], family: str) -> None:
    """UserError where a file is not that network of the family. encoders: option -> file."""
    files = {option: str(path) for option, path in encoders.items()}
    with closing(open_tool_model(str(denoiser), files, family)) as model:
        for network in model.networks.values():
            network.weights.read_shapes()


def join_networks(parts: Mapping[str, Path], output: Path, precision: str | None) -> list[str]:
    """Write one file of several. parts: prefix -> file; keys that have the prefix keep theirs. The report's lines."""
    check_output(output, list(parts.values()))
    entries: dict[str, TensorEntry] = {}
    lines: list[str] = []
    with ExitStack() as stack:
        for prefix, path in parts.items():
            file = stack.enter_context(open_checkpoint(path))
            prefixed = any(key.startswith(prefix) for key in file.header.tensors)
            own = {key if prefixed else prefix + key: entry for key, entry in iterate_stored(file)}
            twice = entries.keys() & own.keys()
            if twice:
                raise UserError(
                    f"{path} has {plural(len(twice), 'key')} that another file has, too: {min(twice)}",
                    code="join-keys-twice",
                    fix="give the files of the networks alone",
                )
            entries |= own
            lines.append(f"{path}: {plural(len(own), 'tensor')} as {prefix}...")
        metadata, named = {"format": "pt", **make_spec_entries(output, ())}, name_output(output)
        lines += write_checkpoint(output, iter(entries.items()), metadata, TOOL_DTYPES[precision])
    return [*lines, f"{named}: {plural(len(entries), 'tensor')}"]
