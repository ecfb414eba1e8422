"""torch generators as a function of (seed, purpose, sample id), never of history, rank or batch size."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor

from sfumato.seeds import seed_of


@dataclass(frozen=True)
class Randomness:
    """All of a run's chance; `seed` is the user's."""

    seed: int

    def generator(self, purpose: str, *counters: int) -> Generator:
        return Generator().manual_seed(seed_of(self.seed, purpose, *counters))

    def per_sample(self, purpose: str, ids: Tensor, draw: Callable[[Generator, int], Tensor]) -> Tensor:
        """Stack draw(generator, i) over the batch; the generator depends on the sample's id alone."""
        drawn = [draw(self.generator(purpose, sample), i) for i, sample in enumerate(ids.tolist())]
        return torch.stack(drawn)

    def seed_modules(self, step: int, micro_step: int, rank: int) -> None:
        """Reseed the GLOBAL generators before each micro-step: the only source for dropout inside networks."""
        seed = seed_of(self.seed, "modules", step, micro_step, rank)
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)
