"""The layers that an adapter file speaks of, from its names and shapes alone: no model is needed.

Names in adapter files have _ where the layers' have a dot; a part's own tables say which _ was one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from sfumato.errors import UserError
from sfumato.families.base import PartSpec
from sfumato.formats.groups import LayerGroup, skeleton
from sfumato.formats.keymap import KeyMap, matches


def groups_of(spec: PartSpec, shapes: Mapping[str, Sequence[int]]) -> dict[str, LayerGroup]:
    """Name in the file -> the group that a model would have for it; names that fit no layer of the part are left out.

    shapes: name in the file -> shape of the weight that it changes, that of all its layers stacked. The layers stand
    on the meta device. Raises UserError for shapes that no layer of the name has.
    """
    found: dict[str, tuple[int, ...]] = {}
    paths: dict[str, str] = {}
    for name, shape in shapes.items():
        siblings, original = _layers(spec, name.removeprefix(spec.adapter_prefix + "_"))
        paths |= {name: siblings[0]} if siblings else {}
        found |= dict(
            zip((f"{path}.weight" for path in siblings), _split(spec, name, original, shape, siblings), strict=True)
        )
    groups = {group.paths[0]: group for group in spec.groups(skeleton(found), every=True)}
    return {name: groups[path] for name, path in paths.items()}


def _layers(spec: PartSpec, name: str) -> tuple[tuple[str, ...], str]:
    """Paths of the layers behind a name without its prefix, and their original key; nothing where it fits none."""
    targets = "|".join(spec.every_target)
    for layout in (spec.adapter_map, *spec.adapter_aliases):
        words = _words(layout, spec.every_target)
        for original in _dotted(name, words):
            found = layout.ours(original)
            if found and all(matches(targets, path) and _is_known(spec.adapter_map, path) for path in found[0]):
                return found[0], original
    return (), ""


def _is_known(layout: KeyMap, path: str) -> bool:
    """A further layout may have names of layers that no model of the family has."""
    try:
        layout.locate(path)
    except UserError:
        return False
    return True


def _words(layout: KeyMap, targets: Sequence[str]) -> frozenset[str]:
    """What may stand between two dots in a layout's keys, but for numbers."""
    texts = (*(rule.original for rule in layout.rules), *targets)
    return frozenset(word for text in texts for word in text.split(".") if "{" not in word)


def _dotted(name: str, words: frozenset[str]) -> Iterator[str]:
    """Every way to read the name as words and numbers: a_b_0 is a.b.0, or a_b.0 where a_b is a word."""
    if name in words or name.isdecimal():
        yield name
    for place, letter in enumerate(name):
        if letter == "_" and (name[:place] in words or name[:place].isdecimal()):
            yield from (f"{name[:place]}.{rest}" for rest in _dotted(name[place + 1 :], words))


def _split(
    spec: PartSpec, name: str, original: str, shape: Sequence[int], siblings: Sequence[str]
) -> list[tuple[int, ...]]:
    """The shapes of the layers whose stacked weight has this one."""
    count = len(siblings)
    if not count:
        return []
    rows = spec.rows(f"{original}.weight", shape) if spec.rows and count > 1 else [shape[0] // count] * count
    if sum(rows) != shape[0] or min(rows) <= 0:
        raise UserError(f"{name} changes a weight of shape {tuple(shape)}, which {' + '.join(siblings)} cannot have")
    return [(each, *shape[1:]) for each in rows]
