"""The trained weights of full training and their learning rates: by part, and by block of the denoiser."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from sfumato.common.text import plural
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
    frozen_last: int = 0  # the denoiser's last blocks, which do not train

    def select_weights(self, spec: PartSpec, weights: Iterable[tuple[str, WeightT]]) -> list[TrainedWeights[WeightT]]:
        """A part's weights that train, by learning rate; blocks at learning rate 0 are skipped."""
        trained = {name: weight for name, weight in weights if name not in spec.constant_tensors}
        part = spec.name
        if part == "denoiser" and self.frozen_last:
            frozen = find_last_blocks(spec, trained, self.frozen_last)
            trained = {name: weight for name, weight in trained.items() if not name.startswith(frozen)}
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
    parts |= read_encoder_learning_rates(config, blueprint) if config.full.trains_text else {}
    parts = {part: lr for part, lr in parts.items() if lr}
    if not parts:
        raise make_zero_learning_rates_error("--learning_rate 1e-5")
    return FullLearningRates(parts=parts, blocks=blocks, frozen_last=config.full.num_last_block_to_freeze or 0)


def read_encoder_learning_rates(config: Config, blueprint: Blueprint) -> dict[str, float]:
    """The learning rate of each text encoder: its own, else that of all text encoders, else the model's."""
    optim, names = config.optim, blueprint.text_lr_order
    learning_rates = read_text_encoder_lr(optim, names)
    if optim.learning_rate_te is not None:
        learning_rates = dict.fromkeys(names, optim.learning_rate_te)
    for i, lr in enumerate((optim.learning_rate_te1, optim.learning_rate_te2, optim.learning_rate_te3)):
        if lr is not None and (i >= len(names) or names[i] not in blueprint.text_parts):
            raise UserError(
                f"--learning_rate_te{i + 1}: of text encoders this model has {', '.join(blueprint.text_parts)}",
                code="numbered-text-encoder-missing",
                fix="--learning_rate_te, for all of them",
            )
        if lr is not None:
            learning_rates[names[i]] = lr
    opted_in = {"train_t5xxl"} if config.full.train_t5xxl else set[str]()
    return {
        part: learning_rates[part]
        for part in blueprint.text_parts
        if not blueprint.networks[part].spec.opt_in or blueprint.networks[part].spec.opt_in in opted_in
    }


def find_last_blocks(spec: PartSpec, names: Iterable[str], count: int) -> tuple[str, ...]:
    """The starts of the names of weights in a network's last blocks. UserError where there are not so many."""
    found: set[tuple[int, int, str]] = set()
    for place, pattern in enumerate(spec.blocks):
        if pattern.count("{n}") != 1:
            raise UserError(
                "--num_last_block_to_freeze: the blocks of this model are not in one row",
                code="last-blocks-not-in-a-row",
                fix="--block_lr, with 0 for those that do not train",
            )
        start = pattern.partition("{n}")[0]
        for name in names:
            number = name[len(start) :].partition(".")[0] if name.startswith(start) else ""
            if number.isdecimal():
                found.add((place, int(number), f"{start}{number}."))
    if count > len(found):
        raise UserError(
            f"--num_last_block_to_freeze {count}: this model has {plural(len(found), 'block')}",
            code="last-blocks-too-many",
        )
    return tuple(prefix for _, _, prefix in sorted(found)[len(found) - count :])


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
            f"--block_lr has {plural(len(optim.block_lr), 'value')}, this model needs {len(spec.lr_blocks)}",
            code="block-lr-wrong-length",
        )
    return optim.block_lr
