"""Adapter files on a model that only makes pictures: nothing trains, nothing is saved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from sfumato.adapters.base import AdapterEngine, merge
from sfumato.adapters.lora import LoRA
from sfumato.data.batch import Extras, Tensors
from sfumato.families.base import Family
from sfumato.formats.lora import read_adapter_file
from sfumato.methods.adapter import matched

Strengths = Sequence[tuple[Path, float]]


class Attached:
    """The adapters are hooked, so that they add exactly what they added in training; `base` ones are merged before."""

    def __init__(self, model: Family, files: Strengths, *, base: Strengths = ()) -> None:
        self.model = model
        self.engines: list[AdapterEngine] = []
        self.live_text: frozenset[str] = frozenset()  # the encoders with adapters, as in training
        model.freeze()
        for path, strength in base:
            for adapter in self._read(path).values():
                merge(adapter, strength)
        for path, strength in files:
            self._attach(path, strength)

    def _read(self, path: Path) -> dict[str, LoRA]:
        """The adapters of a file by the names of their layers; UserError for what fits no layer of this model."""
        groups = {name: part.groups(every=True) for name, part in self.model.parts.items() if part.spec.targets}
        specs = {name: self.model.parts[name].spec for name in groups}
        known = {group.name: group for each in groups.values() for group in each}
        entries = matched(path, read_adapter_file(path), specs, groups)
        return {name: LoRA.from_tensors(known[name], tensors) for name, tensors in entries.items()}

    def _attach(self, path: Path, strength: float) -> None:
        engine, adapters = AdapterEngine(), self._read(path)
        engine.attach([adapter.group for adapter in adapters.values()], lambda group: adapters.get(group.name))
        engine.multiplier = strength
        engine.requires_grad_(False).eval()
        self.engines.append(engine)
        self.live_text |= {adapter.group.part for adapter in engine} & {*self.model.text_parts}

    def caption(self, text: str) -> str:
        return text

    def begin(self, model: Family, extras: Extras) -> None:
        pass

    def predict(self, model: Family, noisy: Tensor, t: Tensor, conditioning: Tensors, extras: Extras) -> Tensor:
        return model.predict(noisy, t, conditioning)
