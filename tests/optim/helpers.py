"""A module of two layers that any optimizer can train, and steps over it that depend on the step's number alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sfumato.config import OptimOptions
from sfumato.optim.groups import ParameterGroup
from sfumato.optim.lr_schedule import LrSchedule, make_lr_schedule
from sfumato.optim.optimizers import make_optimizer

TOTAL, STEPS = 8, 100


class Bench:
    """One run; the first layer is large enough for 8-bit optimizer state, the second is not."""

    def __init__(self, total: int = TOTAL, lrs: tuple[float, float] | None = None, **options: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        self.module = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 3))
        for parameter in self.module.parameters():
            nn.init.normal_(parameter, std=0.1, generator=generator)
        self.options = OptimOptions(**options)
        first, second = lrs or (self.options.learning_rate, self.options.learning_rate)
        groups = [
            ParameterGroup(name="first", parameters=list(self.module[0].parameters()), learning_rate=first),
            ParameterGroup(name="second", parameters=list(self.module[2].parameters()), learning_rate=second),
        ]
        self.optimizer: Optimizer = make_optimizer(self.options, groups)
        self.schedule: LrSchedule = make_lr_schedule(self.options, self.optimizer, total)

    def step(self, index: int) -> None:
        generator = torch.Generator().manual_seed(100 + index)
        x = torch.randn(16, 64, generator=generator)
        self.optimizer.zero_grad(set_to_none=True)
        (self.module(x) - x[:, :3].sin()).square().mean().backward()
        self.schedule.set(self.optimizer, index)
        self.optimizer.step()

    def steps(self, indices: Iterable[int]) -> None:
        for index in indices:
            self.step(index)

    def weights(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.module.parameters()]


def factors(lr: float = 1e-3, **options: Any) -> list[float]:
    """The learning rates of a run of STEPS steps, relative to the first group's own."""
    bench = Bench(total=STEPS, learning_rate=lr, **options)
    lrs: list[float] = []
    for step in range(STEPS):
        bench.schedule.set(bench.optimizer, step)
        lrs.append(bench.optimizer.param_groups[0]["lr"] / lr)
    return lrs
