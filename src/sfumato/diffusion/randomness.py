"""torch generators as a function of (seed, purpose, sample id), never of history, rank or batch size."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor

from sfumato.common.seeds import seed_of

GOLDEN = 0x9E3779B97F4A7C15  # (sqrt(5) - 1) / 2 in units of 2^-64


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

    def uniform(self, purpose: str, ids: Tensor) -> Tensor:
        """(B,) float64 in [0, 1), each drawn by itself."""
        return self.per_sample(purpose, ids, lambda draw, _: torch.rand((), generator=draw, dtype=torch.float64))

    def spread(self, purpose: str, ids: Tensor) -> Tensor:
        """(B,) float64 in [0, 1), those of ids in a row as evenly spread as can be, without looking at each other.

        A share of the seed's own plus id times the golden ratio, modulo 1 (Kronecker's sequence), in whole numbers, so
        exact for every id. Over any N ids in a row the share of numbers below x differs from x by O(log N / N) at
        most; for numbers drawn by themselves it is O(1 / sqrt(N)).
        """
        start = 2 * seed_of(self.seed, purpose)
        places = [(start + sample * GOLDEN) % 2**64 >> 11 for sample in ids.tolist()]
        return torch.tensor(places, dtype=torch.float64) / 2**53

    def seed_modules(self, step: int, micro_step: int, rank: int) -> None:
        """Reseed the GLOBAL generators before each micro-step: the only source for dropout inside networks."""
        seed = seed_of(self.seed, "modules", step, micro_step, rank)
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)
