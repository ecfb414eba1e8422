"""What a later run needs of this one: named parts, collected, written and read by one object."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from sfumato.config import Config
from sfumato.config.secrets import collect_secrets
from sfumato.diffusion.uncertainty import Uncertainty, resume_uncertainty
from sfumato.errors import UserError
from sfumato.formats.state import find_newest_state, load_state, save_state
from sfumato.optim.optimizers import class_name, restore_optimizer
from sfumato.plan import RunPlan
from sfumato.track.hub import fetch_state
from sfumato.training.plan_report import describe_changes
from sfumato.training.start_point import StartPoint

log = logging.getLogger(__name__)


class Stateful(Protocol):
    """torch's two methods."""

    def state_dict(self) -> Mapping[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> Any: ...


_Part = TypeVar("_Part", bound=Stateful)


class RunState:
    """Every part of a run that training changes. What is not added here is neither saved nor resumed."""

    def __init__(self, saved: Mapping[str, Any] | None = None) -> None:
        self.parts: dict[str, Stateful] = {}
        self.resumed = saved is not None
        self._saved = dict(saved or {})  # parts that were not yet taken over
        self.counters: dict[str, int] = self._saved.pop("counters", {})  # of the saved state

    def add(self, name: str, part: _Part) -> _Part:
        """Register a part; in a resumed run it takes over what was saved, whose memory is then given back."""
        assert name not in self.parts, f"two parts of the state are called {name}"
        self.parts[name] = part
        if self.resumed:
            if name not in self._saved:
                raise UserError(
                    f"the state has no {name!r}: another version of the program saved it",
                    code="state-part-missing",
                    fix="start without --resume",
                )
            part.load_state_dict(self._saved.pop(name))
        return part

    def save(self, folder: Path, start: StartPoint, step: int, options: Mapping[str, str]) -> None:
        """Write all parts as they are after `step`; an older state of that name stays until this one is complete."""
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        save_state(folder, {"counters": start.counters(step), **parts}, {"options": options})


def open_state(plan: RunPlan) -> RunState:
    """The state that --resume names, or an empty one; each option that differs from the saved run is reported."""
    config = plan.config
    if config.save.resume is None:
        return RunState()
    folder = plan.saved.folder if plan.saved else find_newest_state(download_state(config, config.save.resume))
    saved, info = load_state(folder)
    state = RunState(saved)
    log.info("resuming from %s, step %d of %d", folder, state.counters["step"], plan.total_steps)
    for line in describe_changes(info["options"], config):
        log.warning("%s", line)
    return state


def download_state(config: Config, path: Path) -> Path:
    """Where the state of this name on the hub lies on this machine."""
    return fetch_state(config.hub, path, collect_secrets(config))


class OptimizerState:
    """An optimizer with the name of its class, since the state of another class is of no use."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        return {"class": class_name(self.optimizer), "state": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        restore_optimizer(self.optimizer, state["state"], state["class"])


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
