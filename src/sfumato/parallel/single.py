"""One process: nothing is shared, nobody is waited for."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sfumato.parallel.base import ParallelStrategy

_T = TypeVar("_T")


class Single(ParallelStrategy):
    """This process is the whole run."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(rank=0, processes=1, device=device)
        self.no_facts = torch.zeros(0)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nobody waits."""

    @property
    def must_stop(self) -> bool:
        return self.stop_requested

    def prepare(self, name: str, module: nn.Module) -> None:
        """It stays as it is."""

    def reduce(self, parameters: Sequence[nn.Parameter], loss: Tensor) -> Tensor:
        """The gradients of this process are those of the run."""
        return self.no_facts

    def read_facts(self, facts: Tensor) -> None:
        """There are none: `stop_requested` says all."""

    def sum(self, tensor: Tensor) -> None:
        """It is the sum already."""

    def share(self, work: Sequence[_T]) -> Sequence[_T]:
        return work

    def exchange(self, value: Any = None) -> list[Any]:
        return [value]

    def announce_failure(self, parameters: Sequence[nn.Parameter]) -> None:
        """Nobody has to know."""
