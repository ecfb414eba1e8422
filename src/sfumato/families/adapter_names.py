"""The layers that an adapter file adapts, from its names and shapes alone: no model is needed.

Names in adapter files have _ where layer names have a dot; a part's key maps say which _ was a dot.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from sfumato.errors import UserError
from sfumato.families.part import PartSpec
from sfumato.formats.groups import LayerGroup, make_meta_layers
from sfumato.formats.keymap import KeyMap, matches


def find_groups(spec: PartSpec, shapes: Mapping[str, Sequence[int]]) -> dict[str, LayerGroup]:
    """Name in the file -> the group that a model has for it; names that match no layer of the part are skipped.

    shapes: name in the file -> shape of the weight that it changes, of all its layers stacked. The layers are on the
    meta device. Raises UserError for a shape that the layers of the name cannot have.
    """
    layer_shapes: dict[str, tuple[int, ...]] = {}
    paths: dict[str, str] = {}
    for name, shape in shapes.items():
        siblings, original = _find_layers(spec, name.removeprefix(spec.adapter_prefix + "_"))
        if siblings:
            paths[name] = siblings[0]
            split = _split_shape(spec, name, original, shape, siblings)
            layer_shapes |= {f"{path}.weight": rows for path, rows in zip(siblings, split, strict=True)}
    groups = {group.paths[0]: group for group in spec.groups(make_meta_layers(layer_shapes), every=True)}
    return {name: groups[path] for name, path in paths.items()}


def _find_layers(spec: PartSpec, name: str) -> tuple[tuple[str, ...], str]:
    """Paths of the layers behind a name without its prefix, and their original key; empty where it matches none."""
    targets = "|".join(spec.all_targets)
    for layout in (spec.adapter_map, *spec.adapter_aliases):
        words = _collect_words(layout, spec.all_targets)
        for original in _iterate_dotted(name, words):
            ours = layout.find_ours(original)
            if ours and all(matches(targets, path) and _is_known(spec.adapter_map, path) for path in ours[0]):
                return ours[0], original
    return (), ""


def _is_known(layout: KeyMap, path: str) -> bool:
    """Whether models of the family have the layer: a further layout may also have others."""
    return layout.find_original(path) is not None


def _collect_words(layout: KeyMap, targets: Sequence[str]) -> frozenset[str]:
    """Everything but numbers that stands between two dots in a layout's keys."""
    words: set[str] = set()
    for text in (*(rule.original for rule in layout.rules), *targets):
        words.update(text.split("."))
    return frozenset(word for word in words if "{" not in word)


def _iterate_dotted(name: str, words: frozenset[str]) -> Iterator[str]:
    """Every reading of the name as words and numbers: a_b_0 is a.b.0, or a_b.0 where a_b is a word."""
    if name in words or name.isdecimal():
        yield name
    for i, letter in enumerate(name):
        if letter == "_" and (name[:i] in words or name[:i].isdecimal()):
            yield from (f"{name[:i]}.{rest}" for rest in _iterate_dotted(name[i + 1 :], words))


def _split_shape(
    spec: PartSpec, name: str, original: str, shape: Sequence[int], siblings: Sequence[str]
) -> list[tuple[int, ...]]:
    """The shapes of the layers whose stacked weight has this shape."""
    count = len(siblings)
    rows = spec.row_split(f"{original}.weight", shape) if spec.row_split and count > 1 else [shape[0] // count] * count
    if sum(rows) != shape[0] or min(rows) <= 0:
        raise UserError(
            f"{name} changes a weight of shape {tuple(shape)}, which {' + '.join(siblings)} cannot have",
            code="adapter-weight-shape-impossible",
        )
    return [(height, *shape[1:]) for height in rows]
