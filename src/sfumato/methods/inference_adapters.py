"""Adapter files on a model that only generates images: nothing trains, nothing is saved."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from sfumato.adapters.base import AdapterEngine, merge_adapter
from sfumato.adapters.lora import LoRA
from sfumato.data.batch import Extras, Tensors
from sfumato.families.base import Family
from sfumato.formats.adapter_file import read_adapter_file
from sfumato.methods.adapter_builder import iterate_adapters

log = logging.getLogger(__name__)
Strengths = Sequence[tuple[Path, float]]


class InferenceAdapters:
    """Hooks the adapters, so that they add exactly what they added in training; those of `base` are merged before."""

    def __init__(self, model: Family, files: Strengths, *, base: Strengths = ()) -> None:
        self.model = model
        self.engines: list[AdapterEngine] = []
        self.live_text: frozenset[str] = frozenset()  # the encoders with adapters, as in training
        model.freeze()
        for path, strength in base:
            for adapter in self._iterate_adapters(path):
                merge_adapter(adapter, strength)
        for path, strength in files:
            self._attach(path, strength)

    def _iterate_adapters(self, path: Path) -> Iterator[LoRA]:
        """The adapters of a file; UserError for one that belongs to no layer of this model."""
        parts = {name: part for name, part in self.model.parts.items() if part.spec.targets}
        groups = {name: part.groups(every=True) for name, part in parts.items()}
        specs = {name: part.spec for name, part in parts.items()}
        file = read_adapter_file(path)
        for line in file.describe_passed_over():
            log.warning("%s", line)
        return iterate_adapters(file, specs, groups)

    def _attach(self, path: Path, strength: float) -> None:
        engine = AdapterEngine()
        adapters = {adapter.group.name: adapter for adapter in self._iterate_adapters(path)}
        engine.attach([adapter.group for adapter in adapters.values()], lambda group: adapters.get(group.name))
        engine.multiplier = strength
        engine.requires_grad_(False).eval()
        self.engines.append(engine)
        self.live_text |= {adapter.group.part for adapter in engine} & {*self.model.text_parts}

    def rewrite_caption(self, text: str) -> str:
        return text

    def set_batch(self, model: Family, extras: Extras) -> None:
        pass

    def predict(self, model: Family, noisy: Tensor, t: Tensor, conditioning: Tensors, extras: Extras) -> Tensor:
        return model.predict(noisy, t, conditioning)
