"""How fast each adapter learns: rates of parts, of blocks and of names, and LoRA+ for some of the parameters."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from sfumato.adapters.base import Adapter, trains
from sfumato.config import NetworkOptions, OptimOptions
from sfumato.config.values import as_tuple
from sfumato.errors import UserError
from sfumato.families.base import PartSpec
from sfumato.formats.groups import LayerGroup
from sfumato.methods.adapter_args import AdapterArgs
from sfumato.methods.adapter_ranks import stage_of
from sfumato.optim.groups import ParameterGroup

PLUS = "+"  # ends the name of a group that LoRA+ speeds up


@dataclass(frozen=True, kw_only=True)
class Rate:
    """A learning rate and what logs and reports call the parameters that have it."""

    label: str
    value: float


@dataclass(frozen=True, kw_only=True)
class AdapterRates:
    """The rule of one run; `parts`: the rate of each part that trains, `weights`: of each stage of some parts."""

    args: AdapterArgs
    specs: Mapping[str, PartSpec]
    parts: Mapping[str, float]
    weights: Mapping[str, Sequence[float]]

    def of(self, group: LayerGroup) -> Rate:
        """The last expression that matches the name, else the part's rate times its block's weight."""
        part = group.part
        named = [
            Rate(label=f"{part}.reg{i}", value=rate)
            for i, (expression, rate) in enumerate(self.args.network_reg_lrs)
            if expression.search(group.name)
        ]
        if named:
            return named[-1]
        stage = stage_of(self.specs[part], group) if part in self.weights else None
        if stage is None or self.weights[part][stage] == 1:
            return Rate(label=part, value=self.parts[part])
        return Rate(label=f"{part}.block{stage:02d}", value=self.parts[part] * self.weights[part][stage])

    def groups(self, adapters: Iterable[Adapter]) -> list[ParameterGroup]:
        """What the optimizer gets, by rate; parameters that LoRA+ speeds up stand in groups of their own."""
        found: dict[str, list[nn.Parameter]] = {}
        rates: dict[str, float] = {}
        for adapter in adapters:
            if not trains(adapter):
                continue
            rate, boost = self.of(adapter.group), self._boost(adapter.group.part)
            for name, parameter in adapter.named_parameters():
                fast = boost != 1 and name.rpartition(".")[2] in adapter.boosted
                label = rate.label + PLUS if fast else rate.label
                rates[label] = rate.value * boost if fast else rate.value
                found.setdefault(label, []).append(parameter)
        return [ParameterGroup(name=n, parameters=p, learning_rate=rates[n]) for n, p in found.items()]

    def _boost(self, part: str) -> float:
        args = self.args
        own = args.loraplus_unet_lr_ratio if part == "denoiser" else args.loraplus_text_encoder_lr_ratio
        return own or args.loraplus_lr_ratio or 1.0


def adapter_rates(
    network: NetworkOptions,
    optim: OptimOptions,
    args: AdapterArgs,
    specs: Mapping[str, PartSpec],
    text_parts: Sequence[str],
) -> AdapterRates:
    """Read the rates of all options; UserError where nothing trains or an argument is for what does not train."""
    asleep = left_out(specs, args, text_parts)
    parts = part_rates(network, optim, text_parts, asleep)
    if not parts and part_rates(network, optim, text_parts, set()):
        names = " ".join(f"{specs[part].opt_in}=True" for part in text_parts if part in asleep)
        raise UserError("no part of the model trains: what is left trains on request", fix=f"--network_args {names}")
    if not parts:
        raise UserError("no part of the model trains: every learning rate is 0", fix="--learning_rate 1e-4")
    for part in text_parts:
        if args.opted_in.get(specs[part].opt_in) and part not in parts:
            raise UserError(f"--network_args {specs[part].opt_in}=True has no effect: the part {part!r} does not train")
    weights = {part: stage_weights(args, specs[part]) for part in parts if args.sections and specs[part].sections}
    only_denoiser, only_text = set(parts) == {"denoiser"}, "denoiser" not in parts
    if (args.sections or args.block_dims or args.conv_block_dims) and not any(specs[part].stages for part in parts):
        raise UserError("--network_args: ranks and rates of blocks have no effect, the part with blocks does not train")
    if (args.loraplus_unet_lr_ratio and only_text) or (args.loraplus_text_encoder_lr_ratio and only_denoiser):
        name = "loraplus_unet_lr_ratio" if only_text else "loraplus_text_encoder_lr_ratio"
        raise UserError(f"--network_args {name} has no effect: the part does not train", fix="leave it out")
    return AdapterRates(args=args, specs=specs, parts=parts, weights=weights)


def left_out(specs: Mapping[str, PartSpec], args: AdapterArgs, text_parts: Sequence[str]) -> set[str]:
    """Text encoders that train only on request and were not asked for."""
    return {part for part in text_parts if specs[part].opt_in and not args.opted_in.get(specs[part].opt_in)}


def part_rates(
    network: NetworkOptions, optim: OptimOptions, text_parts: Sequence[str], without: set[str]
) -> dict[str, float]:
    """Part -> learning rate of the parts that train; a rate of 0 leaves a part out."""
    rates: dict[str, float] = {}
    if not network.network_train_text_encoder_only:
        rates["denoiser"] = optim.learning_rate if optim.unet_lr is None else optim.unet_lr
    if not network.network_train_unet_only:
        rates |= dict(zip(text_parts, text_rates(optim, len(text_parts)), strict=True))
    return {part: rate for part, rate in rates.items() if rate and part not in without}


def text_rates(optim: OptimOptions, encoders: int) -> Sequence[float]:
    """One rate for each text encoder; those that do not train have their place among the values, too."""
    given = optim.text_encoder_lr
    if not given:
        return [optim.learning_rate] * encoders
    if len(given) == 1:
        return list(given) * encoders
    if len(given) != encoders:
        raise UserError(
            f"--text_encoder_lr has {len(given)} values, this model has {encoders} text encoders",
            fix="give one value, or one for each encoder",
        )
    return given


def idle_rates(
    optim: OptimOptions, specs: Mapping[str, PartSpec], text_parts: Sequence[str], idle: set[str]
) -> list[str]:
    """A line for each rate that stands for an encoder that was not asked to train."""
    given = optim.text_encoder_lr or ()
    rates = dict(zip(text_parts, given, strict=False)) if len(given) > 1 else {}
    return [
        f"--text_encoder_lr: the rate {rates[part]:g} of {part} has no effect without "
        f"--network_args {specs[part].opt_in}=True"
        for part in text_parts
        if part in idle and rates.get(part)
    ]


def stage_weights(args: AdapterArgs, spec: PartSpec) -> list[float]:
    """The factor of each stage's rate; 1 where none is given, 0 at or below the threshold."""
    weights = [1.0] * len(spec.stages)
    threshold = args.block_lr_zero_threshold or 0.0
    for option, value in args.sections.items():
        places = spec.sections[option]
        factors = section_weights(option, value, len(places))
        for place, factor in zip(places, factors, strict=False):
            weights[place] = factor if factor > threshold else 0.0
    return weights


def section_weights(option: str, value: Any, count: int) -> list[float]:
    """Numbers, or the name of a shape with +base; a short list leaves the last stages at 1, an empty place means 0."""
    if isinstance(value, str) and not set(value) <= set("0123456789.,eE+- "):
        name, _, base = value.partition("+")
        if name.strip() not in SHAPES:
            raise UserError(
                f"--network_args {option}={value}: neither numbers nor one of {', '.join(SHAPES)}, each with +base"
            )
        places = [i / max(1, count - 1) for i in range(count)]
        return [SHAPES[name.strip()](place) + _number(option, base or "0") for place in places]
    texts = value.split(",") if isinstance(value, str) else [str(each) for each in as_tuple(value)]
    if len(texts) > count:
        raise UserError(f"--network_args {option} has {len(texts)} numbers for {count} blocks")
    return [_number(option, text.strip() or "0") for text in texts]


def _number(option: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not (math.isfinite(number) and number >= 0):
        raise UserError(
            f"--network_args {option}: {text!r} is no factor of a learning rate", fix="0 or a number above it"
        )
    return number


SHAPES = {  # over a section from its first stage (0) to its last (1)
    "sine": lambda x: math.sin(math.pi / 2 * x),
    "cosine": lambda x: math.sin(math.pi / 2 * (1 - x)),
    "linear": lambda x: x,
    "reverse_linear": lambda x: 1 - x,
    "zeros": lambda x: 0.0,
}
