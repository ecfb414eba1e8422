"""Running averages of the trained weights, saved beside them. Training never sees them.

Two shapes. The plain one keeps a fixed share at every step. The power function (Karras et al. 2024, "Analyzing and
Improving the Training Dynamics of Diffusion Models", sec. 3.1) grows with training: its width is a share of all steps
so far, and from saves of two such averages any other width can be made afterwards (`sfumato ema`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from sfumato.config import EmaOptions


class Shape(Protocol):
    """How much of the past an average keeps."""

    @property
    def suffix(self) -> str:
        """What follows a save's name in the name of the average's file."""
        ...

    def kept(self, step: int) -> float:
        """The share of the average that stays when the weights after this step, counted from 1, join it."""
        ...

    def facts(self) -> dict[str, float]:
        """What tells the average from others, plain numbers."""
        ...


@dataclass(frozen=True)
class Plain:
    """The same share at every step; less in the first ones, so that what was there before is soon forgotten."""

    decay: float
    suffix = "-ema"

    def kept(self, step: int) -> float:
        """min(decay, (1 + n) / (10 + n)) after n steps; the first leaves nothing of the weights before training."""
        return 0.0 if step == 1 else min(self.decay, step / (9 + step))

    def facts(self) -> dict[str, float]:
        return {"decay": self.decay}


@dataclass(frozen=True)
class Power:
    """The weights after step s count in proportion to s^gamma; sigma_rel is the deviation of that over all steps."""

    sigma_rel: float

    @property
    def suffix(self) -> str:
        return f"-ema{self.sigma_rel:g}"

    @cached_property
    def gamma(self) -> float:
        return gamma_of(self.sigma_rel)

    def kept(self, step: int) -> float:
        """beta(t) = (1 - 1/t)^(gamma + 1): 0 at the first step."""
        return (1 - 1 / step) ** (self.gamma + 1)

    def facts(self) -> dict[str, float]:
        return {"sigma_rel": self.sigma_rel}


def gamma_of(sigma_rel: float) -> float:
    """The exponent with this relative width: sigma^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), for widths below
    0.289 it has one root above 0."""
    over = sigma_rel**-2
    return float(np.polynomial.Polynomial([12 - over, 16 - over, 7, 1]).roots().real.max())


class Average:
    """One running average of some parameters, in float32. It begins with what they are now."""

    def __init__(self, shape: Shape, parameters: Sequence[nn.Parameter], *, on_cpu: bool = False) -> None:
        self.shape, self.parameters = shape, parameters
        self.steps = 0
        self.weights = [whole(parameter, "cpu" if on_cpu else parameter.device) for parameter in parameters]

    @torch.no_grad()
    def update(self) -> None:
        """After an optimizer step."""
        self.steps += 1
        new = 1 - self.shape.kept(self.steps)
        pairs = list(zip(self.weights, self.parameters, strict=True))
        if all(alike(average, parameter) for average, parameter in pairs):
            torch._foreach_lerp_(self.weights, list(self.parameters), new)  # pyright: ignore[reportPrivateImportUsage]
            return
        for average, parameter in pairs:  # one copy in float32, or on the other device, at a time
            average.lerp_(parameter.to(average), new)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """For a while the parameters are the average; they come back bit for bit.

        Where both have one dtype they change places, so that only one tensor at a time needs room of its own.
        """
        undo: list[tuple[nn.Parameter, Tensor, Tensor | None]] = []
        try:
            for parameter, average in zip(self.parameters, self.weights, strict=True):
                undo.append((parameter, average, put(parameter, average)))
            yield
        finally:
            for parameter, average, waiting in undo:
                take_back(parameter, average, waiting)

    def facts(self) -> dict[str, float]:
        """What a file of the average says of it."""
        return {**self.shape.facts(), "steps": self.steps}

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "weights": self.weights}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps = state["steps"]
        for average, saved in zip(self.weights, state["weights"], strict=True):
            average.copy_(saved)


@torch.no_grad()
def put(parameter: nn.Parameter, average: Tensor) -> Tensor | None:
    """Give a parameter its average; where its dtype cannot hold that, what it was is given back to be kept."""
    weights = parameter.to("cpu" if parameter.dtype != average.dtype else average.device, copy=True)
    parameter.copy_(average)
    if parameter.dtype != average.dtype:
        return weights
    average.copy_(weights)
    return None


@torch.no_grad()
def take_back(parameter: nn.Parameter, average: Tensor, waiting: Tensor | None) -> None:
    """Undo `put`."""
    if waiting is None:
        put(parameter, average)
    else:
        parameter.copy_(waiting)


def whole(parameter: Tensor, device: torch.device | str) -> Tensor:
    """A copy in float32, or in what the parameter has if that is wider."""
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return parameter.detach().to(device=device, dtype=dtype, copy=True)


def alike(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.device == other.device


class Averages:
    """The averages of one run, the plain one first; often none."""

    def __init__(self, options: EmaOptions, parameters: Sequence[nn.Parameter]) -> None:
        shapes: list[Shape] = [] if options.ema_decay is None else [Plain(options.ema_decay)]
        shapes += [Power(width) for width in options.ema_sigma_rel]
        self.options = options
        self.all = [Average(shape, parameters, on_cpu=options.ema_on_cpu) for shape in shapes]

    def __iter__(self) -> Iterator[Average]:
        return iter(self.all)

    @property
    def suffixes(self) -> list[str]:
        return [average.shape.suffix for average in self.all]

    def update(self) -> None:
        """After each optimizer step."""
        for average in self.all:
            average.update()

    @property
    def evaluated(self) -> Average | None:
        """The one with which samples are made and the model is validated; None for the weights themselves."""
        return self.all[0] if self.all and self.options.evaluate_with_ema else None

    def shown(self) -> AbstractContextManager[None]:
        """Within, the model is what is evaluated."""
        return self.evaluated.in_place() if self.evaluated else nullcontext()

    def state_dict(self) -> dict[str, Any]:
        return {average.shape.suffix: average.state_dict() for average in self.all}

    def load_state_dict(self, state: Mapping[str, Any]) -> list[str]:
        """Take over the saved ones; the suffixes of those that the state lacks, which begin with the weights of now."""
        for average in self.all:
            if average.shape.suffix in state:
                average.load_state_dict(state[average.shape.suffix])
        return [suffix for suffix in self.suffixes if suffix not in state]
