"""Two checks while training: nothing non-finite reaches the weights, and all that was asked to train does."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from sfumato.common.text import plural
from sfumato.errors import UserError

log = logging.getLogger(__name__)
HOST_SAMPLE = 4096  # values of a parameter in main memory
PATIENCE = 10  # steps with a learning rate above 0 within which a group must have changed


class NonfiniteGuard:
    """Counts the steps that were skipped since their loss or gradients were not finite."""

    def __init__(self, *, limit: int) -> None:
        self.limit = limit
        self.skipped = 0  # steps in a row
        self.reason = ""  # of the last one

    def count(self, *, sound: bool) -> None:
        self.skipped = 0 if sound else self.skipped + 1

    def report_skip(self, step: int, reason: str, *, fused: bool = False) -> None:
        """fused: whether the optimizer steps in backward, so that other weights have taken the step."""
        self.reason = reason
        if fused:
            log.warning("step %d: %s; weights with such gradients skipped it", step, reason)
        else:
            log.warning("step %d skipped: %s; weights unchanged", step, reason)

    @property
    def exhausted(self) -> bool:
        """Whether it is time to stop."""
        return self.skipped >= self.limit

    def error(self, state: Path) -> UserError:
        return UserError(
            f"training stops: {plural(self.skipped, 'step')} in a row had a non-finite loss or gradient; the last: "
            f"{self.reason}",
            code="training-nonfinite",
            fix=f"go on from before them with --resume {state}, and a lower --learning_rate or --mixed_precision no",
        )


def find_nonfinite_group(optimizer: Optimizer) -> str:
    """The name of a parameter group with a weight that is infinite or NaN, else empty; waits for the device."""
    for number, group in enumerate(optimizer.param_groups):
        weights = [parameter for parameter in group["params"] if parameter.numel()]
        if weights and not torch.isfinite(nn.utils.get_total_norm(weights, float("inf"))):
            return group_name(optimizer, number)
    return ""


def check_finite_weights(groups: Iterable[str], step: int) -> None:
    """UserError where one of the groups has weights that are not finite. groups: of `find_nonfinite_group`."""
    found = next(filter(None, groups), "")
    if found:
        raise UserError(
            f"the weights of {found} are infinite or NaN after step {step}",
            code="weights-nonfinite",
            fix="go on from the last state before with --resume, and a lower --learning_rate",
        )


def group_name(optimizer: Optimizer, number: int) -> str:
    return str(optimizer.param_groups[number].get("name", f"group {number}"))


class TrainingCheck:
    """Within the first steps every group must get a gradient and change its weights; else the run stops and names it.

    An update that a weight's precision swallows, a frozen part, a layer that never runs: all are found here.
    """

    def __init__(self, optimizer: Optimizer, *, sees_gradients: bool = True) -> None:
        """sees_gradients: False where parameters have none after a step, so that nothing is checked."""
        self.optimizer = optimizer
        groups = optimizer.param_groups if sees_gradients else ()
        self.pending = {group_name(optimizer, i): group for i, group in enumerate(groups)}
        self.sums = {name: compute_checksum(group["params"]) for name, group in self.pending.items()}
        self.with_gradient: set[str] = set()
        self.steps = dict.fromkeys(self.pending, 0)

    @property
    def complete(self) -> bool:
        return not self.pending

    def measure(self) -> dict[str, Tensor]:
        """After an optimizer step, its gradients still there. Nothing waits; `note` is called with the same, read.

        Group -> (2,) bool: whether a gradient is above 0, and whether the weights are others than before training.
        """
        return {name: self._measure_group(name, group) for name, group in self.pending.items() if group["lr"] != 0}

    def _measure_group(self, name: str, group: Mapping[str, Any]) -> Tensor:
        changed = (compute_checksum(group["params"]) != self.sums[name]).any()
        gradients = [p.grad.any().to(changed.device, non_blocking=True) for p in group["params"] if p.grad is not None]
        has_gradient = torch.stack(gradients).any() if gradients else torch.zeros_like(changed)
        return torch.stack([has_gradient, changed])

    def note(self, measured: Mapping[str, Tensor]) -> None:
        """What was measured after a step that was taken. UserError when a group has not changed in time."""
        for name, found in measured.items():
            has_gradient, changed = found.tolist()
            if name not in self.pending:
                continue
            self.steps[name] += 1
            if has_gradient:
                self.with_gradient.add(name)
            if name in self.with_gradient and changed:
                del self.pending[name]
            elif self.steps[name] >= PATIENCE:
                self._refuse(name)

    def _refuse(self, name: str) -> None:
        if name not in self.with_gradient:
            raise UserError(
                f"{name} was asked to train, but in {plural(self.steps[name], 'step')} it got no gradient",
                code="trained-part-without-gradient",
                fix="give the part the learning rate 0, if it is not meant to train",
            )
        raise UserError(
            f"{name} was asked to train, but in {plural(self.steps[name], 'step')} it got gradients and did not change",
            code="trained-part-unchanged",
            fix="raise the learning rate, or train with weights in float32",
        )


@torch.no_grad()
def compute_checksum(parameters: Sequence[Tensor]) -> Tensor:
    """(2,) the sums of the values and of their squares: hardly any change leaves both the same.

    Of parameters in main memory, where others are on a device, the first values stand for all.
    """
    device = next((p.device for p in parameters if p.device.type != "cpu"), torch.device("cpu"))
    values = [p if p.device == device else p.flatten()[:HOST_SAMPLE].to(device, non_blocking=True) for p in parameters]
    return torch.stack([torch.stack([(v.double() ** power).sum() for v in values]).sum() for power in (1, 2)])


@contextmanager
def record_nonfinite_outputs(networks: Mapping[str, nn.Module]) -> Iterator[list[str]]:
    """Within, collects the names of modules whose output is not finite, in the order in which they ran."""
    names: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            for tensor in iterate_tensors(output):
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    names.append(name)
                    return

        return hook

    handles: list[RemovableHandle] = []
    for part, network in networks.items():
        for name, module in network.named_modules():
            handles.append(module.register_forward_hook(watch(f"{part}.{name}" if name else part)))
    try:
        yield names
    finally:
        for handle in handles:
            handle.remove()


def iterate_tensors(output: Any) -> Iterator[Tensor]:
    """Every tensor in a module's output."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for each in output.values():
            yield from iterate_tensors(each)
    elif isinstance(output, list | tuple):
        for each in output:
            yield from iterate_tensors(each)


def list_nonfinite_gradients(
    networks: Mapping[str, nn.Module], own_values: Callable[[Tensor], Tensor] = lambda gradient: gradient
) -> list[str]:
    """Names of the parameters whose gradient is not finite, in the order in which backward reached them.

    own_values: gives what this process has of a gradient.
    """
    names: list[str] = []
    for part, network in networks.items():
        for name, parameter in network.named_parameters():
            if parameter.grad is not None and not torch.isfinite(own_values(parameter.grad)).all():
                names.append(f"{part}.{name}")
    return names[::-1]
