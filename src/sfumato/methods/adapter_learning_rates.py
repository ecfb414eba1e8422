"""The learning rates of adapters: by part, by block, by name, and with LoRA+ by parameter."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from sfumato.adapters.base import Adapter, is_trainable
from sfumato.common.text import plural
from sfumato.config import NetworkOptions, OptimOptions
from sfumato.config.values import to_tuple
from sfumato.errors import UserError
from sfumato.families.part import PartSpec
from sfumato.formats.groups import LayerGroup
from sfumato.methods.adapter_args import AdapterArgs, make_frozen_part_error
from sfumato.methods.adapter_ranks import find_lr_block
from sfumato.methods.base import TrainablePart
from sfumato.methods.trained_parts import make_zero_learning_rates_error, read_text_encoder_lr
from sfumato.optim.groups import ParameterGroup

PLUS_SUFFIX = "+"  # ends the name of a parameter group with the learning rate of loraplus_lr_ratio


@dataclass(frozen=True, kw_only=True)
class LearningRate:
    """A learning rate and the name of its parameters in logs and reports."""

    label: str
    value: float


@dataclass(frozen=True, kw_only=True)
class AdapterLearningRates:
    """The learning rates of one run."""

    args: AdapterArgs
    specs: Mapping[str, PartSpec]
    parts: Mapping[str, float]  # part that trains -> its learning rate
    block_factors: Mapping[str, Sequence[float]]  # part -> the factor of each of its blocks

    def find_learning_rate(self, group: LayerGroup) -> LearningRate:
        """From the last expression that matches the name, else the part's learning rate times its block's factor."""
        part = group.part
        found: LearningRate | None = None
        for i, (expression, value) in enumerate(self.args.network_reg_lrs):
            if expression.search(group.name) or expression.fullmatch(self._find_name(group)):
                found = LearningRate(label=f"{part}.reg{i}", value=value)
        if found is not None:
            return found
        block = find_lr_block(self.specs[part], group) if part in self.block_factors else None
        if block is None or self.block_factors[part][block] == 1:
            return LearningRate(label=part, value=self.parts[part])
        return LearningRate(label=f"{part}.block{block:02d}", value=self.parts[part] * self.block_factors[part][block])

    def _find_name(self, group: LayerGroup) -> str:
        return self.specs[group.part].adapter_map.locate(group.paths[0]).original

    def make_parameter_groups(self, adapters: Iterable[Adapter]) -> list[ParameterGroup]:
        """The optimizer's groups by learning rate; parameters with the LoRA+ ratio have groups of their own."""
        parameters: dict[str, list[nn.Parameter]] = {}
        values: dict[str, float] = {}
        for adapter in adapters:
            if not is_trainable(adapter):
                continue
            base, ratio = self.find_learning_rate(adapter.group), self._plus_ratio(adapter.group.part)
            for name, parameter in adapter.trainable():
                is_plus = ratio != 1 and name.rpartition(".")[2] in adapter.plus_params
                label = base.label + PLUS_SUFFIX if is_plus else base.label
                values[label] = base.value * ratio if is_plus else base.value
                parameters.setdefault(label, []).append(parameter)
        return [
            ParameterGroup(name=label, parameters=parameters[label], learning_rate=values[label])
            for label in parameters
        ]

    def list_trainable(self, adapters: Sequence[Adapter]) -> list[TrainablePart]:
        """What trains, one entry for each of the optimizer's groups."""
        reads_weights = any(adapter.reads_weights or adapter.starts_from_weights for adapter in adapters)
        labels = Counter(self.find_learning_rate(adapter.group).label for adapter in adapters)
        return [
            TrainablePart(
                part=row.name,
                modules=labels[row.name.removesuffix(PLUS_SUFFIX)],
                parameters=sum(parameter.numel() for parameter in row.parameters),
                learning_rate=row.learning_rate,
                reads_weights=reads_weights,
            )
            for row in self.make_parameter_groups(adapters)
        ]

    def _plus_ratio(self, part: str) -> float:
        args = self.args
        own = args.loraplus_unet_lr_ratio if part == "denoiser" else args.loraplus_text_encoder_lr_ratio
        return own or args.loraplus_lr_ratio or 1.0


def read_adapter_learning_rates(
    network: NetworkOptions,
    optim: OptimOptions,
    args: AdapterArgs,
    specs: Mapping[str, PartSpec],
    text_parts: Sequence[str],
    *,
    lr_order: Sequence[str] = (),
    cached: Collection[str] = (),
) -> AdapterLearningRates:
    """Read the learning rates of all options; UserError where nothing trains or an argument has no effect.

    lr_order: the text encoders that --text_encoder_lr counts, where they are not `text_parts`. cached: text encoders
    that do not train where anything else does.
    """
    opted_out = find_opted_out(specs, args, text_parts)
    text_lrs = read_text_encoder_lr(optim, lr_order or text_parts)
    text_lrs = {part: text_lrs[part] for part in text_parts}
    parts = read_part_learning_rates(network, optim, text_lrs, opted_out)
    parts = {part: lr for part, lr in parts.items() if part not in cached} or parts
    if not parts and read_part_learning_rates(network, optim, text_lrs, set()):
        names = " ".join(f"{specs[part].opt_in}=True" for part in text_parts if part in opted_out)
        raise UserError(
            "no part of the model trains: the remaining ones train only on request",
            code="only-opt-in-parts",
            fix=f"--network_args {names}",
        )
    if not parts:
        raise make_zero_learning_rates_error("--learning_rate 1e-4")
    check_part_arguments(args, specs, parts, text_parts)
    with_factors = [part for part in parts if args.lr_block_factors and specs[part].lr_block_ranges]
    factors = {part: read_block_factors(args, specs[part]) for part in with_factors}
    return AdapterLearningRates(args=args, specs=specs, parts=parts, block_factors=factors)


def check_part_arguments(
    args: AdapterArgs, specs: Mapping[str, PartSpec], parts: Mapping[str, float], text_parts: Sequence[str]
) -> None:
    """Raise UserError for an argument of a part that does not train; `parts` are those that do."""
    for part in text_parts:
        if args.opted_in.get(specs[part].opt_in) and part not in parts:
            raise UserError(
                f"--network_args {specs[part].opt_in}=True has no effect: the part {part!r} does not train",
                code="opt-in-of-frozen-part",
            )
    needs_blocks = args.lr_block_factors or args.block_dims or args.conv_block_dims
    if needs_blocks and not any(specs[part].lr_blocks for part in parts):
        raise UserError(
            "--network_args: ranks and learning rates of blocks have no effect, the part with blocks does not train",
            code="block-args-of-frozen-part",
        )
    if args.loraplus_unet_lr_ratio and "denoiser" not in parts:
        raise make_frozen_part_error("loraplus_unet_lr_ratio")
    if args.loraplus_text_encoder_lr_ratio and set(parts) == {"denoiser"}:
        raise make_frozen_part_error("loraplus_text_encoder_lr_ratio")


def find_opted_out(specs: Mapping[str, PartSpec], args: AdapterArgs, text_parts: Sequence[str]) -> set[str]:
    """Text encoders that train only on request, without a request for them."""
    return {part for part in text_parts if specs[part].opt_in and not args.opted_in.get(specs[part].opt_in)}


def read_part_learning_rates(
    network: NetworkOptions, optim: OptimOptions, text_lrs: Mapping[str, float], opted_out: set[str]
) -> dict[str, float]:
    """Part -> learning rate of the parts that train, those with a learning rate above 0."""
    learning_rates: dict[str, float] = {}
    if not network.network_train_text_encoder_only:
        learning_rates["denoiser"] = optim.learning_rate if optim.unet_lr is None else optim.unet_lr
    if not network.network_train_unet_only:
        learning_rates |= text_lrs
    return {part: lr for part, lr in learning_rates.items() if lr and part not in opted_out}


def list_ignored_learning_rates(
    optim: OptimOptions, specs: Mapping[str, PartSpec], lr_order: Sequence[str], opted_out: set[str]
) -> list[str]:
    """A line for each learning rate of a text encoder that trains only on request, without a request for it."""
    given = optim.text_encoder_lr or ()
    values = dict(zip(lr_order, given, strict=False)) if len(given) > 1 else {}
    return [
        f"--text_encoder_lr: the learning rate {values[part]:g} of {part} has no effect without "
        f"--network_args {specs[part].opt_in}=True"
        for part in lr_order
        if part in opted_out and values.get(part)
    ]


def read_block_factors(args: AdapterArgs, spec: PartSpec) -> list[float]:
    """The learning-rate factor of each block; 1 by default, 0 at or below the threshold."""
    factors = [1.0] * len(spec.lr_blocks)
    threshold = args.block_lr_zero_threshold or 0.0
    for option, value in args.lr_block_factors.items():
        blocks = spec.lr_block_ranges[option]
        for block, factor in zip(blocks, parse_block_factors(option, value, len(blocks)), strict=False):
            factors[block] = factor if factor > threshold else 0.0
    return factors


def parse_block_factors(option: str, value: Any, count: int) -> list[float]:
    """Numbers, or the name of a shape with +base; a short list leaves the last blocks at 1, an empty item means 0."""
    if isinstance(value, str) and not set(value) <= set("0123456789.,eE+- "):
        name, _, base = value.partition("+")
        shape = FACTOR_SHAPES.get(name.strip())
        if shape is None:
            names = ", ".join(FACTOR_SHAPES)
            raise UserError(
                f"--network_args {option}={value}: neither numbers nor one of {names}, each with +base",
                code="block-factors-invalid",
            )
        return [shape(i / max(1, count - 1)) + _parse_factor(option, base or "0") for i in range(count)]
    texts = value.split(",") if isinstance(value, str) else [str(item) for item in to_tuple(value)]
    if len(texts) > count:
        raise UserError(
            f"--network_args {option} has {plural(len(texts), 'number')} for {plural(count, 'block')}",
            code="block-factors-too-many",
        )
    return [_parse_factor(option, text.strip() or "0") for text in texts]


def _parse_factor(option: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not (math.isfinite(number) and number >= 0):
        raise UserError(
            f"--network_args {option}: {text!r} is not a factor of a learning rate",
            code="block-factor-invalid",
            fix="give a number of 0 or more",
        )
    return number


FACTOR_SHAPES = {  # factors over a range of blocks, from its first block (0) to its last (1)
    "sine": lambda x: math.sin(math.pi / 2 * x),
    "cosine": lambda x: math.sin(math.pi / 2 * (1 - x)),
    "linear": lambda x: x,
    "reverse_linear": lambda x: 1 - x,
    "zeros": lambda x: 0.0,
}
