"""The interface of parallel strategies: what one process of a run does, what all do together, and how they wait.

What is defined here holds where each process has the whole model. Where weights are shared out, the optimizer, EMAs and
checks see plain tensors, each this process's rows of a parameter (`own_parameters`), and every forward is one of all
processes at the same time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sfumato.common.stop_signals import raise_interrupt
from sfumato.common.text import EMPTY
from sfumato.errors import UserError

if TYPE_CHECKING:
    from sfumato.families.part import Part
    from sfumato.optim.groups import ParameterGroup

_T = TypeVar("_T")


class ProcessFailed(UserError):
    """Another process of the run has failed, or does not answer any more."""


class Engine(ABC):
    """A library's engine that owns the step: sums of gradients, their norm and clipping, loss scale and optimizer."""

    state: Any  # a part of the run's state, in the optimizer's place

    @abstractmethod
    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Of one micro-batch; the last one of a step is said."""

    @abstractmethod
    def step(self) -> tuple[float, bool]:
        """Take the step. Gives the norm of all gradients before clipping, and whether all were finite; waits."""

    @abstractmethod
    def forget_gradients(self) -> None:
        """Before the first backward of a step."""

    @property
    @abstractmethod
    def loss_scale(self) -> float:
        """1 without float16."""


class ParallelStrategy(ABC):
    """One process's place among those of a run.

    All processes call the same methods in the same order. Each of them may raise ProcessFailed.
    """

    shared_kinds: ClassVar[tuple[type[Tensor], ...]] = ()  # the classes of tensors that `make_whole` makes whole

    def __init__(self, *, rank: int, processes: int, device: torch.device) -> None:
        self.rank, self.processes, self.device = rank, processes, device
        self.stop_requested = False  # by a signal to this process

    def __enter__(self) -> Self:
        return self

    @abstractmethod
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the others: after all have come to the end, or at once where this process has failed."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and messages."""
        return self.rank == 0

    @property
    def devices(self) -> str:
        """For instance "2 × NVIDIA H100", or "CPU"."""
        name = name_device(self.device)
        return f"{self.processes} × {name}" if self.processes > 1 else name

    @property
    def moves_together(self) -> bool:
        """Whether none may leave out a forward, or one of its images."""
        return False

    @property
    @abstractmethod
    def must_stop(self) -> bool:
        """Whether to stop after this step; the same in all processes."""

    def request_stop(self) -> None:
        """What a signal does: all processes learn of it with their next sum or meeting; the second ends this one."""
        if self.stop_requested:
            raise_interrupt()
        self.stop_requested = True

    def load(self, part: Part) -> None:
        """Read the weights of a network that the steps run."""
        part.load()

    @abstractmethod
    def prepare(self, name: str, module: nn.Module) -> None:
        """Make a network, whose weights are read, ready for training in all processes. UserError if it cannot be."""

    def own_parameters(self, groups: Sequence[ParameterGroup]) -> Sequence[ParameterGroup]:
        """What the optimizer of this process steps, in the order of the method's parameters."""
        return groups

    def start_engine(
        self, optimizer: Optimizer, modules: nn.ModuleDict, *, accumulation: int, max_grad_norm: float
    ) -> Engine | None:
        """The engine that takes the optimizer's steps; None where the run takes them itself.

        modules: what the method trains. accumulation: micro-batches of a step. max_grad_norm: 0 for no clipping.
        """
        return None

    def run_forward(self, compute: Callable[[], _T]) -> _T:
        """Call what runs the networks, once for each micro-batch, preview or validated batch."""
        return compute()

    @property
    def shares_out_trained(self) -> bool:
        """Whether no process has all weights that train."""
        return False

    @contextmanager
    def learning_of_failures(self) -> Iterator[None]:
        """Within, what fails because another process has failed ends as ProcessFailed."""
        yield

    # ---------------------------------------------------------------- within a step

    @abstractmethod
    def reduce(self, parameters: Sequence[nn.Parameter], loss: Tensor) -> Tensor:
        """Sum every gradient, and the 0-d loss, in place; each process has divided by the real samples of all.

        A parameter that got a gradient in no process keeps none, so that the optimizer skips it as it does alone.
        Gives the facts that came with the sums, on the device, for `read_facts`.
        """

    @abstractmethod
    def read_facts(self, facts: Tensor) -> None:
        """Learn whether to stop, and that no process has failed; waits for the device. Before the optimizer's step."""

    def forget_gradients(self) -> None:
        """Drop those that the optimizer does not know; none, where each process has the whole model."""
        return

    def join_findings(self, findings: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Bools on the device, each true where it is in any process; they are alike where each has the whole model."""
        return findings

    def total_norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """The 2-norm of all gradients together, 0-d."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        if any(gradient.dtype == torch.float16 for gradient in gradients):  # whose norm may be beyond its range
            norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
            return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
        return nn.utils.get_total_norm(gradients)

    def clip(self, parameters: Sequence[nn.Parameter], maximum: float, norm: Tensor) -> None:
        """Scale the gradients down to `maximum`, where `norm`, their total norm, is above it."""
        nn.utils.clip_grads_with_norm_(parameters, maximum, norm)

    # ---------------------------------------------------------------- shared-out weights

    def own_values(self, tensor: Tensor) -> Tensor:
        """What this process has of a weight or gradient of the model."""
        return tensor

    def mark_rows(self, parameter: Tensor, tensor: Tensor) -> Tensor:
        """A tensor of the optimizer or an EMA that belongs to one of `own_parameters`, as part of the whole one.

        It has the shape of the whole, and `make_whole` gives it.
        """
        return tensor

    def take_rows(self, parameter: Tensor, whole: Tensor) -> Tensor:
        """The opposite: what this process has of the whole tensor that belongs to one of `own_parameters`."""
        return whole

    def take_like(self, own: Tensor, whole: Tensor) -> Tensor:
        """What this process has of a whole tensor, shared out as `own` is."""
        return whole

    def make_whole(self, name: str, tensor: Tensor) -> Tensor:
        """The whole tensor, on the main process within `run_on_main`, which has it under this name."""
        return tensor

    # ---------------------------------------------------------------- between steps

    @abstractmethod
    def sum(self, tensor: Tensor) -> None:
        """Sum a tensor over all processes, in place; call it right after a meeting, since its waiting has a limit."""

    @abstractmethod
    def share(self, work: Sequence[_T]) -> Sequence[_T]:
        """This process's part of the work; the parts of all are everything, once."""

    def share_rounds(self, work: Sequence[_T], key: Callable[[_T], object]) -> Iterator[tuple[_T, bool]]:
        """The same for work with forwards, and whether this process keeps its result.

        Where all move together, they do so with work of the same key, and whoever has none left repeats some.
        """
        return ((each, True) for each in self.share(work))

    def may_break_off(self) -> bool:
        """Whether to leave the rest of shared-out work, since the run stops; all ask where they move together."""
        return self.stop_requested

    @abstractmethod
    def exchange(self, value: Any = None) -> list[Any]:
        """A meeting: wait without a limit until every process is here; gives the values of all, by rank.

        value: what JSON can hold.
        """

    def run_on_main(self, work: Callable[[], _T], tensors: Mapping[str, Tensor] = EMPTY) -> _T:
        """Let the main process do the work while the others wait without a limit; all get the result.

        Its result is what JSON can hold. Where it raises, the others end with ProcessFailed.
        tensors: in all processes, those that the work makes whole, by name, beside the model's weights.
        """
        return self.exchange(work() if self.is_main else None)[0]

    @abstractmethod
    def announce_failure(self, parameters: Sequence[nn.Parameter]) -> None:
        """Let the others know that this process cannot go on, wherever they wait, also for its gradients."""


def name_device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()
