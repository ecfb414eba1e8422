"""Adapter files: reading, writing, and matching their names to layer groups; an unmatched name is an error."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from sfumato.common.text import list_some
from sfumato.errors import UserError
from sfumato.formats.checkpoint import open_checkpoint
from sfumato.formats.checkpoint_writer import write_safetensors
from sfumato.formats.hashes import add_hashes
from sfumato.formats.pickled import is_pickled, write_pickle

TensorsByGroup = dict[str, dict[str, Tensor]]  # group name -> suffix -> tensor
SOURCE_HINTS = {
    "lora_A.": "diffusers or PEFT",
    "lora_B.": "diffusers or PEFT",
    "hada_": "LyCORIS (LoHa)",
    "lokr_": "LyCORIS (LoKr)",
    "oft_blocks": "the kohya OFT",
    "dora_scale": "a DoRA trainer",
}


def read_adapter_file(path: Path) -> TensorsByGroup:
    """The tensors of a file in the kohya format (`<name>.lora_down.weight`)."""
    entries: dict[str, dict[str, Tensor]] = defaultdict(dict)
    with open_checkpoint(path) as file:
        for key in file.header.tensors:
            name, _, suffix = key.partition(".")
            entries[name][suffix] = file.read(key)
    return dict(entries)


def write_adapter_file(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], dtype: torch.dtype | None
) -> None:
    """A safetensors file with sd-scripts' two hashes, or the tensors alone in a pickled one, as `path` ends."""
    if is_pickled(path):
        write_pickle(path, tensors, dtype=dtype)
    else:
        write_safetensors(path, tensors, add_hashes(metadata, tensors, dtype=dtype), dtype=dtype)


def apply_aliases(path: Path, entries: TensorsByGroup, aliases: Mapping[str, str]) -> TensorsByGroup:
    """The entries with names of another layout replaced by ours; a layer under both names is a UserError."""
    renamed: dict[str, dict[str, Tensor]] = {}
    for name, tensors in entries.items():
        ours = aliases.get(name, name)
        if ours in renamed or (ours != name and ours in entries):
            raise UserError(f"{path} holds the layer {ours} twice, also as {name}", code="adapter-layer-twice")
        renamed[ours] = tensors
    return renamed


def check_names(path: Path, entries: Mapping[str, Mapping[str, Tensor]], known: Iterable[str]) -> None:
    """Raise UserError for names that belong to no layer, with the program that the file seems to come from."""
    unmatched = sorted(set(entries) - set(known))
    if not unmatched:
        return
    keys: list[str] = []
    for name in unmatched:
        keys += [f"{name}.{suffix}" for suffix in entries[name]]
    text = " ".join(keys)
    sources = [source for mark, source in SOURCE_HINTS.items() if mark in text]
    fix = f"the file looks like one of {sources[0]}" if sources else "it was made for another model or other layers"
    raise UserError(
        f"{path}: {len(unmatched)} of {len(entries)} names match no layer of this model, e.g. {list_some(keys)}",
        code="adapter-names-unmatched",
        fix=fix,
    )
