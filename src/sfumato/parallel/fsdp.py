"""Several processes that share out the denoiser's weights by rows: torch's FSDP2 (Zhao et al. 2023, "PyTorch FSDP").

A block's weights are whole while it computes, in forward and again in backward; its gradients are summed and shared out
at once, after each micro-batch, so that no process ever has the whole model or all of its gradients. Everything else,
adapters and text encoders among it, is whole in each process, and its gradients are summed as without FSDP.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from sfumato.errors import UserError
from sfumato.families.part import Part
from sfumato.formats.keymap import matches
from sfumato.optim.groups import ParameterGroup
from sfumato.parallel.gathering import Gathering
from sfumato.parallel.meeting import Meetings
from sfumato.parallel.rows import as_rows_of, gather_rows, slice_rows

SHARDED_PART = "denoiser"


class Fsdp(Gathering):
    """This process and others, each with its rows of the denoiser's weights."""

    shared_kinds: ClassVar[tuple[type[Tensor], ...]] = (DTensor,)

    def __init__(
        self, meetings: Meetings, device: torch.device, *, computed: torch.dtype | None = None, offload: bool = False
    ) -> None:
        """computed: the dtype of mixed precision, in which weights are sent and computed with; None: their own.

        offload: whether the rows, their gradients and the optimizer's state are in main memory.
        """
        super().__init__(meetings, device)
        check_torch()
        self.mesh: DeviceMesh = init_device_mesh(device.type, (meetings.processes,))
        self.precision = MixedPrecisionPolicy(
            param_dtype=computed, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        pins = device.type == "cuda"
        self.offload: OffloadPolicy = CPUOffloadPolicy(pin_memory=pins) if offload else OffloadPolicy()
        self.home = torch.device("cpu") if offload else device  # of the rows
        self.shared: dict[Tensor, DTensor] = {}  # what the optimizer steps -> the model's parameter

    @property
    def moves_together(self) -> bool:
        return True

    # ---------------------------------------------------------------- loading

    def load(self, part: Part) -> None:
        """Built without memory, shared out, filled: of each tensor that is read this process keeps its rows."""
        if part.spec.name != SHARDED_PART or part.is_loaded:
            part.load()
            return
        self.shard(part.module, part.spec.blocks)
        names = {name for name, _ in part.module.named_parameters()}
        part.load(lambda name, tensor: self._keep_rows(tensor) if name in names else tensor)
        settle_rows(part.module)
        part.make_whole = self.gather_by_name(part)
        self.parts[part.spec.name] = part

    def shard(self, module: nn.Module, blocks: Sequence[str]) -> None:
        """Each block is whole by itself, then what is outside of them. blocks: patterns on their paths."""
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")  # no network adds to it
        pattern = "|".join(blocks)
        inner = [child for path, child in module.named_modules() if blocks and matches(pattern, path)]
        for each in (*inner, module):
            fully_shard(
                each,
                mesh=self.mesh,
                reshard_after_forward=True,  # else weights of an evaluation would be there in the next step
                mp_policy=self.precision,
                offload_policy=self.offload,
            )
            shared = cast(FSDPModule, each)
            shared.set_gradient_divide_factor(1.0)  # losses are divided by the samples of all
            shared.set_force_sum_reduction_for_comms(True)  # gloo has no other sum with a factor

    def _keep_rows(self, tensor: Tensor) -> Tensor:
        own = slice_rows(tensor, self.rank, self.processes).to(self.home, copy=True)
        return as_rows_of(
            own.pin_memory() if own.numel() and self.home != self.device else own, tensor.shape, self.mesh
        )

    def prepare(self, name: str, module: nn.Module) -> None:
        """Compare what each has whole; rows are of the same file, whose other tensors are compared."""
        if name not in self.parts:
            super().prepare(name, module)

    def own_parameters(self, groups: Sequence[ParameterGroup]) -> Sequence[ParameterGroup]:
        """A plain tensor for each parameter that is shared out, which looks at its rows."""
        own: list[ParameterGroup] = []
        for group in groups:
            parameters: list[nn.Parameter] = []
            for parameter in group.parameters:
                local = parameter
                if isinstance(parameter, DTensor):
                    local = nn.Parameter(parameter.to_local().detach())
                    self.shared[local] = parameter
                parameters.append(local)
            own.append(replace(group, parameters=parameters))
        return own

    @property
    def shares_out_trained(self) -> bool:
        return bool(self.shared)

    # ---------------------------------------------------------------- within a step

    def forget_gradients(self) -> None:
        for parameter in self.shared.values():
            parameter.grad = None

    def reduce(self, parameters: Sequence[nn.Parameter], loss: Tensor) -> Tensor:
        """Those of shared-out parameters were summed in backward."""
        for own, parameter in self.shared.items():
            gradient = parameter.grad
            assert gradient is None or isinstance(gradient, DTensor)
            own.grad = None if gradient is None else gradient.to_local()
        return super().reduce([parameter for parameter in parameters if parameter not in self.shared], loss)

    def total_norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        squares = [torch.zeros((), device=self.device), torch.zeros((), device=self.device)]
        for parameter in parameters:
            if parameter.grad is not None:
                wide = torch.promote_types(parameter.grad.dtype, torch.float32)
                norm = torch.linalg.vector_norm(parameter.grad, dtype=wide)
                index = int(parameter in self.shared)
                squares[index] = squares[index] + norm.square().to(self.device, non_blocking=True)
        whole, rows = squares
        self.sum(rows)
        return (whole + rows).sqrt()

    def join_findings(self, findings: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if not findings or not self.shared:
            return findings
        counts = torch.stack([found.to(self.device) for found in findings.values()]).float()
        self.sum(counts)
        return dict(zip(findings, (counts > 0).unbind(), strict=True))

    # ---------------------------------------------------------------- shared-out weights

    def own_values(self, tensor: Tensor) -> Tensor:
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def mark_rows(self, parameter: Tensor, tensor: Tensor) -> Tensor:
        if parameter not in self.shared or tensor.shape != parameter.shape:
            return tensor
        return as_rows_of(tensor, self.shared[parameter].shape, self.mesh)

    def take_rows(self, parameter: Tensor, whole: Tensor) -> Tensor:
        if parameter not in self.shared or whole.shape != self.shared[parameter].shape:
            return whole
        return slice_rows(whole, self.rank, self.processes)

    def take_like(self, own: Tensor, whole: Tensor) -> Tensor:
        if not isinstance(own, DTensor):
            return whole
        rows = slice_rows(whole, self.rank, self.processes).to(own.to_local())
        return as_rows_of(rows, whole.shape, self.mesh)

    def gather(self, shared: Tensor) -> Tensor:
        assert isinstance(shared, DTensor)
        return gather_rows(shared, self.device)


def check_torch() -> None:
    """Raise UserError where this torch's FSDP2 cannot sum gradients as they are."""
    if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        raise UserError(
            f"--fsdp needs a newer torch than {torch.__version__}, whose FSDP2 only averages gradients",
            code="fsdp-torch-too-old",
            fix="pip install --upgrade torch, or remove --fsdp",
        )


def settle_rows(module: nn.Module) -> None:
    """Let FSDP2 take the rows over now, which it pads where they do not divide, and else would at the first forward."""
    module._apply(lambda tensor: tensor)
