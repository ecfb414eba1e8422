"""Adapter files that take part without being trained: hooked to a network each time its weights are read."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from weakref import WeakKeyDictionary

from torch import nn

from sfumato.adapters.base import AdapterEngine
from sfumato.adapters.kinds import read_adapter_file, restore_adapter
from sfumato.config.frozen import FrozenAdapter
from sfumato.errors import UserError
from sfumato.families.adapter_names import match_file_layers
from sfumato.families.base import Family
from sfumato.families.part import PartSpec, WeightChange
from sfumato.formats.adapter_kind import LayerMatch
from sfumato.formats.checkpoint import view_bytes
from sfumato.formats.groups import find_layers
from sfumato.methods.adapter_builder import GroupsByPart


@dataclass(frozen=True, kw_only=True)
class FrozenFile:
    """A file that was read, with the layers that it changes: by part, in the file's own layout."""

    request: FrozenAdapter
    matches: Mapping[str, Sequence[LayerMatch]]
    notes: tuple[str, ...]  # what of the file is not used

    def make_remark(self) -> str:
        uses = {"train": "in training and validation", "sample": "in previews", "both": "in training and previews"}
        counts = ", ".join(f"{len(found)} layers of {part}" for part, found in self.matches.items())
        kinds = Counter(match.kinds[-1].label for found in self.matches.values() for match in found)
        request = self.request
        return (
            f"frozen: {request.path}, {', '.join(kinds)} at strength {request.strength:g} {uses[request.use]}, {counts}"
        )


def read_frozen_file(request: FrozenAdapter, specs: Mapping[str, PartSpec], groups: GroupsByPart) -> FrozenFile:
    """Read a file and find its layers in a model; UserError where it does not fit.

    specs: of every part that can be adapted. groups: part -> every adaptable layer.
    """
    file = read_adapter_file(request.path)
    matches: dict[str, list[LayerMatch]] = defaultdict(list)
    for match in match_file_layers(file, specs, groups):
        matches[match.view.part].append(match)
    return FrozenFile(request=request, matches=matches, notes=tuple(file.describe_passed_over()))


def check_text_use(files: Sequence[FrozenFile], text_parts: Sequence[str]) -> None:
    """UserError for text encoders that would differ between training and previews, whose features are made once."""
    for file in files:
        parts = [part for part in file.matches if part in text_parts]
        if parts and file.request.use != "both" and file.request.strength:
            raise UserError(
                f"--frozen_lora {file.request}: it also adapts {', '.join(parts)}, and text is encoded in one way for "
                "training and previews",
                code="frozen-text-encoder-use",
                fix=f"--frozen_lora {file.request.path}:{file.request.strength:g}:both",
            )


class FrozenAdapters:
    """The hooks of several files; an adapter lives as long as the weights that it is hooked to."""

    def __init__(self, files: Sequence[FrozenFile] = ()) -> None:
        self.files = [file for file in files if file.request.strength]  # at strength 0 there is nothing to hook
        self.sampling = False  # whether images are being made
        self._engines: WeakKeyDictionary[AdapterEngine, FrozenAdapter] = WeakKeyDictionary()

    @property
    def engines(self) -> list[AdapterEngine]:
        """Those of the networks whose weights are read."""
        return list(self._engines)

    def register(self, model: Family) -> None:
        for file in self.files:
            for part, found in file.matches.items():
                identity = f"{hash_matches(found)} beside it, {file.request.strength}"
                attach = partial(self._attach, file.request, found)
                model.parts[part].add_change(WeightChange(identity=identity, apply=attach))

    def _attach(self, request: FrozenAdapter, found: Sequence[LayerMatch], network: nn.Module) -> None:
        engine, layers = AdapterEngine(), find_layers(network)
        for match in found:
            group = match.view.bind(layers)
            adapter = restore_adapter(match.kinds, group, match.tensors)
            adapter.requires_grad_(False).eval()
            engine.attach([group], lambda _, adapter=adapter: adapter)
        self._engines[engine] = request
        self._set_strength(engine)

    def _set_strength(self, engine: AdapterEngine) -> None:
        request = self._engines[engine]
        engine.multiplier = request.strength if request.is_used(sampling=self.sampling) else 0.0

    @contextmanager
    def use_for_sampling(self) -> Iterator[None]:
        """A context in which those for previews are active instead of those for training."""
        self._set_sampling(True)
        try:
            yield
        finally:
            self._set_sampling(False)

    def _set_sampling(self, sampling: bool) -> None:
        self.sampling = sampling
        for engine in self.engines:
            self._set_strength(engine)


def hash_matches(found: Sequence[LayerMatch]) -> str:
    """A hash of all tensors, their names and the layers that they change."""
    digest = hashlib.sha256()
    for match in sorted(found, key=lambda match: match.view.paths):
        for name, tensor in sorted(match.tensors.items()):
            layers = f"{match.view.paths} {match.view.rows}"
            digest.update(f"{layers} {name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(view_bytes(tensor.contiguous().reshape(-1)))
    return digest.hexdigest()
