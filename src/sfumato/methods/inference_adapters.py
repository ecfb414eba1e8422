"""Adapter files on a model that only generates images: nothing trains, nothing is saved."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from sfumato.config.frozen import FrozenAdapter
from sfumato.data.batch import Extras, Tensors
from sfumato.families.base import Family
from sfumato.methods.base_weights import read_base_weights
from sfumato.methods.frozen_adapters import FrozenAdapters, read_frozen_file

log = logging.getLogger(__name__)
Strengths = Sequence[tuple[Path, float]]


class InferenceAdapters:
    """Hooks the adapters, so that they add exactly what they added in training; those of `base` are merged before."""

    def __init__(self, model: Family, files: Strengths, *, base: Strengths = ()) -> None:
        networks = {name: part.network for name, part in model.parts.items() if part.spec.targets}
        specs = {name: network.spec for name, network in networks.items()}
        groups = {name: network.groups(every=True) for name, network in networks.items()}
        merged = read_base_weights(base, specs, groups)
        merged.register(model)
        requests = [FrozenAdapter(path=path, strength=strength) for path, strength in files]
        read = [read_frozen_file(request, specs, groups) for request in requests]
        for line in (*merged.notes, *(note for file in read for note in file.notes)):
            log.warning("%s", line)
        self.frozen = FrozenAdapters(read)
        self.frozen.register(model)
        adapted = {part for file in read for part in file.matches}
        for part in adapted:  # not to be unloaded from now on
            model.parts[part].load()
        self.live_text = frozenset(adapted & {*model.text_parts})  # the encoders with adapters, as in training

    def rewrite_caption(self, text: str) -> str:
        return text

    def set_batch(self, model: Family, extras: Extras) -> None:
        pass

    def predict(self, model: Family, noisy: Tensor, t: Tensor, conditioning: Tensors, extras: Extras) -> Tensor:
        return model.predict(noisy, t, conditioning, extras.images)
