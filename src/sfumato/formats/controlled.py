"""A layer whose input a control image may change, by its name in files and its place in a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sfumato.formats.keymap import matches

_PREFIX = "lllite_dit_"


@dataclass(frozen=True, kw_only=True)
class ControlledLayer:
    """A linear layer over image tokens in row-major order."""

    name: str  # in files
    path: str  # in its network
    inputs: int  # channels
    token_side: int  # pixels
    layer_kind: str  # one of common.layer_kinds
    follows_text: bool = False  # whether tokens of text come before those of the image
    in_version_1: bool = False  # whether the first version of LLLite changes it


@dataclass(frozen=True, kw_only=True)
class LayerPattern:
    """The layers of a kind in a transformer: a pattern on their paths."""

    layer_kind: str
    paths: str
    follows_text: bool = False


def list_transformer_layers(
    shapes: Mapping[str, Sequence[int]], patterns: Sequence[LayerPattern], token_side: int
) -> dict[str, ControlledLayer]:
    """Name in files -> layer. shapes: of the network's weights, by their names in it. token_side: in pixels."""
    layers: dict[str, ControlledLayer] = {}
    for weight, shape in shapes.items():
        path = weight.removesuffix(".weight")
        found = next((each for each in patterns if path != weight and matches(each.paths, path)), None)
        if found is not None:
            name = _PREFIX + path.replace(".", "_")
            layers[name] = ControlledLayer(
                name=name,
                path=path,
                inputs=shape[1],
                token_side=token_side,
                layer_kind=found.layer_kind,
                follows_text=found.follows_text,
            )
    return layers
