"""What the options say of a run's adapters, put together and checked against the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sfumato.config import Config
from sfumato.errors import UserError
from sfumato.families.base import Blueprint, PartSpec
from sfumato.methods.adapter_args import AdapterArgs, read_args
from sfumato.methods.adapter_ranks import Ranks
from sfumato.methods.adapter_rates import AdapterRates, adapter_rates, idle_rates, left_out


@dataclass(frozen=True, kw_only=True)
class AdapterRule:
    """Which layers are adapted, with which ranks, at which rates."""

    args: AdapterArgs
    specs: Mapping[str, PartSpec]  # of every part that can be adapted, trained or not
    ranks: Ranks
    rates: AdapterRates
    notes: tuple[str, ...]  # what was asked for and has no effect


def make_rule(config: Config, blueprint: Blueprint) -> AdapterRule:
    """Raises UserError for what does not fit the model or would have no effect."""
    specs = {name: network.spec for name, network in blueprint.networks.items() if network.spec.targets}
    args = read_args(config.network.network_args, specs.values())
    if config.network.dim_from_weights and args.sets_ranks:
        names = ", ".join(args.sets_ranks)
        raise UserError(
            f"--network_args {names} has no effect: --dim_from_weights takes ranks from the file", fix="leave it out"
        )
    rates = adapter_rates(config.network, config.optim, args, specs, blueprint.text_parts)
    if config.cache.cache_text_encoder_outputs and rates.parts.keys() >= set(blueprint.text_parts):
        raise UserError(
            "--cache_text_encoder_outputs has nothing to keep: every text encoder trains, so its output changes",
            fix="--network_train_unet_only, or leave it out",
        )
    asleep = left_out(specs, args, blueprint.text_parts)
    return AdapterRule(
        args=args,
        specs=specs,
        ranks=Ranks(network=config.network, args=args, specs=specs),
        rates=rates,
        notes=tuple(idle_rates(config.optim, specs, blueprint.text_parts, asleep)),
    )
