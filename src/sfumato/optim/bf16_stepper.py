"""Optimizer steps for bfloat16 weights without a float32 copy: computed in float32, a few tensors at a time, rounded.

bfloat16 has 8 significant bits, so round-to-nearest loses a step smaller than about 1/512 of a weight. Stochastic
rounding, where the probability of each neighbor is proportional to the distance of the other, keeps it on average
(Gupta et al. 2015, "Deep Learning with Limited Numerical Precision", sec. 3).
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

CHUNK_SIZE = 1 << 24  # elements that are in float32 at a time
LOW_BITS = 1 << 16  # bfloat16 is the upper half of float32
# Packages whose optimizers step each parameter independently; others may need all of them at once.
PER_PARAMETER_PACKAGES = ("torch", "transformers", "lion_pytorch", "bitsandbytes")


def make_bf16_stepper(memory: MemoryOptions, optimizer: Optimizer, seed: int) -> Bf16Stepper | None:
    """The stepper of --full_bf16; None where weights are in float32 and the optimizer steps by itself."""
    return Bf16Stepper(optimizer, seed=seed, stochastic=memory.stochastic_rounding) if memory.full_bf16 else None


def steps_each_parameter(optimizer: Optimizer) -> bool:
    """Whether it is known to step each parameter on its own."""
    return type(optimizer).__module__.partition(".")[0] in PER_PARAMETER_PACKAGES


def keep_in_bfloat16(groups: Sequence[ParameterGroup]) -> None:
    """Cast the trained parameters, and so their gradients, to bfloat16; call before the optimizer is made."""
    for group in groups:
        for parameter in group.parameters:
            parameter.data = parameter.data.to(torch.bfloat16)


@torch.no_grad()
def stochastic_round(values: Tensor, generator: Generator) -> Tensor:
    """float32 -> bfloat16, to one of the two neighbors; the expected value is the value itself.

    Values that bfloat16 holds exactly, nan and inf are unchanged. The generator is on the values' device.
    """
    noise = torch.randint(0, LOW_BITS, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    rounded = noise.add_(values.view(torch.int32)).bitwise_and_(-LOW_BITS).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)


class Bf16Stepper:
    """Runs an optimizer on float32 copies of bfloat16 parameters, so that its state is float32."""

    def __init__(self, optimizer: Optimizer, *, seed: int, stochastic: bool) -> None:
        self.optimizer, self.seed, self.stochastic = optimizer, seed, stochastic
        self.generators: dict[torch.device, Generator] = {}
        self.per_parameter = steps_each_parameter(optimizer)
        members = chain.from_iterable(group["params"] for group in optimizer.param_groups)
        self.numbers: dict[Tensor, int] = {parameter: number for number, parameter in enumerate(members)}
        for state in optimizer.state.values():  # some optimizers create it when they are made
            for name, value in state.items():
                if isinstance(value, Tensor) and value.dtype == torch.bfloat16:
                    state[name] = value.float()

    def add_copies(self, copies: Mapping[Tensor, nn.Parameter]) -> None:
        """Parameter -> what steps in its place; both are rounded alike."""
        self.numbers |= {copy: self.numbers[parameter] for parameter, copy in copies.items()}

    @torch.no_grad()
    def step(self, step: int) -> None:
        """The optimizer step with this index; the rounding depends on the index and the seed alone."""
        groups = self.optimizer.param_groups
        members = [group["params"] for group in groups]
        try:
            for chunk in self._chunks(members):
                copies = {parameter: to_float32(parameter) for parameter in chain.from_iterable(chunk)}
                for group, parameters in zip(groups, chunk, strict=True):
                    group["params"] = [copies[parameter] for parameter in parameters]
                self._step(copies)
                for parameter, values in copies.items():
                    if values is not parameter:
                        parameter.copy_(self._round(values, step, self.numbers[parameter]))
        finally:
            for group, parameters in zip(groups, members, strict=True):
                group["params"] = parameters

    def _chunks(self, members: Sequence[Sequence[nn.Parameter]]) -> Iterator[list[list[nn.Parameter]]]:
        """Parameters with a gradient, by group: up to CHUNK_SIZE elements at a time, or all at once."""
        chunk: list[list[nn.Parameter]] = [[] for _ in members]
        size = 0
        for number, parameters in enumerate(members):
            for parameter in parameters:
                if parameter.grad is None:
                    continue
                if self.per_parameter and size and size + parameter.numel() > CHUNK_SIZE:
                    yield chunk
                    chunk, size = [[] for _ in members], 0
                chunk[number].append(parameter)
                size += parameter.numel()
        if size:
            yield chunk

    def _step(self, copies: dict[nn.Parameter, nn.Parameter]) -> None:
        """One step of the optimizer on the copies, with the state of the originals."""
        state = self.optimizer.state
        move_state(state, copies)
        try:
            self.optimizer.step()
        finally:
            move_state(state, {copy: parameter for parameter, copy in copies.items()})

    def _round(self, values: Tensor, step: int, number: int) -> Tensor:
        if not self.stochastic:
            return values
        if values.device not in self.generators:
            self.generators[values.device] = torch.Generator(values.device)
        seed = seed_of(self.seed, "rounding", step, number)
        return stochastic_round(values, self.generators[values.device].manual_seed(seed))


def to_float32(parameter: nn.Parameter) -> nn.Parameter:
    """A float32 copy of a bfloat16 parameter and its gradient; any other parameter itself."""
    if parameter.dtype != torch.bfloat16:
        return parameter
    assert parameter.grad is not None
    copied = nn.Parameter(parameter.detach().float())
    copied.grad = parameter.grad.float()
    return copied


def move_state(state: MutableMapping[Tensor, Any], moves: Mapping[nn.Parameter, nn.Parameter]) -> None:
    """Move an optimizer's state from one parameter to another."""
    for old, new in moves.items():
        if old in state:
            state[new] = state.pop(old)
