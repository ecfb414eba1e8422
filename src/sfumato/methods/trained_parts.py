"""Checks and learning rates of the trained parts that all methods share."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from sfumato.common.text import plural
from sfumato.config import Config, MemoryOptions, OptimOptions
from sfumato.errors import UserError
from sfumato.families.blueprint import Blueprint
from sfumato.formats.checkpoint import SAVE_DTYPES


def read_text_encoder_lr(optim: OptimOptions, order: Sequence[str]) -> dict[str, float]:
    """--text_encoder_lr as one learning rate for each text encoder, also for those that do not train.

    The last of several values serves every further encoder, and values beyond the last encoder are ignored: sd-scripts
    does both. order: the encoders that the values are for.
    """
    values = list(optim.text_encoder_lr or (optim.learning_rate,))
    values += values[-1:] * (len(order) - len(values))
    return dict(zip(order, values, strict=False))


def describe_text_encoder_lr(optim: OptimOptions, order: Sequence[str], parts: Collection[str]) -> list[str]:
    """A line where --text_encoder_lr has more values than encoders, or several and yet fewer.

    parts: those that train.
    """
    values = optim.text_encoder_lr or ()
    if not set(parts) & set(order):
        return []
    given = f"--text_encoder_lr has {plural(len(values), 'value')} for {plural(len(order), 'text encoder')}"
    if len(values) > len(order):
        kept = ", ".join(f"{lr:g} for {part}" for part, lr in zip(order, values, strict=False))
        return [f"{given}; used: {kept}"]
    shared = [part for part in order[max(0, len(values) - 1) :] if part in parts]
    if len(values) > 1 and len(shared) > 1:
        return [f"{given}; the last serves {' and '.join(shared)}"]
    return []


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


def get_trained_dtype(memory: MemoryOptions) -> torch.dtype:
    """Of weights that train."""
    return SAVE_DTYPES.get(memory.trained_precision) or torch.float32
