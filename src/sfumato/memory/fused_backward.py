"""The fused backward pass: weights take their step while backward runs, and their gradients are gone at once.

Parameters are in buckets; a bucket steps when the gradients of all its parameters are there. Each gradient is clipped
by its own norm, since that of all is known only when backward is over; sd-scripts does the same. A bucket with a
gradient that is not finite is skipped, and all are where the loss is not finite.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sfumato.memory.offload import BlockOffload
from sfumato.optim.half_stepper import HalfStepper, move_state
from sfumato.optim.skipping import step_where


@dataclass(kw_only=True, eq=False)
class Bucket:
    """Parameters that step together."""

    parameters: Sequence[nn.Parameter]
    ready: list[nn.Parameter] = field(default_factory=list)  # those whose gradients are there


class FusedBackward:
    """Steps an optimizer that treats each parameter on its own."""

    def __init__(
        self,
        optimizer: Optimizer,
        buckets: Sequence[Sequence[nn.Parameter]],
        *,
        stepper: HalfStepper | None,
        offload: BlockOffload | None,
        max_norm: float,
    ) -> None:
        """buckets: of all parameters, each once; those of blocks in main memory are alone. max_norm: 0: no clipping."""
        self.optimizer, self.stepper, self.offload, self.max_norm = optimizer, stepper, offload, max_norm
        self.buckets = [Bucket(parameters=parameters) for parameters in buckets]
        self.stand_ins: Mapping[Tensor, nn.Parameter] = {} if offload is None else offload.stand_ins
        self._loss: Tensor | None = None  # of the step that runs; None outside of steps
        self._accumulates = False  # whether gradients of the backward that runs wait for another one
        self._waiting: set[nn.Parameter] = set()  # those with such gradients
        self._step = 0
        self._norms: list[Tensor] = []
        for bucket in self.buckets:
            for parameter in bucket.parameters:
                leaf = self.stand_ins.get(parameter, parameter)
                leaf.register_post_accumulate_grad_hook(partial(self._collect, bucket, parameter))
        if stepper is not None:
            stepper.add_copies(self.stand_ins)
        self._place_state()

    def accumulate(self) -> None:
        """Call before a backward whose gradients wait for that of the step's last batch."""
        self._accumulates = True

    def start(self, step: int, loss: Tensor) -> None:
        """Call before the backward of the step with this index, of its last batch. loss: of all of them, 0-d."""
        self._accumulates = False
        self._step, self._loss, self._norms = step, loss.detach(), []

    def finish(self) -> Tensor:
        """Call after backward: the rest takes its step. Gives the norm of all gradients before clipping, 0-d."""
        assert self._loss is not None
        for bucket in self.buckets:
            bucket.ready += [parameter for parameter in bucket.parameters if parameter in self._waiting]
            if bucket.ready:
                self._take_step(bucket)
        self._waiting.clear()
        norms = [norm.to(self._loss.device) for norm in self._norms]
        self._loss = None
        return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())

    @torch.no_grad()
    def make_state(self) -> None:
        """Let the optimizer make its state, by a step whose gradients are 0."""
        device = next(iter(self.stand_ins.values()), self.buckets[0].parameters[0]).device
        self.start(0, torch.zeros((), device=device))
        for bucket in self.buckets:
            for parameter in bucket.parameters:
                leaf = self.stand_ins.get(parameter, parameter)
                if leaf is not parameter:
                    leaf.data = torch.zeros(parameter.shape, dtype=parameter.dtype, device=device)
                leaf.grad = torch.zeros_like(leaf)
            bucket.ready = list(bucket.parameters)
            self._take_step(bucket, visits=False)
            for parameter in bucket.parameters:
                if parameter in self.stand_ins:
                    self.stand_ins[parameter].data = torch.empty(0, dtype=parameter.dtype, device=device)
        self.finish()

    def _collect(self, bucket: Bucket, parameter: nn.Parameter, leaf: Tensor) -> None:
        """A gradient is there."""
        if self._accumulates:
            self._waiting.add(parameter)
            return
        self._waiting.discard(parameter)
        if self._loss is None:  # a backward that is no step's: what is left says whether the gradient was finite
            assert leaf.grad is not None
            norm = torch.linalg.vector_norm(leaf.grad, math.inf)
            leaf.grad = None
            parameter.grad = norm.to(parameter).expand(parameter.shape)
            return
        bucket.ready.append(parameter)
        if len(bucket.ready) == len(bucket.parameters):
            self._take_step(bucket)

    @torch.no_grad()
    def _take_step(self, bucket: Bucket, *, visits: bool = True) -> None:
        assert self._loss is not None
        leaves = {parameter: self.stand_ins.get(parameter, parameter) for parameter in bucket.ready}
        bucket.ready = []
        norms: list[Tensor] = []
        for leaf in leaves.values():
            assert leaf.grad is not None
            norms.append(torch.linalg.vector_norm(leaf.grad, dtype=torch.float32))
            if self.max_norm > 0:
                nn.utils.clip_grads_with_norm_([leaf], self.max_norm, norms[-1])
        self._norms += norms
        taken = torch.isfinite(self._loss + torch.stack(norms).sum())
        # Weights of a file's one tensor count their changes together, and autograd would take one's step for another's.
        with self._stepping(leaves), torch.autograd.grad_mode._unsafe_preserve_version_counter(tuple(leaves.values())):
            step = self.optimizer.step if self.stepper is None else partial(self.stepper.step, self._step)
            step_where(taken, self.optimizer, step)
        for (parameter, leaf), norm in zip(leaves.items(), norms, strict=True):
            leaf.grad = None
            parameter.grad = make_trace(parameter, norm)
            if leaf is not parameter and visits and self.offload is not None:
                self.offload.mark_changed()

    @contextmanager
    def _stepping(self, leaves: Mapping[nn.Parameter, nn.Parameter]) -> Iterator[None]:
        """A context in which these are the optimizer's only parameters."""
        groups = self.optimizer.param_groups
        members = [group["params"] for group in groups]
        moved = {parameter: leaf for parameter, leaf in leaves.items() if leaf is not parameter}
        move_state(self.optimizer.state, moved)
        try:
            for group in groups:
                group["params"] = [leaves[parameter] for parameter in group["params"] if parameter in leaves]
            yield
        finally:
            for group, parameters in zip(groups, members, strict=True):
                group["params"] = parameters
            move_state(self.optimizer.state, {leaf: parameter for parameter, leaf in moved.items()})

    def _place_state(self) -> None:
        """A restored state is where its parameter is; that of a parameter in main memory belongs to the device."""
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if parameter not in self.stand_ins:
                    continue
                state = self.optimizer.state.get(parameter, {})
                for name, value in state.items():
                    if isinstance(value, Tensor) and (name != "step" or group.get("fused")):
                        state[name] = value.to(self.stand_ins[parameter].device)


def make_trace(parameter: nn.Parameter, norm: Tensor) -> Tensor:
    """In the place of a gradient that is gone: one number for all, 0 where the gradient was 0."""
    if norm.device != parameter.device:
        norm = torch.ones((), device=parameter.device)  # it would have to be waited for
    return norm.sign().to(parameter.dtype).expand(parameter.shape)


def divide(parameters: Sequence[nn.Parameter], count: int) -> Iterator[Sequence[nn.Parameter]]:
    """The parameters in `count` pieces with about as many numbers each, in their order."""
    share = math.ceil(sum(parameter.numel() for parameter in parameters) / count)
    piece: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        piece.append(parameter)
        size += parameter.numel()
        if size >= share:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece
