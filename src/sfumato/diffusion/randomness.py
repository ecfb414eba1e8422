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
    """The generators of one run; `seed` is --seed."""

    seed: int

    def generator(self, purpose: str, *counters: int) -> Generator:
        return Generator().manual_seed(seed_of(self.seed, purpose, *counters))

    def per_sample(self, purpose: str, ids: Tensor, draw: Callable[[Generator, int], Tensor]) -> Tensor:
        """Stack draw(generator, i) over the batch; the generator depends on the sample's id alone."""
        return torch.stack([draw(self.generator(purpose, sample), i) for i, sample in enumerate(ids.tolist())])

    def uniform(self, purpose: str, ids: Tensor) -> Tensor:
        """(B,) float64 in [0, 1), independent for each id."""
        return self.per_sample(
            purpose, ids, lambda generator, _: torch.rand((), generator=generator, dtype=torch.float64)
        )

    def stratified_uniform(self, purpose: str, ids: Tensor) -> Tensor:
        """(B,) float64 in [0, 1), evenly spread over consecutive ids; each is a function of its id alone.

        A start from the seed plus id times the golden ratio, modulo 1 (Kronecker sequence), in integers, so exact for
        every id. Over any N consecutive ids the share of numbers below x differs from x by at most O(log N / N); for
        independent numbers it is O(1 / sqrt(N)).
        """
        start = 2 * seed_of(self.seed, purpose)
        fractions = [(start + sample * GOLDEN) % 2**64 >> 11 for sample in ids.tolist()]
        return torch.tensor(fractions, dtype=torch.float64) / 2**53

    def seed_modules(self, step: int, micro_step: int, rank: int) -> None:
        """Reseed the global generators before each micro-step; dropout inside networks draws from them alone."""
        seed = seed_of(self.seed, "modules", step, micro_step, rank)
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)
