"""What each of several processes that share a model needs, by arithmetic on what one process has allocated.

A rehearsal has seen when every tensor came and went. Of the weights, gradients and optimizer states that a process
shares with N - 1 others it has the N-th part; of the rest, such as activations, it has all. Beside that there are the
blocks that are whole while they compute.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, nn

from sfumato.config import Config
from sfumato.families.part import Part
from sfumato.memory.offload import find_blocks
from sfumato.memory.precision import MIXED_PRECISION
from sfumato.memory.rehearsal.meter import MemoryMeter
from sfumato.quantization.weight import list_stored

WHOLE_BLOCKS = 2  # the one that computes, and the one that is fetched meanwhile
OPTIMIZER_CODE = "optim/"  # where what the optimizer makes in a step comes from
ZERO_GRADIENTS = "training/step_owner.py"  # where those come from that the optimizer's state was made with
MASTER_BYTES = 4  # of the copy in float32 of a weight that DeepSpeed keeps in half precision


class RankPeak(NamedTuple):
    """Of one process among `processes`, in bytes."""

    processes: int
    peak: int


class SharedKinds(NamedTuple):
    """Of which kinds of tensors a process has a part only; the other kinds it has whole."""

    weights: bool
    gradients: bool
    state: bool


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Peaks of processes that share a model as the options say.

    counts: numbers of processes. computing: bytes of a trained weight while it is whole. has_masters: whether it is in
    that precision otherwise, too, beside a copy in float32 that counts as state. state_on_host, weights_on_host: what
    waits in main memory.
    """

    memory: MemoryMeter
    shares: SharedKinds
    counts: Sequence[int]
    computing: int = MASTER_BYTES
    has_masters: bool = False
    state_on_host: bool = False
    weights_on_host: bool = False
    parts: Mapping[str, Part] = field(default_factory=dict)

    def list_peaks(self, parts: Mapping[str, Part], optimizer: Sequence[Tensor]) -> list[RankPeak]:
        """Of the stage that ends. optimizer: the tensors of its state."""
        shared = {name: part for name, part in parts.items() if is_shared(part)}
        weights = [weight for part in shared.values() for weight in part.module.parameters()]
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        whole = sum(self.count_whole(part) for part in shared.values()) if self.shares.weights else 0
        casts = self.memory.list_casts(list_weight_names(shared))
        peaks: list[RankPeak] = []
        for count in self.counts:
            held = self.list_parts(count, weights, gradients, optimizer) | dict.fromkeys(casts, 0.0)
            peaks.append(RankPeak(count, whole + self.memory.replay(held)))
        return peaks

    def list_parts(
        self, count: int, weights: Sequence[nn.Parameter], gradients: Sequence[Tensor], optimizer: Sequence[Tensor]
    ) -> dict[int, float]:
        """Number of a storage -> the part of its bytes that a process has."""
        parts: dict[int, float] = {}
        of_state = 0.0 if self.state_on_host else 1 / count
        if self.shares.state:
            parts |= dict.fromkeys(self.memory.find_numbers(optimizer), of_state)
            parts |= dict.fromkeys(self.memory.list_from(OPTIMIZER_CODE), of_state)
        if self.shares.gradients:
            offloaded = self.weights_on_host or self.state_on_host
            found = self.memory.find_numbers(gradients) | self.memory.list_from(ZERO_GRADIENTS)
            parts |= dict.fromkeys(found, 0.0 if offloaded else 1 / count)
        of_weight = 1 / count if self.shares.weights else 1.0
        of_weight = 0.0 if self.weights_on_host else of_weight
        for weight in weights:
            own = of_weight
            if self.has_masters and weight.requires_grad:
                own = (of_weight * self.computing + of_state * MASTER_BYTES) / weight.element_size()
            parts |= dict.fromkeys(self.memory.find_numbers(list_stored([weight])), own)
        return parts

    def count_whole(self, part: Part) -> int:
        """Bytes of what is whole at the worst moment: two blocks, the gradients of one, and what is in no block."""
        in_blocks: set[int] = set()
        largest = largest_gradients = 0
        for block in find_blocks(part.module, part.spec.blocks).values():
            in_blocks |= {id(weight) for weight in block.parameters()}
            largest = max(largest, sum(self.count_gathered(weight) for weight in block.parameters()))
            trained = [weight for weight in block.parameters() if weight.requires_grad]
            largest_gradients = max(largest_gradients, sum(map(self.count_gathered, trained)))
        rest = [weight for weight in part.module.parameters() if id(weight) not in in_blocks]
        return WHOLE_BLOCKS * largest + largest_gradients + sum(map(self.count_gathered, rest))

    def count_gathered(self, weight: nn.Parameter) -> int:
        """Bytes of a weight while it is whole, in the precision that computes."""
        size = weight.element_size()
        return weight.numel() * (min(size, self.computing) if weight.requires_grad else size)


def list_weight_names(parts: Mapping[str, Part]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name of a module, shape) of each weight, whose copies in the precision that computes are the whole blocks'."""
    for name, part in parts.items():
        for weight_name, weight in part.module.named_parameters():
            yield f"{name}.{weight_name}".rpartition(".")[0], tuple(weight.shape)


def is_shared(part: Part) -> bool:
    """Whether processes share it: the network that is trained or is large, the denoiser."""
    return part.is_loaded and (part.spec.name == "denoiser" or any(w.requires_grad for w in part.module.parameters()))


def make_rank_memory(config: Config, memory: MemoryMeter, counts: Sequence[int]) -> RankMemory | None:
    """None where nobody asks, and where each process has the whole model."""
    options, mixed = config.processes, config.memory.mixed_precision
    if not counts or not (options.fsdp or options.deepspeed):
        return None
    computing = MASTER_BYTES if mixed == "no" else MIXED_PRECISION[mixed].itemsize
    if options.fsdp:
        return RankMemory(
            memory=memory,
            shares=SharedKinds(weights=True, gradients=True, state=True),
            counts=counts,
            computing=computing,
            state_on_host=options.fsdp_offload_params,
            weights_on_host=options.fsdp_offload_params,
        )
    stage = options.zero_stage
    return RankMemory(
        memory=memory,
        shares=SharedKinds(weights=stage >= 3, gradients=stage >= 2, state=stage >= 1),
        counts=counts,
        computing=computing,
        has_masters=mixed != "no",
        state_on_host=options.offload_optimizer_device is not None,
        weights_on_host=options.offload_param_device is not None,
    )


def format_peaks(names: Sequence[str], peaks: Sequence[Sequence[RankPeak]], gigabyte: float) -> Iterator[str]:
    """A table: stage, and its peak for each number of processes."""
    width = max(map(len, names))
    counts = [peak.processes for peak in next(filter(None, peaks))]
    yield f"{'each process has at most (GB)':{width}}  " + "  ".join(f"of {count:>2}" for count in counts)
    for name, row in zip(names, peaks, strict=True):
        yield f"{name:{width}}  " + "  ".join(f"{peak.peak / gigabyte:5.2f}" for peak in row)
