"""Several processes whose steps DeepSpeed's engine takes: ZeRO (Rajbhandari et al. 2020), stages 1 to 3.

Stage 1 shares out the optimizer's state and the float32 copies of trained weights, stage 2 their gradients, too, stage
3 the weights themselves. The engine owns the step: it scales, sums, clips and steps, in its own precision. Weights and
optimizer state are gathered from it tensor by tensor, so that files and states are those of every other strategy.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sfumato.common.text import join_lines
from sfumato.config import ProcessOptions
from sfumato.errors import UserError
from sfumato.families.part import Part
from sfumato.parallel.base import Engine
from sfumato.parallel.gathering import Gathering
from sfumato.parallel.meeting import Meetings
from sfumato.parallel.zero_config import make_engine_config
from sfumato.parallel.zero_state import EngineTensor, ZeroState

_T = TypeVar("_T")
FROZEN_TOO = "denoiser"  # which is shared out in stage 3 whether it trains or not


class Zero(Gathering):
    """This process and others, whose steps are the engine's."""

    shared_kinds: ClassVar[tuple[type[Tensor], ...]] = (EngineTensor,)

    def __init__(
        self, meetings: Meetings, device: torch.device, options: ProcessOptions, *, computed: torch.dtype | None = None
    ) -> None:
        """computed: the dtype of mixed precision, which the engine's weights then have; None: their own."""
        super().__init__(meetings, device)
        self.options, self.computed = options, computed
        self.deepspeed = import_deepspeed(device)
        self.loaded: list[Part] = []
        self.engine: ZeroEngine | None = None

    @property
    def shares_weights(self) -> bool:
        """Whether weights are whole only while they compute."""
        return self.options.zero_stage == 3

    @property
    def moves_together(self) -> bool:
        return self.shares_weights

    @property
    def shares_out_trained(self) -> bool:
        return True

    def load(self, part: Part) -> None:
        part.load()
        self.loaded.append(part)

    def start_engine(
        self, optimizer: Optimizer, modules: nn.ModuleDict, *, accumulation: int, max_grad_norm: float
    ) -> Engine:
        config = make_engine_config(
            self.options, computed=self.computed, accumulation=accumulation, max_grad_norm=max_grad_norm
        )
        trained = [part for part in self.loaded if any(p.requires_grad for p in part.module.parameters())]
        shared = [part for part in self.loaded if part in trained or part.spec.name == FROZEN_TOO]
        known = {part.module for part in shared}
        root = Root([*(part.module for part in shared), *(each for each in modules.values() if each not in known)])
        parameters = [parameter for parameter in root.parameters() if parameter.requires_grad]
        exact = keep_exact(parameters, self.computed)
        state = ZeroState(optimizer)
        if "nvme" in (self.options.offload_optimizer_device, self.options.offload_param_device):
            build_disk_access()
        with fault_of_options():
            state.engine = self.deepspeed.initialize(
                model=root, optimizer=optimizer, config=config, dist_init_required=False, model_parameters=parameters
            )[0]
        state.set_weights(exact)
        for part in trained:
            self.parts[part.spec.name] = part
            part.make_whole = self.gather_by_name(part)
        for module in root.modules():
            if any(parameter is not None for parameter in module._parameters.values()):
                module.register_state_dict_post_hook(partial(state.mark_weights))
        self.engine = ZeroEngine(state, self.processes)
        return self.engine

    def run_forward(self, compute: Callable[[], _T]) -> _T:
        """Through the engine's root, whose hooks make weights whole. Autocast is entered within, not around it."""
        return compute() if self.engine is None else self.engine.forward(compute)

    def gather(self, shared: Tensor) -> Tensor:
        assert self.engine is not None
        assert isinstance(shared, EngineTensor)
        return self.engine.state.gather(shared)


class Root(nn.Module):
    """All that the engine knows of; its forward is whatever it is asked to compute."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(modules)

    def forward(self, compute: Callable[[], _T]) -> _T:
        return compute()


class ZeroEngine(Engine):
    """One engine of DeepSpeed, which averages: losses, divided by the samples of all processes, get the factor."""

    def __init__(self, state: ZeroState, processes: int) -> None:
        self.state, self.processes = state, processes
        self.engine = state.engine

    def forward(self, compute: Callable[[], _T]) -> _T:
        return self.engine(compute) if torch.is_grad_enabled() else self.engine.module(compute)

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(is_last)
        self.engine.backward(loss * self.processes, scale_wrt_gas=False)
        if not is_last:
            self.engine.step()  # which counts

    def step(self) -> tuple[float, bool]:
        self.engine.step()
        taken = not self.engine.optimizer.overflow
        norm = self.engine.get_global_grad_norm()
        return float("inf") if norm is None else float(norm), taken

    def forget_gradients(self) -> None:
        self.engine.optimizer.zero_grad()

    @property
    def loss_scale(self) -> float:
        return float(self.engine.optimizer.loss_scale)


def keep_exact(parameters: Sequence[nn.Parameter], computed: torch.dtype | None) -> dict[nn.Parameter, Tensor]:
    """In main memory, the weights that lose something in the engine's precision, from which it would start."""
    if computed is None:
        return {}
    return {p: p.detach().cpu().clone() for p in parameters if not torch.equal(p.detach().to(computed).to(p.dtype), p)}


@contextlib.contextmanager
def fault_of_options() -> Iterator[None]:
    """What the engine refuses, it refuses because of the options or the machine."""
    try:
        yield
    except (ValueError, AssertionError) as error:
        raise UserError(
            f"DeepSpeed cannot be set up: {join_lines(error)}",
            code="deepspeed-refuses",
            fix="change the options that it names, or train with --fsdp",
        ) from error


def build_disk_access() -> None:
    """Let DeepSpeed compile what reads and writes an NVMe disk, once on each machine: a minute or two."""
    builder = importlib.import_module("deepspeed.accelerator").get_accelerator().create_op_builder("AsyncIOBuilder")
    try:
        builder.load(verbose=False)
    except (RuntimeError, OSError, ImportError) as error:
        raise UserError(
            f"DeepSpeed cannot compile what it reads and writes an NVMe disk with: {join_lines(error)}",
            code="deepspeed-nvme-unavailable",
            fix="apt-get install libaio-dev ninja-build, or offload to the CPU: --offload_optimizer_device cpu",
        ) from error


def import_deepspeed(device: torch.device) -> Any:
    """DeepSpeed, which reads from the environment what it computes on. UserError where it is not installed."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        deepspeed = importlib.import_module("deepspeed")
    except ImportError as error:
        raise UserError(
            f"--deepspeed needs the package deepspeed, which cannot be imported: {error}",
            code="deepspeed-missing",
            fix='pip install "sfumato[deepspeed]"',
        ) from error
    if device.type == "cpu":  # gloo sums as well as what would be compiled first
        importlib.import_module("deepspeed.ops").__compatible_ops__["deepspeed_shm_comm"] = False
    importlib.import_module("deepspeed.utils.logging").logger.setLevel(logging.WARNING)
    return deepspeed
