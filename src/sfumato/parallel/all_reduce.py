"""Several processes, each with the whole model: gradients are summed over all of them after backward."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from sfumato.common.stop_signals import handle_stop_signals
from sfumato.errors import UserError
from sfumato.parallel.base import ParallelStrategy, ProcessFailed, name_device
from sfumato.parallel.gradient_sum import Facts, sum_gradients
from sfumato.parallel.meeting import SEE_OTHERS, Meetings
from sfumato.quantization.weight import list_stored

_T = TypeVar("_T")
LONGEST_FAREWELL = 60.0  # seconds that a process which has failed waits for the others to learn of it
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


class AllReduce(ParallelStrategy):
    """This process and others, whose sums and meetings are the same."""

    def __init__(self, meetings: Meetings, device: torch.device) -> None:
        super().__init__(rank=meetings.rank, processes=meetings.processes, device=device)
        self.meetings = meetings
        self.stop_shared = False  # whether all processes know that one was asked to stop

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                with handle_stop_signals(self.request_stop):  # all is done, the others only have to come
                    self.meetings.leave()
                    distributed.destroy_process_group()
            elif not isinstance(error, ProcessFailed):
                with contextlib.suppress(ProcessFailed):  # the error that ends this process is the other one
                    self.meetings.announce_failure()
        finally:
            self.meetings.close()

    @property
    def must_stop(self) -> bool:
        return self.stop_shared

    def prepare(self, name: str, module: nn.Module) -> None:
        """Compare its weights over the processes whose devices compute alike, bit for bit."""
        own = [[name_device(self.device), torch.__version__], sum_weights(module)]
        everyone = self.exchange(own)
        for rank, (device, weights) in enumerate(everyone):
            if device == everyone[0][0] and weights != everyone[0][1]:
                raise UserError(
                    f"process {rank} has other weights in {name} than process 0: it would train another model",
                    code="process-weights-differ",
                    fix="give all processes the same files",
                )

    def reduce(self, parameters: Sequence[nn.Parameter], loss: Tensor) -> Tensor:
        return sum_gradients(parameters, loss, Facts(stop=self.stop_requested), self.sum)

    def read_facts(self, facts: Tensor) -> None:
        summed = Facts(*(count > 0 for count in facts.tolist()))
        if summed.failed:
            raise ProcessFailed("another process of this run has failed", code="process-failed-in-step", fix=SEE_OTHERS)
        self.stop_shared |= summed.stop

    def sum(self, tensor: Tensor) -> None:
        try:
            distributed.all_reduce(tensor)
        except RuntimeError as error:  # gloo's and NCCL's own errors are of this class
            raise ProcessFailed(
                "another process of this run has ended", code="process-ended-in-sum", fix=SEE_OTHERS
            ) from error

    def share(self, work: Sequence[_T]) -> Sequence[_T]:
        return work[self.rank :: self.processes]

    def exchange(self, value: Any = None) -> list[Any]:
        values = self.meetings.exchange([self.stop_requested, value])
        self.stop_shared |= any(stop for stop, _ in values)
        return [value for _, value in values]

    def announce_failure(self, parameters: Sequence[nn.Parameter]) -> None:
        """In the store, and by taking part in the next step's sum, without gradients, until nobody can come to it."""
        self.meetings.announce_failure()
        for parameter in parameters:
            parameter.grad = None
        loss = torch.zeros((), device=self.device)
        with contextlib.suppress(ProcessFailed):  # all others know already
            sum_gradients(parameters, loss, Facts(failed=True), self._sum_while_others_may_come)

    def _sum_while_others_may_come(self, tensor: Tensor) -> None:
        deadline = time.monotonic() + LONGEST_FAREWELL
        work = distributed.all_reduce(tensor, async_op=True)
        assert work is not None
        while not work.is_completed():
            if time.monotonic() > deadline or not self.meetings.has_audience():
                raise ProcessFailed("all other processes have ended", code="processes-ended")
            time.sleep(0.01)


@torch.no_grad()
def sum_weights(module: nn.Module) -> list[int]:
    """The sum of the bits, read as integers, of each weight."""
    sums: list[Tensor] = []
    for weight in list_stored(module.state_dict().values()):
        bits = weight.detach().contiguous().view(INTEGERS[weight.element_size()])
        sums.append(bits.sum(dtype=torch.int64))
    return torch.stack([each.cpu() for each in sums]).tolist() if sums else []  # some may be in main memory
