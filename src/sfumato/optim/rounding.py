"""Weights in bfloat16 without a copy in float32: every step is taken in float32, a few tensors at a time, and rounded.

bfloat16 has 8 significant bits, so a step smaller than about 1/512 of a weight is lost when it is rounded to the
nearest. Rounded up or down by chance, each as likely as the other end is near, it counts on average (Gupta et al.
2015, "Deep Learning with Limited Numerical Precision", sec. 3).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

from sfumato.common.seeds import seed_of
from sfumato.config import MemoryOptions
from sfumato.optim.groups import ParameterGroup

PART = 1 << 24  # elements that are in float32 at a time
CUT = 1 << 16  # bfloat16 is the upper half of float32
# Packages whose optimizers step each parameter by itself; others may measure all of them together.
SEPARATE = ("torch", "transformers", "lion_pytorch", "bitsandbytes")


def make_rounding(memory: MemoryOptions, optimizer: Optimizer, seed: int) -> Rounding | None:
    """What takes the optimizer's steps; None where weights are in float32, and it takes them itself."""
    return Rounding(optimizer, seed=seed, stochastic=memory.stochastic_rounding) if memory.full_bf16 else None


def keep_in_bfloat16(groups: Sequence[ParameterGroup]) -> None:
    """Before an optimizer is made: what trains becomes bfloat16, and so do its gradients."""
    for group in groups:
        for parameter in group.parameters:
            parameter.data = parameter.data.to(torch.bfloat16)


@torch.no_grad()
def round_by_chance(values: Tensor, generator: Generator) -> Tensor:
    """float32 -> bfloat16, to one of the two neighbours; the mean over all chances is the value itself.

    What bfloat16 can hold stays as it is, and so does what is not finite. The generator lives on the same device.
    """
    below = torch.randint(0, CUT, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    cut = below.add_(values.view(torch.int32)).bitwise_and_(-CUT).view(torch.float32)
    return torch.where(values.isfinite(), cut, values).to(torch.bfloat16)


class Rounding:
    """Takes an optimizer's steps. Parameters in bfloat16 meet it as float32, and so its own state is in float32."""

    def __init__(self, optimizer: Optimizer, *, seed: int, stochastic: bool) -> None:
        self.optimizer, self.seed, self.stochastic = optimizer, seed, stochastic
        self.chances: dict[torch.device, Generator] = {}
        self.separate = type(optimizer).__module__.partition(".")[0] in SEPARATE
        for state in optimizer.state.values():  # of those that make it at once
            for name, value in state.items():
                if isinstance(value, Tensor) and value.dtype == torch.bfloat16:
                    state[name] = value.float()

    @torch.no_grad()
    def step(self, step: int) -> None:
        """The optimizer step with this index; which way each weight is rounded depends on it and the seed alone."""
        groups = self.optimizer.param_groups
        members = [group["params"] for group in groups]
        numbers = {parameter: number for number, parameter in enumerate(chain.from_iterable(members))}
        try:
            for part in self._parts(members):
                wide = {parameter: widened(parameter) for each in part for parameter in each}
                for group, each in zip(groups, part, strict=True):
                    group["params"] = [wide[parameter] for parameter in each]
                self._step(wide)
                for parameter, values in wide.items():
                    if values is not parameter:
                        parameter.copy_(self._rounded(values, step, numbers[parameter]))
        finally:
            for group, each in zip(groups, members, strict=True):
                group["params"] = each

    def _parts(self, members: Sequence[Sequence[nn.Parameter]]) -> Iterator[list[list[nn.Parameter]]]:
        """Parameters with a gradient, by group: a few at a time, or all where the optimizer looks at all together."""
        part: list[list[nn.Parameter]] = [[] for _ in members]
        size = 0
        for number, each in enumerate(members):
            for parameter in each:
                if parameter.grad is None:
                    continue
                if self.separate and size and size + parameter.numel() > PART:
                    yield part
                    part, size = [[] for _ in members], 0
                part[number].append(parameter)
                size += parameter.numel()
        if size:
            yield part

    def _step(self, wide: dict[nn.Parameter, nn.Parameter]) -> None:
        """One step of the optimizer, whose state is lent to the parameters' places in float32."""
        state = self.optimizer.state
        lend(state, wide)
        try:
            self.optimizer.step()
        finally:
            lend(state, {values: parameter for parameter, values in wide.items()})

    def _rounded(self, values: Tensor, step: int, number: int) -> Tensor:
        if not self.stochastic:
            return values
        if values.device not in self.chances:
            self.chances[values.device] = Generator(values.device)
        seed = seed_of(self.seed, "rounding", step, number)
        return round_by_chance(values, self.chances[values.device].manual_seed(seed))


def widened(parameter: nn.Parameter) -> nn.Parameter:
    """Values and gradient in float32; a parameter that is in bfloat16 no longer is itself."""
    if parameter.dtype != torch.bfloat16:
        return parameter
    assert parameter.grad is not None
    wide = nn.Parameter(parameter.detach().float())
    wide.grad = parameter.grad.float()
    return wide


def lend(state: MutableMapping[Tensor, Any], places: Mapping[nn.Parameter, nn.Parameter]) -> None:
    """Move an optimizer's entries from one parameter to another."""
    for old, new in places.items():
        if old in state:
            state[new] = state.pop(old)
