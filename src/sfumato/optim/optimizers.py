"""Optimizers: the field's names as rows, any of torch's by its name, any other by its dotted path."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sfumato.common.registry import Registry, bind
from sfumato.config import OptimOptions
from sfumato.errors import UserError
from sfumato.optim.averaging import Averaging
from sfumato.optim.classes import find_class, needs_more
from sfumato.optim.groups import ParameterGroup

log = logging.getLogger(__name__)
FUSED_DEVICES = {"cuda", "cpu", "mps"}
NESTEROV = {"momentum": 0.9, "nesterov": True}


@dataclass(frozen=True, kw_only=True)
class Row:
    """Where an optimizer's class lives and what is special about it; imported only when it is asked for."""

    path: str
    package: str = ""  # what pip installs; empty where sfumato itself needs it
    usual: Mapping[str, Any] = field(default_factory=dict)  # arguments unless the user says otherwise
    one_rate: bool = False  # finds its own rate, and multiplies it by one number for all groups
    note: str = ""  # a line for the log


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The optimizer of one run, its arguments checked, before there are parameters."""

    name: str
    row: Row
    kind: Any  # the class
    arguments: Mapping[str, Any]


OPTIMIZERS: Registry[Row] = Registry("optimizer")


def row(name: str, path: str, package: str = "", **facts: Any) -> None:
    OPTIMIZERS.register(name)(Row(path=path, package=package, **facts))


row("AdamW", "torch.optim.AdamW")
row("SGDNesterov", "torch.optim.SGD", usual=NESTEROV)
row("AdaFactor", "transformers.optimization.Adafactor")
row("Lion", "lion_pytorch.Lion", "lion-pytorch")
row("AdamW8bit", "bitsandbytes.optim.AdamW8bit", "bitsandbytes")
row("PagedAdamW8bit", "bitsandbytes.optim.PagedAdamW8bit", "bitsandbytes")
row("PagedAdamW", "bitsandbytes.optim.PagedAdamW", "bitsandbytes")
row("PagedAdamW32bit", "bitsandbytes.optim.PagedAdamW32bit", "bitsandbytes")
row("Lion8bit", "bitsandbytes.optim.Lion8bit", "bitsandbytes")
row("PagedLion8bit", "bitsandbytes.optim.PagedLion8bit", "bitsandbytes")
row(
    "SGDNesterov8bit", "bitsandbytes.optim.SGD8bit", "bitsandbytes", usual=NESTEROV,
    note="SGDNesterov8bit: bitsandbytes takes the argument nesterov and computes plain momentum",
)  # fmt: skip
row("Prodigy", "prodigyopt.Prodigy", "prodigyopt", one_rate=True)
row("DAdaptation", "dadaptation.experimental.dadapt_adam_preprint.DAdaptAdamPreprint", "dadaptation", one_rate=True)
row(
    "DAdaptAdamPreprint", "dadaptation.experimental.dadapt_adam_preprint.DAdaptAdamPreprint", "dadaptation",
    one_rate=True,
)  # fmt: skip
row("DAdaptAdaGrad", "dadaptation.DAdaptAdaGrad", "dadaptation", one_rate=True)
row("DAdaptAdam", "dadaptation.DAdaptAdam", "dadaptation", one_rate=True)
row("DAdaptAdan", "dadaptation.DAdaptAdan", "dadaptation", one_rate=True)
row("DAdaptAdanIP", "dadaptation.experimental.dadapt_adan_ip.DAdaptAdanIP", "dadaptation", one_rate=True)
row("DAdaptLion", "dadaptation.DAdaptLion", "dadaptation", one_rate=True)
row("DAdaptSGD", "dadaptation.DAdaptSGD", "dadaptation", one_rate=True)
row("AdamWScheduleFree", "schedulefree.AdamWScheduleFree", "schedulefree")
row("RAdamScheduleFree", "schedulefree.RAdamScheduleFree", "schedulefree")
row("SGDScheduleFree", "schedulefree.SGDScheduleFree", "schedulefree")


def choose(optim: OptimOptions) -> Choice:
    """Find the class and check the names of its arguments, without any parameter; UserError for what cannot work."""
    name = optim.optimizer
    known = OPTIMIZERS.get(name) if name in OPTIMIZERS else Row(path=name)
    option = "--optimizer_type"
    kind = find_class(
        known.path, option=option, home=torch.optim, base=Optimizer, package=known.package, more=OPTIMIZERS.names
    )
    if not (inspect.isclass(kind) and issubclass(kind, Optimizer)):
        raise UserError(f"{option} {name} is not an optimizer")
    if needs_more(kind.step):
        raise UserError(f"{option} {name} computes the loss several times a step, which training here does not do")
    if "lr" in optim.optimizer_args:
        raise UserError("--optimizer_args: lr is given by --learning_rate, --unet_lr and --text_encoder_lr")
    given = bind(kind, optim.optimizer_args, where=f"--optimizer_args: {name}")
    if optim.relative_step:
        given["relative_step"] = True
    return Choice(name=name, row=known, kind=kind, arguments=dict(known.usual) | given)


def make_optimizer(optim: OptimOptions, groups: Sequence[ParameterGroup]) -> Optimizer:
    """The optimizer that the options name, over the method's groups, each with its own rate."""
    choice = choose(optim)
    rates = [group.learning_rate for group in groups]
    if choice.row.one_rate and len(set(rates)) > 1:
        log.warning("%s knows one rate for all: %g of %s", choice.name, rates[0], groups[0].name)
        rates = [rates[0]] * len(rates)
    rows = [{"params": list(group.parameters), "name": group.name} for group in groups]
    if "weight_decay" in inspect.signature(choice.kind).parameters:
        still = {"weight_decay": 0.0}
        rows = [each | ({} if group.decays else still) for each, group in zip(rows, groups, strict=True)]
    arguments = dict(choice.arguments)
    if not optim.relative_step:
        rows = [each | {"lr": rate} for each, rate in zip(rows, rates, strict=True)]
        arguments["lr"] = rates[0]
    if choice.kind is torch.optim.AdamW:
        devices = {parameter.device.type for group in groups for parameter in group.parameters}
        arguments.setdefault("fused", devices <= FUSED_DEVICES)
    if choice.row.note:
        log.warning("%s", choice.row.note)
    return build(choice, rows, arguments)


def build(choice: Choice, rows: list[dict[str, Any]], arguments: Mapping[str, Any]) -> Optimizer:
    try:
        optimizer: Optimizer = choice.kind(rows, **arguments)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise UserError(f"{choice.name} cannot be made of these arguments: {error}", fix="--optimizer_args") from error
    if isinstance(optimizer, Averaging):
        optimizer.train()
    return optimizer


def restore(optimizer: Optimizer, saved: Mapping[str, Any], name: str) -> None:
    """Take over a saved state; arguments keep what this run was told, also where the saved run was told otherwise.

    name: the class of the saved optimizer, as `class_name` gives it.
    """
    if name != class_name(optimizer):
        raise UserError(
            f"the state was saved with {name}, this run has {class_name(optimizer)}",
            fix="give the optimizer of the saved run, or start without --resume",
        )
    if [len(group["params"]) for group in saved["param_groups"]] != [len(g["params"]) for g in optimizer.param_groups]:
        raise UserError("the state was saved with other parts or layers in training", fix="start without --resume")
    told = {argument for kind in type(optimizer).__mro__ for argument in inspect.signature(kind.__init__).parameters}
    fresh = [{key: group[key] for key in told & set(group) - {"params", "lr"}} for group in optimizer.param_groups]
    optimizer.load_state_dict(dict(saved))
    for group, arguments in zip(optimizer.param_groups, fresh, strict=True):
        group.update(arguments)
    keep_precision(optimizer, saved["state"])


def keep_precision(optimizer: Optimizer, saved: Mapping[int, Mapping[str, Any]]) -> None:
    """Loading gives the state each parameter's own dtype; what was saved in a wider one comes back as it was."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, values in saved.items():
        state = optimizer.state[parameters[number]]
        for name, value in values.items():
            if isinstance(value, Tensor) and value.dtype != state[name].dtype:
                state[name] = value.to(state[name].device)


def class_name(optimizer: Optimizer) -> str:
    return f"{type(optimizer).__module__}.{type(optimizer).__name__}"


def describe(optimizer: Optimizer, options: Mapping[str, Any]) -> str:
    """module.Class(argument=value,...) as ss_optimizer records it."""
    arguments = ",".join(f"{name}={value}" for name, value in options.items())
    return class_name(optimizer) + (f"({arguments})" if arguments else "")
