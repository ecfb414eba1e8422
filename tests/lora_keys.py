"""Help for tests of adapter files' names: goldens in which a range of numbers stands as {0-9}."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sfumato.adapters.base import Adapter

GOLDENS = Path(__file__).parent / "goldens" / "lora_keys"
Shapes = dict[str, tuple[int, ...]]


def golden(variant: str) -> Shapes:
    """Every key of a file of sd-scripts at rank 4, alpha 1, and its shape."""
    content = json.loads((GOLDENS / f"{variant}.json").read_text())
    return golden(content["same_as"]) if "same_as" in content else expand(content)


def shapes_in_file(adapters: Iterable[Adapter]) -> Shapes:
    """Every key of the file that has these adapters, and its shape."""
    shapes: Shapes = {}
    for adapter in adapters:
        for suffix, tensor in adapter.export_tensors().items():
            shapes[f"{adapter.file_name}.{suffix}"] = tuple(tensor.shape)
    return shapes


def expand(content: Mapping[str, Any]) -> Shapes:
    shapes: Shapes = {}
    for layers in content["layers"]:
        for pattern in layers["names"]:
            for name in names(pattern):
                if "tensors" in layers:
                    shapes |= {f"{name}.{end}": tuple(shape) for end, shape in layers["tensors"].items()}
                    continue
                shapes[f"{name}.alpha"] = ()
                shapes[f"{name}.lora_down.weight"] = tuple(layers["down"])
                shapes[f"{name}.lora_up.weight"] = tuple(layers["up"])
    return shapes


def names(pattern: str) -> Iterator[str]:
    """a_{0-2}_b -> a_0_b, a_1_b, a_2_b."""
    pieces = re.split(r"\{(\d+)-(\d+)\}", pattern)
    ranges = [range(int(first), int(last) + 1) for first, last in zip(pieces[1::3], pieces[2::3], strict=True)]
    for numbers in itertools.product(*ranges):
        holes = [str(number) for number in numbers]
        yield "".join(itertools.chain(*zip(pieces[::3], [*holes, ""], strict=True)))
