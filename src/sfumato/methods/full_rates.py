"""Which weights of a model train in full training, and how fast: by part, and by block of the denoiser."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from sfumato.config import Config, OptimOptions
from sfumato.errors import UserError
from sfumato.families.base import Blueprint, PartSpec
from sfumato.methods import adapter_rates

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Chosen(Generic[T]):
    """Weights that share a rate, by name: tensors of a loaded model, or their shapes before that."""

    label: str  # what logs and reports call them
    part: str
    rate: float
    weights: Mapping[str, T]


@dataclass(frozen=True, kw_only=True)
class FullRates:
    """The rule of one run."""

    parts: Mapping[str, float]  # of each part that trains, in the order of the optimizer's groups
    blocks: Sequence[float] | None = None  # of the denoiser's stages, in place of its own rate

    def choose(self, spec: PartSpec, weights: Iterable[tuple[str, T]]) -> list[Chosen[T]]:
        """A part's weights that train, by rate; those of blocks at rate 0 are left out."""
        weights = [(name, weight) for name, weight in weights if name not in spec.tables]
        if self.blocks is None or spec.name != "denoiser":
            return [Chosen(label=spec.name, part=spec.name, rate=self.parts[spec.name], weights=dict(weights))]
        found: dict[int, dict[str, T]] = {stage: {} for stage, rate in enumerate(self.blocks) if rate}
        for name, weight in weights:
            stage = spec.stage(name)
            assert stage is not None, f"{name} is in no block"
            if stage in found:
                found[stage][name] = weight
        return [
            Chosen(label=f"{spec.name}.block{stage:02d}", part=spec.name, rate=self.blocks[stage], weights=inside)
            for stage, inside in found.items()
            if inside
        ]


def full_rates(config: Config, blueprint: Blueprint) -> FullRates:
    """Read the rates of all options; UserError where nothing trains, or something is asked for that does not exist."""
    optim = config.optim
    blocks = block_rates(optim, blueprint.networks["denoiser"].spec)
    denoiser = optim.learning_rate if optim.unet_lr is None else optim.unet_lr
    parts = {"denoiser": max(blocks) if blocks else denoiser}
    parts |= text_rates(optim, blueprint) if config.full.trains_text else {}
    parts = {part: rate for part, rate in parts.items() if rate}
    if not parts:
        raise UserError("no part of the model trains: every learning rate is 0", fix="--learning_rate 1e-5")
    outside = [part for part in parts if not blueprint.in_file(part)]
    if outside:
        raise UserError(
            f"--train_text_encoder: {' and '.join(outside)} of this model lies in a file of its own, and full training "
            "writes the model's own file alone",
            fix="leave it out, or train an adapter, whose file can change text encoders, too",
        )
    return FullRates(parts=parts, blocks=blocks)


def text_rates(optim: OptimOptions, blueprint: Blueprint) -> dict[str, float]:
    """The rate of each text encoder: its own, else that of all of them, else the model's."""
    names = blueprint.text_parts
    common = adapter_rates.text_rates(optim, len(names))
    if optim.learning_rate_te is not None:
        common = [optim.learning_rate_te] * len(names)
    rates = dict(zip(names, common, strict=True))
    own = {"learning_rate_te1": optim.learning_rate_te1, "learning_rate_te2": optim.learning_rate_te2}
    for place, (option, rate) in enumerate(own.items()):
        if rate is not None and place >= len(names):
            raise UserError(f"--{option}: this model has only one text encoder", fix="--learning_rate_te")
        if rate is not None:
            rates[names[place]] = rate
    return {part: rate for part, rate in rates.items() if not blueprint.networks[part].spec.opt_in}


def block_rates(optim: OptimOptions, spec: PartSpec) -> Sequence[float] | None:
    """--block_lr, which must have a rate for each of the denoiser's stages."""
    if optim.block_lr is None:
        return None
    if not spec.stages:
        raise UserError("--block_lr: this model's blocks are not counted", fix="--learning_rate, for all of them")
    if len(optim.block_lr) != len(spec.stages):
        raise UserError(f"--block_lr has {len(optim.block_lr)} values, this model needs {len(spec.stages)}")
    return optim.block_lr
