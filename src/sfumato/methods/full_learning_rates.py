"""The trained weights of full training and their learning rates: by part, and by block of the denoiser."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from sfumato.config import Config, OptimOptions
from sfumato.errors import UserError
from sfumato.families.blueprint import Blueprint
from sfumato.families.part import PartSpec
from sfumato.methods.trained_parts import make_zero_learning_rates_error, read_text_encoder_lr

WeightT = TypeVar("WeightT")


@dataclass(frozen=True, kw_only=True)
class TrainedWeights(Generic[WeightT]):
    """Weights with one learning rate, by name: tensors of a loaded model, or their shapes before that."""

    label: str  # their name in logs and reports
    part: str
    learning_rate: float
    weights: Mapping[str, WeightT]


@dataclass(frozen=True, kw_only=True)
class FullLearningRates:
    """The learning rates of one run."""

    parts: Mapping[str, float]  # of each part that trains, in the order of the optimizer's groups
    blocks: Sequence[float] | None = None  # of the denoiser's blocks, instead of its own learning rate

    def select_weights(self, spec: PartSpec, weights: Iterable[tuple[str, WeightT]]) -> list[TrainedWeights[WeightT]]:
        """A part's weights that train, by learning rate; blocks at learning rate 0 are skipped."""
        trained = {name: weight for name, weight in weights if name not in spec.constant_tensors}
        part = spec.name
        if self.blocks is None or part != "denoiser":
            return [TrainedWeights(label=part, part=part, learning_rate=self.parts[part], weights=trained)]
        by_block: dict[int, dict[str, WeightT]] = {
            i: {} for i, learning_rate in enumerate(self.blocks) if learning_rate
        }
        for name, weight in trained.items():
            block = spec.lr_block_index(name)
            assert block is not None, f"{name} is in no block"
            if block in by_block:
                by_block[block][name] = weight
        return [
            TrainedWeights(
                label=f"{part}.block{block:02d}", part=part, learning_rate=self.blocks[block], weights=inside
            )
            for block, inside in by_block.items()
            if inside
        ]


def read_full_learning_rates(config: Config, blueprint: Blueprint) -> FullLearningRates:
    """Read the learning rates of all options; UserError where nothing trains or the model has no part for an option."""
    optim = config.optim
    blocks = read_block_lr(optim, blueprint.networks["denoiser"].spec)
    denoiser = optim.learning_rate if optim.unet_lr is None else optim.unet_lr
    parts = {"denoiser": max(blocks) if blocks else denoiser}
    parts |= read_encoder_learning_rates(optim, blueprint) if config.full.trains_text else {}
    parts = {part: lr for part, lr in parts.items() if lr}
    if not parts:
        raise make_zero_learning_rates_error("--learning_rate 1e-5")
    outside = [part for part in parts if not blueprint.in_file(part)]
    if outside:
        raise UserError(
            f"--train_text_encoder: {' and '.join(outside)} of this model has a file of its own, and full training "
            "writes only the model's file",
            code="text-encoder-in-other-file",
            fix="remove --train_text_encoder, or train an adapter, whose file can change text encoders, too",
        )
    return FullLearningRates(parts=parts, blocks=blocks)


def read_encoder_learning_rates(optim: OptimOptions, blueprint: Blueprint) -> dict[str, float]:
    """The learning rate of each text encoder: its own, else that of all text encoders, else the model's."""
    names = blueprint.text_parts
    common = read_text_encoder_lr(optim, blueprint.text_lr_order)
    learning_rates = {part: common[part] for part in names}
    if optim.learning_rate_te is not None:
        learning_rates = dict.fromkeys(names, optim.learning_rate_te)
    own = {"learning_rate_te1": optim.learning_rate_te1, "learning_rate_te2": optim.learning_rate_te2}
    for i, (option, lr) in enumerate(own.items()):
        if lr is not None and i >= len(names):
            raise UserError(
                f"--{option}: this model has only one text encoder",
                code="second-text-encoder-missing",
                fix="--learning_rate_te",
            )
        if lr is not None:
            learning_rates[names[i]] = lr
    return {part: lr for part, lr in learning_rates.items() if not blueprint.networks[part].spec.opt_in}


def read_block_lr(optim: OptimOptions, spec: PartSpec) -> Sequence[float] | None:
    """--block_lr, which must have a learning rate for each of the denoiser's blocks."""
    if optim.block_lr is None:
        return None
    if not spec.lr_blocks:
        raise UserError(
            "--block_lr: this model has no numbered blocks",
            code="block-lr-without-blocks",
            fix="--learning_rate, for all of them",
        )
    if len(optim.block_lr) != len(spec.lr_blocks):
        raise UserError(
            f"--block_lr has {len(optim.block_lr)} values, this model needs {len(spec.lr_blocks)}",
            code="block-lr-wrong-length",
        )
    return optim.block_lr
