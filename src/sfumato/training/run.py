"""One training run, ready for its next step: what the loop, saves and validation work with."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from sfumato import plan
from sfumato.config import Config
from sfumato.data.batch import Batch
from sfumato.data.cache.entries import not_finite
from sfumato.data.loader import Loader
from sfumato.diffusion.randomness import Randomness
from sfumato.diffusion.recipe import Recipe
from sfumato.families.base import Family
from sfumato.families.encoding import FrozenText, encode_images
from sfumato.formats.metadata import modelspec
from sfumato.formats.outputs import Plan as SavePlan
from sfumato.methods.base import Method
from sfumato.optim.ema import Averages
from sfumato.optim.rates import Rates
from sfumato.optim.rounding import Rounding
from sfumato.track.best import Best
from sfumato.track.hub import Hub
from sfumato.track.journal import Journal
from sfumato.training.nonfinite import Health, Proof
from sfumato.training.start_point import Beginning

log = logging.getLogger(__name__)
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(kw_only=True)
class Run:
    """One training run, ready for its next step."""

    config: Config
    processes: PartialState
    outlook: plan.Outlook
    model: Family
    method: Method
    recipe: Recipe
    randomness: Randomness
    optimizer: Optimizer
    rates: Rates
    rounding: Rounding | None  # where weights are in bfloat16
    scaler: GradScaler  # does nothing but in fp16
    parameters: Sequence[nn.Parameter]  # of the method
    averages: Averages
    health: Health
    proof: Proof
    loader: Loader
    held_out: Loader | None  # the images of validation
    best: Best
    frozen_text: FrozenText
    journal: Journal
    hub: Hub
    saves: SavePlan
    output: Path
    metadata: dict[str, str]  # ss_ keys that are known before training
    named_files: Future[dict[str, str]]  # those of the checkpoint and --vae, hashed while training goes on
    begun: Beginning
    total: int
    steps_per_epoch: int
    told: set[str] = field(default_factory=set)  # warnings that are not repeated
    lost: list[str] = field(default_factory=list)  # why saves failed, one line each

    @property
    def device(self) -> torch.device:
        assert self.processes.device is not None
        return self.processes.device

    @property
    def start(self) -> int:
        """Steps called done before the first one."""
        return self.begun.step

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files."""
        return self.processes.is_main_process

    @property
    def epochs(self) -> int:
        return -(-self.total // self.steps_per_epoch)

    def autocast(self) -> AbstractContextManager[Any]:
        dtype = DTYPES[self.config.memory.mixed_precision]
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    @property
    def learning(self) -> list[nn.Parameter]:
        """Everything that gets a gradient: the method's parameters, and those of a loss that learns."""
        more = self.recipe.uncertainty
        return [*self.parameters, *(more.parameters() if more else ())]

    def take_step(self, step: int) -> None:
        """The optimizer's own step, left out where float16 has overflowed."""
        if self.rounding is None:
            self.scaler.step(self.optimizer)
        else:
            self.rounding.step(step)

    def latents(self, batch: Batch, source: Loader | None = None) -> Tensor:
        """Cached latents, or the autoencoder's, made exactly as the cache makes them.

        source: what the batch came from, where that is not training; its pictures are named where one is no good.
        """
        if batch.latents is not None:
            return batch.latents.to(self.device, non_blocking=True)
        assert batch.pixels is not None
        chunk = self.config.cache.vae_batch_size
        found = encode_images(self.model, batch.pixels, batch.entry_seeds.tolist(), vae_batch_size=chunk)
        if not torch.isfinite(found).all():
            bad = batch.ids[~torch.isfinite(found).flatten(1).all(1).cpu()]
            raise not_finite((source or self.loader).order.pictures(bad.tolist()))
        return found

    def modelspec(self) -> dict[str, str]:
        kind = {"epsilon": "epsilon", "v": "v", "velocity": ""}[self.model.objective.predicts]
        return modelspec(
            self.config,
            architecture=self.outlook.blueprint.architecture + self.method.kind,
            implementation=self.outlook.blueprint.implementation,
            prediction_type=kind,
            resolution=self.outlook.data.datasets[0].settings.resolution,
        )

    def warn_once(self, lines: Iterable[str]) -> None:
        """Warn of what was not yet warned of in this run."""
        new = [line for line in dict.fromkeys(lines) if line not in self.told]
        self.told.update(new)
        self.warn(new)

    def warn(self, lines: Sequence[str]) -> None:
        for line in lines:
            log.warning("%s", line)
