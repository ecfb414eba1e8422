"""Whether training is sound: nothing that is not finite reaches the weights, and all that was asked to train does."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sfumato.errors import UserError

log = logging.getLogger(__name__)
PATIENCE = 10  # steps at a rate above 0 within which a group must have moved


class Health:
    """Looks at each step's loss and gradients before they reach the weights."""

    def __init__(self, *, limit: int) -> None:
        self.limit = limit
        self.left_out = 0  # steps in a row
        self.reason = ""  # of the last one

    def allows(self, loss: Tensor, norm: Tensor, *, scale: float) -> bool:
        """Whether a step may be taken. In float16 (scale above 1) infinite gradients are its scaler's to deal with."""
        sound = bool(torch.isfinite(loss) if scale > 1 else torch.isfinite(loss + norm))
        self.left_out = 0 if sound else self.left_out + 1
        return sound

    def tell(self, step: int, reason: str) -> None:
        self.reason = reason
        log.warning("step %d is left out, the weights stay as they were: %s", step, reason)

    @property
    def lost(self) -> bool:
        """Whether it is time to stop."""
        return self.left_out >= self.limit

    def error(self, state: Path) -> UserError:
        return UserError(
            f"training stops: {self.left_out} steps in a row gave nothing finite; the last: {self.reason}",
            fix=f"go on from before them with --resume {state}, and a lower --learning_rate or --mixed_precision no",
        )


class Proof:
    """Within the first steps every group must get a gradient and change its weights; else the run stops and names it.

    An update that a weight's precision swallows, a frozen part, a layer that never runs: all are found here.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.waiting = {self._name(i): group for i, group in enumerate(optimizer.param_groups)}
        self.sums = {name: checksum(group["params"]) for name, group in self.waiting.items()}
        self.with_gradient: set[str] = set()
        self.steps = dict.fromkeys(self.waiting, 0)

    @property
    def done(self) -> bool:
        return not self.waiting

    def look(self) -> None:
        """After a step that was taken, its gradients still there. UserError when a group did not move in time."""
        for name, group in list(self.waiting.items()):
            if group["lr"] == 0:
                continue
            self.steps[name] += 1
            if name not in self.with_gradient and any(has_gradient(p) for p in group["params"]):
                self.with_gradient.add(name)
            if name in self.with_gradient and checksum(group["params"]) != self.sums[name]:
                del self.waiting[name]
            elif self.steps[name] >= PATIENCE:
                self._refuse(name)

    def _refuse(self, name: str) -> None:
        if name not in self.with_gradient:
            what, fix = "got no gradient", "leave the part out with rate 0, if it is not meant to train"
        else:
            what, fix = "got gradients but did not change", "a higher learning rate, or weights in float32"
        raise UserError(f"{name} was asked to train, but in {self.steps[name]} steps it {what}", fix=fix)

    def _name(self, i: int) -> str:
        return str(self.optimizer.param_groups[i].get("name", f"group {i}"))


def checksum(parameters: Sequence[Tensor]) -> tuple[float, ...]:
    """Two sums that hardly any change leaves both the same."""
    totals = [sum_of(parameters, power) for power in (1, 2)]
    return tuple(float(total) for total in totals)


@torch.no_grad()
def sum_of(parameters: Sequence[Tensor], power: int) -> Tensor:
    return torch.stack([(p.double() ** power).sum() for p in parameters]).sum()


def has_gradient(parameter: Tensor) -> bool:
    return parameter.grad is not None and bool(parameter.grad.any())


@contextmanager
def first_bad_module(networks: Mapping[str, nn.Module]) -> Iterator[list[str]]:
    """Within: the modules whose output is not finite, in the order in which they ran, the first in front."""
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            tensors = [each for each in flat(output) if each.is_floating_point()]
            if not all(bool(torch.isfinite(each).all()) for each in tensors):
                found.append(name)

        return hook

    handles = [
        module.register_forward_hook(watch(f"{part}.{name}" if name else part))
        for part, network in networks.items()
        for name, module in network.named_modules()
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def flat(output: Any) -> Iterator[Tensor]:
    """Every tensor in what a module gives."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for each in output.values():
            yield from flat(each)
    elif isinstance(output, list | tuple):
        for each in output:
            yield from flat(each)


def bad_gradients(networks: Mapping[str, nn.Module]) -> list[str]:
    """Names of the parameters whose gradient is not finite, in the order in which backward reached them."""
    names = [
        f"{part}.{name}"
        for part, network in networks.items()
        for name, parameter in network.named_parameters()
        if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all())
    ]
    return names[::-1]
