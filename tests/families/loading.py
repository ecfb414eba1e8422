"""Load a model for a test, and a method that leaves it as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sfumato.config import ModelOptions, NoiseOptions
from sfumato.data.batch import Extras
from sfumato.families import register_families
from sfumato.families.base import Family, find_family
from sfumato.families.blueprint import Blueprint
from sfumato.families.source import open_source


def read_model(options: ModelOptions, noise: NoiseOptions | None = None, family: str | None = None) -> Blueprint:
    """The blueprint of the model that the options name; family None: whichever recognizes it."""
    register_families()
    source = open_source(options)
    return find_family(family, source).read(source, options, noise or NoiseOptions())


def load_model(
    options: ModelOptions,
    dtype: torch.dtype = torch.float32,
    noise: NoiseOptions | None = None,
    family: str | None = None,
) -> Family:
    """The frozen model that the options name, on the CPU."""
    blueprint = read_model(options, noise, family)
    found = find_family(family, blueprint.source)
    return load_family(found, blueprint, options, dtype)


def load_family(
    family: type[Family], blueprint: Blueprint, options: ModelOptions, dtype: torch.dtype = torch.float32
) -> Family:
    """The model with the weights of every network, on the CPU."""
    model = family(blueprint, options, dtype=dtype, device=torch.device("cpu"))
    model.load()
    return model


@dataclass
class NoMethod:
    """The model as it is."""

    live_text: frozenset[str] = frozenset()

    def rewrite_caption(self, text: str) -> str:
        return text

    def set_batch(self, model: Family, extras: Extras) -> None: ...

    def predict(self, model: Family, noisy: Tensor, t: Tensor, conditioning: Any, extras: Extras) -> Tensor:
        return model.predict(noisy, t, conditioning, extras.images)
