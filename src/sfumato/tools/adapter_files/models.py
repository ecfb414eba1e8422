"""The models that tools change: their networks from file headers, and the layers that adapter files change in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from sfumato.config import ModelOptions
from sfumato.errors import UserError
from sfumato.families import register_families
from sfumato.families.adapter_names import guess_layers, iterate_families, list_shapes, list_unknown_names
from sfumato.families.base import FAMILIES, Family, find_family
from sfumato.families.part import Network, PartSpec
from sfumato.families.source import Source, open_source
from sfumato.formats.adapter_file import AdapterFile, make_unmatched_error
from sfumato.formats.adapter_kind import LayerMatch
from sfumato.formats.adapter_layers import LayerTable, make_views, match_layers
from sfumato.formats.groups import LayerGroup, make_adapter_name, make_meta_layers
from sfumato.formats.keymap import make_identity_map

Encoders = Mapping[str, str | None]  # option -> the file of its text encoder
ENCODER_OPTIONS = {"clip_l": "clip_l", "clip_g": "clip_g", "t5": "t5xxl", "gemma2": "gemma2"}  # part -> option


@dataclass(frozen=True, kw_only=True)
class ToolModel:
    """A checkpoint, and files of text encoders beside it; those networks whose weights are not here are absent."""

    family: type[Family]
    source: Source
    networks: Mapping[str, Network]  # by part

    def close(self) -> None:
        for network in self.networks.values():
            network.weights.file.close()


def open_tool_model(path: str, encoders: Encoders, family: str | None = None) -> ToolModel:
    """Read the headers; UserError for a file of no known family."""
    register_families()
    options = ModelOptions(pretrained_model_name_or_path=path, **encoders)  # pyright: ignore[reportArgumentType]
    source = open_source(options)
    found = find_family(family, source)
    return ToolModel(family=found, source=source, networks=found.read_networks(source, options))


def match_model(file: AdapterFile, model: ToolModel) -> list[LayerMatch]:
    """Every name of an adapter file with its layers, those of networks that are not here included.

    UserError for names and shapes of another model.
    """
    shapes = list_shapes(file)
    table = LayerTable()
    for part, spec in model.family.adapter_specs(shapes).items():
        if part not in model.networks:
            table.add_part(spec.adapter_prefixes, spec.make_views(make_meta_layers(guess_layers(spec, shapes))))
    for network in model.networks.values():
        layers = network.meta_layers
        table.add_part(network.spec.adapter_prefixes, network.spec.make_views(layers))
    return match_layers(file, table, other_models=iterate_families(file))


# ---------------------------------------------------------------- without a model


@dataclass(frozen=True, kw_only=True)
class KnownFiles:
    """Adapter files of one family, and the layer groups that any of them changes, in the layout that is written."""

    family: type[Family]
    specs: Mapping[str, PartSpec]  # by part
    groups: Sequence[LayerGroup]  # of layers on the meta device, from all files
    matches: Sequence[Sequence[LayerMatch]]  # of each file


ListWritten = Callable[[KnownFiles], Sequence[object]]  # what a tool makes of files if they are of this family


def match_files(
    files: Sequence[AdapterFile], family: str | None = None, *, list_written: ListWritten | None = None
) -> KnownFiles:
    """The layers that all names of some files mean, from names and shapes alone.

    Families may share names, as long as what is written is the same; list_written: what that is, by default the layer
    groups. Raises UserError for names of no family, and for files of several families or sizes.
    """
    register_families()
    list_written = list_written or _list_groups
    names = [family] if family else _find_common_families(files)
    found = [_match_family(files, FAMILIES.get(name)) for name in names]
    first, *others = found
    if any(list_written(other) != list_written(first) for other in others):
        raise UserError(
            f"{files[0].path} fits several model families",
            code="adapter-family-ambiguous",
            fix=f"--family {' or '.join(names)}",
        )
    return first


def _find_common_families(files: Sequence[AdapterFile]) -> list[str]:
    by_file = [list(iterate_families(file)) for file in files]
    for file, names in zip(files, by_file, strict=True):
        if not names:
            raise make_unmatched_error(file, list_unknown_names(file), model="any known model")
    common = [name for name in by_file[0] if all(name in names for names in by_file)]
    if not common:
        facts = [f"{file.path} for {' or '.join(names)}" for file, names in zip(files, by_file, strict=True)]
        raise UserError(
            f"the files are for different models: {', '.join(facts)}",
            code="adapter-files-of-several-families",
            fix="give files for one model",
        )
    return common


def _match_family(files: Sequence[AdapterFile], family: type[Family]) -> KnownFiles:
    every = {name: shape for file in files for name, shape in list_shapes(file).items()}
    table, groups, specs = LayerTable(), list[LayerGroup](), family.adapter_specs(every)
    for spec in specs.values():
        layers = make_meta_layers(_join_shapes(files, spec))
        table.add_part(spec.adapter_prefixes, spec.make_views(layers))
        groups += group_known_layers(spec, layers)
    return KnownFiles(family=family, specs=specs, groups=groups, matches=[match_layers(file, table) for file in files])


def _join_shapes(files: Sequence[AdapterFile], spec: PartSpec) -> dict[str, tuple[int, ...]]:
    """Weight's name -> shape, of all files; where one has a kernel flattened or tells no size, that of another."""
    joined: dict[str, tuple[int, ...]] = {}
    for file in files:
        for name, shape in guess_layers(spec, list_shapes(file)).items():
            known = joined.get(name, ())
            joined[name] = max(known, shape, key=lambda each: (0 not in each, len(each))) if known else shape
    return joined


def match_base_model(files: Sequence[AdapterFile], model: ToolModel) -> KnownFiles:
    """The same with a model, whose layers are the ones; UserError where the files change a part that is not here."""
    found = [match_model(file, model) for file in files]
    absent = dict.fromkeys(match.view.part for match in chain.from_iterable(found))
    absent = [part for part in absent if part not in model.networks]
    if absent:
        options = [ENCODER_OPTIONS.get(part, part) for part in absent]
        raise UserError(
            f"the adapters also change {', '.join(absent)}, whose weights are not in {model.source.path}",
            code="base-model-part-missing",
            fix=" ".join(f"--{option} FILE" for option in options),
        )
    specs, groups = dict[str, PartSpec](), list[LayerGroup]()
    for part, network in model.networks.items():
        specs[part] = network.spec
        groups += group_known_layers(network.spec, network.meta_layers)
    return KnownFiles(family=model.family, specs=specs, groups=groups, matches=found)


def group_known_layers(spec: PartSpec, layers: Mapping[str, object]) -> list[LayerGroup]:
    """The layers of a part in the groups that are written; where only some layers of one are known, each alone."""
    layouts = (spec.adapter_map, make_identity_map())
    views = make_views(layers, spec.all_targets, part=spec.name, layouts=layouts)  # pyright: ignore[reportArgumentType]
    groups: list[LayerGroup] = []
    covered: set[str] = set()
    for name, view in views.items():
        if covered.isdisjoint(view.paths):
            covered.update(view.paths)
            full = make_adapter_name(spec.adapter_prefix, name)
            groups.append(LayerGroup(full, view.part, view.paths, view.layers, view.rows))
    return groups


def _list_groups(known: KnownFiles) -> Sequence[object]:
    """Which rows are written under which name."""
    return sorted((group.name, group.paths, group.rows) for group in known.groups)


def list_input_paths(path: Path) -> list[Path]:
    """A file itself, or all files of a folder."""
    return [each for each in path.rglob("*") if each.is_file()] if path.is_dir() else [path]
