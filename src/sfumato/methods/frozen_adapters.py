"""Adapter files that take part without being trained: hooked to a network each time its weights are read."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from weakref import WeakKeyDictionary

import torch
from torch import nn

from sfumato.adapters.base import Adapter, AdapterEngine
from sfumato.adapters.kinds import read_adapter_file, restore_adapter
from sfumato.common.text import plural
from sfumato.config.frozen import FrozenAdapter
from sfumato.errors import UserError
from sfumato.families.adapter_names import match_file_layers
from sfumato.families.base import Family
from sfumato.families.part import PartSpec, WeightChange
from sfumato.formats.adapter_kind import LayerMatch
from sfumato.formats.checkpoint import view_bytes
from sfumato.formats.embedding_file import is_bundled
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
        counts = ", ".join(f"{plural(len(found), 'layer')} of {part}" for part, found in self.matches.items())
        kinds = Counter(match.kinds[-1].label for found in self.matches.values() for match in found)
        request = self.request
        return (
            f"frozen: {request.path}, {', '.join(kinds)} at strength {request.strength:g} {uses[request.use]}, {counts}"
        )


def read_frozen_file(
    request: FrozenAdapter, specs: Mapping[str, PartSpec], groups: GroupsByPart, *, uses_words: bool = False
) -> FrozenFile:
    """Read a file and find its layers in a model; UserError where it does not fit.

    specs: of every part that can be adapted. groups: part -> every adaptable layer. uses_words: whether new words that
    the file bundles are used, too.
    """
    file = read_adapter_file(request.path)
    if uses_words:
        file = replace(file, passed_over=tuple(key for key in file.passed_over if not is_bundled(key)))
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
    """The hooks of several files.

    Those that take part in training live as long as the weights that they are hooked to; those for previews alone are
    hooked only while images are made, so that training is what it is without them.
    """

    def __init__(self, files: Sequence[FrozenFile] = (), *, changes_strength: bool = False) -> None:
        """changes_strength: whether one of strength 0 is hooked, too, since batches may have other strengths."""
        self.files = [file for file in files if file.request.strength or changes_strength]
        self._engines: WeakKeyDictionary[AdapterEngine, FrozenAdapter] = WeakKeyDictionary()
        self._for_previews: dict[tuple[FrozenAdapter, str], list[Adapter]] = {}  # file and part -> its adapters

    @property
    def engines(self) -> list[AdapterEngine]:
        """Those of the networks whose weights are read."""
        return list(self._engines)

    def list_modules(self) -> list[nn.Module]:
        """All that is in memory."""
        return [*self.engines, *chain.from_iterable(self._for_previews.values())]

    def register(self, model: Family) -> None:
        for file in self.files:
            for part, found in file.matches.items():
                identity = f"{hash_matches(found)} beside it, {file.request.strength}"
                attach = partial(self._attach, file.request, found, model.parts[part].device)
                model.parts[part].add_change(WeightChange(identity=identity, apply=attach))

    def _attach(
        self, request: FrozenAdapter, found: Sequence[LayerMatch], device: torch.device, network: nn.Module
    ) -> None:
        layers = find_layers(network)
        adapters = [restore_adapter(match.kinds, match.view.bind(layers), match.tensors) for match in found]
        for adapter in adapters:
            adapter.requires_grad_(False).eval().to(device)  # the layers of a block may be in main memory
        if request.use == "sample":
            self._for_previews[request, found[0].view.part] = adapters
        else:
            self._engines[hook_adapters(adapters, request.strength)] = request

    @contextmanager
    def use_for_sampling(self) -> Iterator[None]:
        """A context in which those for previews are active instead of those for training."""
        resting = [engine for engine, request in self._engines.items() if not request.is_used(sampling=True)]
        hooked = [hook_adapters(adapters, request.strength) for (request, _), adapters in self._for_previews.items()]
        try:
            with mute_engines(resting):
                yield
        finally:
            for engine in hooked:
                engine.detach()


@contextmanager
def mute_engines(engines: Sequence[AdapterEngine]) -> Iterator[None]:
    """A context in which they have no effect."""
    before = [engine.multiplier for engine in engines]
    for engine in engines:
        engine.multiplier = 0.0
    try:
        yield
    finally:
        for engine, multiplier in zip(engines, before, strict=True):
            engine.multiplier = multiplier


def hook_adapters(adapters: Sequence[Adapter], strength: float) -> AdapterEngine:
    """An engine of these adapters at this strength."""
    engine, by_name = AdapterEngine(), {adapter.group.name: adapter for adapter in adapters}
    engine.attach([adapter.group for adapter in adapters], lambda group: by_name[group.name])
    engine.multiplier = strength
    return engine


def hash_matches(found: Sequence[LayerMatch]) -> str:
    """A hash of all tensors, their names and the layers that they change."""
    digest = hashlib.sha256()
    for match in sorted(found, key=lambda match: match.view.paths):
        for name, tensor in sorted(match.tensors.items()):
            layers = f"{match.view.paths} {match.view.rows}"
            digest.update(f"{layers} {name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(view_bytes(tensor.contiguous().reshape(-1)))
    return digest.hexdigest()
