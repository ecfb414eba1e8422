"""Optimizer steps for half-precision weights without a float32 copy: computed in float32, a few tensors at a time.

bfloat16 has 8 significant bits, so round-to-nearest loses a step smaller than about 1/512 of a weight (float16 has 11,
above 6e-5), so the results are rounded stochastically. Stochastic
rounding, where the probability of each neighbor is proportional to the distance of the other, keeps it on average
(Gupta et al. 2015, "Deep Learning with Limited Numerical Precision", sec. 3).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from sfumato.common.seeds import seed_of
from sfumato.config import MemoryOptions
from sfumato.optim.groups import ParameterGroup
from sfumato.optim.half_scaler import HalfGradScaler

CHUNK_SIZE = 1 << 24  # elements that are in float32 at a time
LOW_BITS = 1 << 16  # bfloat16 is the upper half of float32
HALF_PRECISION = (torch.bfloat16, torch.float16)
FLOAT16_BITS, FLOAT16_SMALLEST = 11, -24  # significant bits, exponent of the smallest number
# Packages whose optimizers step each parameter independently; others may need all of them at once.
PER_PARAMETER_PACKAGES = ("torch", "transformers", "lion_pytorch", "bitsandbytes")


def make_half_stepper(memory: MemoryOptions, optimizer: Optimizer, seed: int, scaler: GradScaler) -> HalfStepper | None:
    """The stepper of --full_bf16 and --full_fp16; None where the optimizer steps by itself, on float32 weights."""
    if memory.trained_precision == "no":
        return None
    return HalfStepper(
        optimizer,
        seed=seed,
        stochastic=memory.stochastic_rounding,
        scaler=scaler if isinstance(scaler, HalfGradScaler) else None,
    )


def steps_each_parameter(optimizer: Optimizer) -> bool:
    """Whether it is known to step each parameter on its own."""
    return type(optimizer).__module__.partition(".")[0] in PER_PARAMETER_PACKAGES


def keep_in_half(groups: Sequence[ParameterGroup], dtype: torch.dtype) -> None:
    """Cast the trained parameters, and so their gradients; call before the optimizer is made."""
    for group in groups:
        for parameter in group.parameters:
            parameter.data = parameter.data.to(dtype)


@torch.no_grad()
def stochastic_round(values: Tensor, generator: Generator, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """float32 -> a dtype of HALF_PRECISION, to one of the two neighbors; the expected value is the value itself.

    Values that it holds exactly, nan and inf are unchanged. The generator is on the values' device.
    """
    if dtype == torch.float16:
        step = find_float16_step(values)
        noise = torch.rand(values.shape, device=values.device, generator=generator)
        scaled = values / step
        lower = scaled.floor()  # the noise is compared, not added: near 1 it would be rounded up, exact values with it
        return torch.where(values.isfinite(), (lower + (noise < scaled - lower)) * step, values).to(dtype)
    noise = torch.randint(0, LOW_BITS, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    rounded = noise.add_(values.view(torch.int32)).bitwise_and_(-LOW_BITS).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).to(torch.bfloat16)


def find_float16_step(values: Tensor) -> Tensor:
    """The distance of a value's two neighbors in float16: a power of 2, constant below 6e-5."""
    _, exponents = torch.frexp(values)
    return torch.ldexp(torch.ones_like(values), (exponents - FLOAT16_BITS).clamp(min=FLOAT16_SMALLEST))


class HalfStepper:
    """Runs an optimizer on float32 copies of half-precision parameters, so that its state is float32."""

    def __init__(
        self, optimizer: Optimizer, *, seed: int, stochastic: bool, scaler: HalfGradScaler | None = None
    ) -> None:
        """scaler: the one that left the gradients scaled; they are unscaled here, in float32."""
        self.optimizer, self.seed, self.stochastic, self.scaler = optimizer, seed, stochastic, scaler
        self.generators: dict[torch.device, Generator] = {}
        self.per_parameter = steps_each_parameter(optimizer)
        members = chain.from_iterable(group["params"] for group in optimizer.param_groups)
        self.numbers: dict[Tensor, int] = {parameter: number for number, parameter in enumerate(members)}
        for state in optimizer.state.values():  # some optimizers create it when they are made
            for name, value in state.items():
                if isinstance(value, Tensor) and value.dtype in HALF_PRECISION:
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
                scale = None if self.scaler is None else self.scaler.read_scale()
                copies = {parameter: to_float32(parameter, scale) for parameter in chain.from_iterable(chunk)}
                for group, parameters in zip(groups, chunk, strict=True):
                    group["params"] = [copies[parameter] for parameter in parameters]
                self._step(copies)
                for parameter, values in copies.items():
                    if values is not parameter:
                        parameter.copy_(self._round(values, step, self.numbers[parameter], parameter.dtype))
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

    def _round(self, values: Tensor, step: int, number: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        if not self.stochastic:
            return values
        if values.device not in self.generators:
            self.generators[values.device] = torch.Generator(values.device)
        seed = seed_of(self.seed, "rounding", step, number)
        return stochastic_round(values, self.generators[values.device].manual_seed(seed), dtype)


def to_float32(parameter: nn.Parameter, scale: Tensor | None = None) -> nn.Parameter:
    """A float32 copy of a half-precision parameter and its gradient; any other parameter itself.

    scale: 0-d, by which all gradients are too large.
    """
    assert parameter.grad is not None
    gradient = parameter.grad.float() if scale is None else parameter.grad.float() / scale.to(parameter.device)
    copied = parameter if parameter.dtype not in HALF_PRECISION else nn.Parameter(parameter.detach().float())
    copied.grad = gradient
    return copied


def move_state(state: MutableMapping[Tensor, Any], moves: Mapping[nn.Parameter, nn.Parameter]) -> None:
    """Move an optimizer's state from one parameter to another."""
    for old, new in moves.items():
        if old in state:
            state[new] = state.pop(old)
