"""What strategies have in common where no process has every tensor: gathering one at a time, and moving together."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sfumato.common.text import EMPTY
from sfumato.errors import UserError
from sfumato.families.part import Part
from sfumato.parallel.all_reduce import AllReduce
from sfumato.parallel.base import ProcessFailed
from sfumato.parallel.meeting import SEE_OTHERS, Meetings

_T = TypeVar("_T")
GRACE = 5.0  # seconds for another process's failure to be seen, after a sum has failed


class Gathering(AllReduce):
    """This process and others, each with a part of some tensors."""

    def __init__(self, meetings: Meetings, device: torch.device) -> None:
        super().__init__(meetings, device)
        self.parts: dict[str, Part] = {}  # those whose weights are shared out

    @abstractmethod
    def gather(self, shared: Tensor) -> Tensor:
        """The whole of a tensor of `shared_kinds`; all processes call it at the same time."""

    def gather_by_name(self, part: Part) -> Callable[[str, Tensor], Tensor]:
        """`Part.make_whole` of a part whose weights are shared out."""
        return lambda name, tensor: self.make_whole(f"{part.spec.name} {name}", tensor)

    def make_whole(self, name: str, tensor: Tensor) -> Tensor:
        if not isinstance(tensor, self.shared_kinds):
            return tensor
        self.exchange(["make whole", name])
        return self._gather(tensor)

    def run_on_main(self, work: Callable[[], _T], tensors: Mapping[str, Tensor] = EMPTY) -> _T:
        """The others take part in making tensors whole until the main process has done the work."""
        if self.is_main:
            return self.exchange(["done", work()])[0][1]
        weights: dict[str, Tensor] = {}
        for part in self.parts.values():
            weights |= {f"{part.spec.name} {name}": weight for name, weight in part.module.state_dict().items()}
        while True:
            what, value = self.exchange()[0]
            if what == "done":
                return value
            self._gather(tensors[value] if value in tensors else weights[value])

    def share_rounds(self, work: Sequence[_T], key: Callable[[_T], object]) -> Iterator[tuple[_T, bool]]:
        if not self.moves_together:
            yield from super().share_rounds(work, key)
            return
        by_key: dict[Any, list[_T]] = {}
        for each in work:
            by_key.setdefault(key(each), []).append(each)
        for alike in by_key.values():
            for first in range(0, len(alike), self.processes):
                mine = first + self.rank
                yield alike[min(mine, len(alike) - 1)], mine < len(alike)

    def may_break_off(self) -> bool:
        if not self.moves_together:
            return super().may_break_off()
        self.exchange()
        return self.must_stop

    def announce_failure(self, parameters: Sequence[nn.Parameter]) -> None:
        """In the store; whoever waits in a sum learns of it when this process is gone."""
        self.meetings.announce_failure()

    @contextmanager
    def learning_of_failures(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except RuntimeError as error:  # of gloo, NCCL or the step itself
            deadline = time.monotonic() + GRACE
            while time.monotonic() < deadline:
                failure = self.meetings.find_failure()
                if failure is not None:
                    raise failure from error
                time.sleep(0.1)
            raise

    def _gather(self, shared: Tensor) -> Tensor:
        try:
            return self.gather(shared)
        except RuntimeError as error:
            raise ProcessFailed(
                "another process of this run has ended", code="process-ended-in-gather", fix=SEE_OTHERS
            ) from error
