"""The layers that an adapter file adapts: those of a model, or those that its names and shapes alone tell of.

Names in adapter files have _ where layer names have a dot; a part's key maps say which _ was a dot.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain

from sfumato.families.base import FAMILIES
from sfumato.families.part import PartSpec
from sfumato.formats.adapter_file import AdapterFile
from sfumato.formats.adapter_kind import LayerMatch
from sfumato.formats.adapter_layers import GroupAdapter, LayerTable, collect_groups, match_layers
from sfumato.formats.groups import Layer, LayerGroup, make_meta_layers
from sfumato.formats.keymap import KeyMap, matches

LONGEST_NAME = 400  # letters; that of a real layer has up to 120


def match_file_layers(
    file: AdapterFile, specs: Mapping[str, PartSpec], groups: Mapping[str, Sequence[LayerGroup]]
) -> list[LayerMatch]:
    """Every name of the file with its layers. groups: part -> every adaptable layer of the model.

    Raises UserError for a name of no layer, a matrix of another size than its layer's, a layer under two names.
    """
    table = LayerTable()
    for part, spec in specs.items():
        layers: dict[str, Layer] = {}
        for group in groups[part]:
            layers |= zip(group.paths, group.layers, strict=True)
        table.add_part(spec.adapter_prefixes, spec.make_views(layers))
    return match_layers(file, table, other_models=iterate_families(file))


def match_adapter_file(
    file: AdapterFile, specs: Mapping[str, PartSpec], groups: Mapping[str, Sequence[LayerGroup]]
) -> dict[str, GroupAdapter]:
    """Group name -> what the file holds for it; as `match_file_layers`."""
    found = match_file_layers(file, specs, groups)
    every = chain.from_iterable(groups[part] for part in specs)
    return {adapter.group.name: adapter for adapter in collect_groups(found, every)}


def iterate_families(file: AdapterFile) -> Iterator[str]:
    """The families whose layers have all names of the file; computed as far as it is asked for."""
    for name in FAMILIES.names:
        if not _list_names_unknown_to(file, name):
            yield name


def list_unknown_names(file: AdapterFile) -> list[str]:
    """The names of the file that the family with the fewest such does not know."""
    return min((_list_names_unknown_to(file, name) for name in FAMILIES.names), key=len)


def _list_names_unknown_to(file: AdapterFile, family: str) -> list[str]:
    table = guess_layer_table(FAMILIES.get(family).adapter_specs(list_shapes(file)), file)
    return [layer for layer in file.layers if not table.find(layer)]


def list_shapes(file: AdapterFile) -> dict[str, tuple[int, ...]]:
    """Name in the file -> shape of the weight that it changes, of all its layers stacked."""
    return {name: file.find_weight_shape(name) for name in file.layers}


def guess_layer_table(specs: Mapping[str, PartSpec], file: AdapterFile) -> LayerTable:
    """The layers of parts as far as the file adapts them, on the meta device; no model is needed."""
    table = LayerTable()
    shapes = list_shapes(file)
    for spec in specs.values():
        table.add_part(spec.adapter_prefixes, spec.make_views(make_meta_layers(guess_layers(spec, shapes))))
    return table


def guess_layers(spec: PartSpec, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Weight's name in the module -> shape, of the layers behind all names that a part may have.

    shapes: name in the file -> shape of the weight that it changes. Names with a shape that the layers of the name
    cannot have are skipped, like those of other parts.
    """
    readers = [(layout, _collect_words(layout, spec)) for layout in spec.adapter_layouts]
    layers: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        for rest in _iterate_rests(name, spec.adapter_prefixes):
            siblings, original = _find_layers(spec, rest, readers)
            if siblings:
                split = _split_shape(spec, original, shape, len(siblings))
                layers |= {f"{path}.weight": rows for path, rows in zip(siblings, split, strict=bool(split))}
                break
    return layers


def _iterate_rests(name: str, prefixes: Iterable[str]) -> Iterator[str]:
    """The name without each prefix that it has, the longest first."""
    flat = name.replace(".", "_")
    if len(flat) > LONGEST_NAME:
        return
    for prefix in sorted(prefixes, key=len, reverse=True):
        start = prefix.replace(".", "_") + "_" if prefix else ""
        if flat.startswith(start):
            yield flat.removeprefix(start)


def _find_layers(
    spec: PartSpec, name: str, readers: Sequence[tuple[KeyMap, frozenset[str]]]
) -> tuple[tuple[str, ...], str]:
    """Paths of the layers behind a name without its prefix, and their original key; empty where it matches none."""
    targets = "|".join(spec.all_targets)
    for layout, words in readers:
        for original in _iterate_dotted(name, words):
            ours = layout.find_ours(original)
            if ours and all(matches(targets, path) and _is_known(spec.adapter_map, path) for path in ours[0]):
                return ours[0], original
    return (), ""


def _is_known(layout: KeyMap, path: str) -> bool:
    """Whether models of the family have the layer: a further layout may also have others."""
    return layout.find_original(path) is not None


def _collect_words(layout: KeyMap, spec: PartSpec) -> frozenset[str]:
    """Everything but numbers that stands between two dots in a layout's keys."""
    words: set[str] = set()
    names = list(spec.all_targets)
    names += [rule.original for rule in layout.rules]
    for rule in spec.adapter_map.rules:
        names += rule.ours
    for text in names:
        words.update(text.split("."))
    return frozenset(word for word in words if "{" not in word)


def _iterate_dotted(name: str, words: frozenset[str]) -> Iterator[str]:
    """Every reading of the name as words and numbers: a_b_0 is a.b.0, or a_b.0 where a_b is a word."""
    if name in words or name.isdecimal():
        yield name
    for i, letter in enumerate(name):
        if letter == "_" and (name[:i] in words or name[:i].isdecimal()):
            yield from (f"{name[:i]}.{rest}" for rest in _iterate_dotted(name[i + 1 :], words))


def _split_shape(spec: PartSpec, original: str, shape: Sequence[int], count: int) -> list[tuple[int, ...]]:
    """The shapes of the layers whose stacked weight has this shape; empty where they cannot have it.

    Rotations of inputs do not tell the number of rows, which is 0 then and stays so.
    """
    if shape[0] == 0:
        return [tuple(shape)] * count
    rows = spec.row_split(f"{original}.weight", shape) if spec.row_split and count > 1 else [shape[0] // count] * count
    possible = sum(rows) == shape[0] and min(rows) > 0
    return [(height, *shape[1:]) for height in rows] if possible else []
