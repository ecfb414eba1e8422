"""Adapter files on a model that only generates images: nothing trains, nothing is saved."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from sfumato.adapters.base import AdapterEngine
from sfumato.data.batch import Extras, Tensors
from sfumato.families.adapter_names import match_adapter_file
from sfumato.families.base import Family
from sfumato.formats.adapter_file import read_adapter_file
from sfumato.methods.adapter_builder import iterate_adapters
from sfumato.methods.base_weights import read_base_weights

log = logging.getLogger(__name__)
Strengths = Sequence[tuple[Path, float]]


class InferenceAdapters:
    """Hooks the adapters, so that they add exactly what they added in training; those of `base` are merged before."""

    def __init__(self, model: Family, files: Strengths, *, base: Strengths = ()) -> None:
        self.model = model
        self.engines: list[AdapterEngine] = []
        self.live_text: frozenset[str] = frozenset()  # the encoders with adapters, as in training
        networks = {name: part.network for name, part in model.parts.items() if part.spec.targets}
        self.specs = {name: network.spec for name, network in networks.items()}
        self.groups = {name: network.groups(every=True) for name, network in networks.items()}
        merged = read_base_weights(base, self.specs, self.groups)
        for line in merged.notes:
            log.warning("%s", line)
        merged.register(model)
        for path, strength in files:
            self._attach(path, strength)

    def _attach(self, path: Path, strength: float) -> None:
        """Load the networks that the file adapts, which must not be unloaded from then on, and hook its adapters."""
        engine, file = AdapterEngine(), read_adapter_file(path)
        for line in file.describe_passed_over():
            log.warning("%s", line)
        adapted = {adapter.group.part for adapter in match_adapter_file(file, self.specs, self.groups).values()}
        groups = dict(self.groups)
        for name in adapted:
            self.model.parts[name].load()
            groups[name] = self.model.parts[name].groups(every=True)
        adapters = {adapter.group.name: adapter for adapter in iterate_adapters(file, self.specs, groups)}
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
