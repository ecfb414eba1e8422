"""Adapter files: names on disk <-> groups of layers; nothing unmatched passes silently."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from sfumato.errors import UserError
from sfumato.formats.checkpoint import open_checkpoint

T = TypeVar("T")
GUESSES = {
    "lora_A.": "diffusers or PEFT",
    "lora_B.": "diffusers or PEFT",
    "hada_": "LyCORIS (LoHa)",
    "lokr_": "LyCORIS (LoKr)",
    "oft_blocks": "the field's OFT",
    "dora_scale": "a DoRA trainer",
}


def read_adapter_file(path: Path) -> dict[str, dict[str, Tensor]]:
    """Group name -> suffix -> tensor of a file in the field's naming (`<name>.lora_down.weight`)."""
    with open_checkpoint(path) as file:
        entries: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for key in file.header.tensors:
            name, _, suffix = key.partition(".")
            entries[name][suffix] = file.read(key)
    return dict(entries)


def renamed(path: Path, found: Mapping[str, T], aliases: Mapping[str, str]) -> dict[str, T]:
    """`found` with names of a further layout replaced by ours; a layer under both names is a UserError."""
    result = {aliases.get(name, name): entries for name, entries in found.items()}
    if len(result) < len(found):
        twice = next(name for name in found if name in aliases and aliases[name] in found)
        raise UserError(f"{path} has the layer {aliases[twice]} a second time, as {twice}")
    return result


def check_names(path: Path, found: Mapping[str, Mapping[str, Tensor]], known: Iterable[str]) -> None:
    """Every name in the file must belong to a layer; else say which do not and where the file seems to come from."""
    unmatched = sorted(set(found) - set(known))
    if not unmatched:
        return
    keys = [f"{name}.{suffix}" for name in unmatched for suffix in found[name]]
    guess = next((who for mark, who in GUESSES.items() if any(mark in key for key in keys)), None)
    raise UserError(
        f"{path}: {len(unmatched)} of {len(found)} names fit no layer of this model, for example {', '.join(keys[:5])}",
        fix=f"the file looks like one of {guess}" if guess else "it was made for another model or other layers",
    )
