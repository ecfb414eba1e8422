"""EMA of the trained weights, saved beside them. Training itself is not affected.

Two profiles. The exponential one has a constant decay. The power-function profile (Karras et al. 2024, "Analyzing and
Improving the Training Dynamics of Diffusion Models", sec. 3.1) grows with training: its width is relative to all steps
so far, and any other width can be reconstructed from saves of two of them (`sfumato ema`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from sfumato.config import EmaOptions

log = logging.getLogger(__name__)


class EmaProfile(Protocol):
    """How the weights of past steps count in an EMA."""

    @property
    def suffix(self) -> str:
        """Appended to a save's name to name the EMA's file."""
        ...

    def decay(self, step: int) -> float:
        """The decay applied after this step, counted from 1."""
        ...

    def facts(self) -> dict[str, float]:
        """The profile's parameters, plain numbers."""
        ...


@dataclass(frozen=True)
class ExponentialProfile:
    """A constant decay, smaller in the first steps so that the initial weights are soon forgotten."""

    max_decay: float
    suffix = "-ema"

    def decay(self, step: int) -> float:
        """min(max_decay, (1 + n) / (10 + n)) after n earlier steps; 0 at the first, as in diffusers."""
        return 0.0 if step == 1 else min(self.max_decay, step / (9 + step))

    def facts(self) -> dict[str, float]:
        return {"decay": self.max_decay}


@dataclass(frozen=True)
class PowerProfile:
    """The weights after step s count in proportion to s^gamma; sigma_rel is its standard deviation over all steps."""

    sigma_rel: float

    @property
    def suffix(self) -> str:
        return f"-ema{self.sigma_rel:g}"

    @cached_property
    def gamma(self) -> float:
        return gamma_from_sigma_rel(self.sigma_rel)

    def decay(self, step: int) -> float:
        """beta(t) = (1 - 1/t)^(gamma + 1): 0 at the first step."""
        return (1 - 1 / step) ** (self.gamma + 1)

    def facts(self) -> dict[str, float]:
        return {"sigma_rel": self.sigma_rel}


def list_profiles(options: EmaOptions) -> list[EmaProfile]:
    """Those of a run's EMAs, the exponential one first; samples and validation may use the first."""
    profiles: list[EmaProfile] = [] if options.ema_decay is None else [ExponentialProfile(options.ema_decay)]
    return [*profiles, *(PowerProfile(width) for width in options.ema_sigma_rel)]


def gamma_from_sigma_rel(sigma_rel: float) -> float:
    """The exponent gamma of a relative width: sigma^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)).

    For widths below 0.289 it has one positive root (Karras et al. 2024, alg. 2).
    """
    inverse_square = sigma_rel**-2
    return float(np.polynomial.Polynomial([12 - inverse_square, 16 - inverse_square, 7, 1]).roots().real.max())


class Ema:
    """The EMA of some parameters, in float32, initialized to their current values."""

    def __init__(self, profile: EmaProfile, parameters: Sequence[nn.Parameter], *, on_cpu: bool = False) -> None:
        self.profile, self.parameters = profile, parameters
        self.steps = 0
        self.weights = [copy_float32(parameter, "cpu" if on_cpu else parameter.device) for parameter in parameters]

    @torch.no_grad()
    def update(self) -> None:
        """After an optimizer step."""
        self.steps += 1
        weight = 1 - self.profile.decay(self.steps)
        pairs = list(zip(self.weights, self.parameters, strict=True))
        if all(same_format(average, parameter) for average, parameter in pairs):
            torch._foreach_lerp_(self.weights, list(self.parameters), weight)  # pyright: ignore[reportPrivateImportUsage]
            return
        for average, parameter in pairs:  # one copy in float32, or on the other device, at a time
            average.lerp_(parameter.to(average), weight)

    @contextmanager
    def apply(self) -> Iterator[None]:
        """Within, the parameters are the EMA; afterwards they are restored bit for bit.

        Where both have the same dtype they are swapped, so that only one tensor at a time needs extra memory.
        """
        undo: list[tuple[nn.Parameter, Tensor, Tensor | None]] = []
        try:
            for parameter, average in zip(self.parameters, self.weights, strict=True):
                undo.append((parameter, average, swap_in(parameter, average)))
            yield
        finally:
            for parameter, average, copied in undo:
                swap_back(parameter, average, copied)

    def facts(self) -> dict[str, float]:
        """What the metadata of its file says of it."""
        return {**self.profile.facts(), "steps": self.steps}

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "weights": self.weights}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps = state["steps"]
        for average, saved in zip(self.weights, state["weights"], strict=True):
            average.copy_(saved)


@torch.no_grad()
def swap_in(parameter: nn.Parameter, average: Tensor) -> Tensor | None:
    """Swap a parameter with its average; where the dtypes differ, return the old weights instead."""
    weights = parameter.to("cpu" if parameter.dtype != average.dtype else average.device, copy=True)
    parameter.copy_(average)
    if parameter.dtype != average.dtype:
        return weights
    average.copy_(weights)
    return None


@torch.no_grad()
def swap_back(parameter: nn.Parameter, average: Tensor, copied: Tensor | None) -> None:
    """Undo `swap_in`, which returned `copied`."""
    if copied is None:
        swap_in(parameter, average)
    else:
        parameter.copy_(copied)


def copy_float32(parameter: Tensor, device: torch.device | str) -> Tensor:
    """A copy in float32, or in the parameter's dtype if that is wider."""
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return parameter.detach().to(device=device, dtype=dtype, copy=True)


def same_format(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device


class EmaSet:
    """All EMAs of one run, the exponential one first; often none."""

    def __init__(self, options: EmaOptions, parameters: Sequence[nn.Parameter]) -> None:
        self.options, self.parameters = options, parameters
        self.averages = [Ema(profile, parameters, on_cpu=options.ema_on_cpu) for profile in list_profiles(options)]

    def __iter__(self) -> Iterator[Ema]:
        return iter(self.averages)

    @property
    def suffixes(self) -> list[str]:
        return [average.profile.suffix for average in self.averages]

    def update(self) -> None:
        """After each optimizer step."""
        for average in self.averages:
            average.update()

    @property
    def eval_ema(self) -> Ema | None:
        """The EMA that samples and validation use; None for the weights themselves."""
        return self.averages[0] if self.averages and self.options.evaluate_with_ema else None

    def using_ema(self) -> AbstractContextManager[None]:
        """Within, the parameters are those of `eval_ema`."""
        return self.eval_ema.apply() if self.eval_ema else nullcontext()

    def state_dict(self) -> dict[str, Any]:
        return {average.profile.suffix: average.state_dict() for average in self.averages}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the saved EMAs; one that the state lacks starts at the current weights, with a warning."""
        for ema in self.averages:
            suffix = ema.profile.suffix
            if suffix in state:
                ema.load_state_dict(state[suffix])
            else:
                log.warning("the saved state has no %s: it starts with the saved weights", suffix.removeprefix("-"))
