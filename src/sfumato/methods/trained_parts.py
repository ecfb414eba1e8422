"""Checks and learning rates of the trained parts that all methods share."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from sfumato.config import Config, OptimOptions
from sfumato.errors import UserError
from sfumato.families.blueprint import Blueprint


def read_text_encoder_lr(optim: OptimOptions, encoders: int) -> Sequence[float]:
    """--text_encoder_lr as one learning rate for each text encoder, also for those that do not train."""
    values = optim.text_encoder_lr
    if not values:
        return [optim.learning_rate] * encoders
    if len(values) == 1:
        return list(values) * encoders
    if len(values) != encoders:
        raise UserError(
            f"--text_encoder_lr has {len(values)} values, this model has {encoders} text encoders",
            code="text-encoder-lr-count",
            fix="give one value, or one for each encoder",
        )
    return values


def check_text_cache(config: Config, parts: Collection[str], blueprint: Blueprint, fix: str) -> None:
    """Raise UserError where text features are to be cached although every text encoder trains."""
    if config.cache.cache_text_encoder_outputs and set(parts) >= set(blueprint.text_parts):
        raise UserError(
            "--cache_text_encoder_outputs has nothing to cache: every text encoder trains, so its output changes",
            code="text-cache-of-trained-encoders",
            fix=fix,
        )


def make_zero_learning_rates_error(fix: str) -> UserError:
    return UserError("no part of the model trains: every learning rate is 0", code="learning-rates-all-zero", fix=fix)
