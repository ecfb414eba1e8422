"""The parts of a state whose own methods do not say all: of what was saved, and of weights that are shared out.

A state is the same whatever the processes and their strategy: of tensors that are shared out by rows the whole is
saved, and a process that resumes takes its rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from sfumato.diffusion.uncertainty import Uncertainty, resume_uncertainty
from sfumato.methods.base import Method
from sfumato.optim.averaging import list_parameters
from sfumato.optim.ema import EmaSet
from sfumato.optim.optimizers import class_name, restore_optimizer
from sfumato.parallel.base import ParallelStrategy


class WeightsState:
    """What the method trains."""

    def __init__(self, method: Method, parallel: ParallelStrategy) -> None:
        self.method, self.parallel = method, parallel

    def state_dict(self) -> Mapping[str, Tensor]:
        return self.method.state_dict()

    def load_state_dict(self, state: dict[str, Tensor], /) -> None:
        own = self.method.state_dict()
        self.method.load_state_dict(
            {name: self.parallel.take_like(own[name], whole) if name in own else whole for name, whole in state.items()}
        )


class OptimizerState:
    """An optimizer with the name of its class, since the state of another class is of no use."""

    def __init__(self, optimizer: Optimizer, parallel: ParallelStrategy) -> None:
        self.optimizer, self.parallel = optimizer, parallel

    def state_dict(self) -> dict[str, Any]:
        state = self.optimizer.state_dict()
        return {"class": class_name(self.optimizer), "state": self._convert(state, self.parallel.mark_rows)}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        restore_optimizer(self.optimizer, self._convert(state["state"], self.parallel.take_rows), state["class"])

    def _convert(self, state: Mapping[str, Any], convert: Any) -> dict[str, Any]:
        """The same with each tensor that belongs to a parameter as `convert(parameter, tensor)`."""
        parameters = list_parameters(self.optimizer)
        converted: dict[int, Any] = {}
        for number, values in state["state"].items():
            converted[number] = values
            if isinstance(values, Mapping) and number < len(parameters):
                converted[number] = {
                    name: convert(parameters[number], value) if isinstance(value, Tensor) else value
                    for name, value in values.items()
                }
        return {**state, "state": converted}


class EmaState:
    """The EMAs of a run."""

    def __init__(self, averages: EmaSet, parallel: ParallelStrategy) -> None:
        self.averages, self.parallel = averages, parallel

    def state_dict(self) -> dict[str, Any]:
        return self._convert(self.averages.state_dict(), self.parallel.mark_rows)

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        self.averages.load_state_dict(self._convert(state, self.parallel.take_rows))

    def _convert(self, state: Mapping[str, Any], convert: Any) -> dict[str, Any]:
        converted: dict[str, Any] = {}
        for suffix, average in state.items():
            pairs = zip(self.averages.parameters, average["weights"], strict=True)
            converted[suffix] = {**average, "weights": [convert(parameter, weight) for parameter, weight in pairs]}
        return converted


class ScalerState:
    """A gradient scaler, whose state is empty where the run was not in float16."""

    def __init__(self, scaler: GradScaler) -> None:
        self.scaler = scaler

    def state_dict(self) -> dict[str, Any]:
        return self.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        if state:
            self.scaler.load_state_dict(state)


class UncertaintyState:
    """The learned weights of the loss, empty in runs without them."""

    def __init__(self, uncertainty: Uncertainty | None) -> None:
        self.uncertainty = uncertainty

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.uncertainty.state_dict()) if self.uncertainty else {}

    def load_state_dict(self, state: dict[str, Tensor], /) -> None:
        resume_uncertainty(self.uncertainty, state)
