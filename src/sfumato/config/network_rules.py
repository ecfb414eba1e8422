"""Rules between the adapter's options and others, as data."""

from __future__ import annotations

from sfumato.config.rule import Rule

NETWORK_RULES = (
    Rule(
        name="lora-plus-found-rate",
        kind="conflict",
        options=("network_args", "optimizer_type", "optimizer_args", "use_8bit_adam", "use_lion_optimizer"),
        broken=lambda c: (
            any(name.startswith("loraplus_") for name in c.network.network_args)
            and (c.optim.finds_rate or c.optim.relative_step)
        ),
        what="LoRA+ needs rates of its own, and D-Adaptation, Prodigy and AdaFactor's relative_step set one for all",
        fix="leave --network_args loraplus_... out, or take another optimizer",
    ),
    Rule(
        name="base-strengths",
        kind="conflict",
        options=("base_weights", "base_weights_multiplier"),
        broken=lambda c: len(c.network.base_weights_multiplier) > len(c.network.base_weights),
        what="--base_weights_multiplier has more values than --base_weights has files",
        fix="give one value for each file, or fewer; missing ones are 1",
    ),
)
