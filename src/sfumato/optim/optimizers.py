"""Optimizers by the field's names; each builder takes the parameter groups and the user's keyword arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from sfumato.config import OptimOptions
from sfumato.optim.groups import ParameterGroup
from sfumato.registry import Registry

Groups = list[dict[str, Any]]
Builder = Callable[[Groups, Mapping[str, Any]], Optimizer]
OPTIMIZERS: Registry[Builder] = Registry("optimizer")


@OPTIMIZERS.register("AdamW")
def adamw(groups: Groups, options: Mapping[str, Any]) -> Optimizer:
    """The fused kernel where every parameter's device and dtype has one."""
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    arguments: dict[str, Any] = {"fused": devices <= {"cuda", "cpu", "mps"}, **options}
    return torch.optim.AdamW(groups, **arguments)


def make_optimizer(optim: OptimOptions, groups: Sequence[ParameterGroup]) -> Optimizer:
    """The optimizer that the options name, over the method's groups, each with its own rate."""
    name = optim.optimizer_type or "AdamW"
    build = OPTIMIZERS.get(name)
    rows = [{"params": list(group.parameters), "lr": group.learning_rate, "name": group.name} for group in groups]
    return build(rows, optim.optimizer_args)


def describe(optimizer: Optimizer, options: Mapping[str, Any]) -> str:
    """module.Class(argument=value,...) as ss_optimizer records it."""
    kind = type(optimizer)
    arguments = ",".join(f"{name}={value}" for name, value in options.items())
    return f"{kind.__module__}.{kind.__name__}" + (f"({arguments})" if arguments else "")
