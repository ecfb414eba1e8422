"""The interface of weight formats: how a weight becomes stored tensors of fewer bits, and those a weight again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

Stored = Mapping[str, Tensor]  # what is in memory, by name


class WeightFormat(ABC):
    """One way to store weights (N, ...); rows are stored independently of each other. Subclasses are frozen."""

    names: ClassVar[tuple[str, ...]]  # of the stored tensors
    largest: ClassVar[float] = float("inf")  # the largest magnitude that it can hold
    computes: bool = False  # whether `multiply` computes with the stored numbers, instead of decoding them

    @property
    @abstractmethod
    def label(self) -> str:
        """In reports, e.g. "float8"."""

    @abstractmethod
    def encode(self, weight: Tensor) -> Stored:
        """(N, ...) in a floating-point dtype -> its stored tensors, on its device."""

    @abstractmethod
    def decode(self, stored: Stored, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The weight (N, ...) that is meant, rounded once."""

    @abstractmethod
    def count_bytes(self, shape: Sequence[int]) -> int:
        """Of the stored tensors of a weight (N, ...)."""

    def has_numbers_of(self, other: WeightFormat) -> bool:
        """Whether what this format stores is what the other one would store."""
        return self == other

    def allocate(self, shape: Sequence[int], device: torch.device | str) -> Stored:
        """Stored tensors whose values do not matter."""
        return self.encode(torch.empty(shape, device=device))

    def take_rows(self, stored: Stored, rows: slice) -> Stored:
        """The stored tensors of some rows."""
        return {name: tensor[rows] for name, tensor in stored.items()}

    def multiply(self, x: Tensor, stored: Stored, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """x (M, K) @ weight (N, K) transposed -> (M, N)."""
        return x @ self.decode(stored, shape, dtype).t()

    def multiply_back(self, gradient: Tensor, stored: Stored, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """gradient (M, N) @ weight (N, K) -> (M, K), the gradient of x."""
        return gradient @ self.decode(stored, shape, dtype)
