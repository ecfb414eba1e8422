"""`sfumato model inspect`: what a checkpoint holds, from its headers: networks, precisions, keys of no network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sfumato.common.text import format_bytes, plural
from sfumato.config import ModelOptions, NoiseOptions
from sfumato.errors import UserError
from sfumato.families import register_families
from sfumato.families.base import Family, find_family
from sfumato.families.foreign_keys import is_redundant, summarize_keys
from sfumato.families.part import Network
from sfumato.families.source import Source, open_source
from sfumato.formats.checkpoint import Checkpoint
from sfumato.formats.header import TensorInfo
from sfumato.formats.scaled import METADATA, ScaledFile
from sfumato.tools.model_convert import has_whole_files

LONGEST_ENTRY = 100  # letters of an entry of the metadata that are shown


@dataclass(frozen=True, kw_only=True)
class PartFacts:
    """One network of a checkpoint."""

    name: str
    tensors: int
    parameters: int
    size: int  # bytes in the file, scales included
    dtypes: Mapping[str, int]  # as they are stored -> tensors
    formats: Mapping[str, int]  # how weights in fewer bits are stored -> weights


@dataclass(frozen=True, kw_only=True)
class CheckpointFacts:
    """What there is to say of a checkpoint."""

    path: Path
    family: str  # empty where none is known
    layout: str
    size: int  # bytes of all files
    parts: Sequence[PartFacts]
    redundant: Sequence[str] = ()  # keys that every program can do without
    unused: Sequence[str] = ()  # other keys that no network has a place for
    problems: Sequence[str] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)


def inspect_model(path: str, family: str | None = None) -> CheckpointFacts:
    """Read the headers. A file of no known family is described without its networks; UserError where it is damaged."""
    register_families()
    options = ModelOptions(pretrained_model_name_or_path=path)
    source = open_source(options)
    problems: list[str] = []
    networks: Mapping[str, Network] = {}
    found = None
    try:
        found = find_family(family, source)
        networks = read_all_networks(found, source, options)
    except UserError as error:
        problems.append(error.what)
    files = collect_files(source, networks)
    parts = [describe_part(name, network) for name, network in networks.items()]
    used = {
        (id(network.weights.file), key) for network in networks.values() for key in network.weights.list_used_keys()
    }
    unused = [key for file in files for key in file.header.tensors if (id(file), key) not in used]
    if not networks:
        parts, unused = [describe_tensors("all tensors", file, file.header.tensors) for file in files], []
    facts = CheckpointFacts(
        path=source.path,
        family=found.name if found else "",
        layout="folder of diffusers" if source.is_folder else describe_file_kind(source.file),
        size=sum(each.stat().st_size for file in files for each in file.paths()),
        parts=parts,
        redundant=[key for key in unused if is_redundant(key)],
        unused=[key for key in unused if not is_redundant(key)],
        problems=problems,
        metadata={} if source.is_folder else source.file.header.metadata,
    )
    for file in files:
        file.close()
    return facts


def read_all_networks(family: type[Family], source: Source, options: ModelOptions) -> Mapping[str, Network]:
    """Those whose weights are here."""
    if has_whole_files(family) or source.is_folder:
        return family.read(source, options, NoiseOptions()).networks
    return family.read_networks(source, options)


def collect_files(source: Source, networks: Mapping[str, Network]) -> list[Checkpoint]:
    """Each file once; the source's own also where no network is known."""
    files = {id(network.weights.file): network.weights.file for network in networks.values()}
    if not source.is_folder:
        files.setdefault(id(source.file), source.file)
    return list(files.values())


def describe_file_kind(file: Checkpoint) -> str:
    kinds = {"TensorFile": "safetensors", "ScaledFile": "with scales", "PickledFile": "pickled", "GgufFile": "GGUF"}
    count = len(file.paths())
    shards = f", {count} shards" if count > 1 else ""
    return f"single file ({kinds[type(file).__name__]}{shards})"


def describe_part(name: str, network: Network) -> PartFacts:
    weights = network.weights
    return describe_tensors(name, weights.file, weights.list_used_keys())


def describe_tensors(name: str, file: Checkpoint, keys: Iterable[str]) -> PartFacts:
    """Some tensors of a file, as they are stored."""
    stored = file.inner.header.tensors if isinstance(file, ScaledFile) else file.header.tensors
    infos: list[TensorInfo] = []
    formats: Counter[str] = Counter()
    count = parameters = 0
    for key in keys:
        count, parameters = count + 1, parameters + stored[key].numel
        infos.append(stored[key])
        scale = file.find_scale(key) if isinstance(file, ScaledFile) else None
        infos += [stored[scale]] if scale else []
        own = file.find_format(key)
        formats.update([own.label] if own else [])
    return PartFacts(
        name=name,
        tensors=count,
        parameters=parameters,
        size=sum(info.nbytes for info in infos),
        dtypes=Counter(info.dtype for info in infos),
        formats=formats,
    )


# ---------------------------------------------------------------- text


def render_model(facts: CheckpointFacts) -> list[str]:
    """The lines of the report."""
    lines = [
        str(facts.path),
        f"  family    {facts.family or 'unknown'}",
        f"  layout    {facts.layout}, {format_bytes(facts.size)}",
        "",
        f"  {'network':<14}{'tensors':>8}{'parameters':>16}{'size':>10}  stored as",
    ]
    for part in facts.parts:
        kinds = ", ".join(f"{count} {name}" for name, count in part.dtypes.items())
        lines.append(f"  {part.name:<14}{part.tensors:>8}{part.parameters:>16,}{format_bytes(part.size):>10}  {kinds}")
        lines += [f"  {'':<48}  {plural(count, 'weight')} in {label}" for label, count in part.formats.items()]
    lines += [
        "",
        *(f"  {name}: {shorten_entry(value)}" for name, value in sorted(facts.metadata.items()) if name != METADATA),
    ]
    if facts.redundant:
        lines.append(f"not needed: {summarize_keys(facts.redundant)}")
    if facts.unused:
        lines.append(f"of no network: {summarize_keys(facts.unused)}")
    lines += [f"problem: {problem}" for problem in facts.problems]
    return lines


def shorten_entry(value: str) -> str:
    return value if len(value) <= LONGEST_ENTRY else f"{value[:LONGEST_ENTRY]}... ({plural(len(value), 'letter')})"
