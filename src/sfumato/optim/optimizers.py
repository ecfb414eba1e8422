"""Optimizers: a table of sd-scripts' names, any class of torch by its name, any other by its dotted path."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices

from sfumato.common.registry import Registry, bind_arguments
from sfumato.config import OptimOptions
from sfumato.errors import UserError
from sfumato.optim.averaging import ScheduleFreeOptimizer, list_parameters
from sfumato.optim.classes import find_class, required_arguments
from sfumato.optim.groups import ParameterGroup

log = logging.getLogger(__name__)
NESTEROV = {"momentum": 0.9, "nesterov": True}


@dataclass(frozen=True, kw_only=True)
class OptimizerEntry:
    """Where an optimizer's class is and what is special about it; imported only when it is chosen."""

    path: str
    package: str = ""  # what pip installs; empty for a dependency of sfumato
    defaults: Mapping[str, Any] = field(default_factory=dict)  # arguments unless the user says otherwise
    self_tuned_lr: bool = False  # finds a learning rate, and multiplies it by one factor for all groups
    note: str = ""  # a warning


@dataclass(frozen=True, kw_only=True)
class OptimizerChoice:
    """The optimizer of one run with its checked arguments, before there are parameters."""

    name: str
    entry: OptimizerEntry
    optimizer_class: Any
    arguments: Mapping[str, Any]


OPTIMIZERS: Registry[OptimizerEntry] = Registry("optimizer")


def register_optimizer(name: str, path: str, package: str = "", **facts: Any) -> None:
    OPTIMIZERS.register(name)(OptimizerEntry(path=path, package=package, **facts))


register_optimizer("AdamW", "torch.optim.AdamW")
register_optimizer("SGDNesterov", "torch.optim.SGD", defaults=NESTEROV)
register_optimizer("AdaFactor", "transformers.optimization.Adafactor")
register_optimizer("Lion", "lion_pytorch.Lion", "lion-pytorch")
register_optimizer("AdamW8bit", "bitsandbytes.optim.AdamW8bit", "bitsandbytes")
register_optimizer("PagedAdamW8bit", "bitsandbytes.optim.PagedAdamW8bit", "bitsandbytes")
register_optimizer("PagedAdamW", "bitsandbytes.optim.PagedAdamW", "bitsandbytes")
register_optimizer("PagedAdamW32bit", "bitsandbytes.optim.PagedAdamW32bit", "bitsandbytes")
register_optimizer("Lion8bit", "bitsandbytes.optim.Lion8bit", "bitsandbytes")
register_optimizer("PagedLion8bit", "bitsandbytes.optim.PagedLion8bit", "bitsandbytes")
register_optimizer(
    "SGDNesterov8bit", "bitsandbytes.optim.SGD8bit", "bitsandbytes", defaults=NESTEROV,
    note="SGDNesterov8bit: bitsandbytes accepts the argument nesterov but computes plain momentum",
)  # fmt: skip
register_optimizer("Prodigy", "prodigyopt.Prodigy", "prodigyopt", self_tuned_lr=True)
register_optimizer(
    "DAdaptation", "dadaptation.experimental.dadapt_adam_preprint.DAdaptAdamPreprint", "dadaptation", self_tuned_lr=True
)
register_optimizer(
    "DAdaptAdamPreprint", "dadaptation.experimental.dadapt_adam_preprint.DAdaptAdamPreprint", "dadaptation",
    self_tuned_lr=True,
)  # fmt: skip
register_optimizer("DAdaptAdaGrad", "dadaptation.DAdaptAdaGrad", "dadaptation", self_tuned_lr=True)
register_optimizer("DAdaptAdam", "dadaptation.DAdaptAdam", "dadaptation", self_tuned_lr=True)
register_optimizer("DAdaptAdan", "dadaptation.DAdaptAdan", "dadaptation", self_tuned_lr=True)
register_optimizer(
    "DAdaptAdanIP", "dadaptation.experimental.dadapt_adan_ip.DAdaptAdanIP", "dadaptation", self_tuned_lr=True
)
register_optimizer("DAdaptLion", "dadaptation.DAdaptLion", "dadaptation", self_tuned_lr=True)
register_optimizer("DAdaptSGD", "dadaptation.DAdaptSGD", "dadaptation", self_tuned_lr=True)
register_optimizer("AdamWScheduleFree", "schedulefree.AdamWScheduleFree", "schedulefree")
register_optimizer("RAdamScheduleFree", "schedulefree.RAdamScheduleFree", "schedulefree")
register_optimizer("SGDScheduleFree", "schedulefree.SGDScheduleFree", "schedulefree")


def choose_optimizer(optim: OptimOptions) -> OptimizerChoice:
    """Find the class and check the names of its arguments, without any parameter; UserError for what cannot work."""
    name = optim.optimizer
    entry = OPTIMIZERS.get(name) if name in OPTIMIZERS else OptimizerEntry(path=name)
    option = "--optimizer_type"
    optimizer_class = find_class(
        entry.path,
        option=option,
        default_module=torch.optim,
        base=Optimizer,
        package=entry.package,
        extra_names=OPTIMIZERS.names,
    )
    if not (inspect.isclass(optimizer_class) and issubclass(optimizer_class, Optimizer)):
        raise UserError(f"{option} {name} is not an optimizer", code="optimizer-not-a-class")
    if required_arguments(optimizer_class.step):
        raise UserError(
            f"{option} {name} computes the loss several times per step, which is not supported",
            code="optimizer-needs-closure",
        )
    if "lr" in optim.optimizer_args:
        raise UserError(
            "--optimizer_args: lr is not an argument here",
            code="optimizer-args-lr",
            fix="give --learning_rate, --unet_lr or --text_encoder_lr",
        )
    arguments = bind_arguments(optimizer_class, optim.optimizer_args, where=f"--optimizer_args: {name}")
    if optim.relative_step:
        arguments["relative_step"] = True
    return OptimizerChoice(
        name=name, entry=entry, optimizer_class=optimizer_class, arguments=dict(entry.defaults) | arguments
    )


def try_optimizer(optim: OptimOptions) -> Optimizer:
    """The optimizer over a single small parameter: UserError where its class refuses its arguments."""
    choice = choose_optimizer(optim)
    lr = {} if optim.relative_step else {"lr": optim.learning_rate or 1.0}
    rows: list[dict[str, Any]] = [{"params": [torch.nn.Parameter(torch.zeros(2, 2))]}]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # e.g. that this parameter is on the CPU
        return construct_optimizer(choice, rows, {**choice.arguments, **lr})


def make_optimizer(optim: OptimOptions, groups: Sequence[ParameterGroup]) -> Optimizer:
    """The optimizer that the options name, over the method's groups, each with its own learning rate."""
    choice = choose_optimizer(optim)
    if choice.entry.note:
        log.warning("%s", choice.entry.note)
    arguments = dict(choice.arguments)
    lrs = [] if optim.relative_step else learning_rates(choice, groups)
    if lrs:
        arguments["lr"] = lrs[0]
    if choice.optimizer_class is torch.optim.AdamW:
        devices: set[str] = set()
        for group in groups:
            devices.update(parameter.device.type for parameter in group.parameters)
        arguments.setdefault("fused", devices <= set(_get_fused_kernels_supported_devices()))
    return construct_optimizer(choice, param_groups(choice, groups, lrs), arguments)


def learning_rates(choice: OptimizerChoice, groups: Sequence[ParameterGroup]) -> list[float]:
    """Of each group; that of the first for all where the optimizer has one factor for all groups."""
    lrs = [group.learning_rate for group in groups]
    if choice.entry.self_tuned_lr and len(set(lrs)) > 1:
        message = "%s has one learning rate for all parts: using %g of %s, ignoring the others"
        log.warning(message, choice.name, lrs[0], groups[0].name)
        return [lrs[0]] * len(lrs)
    return lrs


def param_groups(
    choice: OptimizerChoice, groups: Sequence[ParameterGroup], lrs: Sequence[float]
) -> list[dict[str, Any]]:
    """torch's parameter groups; `lrs` is empty where the optimizer sets its own."""
    takes_weight_decay = "weight_decay" in inspect.signature(choice.optimizer_class).parameters
    rows: list[dict[str, Any]] = []
    for number, group in enumerate(groups):
        row: dict[str, Any] = {"params": list(group.parameters), "name": group.name}
        if takes_weight_decay and not group.decays:
            row["weight_decay"] = 0.0
        if lrs:
            row["lr"] = lrs[number]
        rows.append(row)
    return rows


def construct_optimizer(choice: OptimizerChoice, rows: list[dict[str, Any]], arguments: Mapping[str, Any]) -> Optimizer:
    """UserError where the class refuses its arguments."""
    try:
        optimizer: Optimizer = choice.optimizer_class(rows, **arguments)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise UserError(
            f"--optimizer_type {choice.name} refuses its arguments: {error}",
            code="optimizer-arguments-refused",
            fix="check --optimizer_args",
        ) from error
    if isinstance(optimizer, ScheduleFreeOptimizer):
        optimizer.train()
    return optimizer


def restore_optimizer(optimizer: Optimizer, saved: Mapping[str, Any], name: str) -> None:
    """Load a saved state, but keep this run's arguments; UserError where the state does not fit.

    name: the class of the saved optimizer, as `class_name` gives it.
    """
    check_saved_class(optimizer, name)
    if group_sizes(saved["param_groups"]) != group_sizes(optimizer.param_groups):
        raise UserError(
            "the state was saved with other parts or layers in training",
            code="resume-parameters-mismatch",
            fix="train the same parts, or start without --resume",
        )
    names: set[str] = set()
    for base in type(optimizer).__mro__:
        names.update(inspect.signature(base.__init__).parameters)
    names -= {"params", "lr"}
    before = [dict(group) for group in optimizer.param_groups]
    optimizer.load_state_dict(dict(saved))
    for group, arguments in zip(optimizer.param_groups, before, strict=True):
        group.update({key: arguments[key] for key in names & set(arguments)})
    restore_precision(optimizer, saved["state"])


def check_saved_class(optimizer: Optimizer, name: str) -> None:
    """Raise UserError where a state has another optimizer than this one. name: as `class_name` gives it."""
    if name != class_name(optimizer):
        raise UserError(
            f"the state was saved with {name}, this run has {class_name(optimizer)}",
            code="resume-optimizer-mismatch",
            fix="give the optimizer of the saved run, or start without --resume",
        )


def group_sizes(groups: Sequence[Mapping[str, Any]]) -> list[int]:
    return [len(group["params"]) for group in groups]


def restore_precision(optimizer: Optimizer, saved: Mapping[int, Mapping[str, Any]]) -> None:
    """Undo the cast of the loaded state to each parameter's dtype: give it its saved dtype again."""
    parameters = list_parameters(optimizer)
    for number, values in saved.items():
        state = optimizer.state[parameters[number]]
        for name, value in values.items():
            if isinstance(value, Tensor) and value.dtype != state[name].dtype:
                state[name] = value.to(state[name].device)


def class_name(optimizer: Optimizer) -> str:
    """The dotted name of its class."""
    return f"{type(optimizer).__module__}.{type(optimizer).__name__}"


def describe_optimizer(optimizer: Optimizer, options: Mapping[str, Any]) -> str:
    """module.Class(argument=value,...) as ss_optimizer records it."""
    arguments = ",".join(f"{name}={value}" for name, value in options.items())
    return class_name(optimizer) + (f"({arguments})" if arguments else "")
