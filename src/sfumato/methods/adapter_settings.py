"""The adapter options of a run, combined and checked against the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sfumato.adapters.base import ADAPTERS
from sfumato.adapters.kinds import choose_kinds
from sfumato.config import Config, NetworkOptions, OptimOptions
from sfumato.errors import UserError
from sfumato.families.blueprint import Blueprint
from sfumato.families.model_options import is_launched
from sfumato.families.part import PartSpec
from sfumato.methods.adapter_args import AdapterArgs, read_args
from sfumato.methods.adapter_learning_rates import (
    AdapterLearningRates,
    find_opted_out,
    list_ignored_learning_rates,
    read_adapter_learning_rates,
)
from sfumato.methods.adapter_modules import read_adapter_module
from sfumato.methods.adapter_ranks import AdapterRanks
from sfumato.methods.trained_parts import check_text_cache, describe_text_encoder_lr


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """Which layers are adapted, with which ranks, at which learning rates."""

    adapter_kind: str
    network: NetworkOptions  # in the words of that kind
    args: AdapterArgs
    specs: Mapping[str, PartSpec]  # of every part that can be adapted, trained or not
    ranks: AdapterRanks
    learning_rates: AdapterLearningRates
    notes: tuple[str, ...]  # of options that have no effect, or another than they seem to have


def make_adapter_settings(config: Config, blueprint: Blueprint) -> AdapterSettings:
    """Raises UserError for options that do not match the model or would have no effect."""
    specs = {name: network.spec for name, network in blueprint.networks.items() if network.spec.targets}
    module = read_adapter_module(
        config.network,
        has_convolutions=any(spec.conv_targets for spec in specs.values()),
        opt_ins=[spec.opt_in for spec in specs.values()],
    )
    network = module.network
    args = read_args(network.network_args, specs.values(), kind=module.adapter_kind)
    if config.network.dim_from_weights and module.preset is None:
        refuse_rank_arguments(args)
    caches_text = config.cache.cache_text_encoder_outputs
    frozen = [part for part in blueprint.text_parts if caches_text and specs[part].frozen_by_cache]
    optim, notes = limit_text_encoder_lr(config, blueprint)
    learning_rates = read_adapter_learning_rates(
        network, optim, args, specs, blueprint.text_parts, lr_order=blueprint.text_lr_order, cached=frozen
    )
    fix = "--network_train_unet_only, or remove --cache_text_encoder_outputs"
    check_text_cache(config, learning_rates.parts.keys(), blueprint, fix)
    opted_out = find_opted_out(specs, args, blueprint.text_parts)
    notes += list_ignored_learning_rates(optim, specs, blueprint.text_lr_order, opted_out)
    notes += describe_text_encoder_lr(optim, blueprint.text_lr_order, learning_rates.parts)
    if frozen and not network.network_train_unet_only:
        notes += [f"--cache_text_encoder_outputs: {part} does not train, its features are cached" for part in frozen]
    return AdapterSettings(
        adapter_kind=module.adapter_kind,
        network=network,
        args=args,
        specs=specs,
        ranks=AdapterRanks(
            network=network, args=args, specs=specs, adapter_kind=module.adapter_kind, preset=module.preset
        ),
        learning_rates=learning_rates,
        notes=(
            *notes,
            *module.notes,
            *list_idle_dropouts(module.adapter_kind, args, network),
            *list_idle_ranks(config, module.adapter_kind),
        ),
    )


def refuse_rank_arguments(args: AdapterArgs) -> None:
    """Raise UserError for arguments that set ranks, where a file does."""
    if args.rank_arguments:
        names = ", ".join(args.rank_arguments)
        raise UserError(
            f"--network_args {names} has no effect: --dim_from_weights takes ranks from the file",
            code="rank-args-with-dim-from-weights",
            fix=f"remove {names}",
        )


def list_idle_dropouts(kind: str, args: AdapterArgs, network: NetworkOptions) -> list[str]:
    """A line for each dropout that the run's kinds of adapters do not have."""
    given = {"neuron": network.network_dropout, "rank": args.rank_dropout, "module": args.module_dropout}
    options = {"neuron": "--network_dropout", "rank": "rank_dropout", "module": "module_dropout"}
    return [
        f"{options[name]}: no effect, {each.label} has no such dropout"
        for each in choose_kinds(kind, args.options, None)
        for name, value in given.items()
        if value and name not in each.dropouts
    ]


def list_idle_ranks(config: Config, kind: str) -> list[str]:
    """A line about --network_dim and the like where the run's kind of adapters has no rank."""
    found = ADAPTERS.get(kind)
    has_effect = {"network_dim": found.uses_rank, "network_alpha": found.uses_rank and found.uses_alpha}
    idle = [name for name, used in has_effect.items() if not used and config.is_changed(name)]
    if not idle:
        return []
    reason = "has no such factor" if found.uses_rank else "has no rank"
    return [f"{' and '.join(f'--{name}' for name in idle)}: no effect, {found.label} {reason}"]


def limit_text_encoder_lr(config: Config, blueprint: Blueprint) -> tuple[OptimOptions, list[str]]:
    """The options with as many learning rates of text encoders as sd-scripts reads under its launchers, and a line."""
    values, limit = config.optim.text_encoder_lr or (), blueprint.adapter_text_lrs
    if limit is None or len(set(values[: len(blueprint.text_parts)])) <= limit or not is_launched(config):
        return config.optim, []
    used = ", ".join(f"{lr:g}" for lr in values[:limit])
    line = f"--text_encoder_lr: of several values {used} is for all text encoders; `sfumato train` gives each its own"
    return config.optim.model_copy(update={"text_encoder_lr": values[:limit]}), [line]
