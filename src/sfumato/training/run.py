"""One training run, ready for its next step: what the loop, saves and validation work with."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from sfumato.config import Config
from sfumato.data.loader import Loader
from sfumato.families.base import Family
from sfumato.loss import LossContext
from sfumato.methods.base import Method
from sfumato.optim.ema import EmaSet
from sfumato.parallel.base import ParallelStrategy
from sfumato.plan import RunPlan
from sfumato.track.best import Best
from sfumato.track.hub import Hub
from sfumato.track.metrics_logger import MetricsLogger
from sfumato.training.optimizer_setup import OptimizerSetup
from sfumato.training.outcomes import Outcomes
from sfumato.training.run_state import RunState
from sfumato.training.start_point import StartPoint

log = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass(kw_only=True)
class Run:
    """One training run, ready for its next step."""

    plan: RunPlan
    start: StartPoint
    state: RunState
    parallel: ParallelStrategy
    context: LossContext
    optimization: OptimizerSetup
    outcomes: Outcomes
    loader: Loader
    validation_loader: Loader | None
    best: Best
    metrics: MetricsLogger
    hub: Hub
    metadata: dict[str, str]  # ss_ keys that are known before training
    file_hashes: Future[dict[str, str]]  # of the checkpoint and --vae, computed while training goes on
    output_lock: AbstractContextManager[Any]  # on the name of the run in its output folder
    step: int  # the last that is complete, counted from 1
    warned: set[str] = field(default_factory=set)  # warnings that are not repeated
    given_up: set[str] = field(default_factory=set)  # what surrounds training and needs more memory than there is
    failed_saves: list[str] = field(default_factory=list)  # why saves failed, one line each

    @property
    def config(self) -> Config:
        return self.plan.config

    @property
    def seed(self) -> int:
        return self.plan.seed

    @property
    def model(self) -> Family:
        return self.context.model

    @property
    def method(self) -> Method:
        return self.plan.method

    @property
    def device(self) -> torch.device:
        return self.context.device

    @property
    def optimizer(self) -> Optimizer:
        return self.optimization.optimizer

    @property
    def scaler(self) -> GradScaler:
        return self.optimization.scaler

    @property
    def ema(self) -> EmaSet:
        return self.optimization.ema

    @property
    def parameters(self) -> Sequence[nn.Parameter]:
        """Of the method."""
        return self.optimization.parameters

    @property
    def all_parameters(self) -> list[nn.Parameter]:
        """Everything that gets a gradient."""
        return self.optimization.all_parameters

    @property
    def mid_step(self) -> bool:
        """Whether the optimizer has begun a step that is not complete."""
        return self.optimization.owner.mid_step

    def output_path(self, name: str) -> Path:
        """The file or folder of an output."""
        return self.output_paths(name)[0]

    def output_paths(self, name: str) -> list[Path]:
        """The same and the files beside it."""
        folder = self.plan.output_dir
        return [folder / (name + suffix) for suffix in self.method.file_suffixes(self.model.blueprint)]

    def autocast(self) -> AbstractContextManager[Any]:
        dtype = self.context.mixed_dtype
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def forward(self, compute: Callable[[], _T]) -> _T:
        """Call what runs the networks in mixed precision, where the weights that they need are."""

        def compute_in_precision() -> _T:
            with self.autocast():
                return compute()

        return self.parallel.run_forward(compute_in_precision)

    def complete_step(self, number: int) -> None:
        """Everything that a state holds is as it is after this step, counted from 1."""
        self.step, self.optimization.owner.mid_step = number, False

    def warn_once(self, lines: Iterable[str]) -> None:
        """Log the warnings that this run has not logged before."""
        new = [line for line in dict.fromkeys(lines) if line not in self.warned]
        self.warned.update(new)
        self.warn(new)

    def warn(self, lines: Sequence[str]) -> None:
        for line in lines:
            log.warning("%s", line)
