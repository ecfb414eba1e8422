"""The stages of a rehearsal: what each leaves on the device, its peak, and where it waits; as a table and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sfumato.families.part import Part
from sfumato.memory.rehearsal.device import Rehearsal, Wait
from sfumato.memory.rehearsal.meter import LiveTensor
from sfumato.methods.base import Method
from sfumato.tools.rehearsal_ranks import RankMemory, RankPeak, format_peaks

GB = 1e9
STEP = "training step"
TRAINED, FROZEN = "trained", "frozen"
LARGEST = 3  # tensors of a peak that the table lists


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of a run, in bytes."""

    name: str
    peak: int
    resident: Mapping[str, int]  # what is on the device after it
    largest: tuple[LiveTensor, ...]  # of the peak
    waits: tuple[Wait, ...]
    seconds: float = 0.0
    by_rank: tuple[RankPeak, ...] = ()  # of processes that share the model


class StageMeter(Protocol):
    """What a stage is measured with."""

    @property
    def device(self) -> torch.device: ...

    def name_networks(self, networks: Mapping[str, nn.Module]) -> None:
        """Called when networks have come or gone."""
        ...

    def start(self) -> None:
        """A stage begins."""
        ...

    def finish(self, name: str, resident: Mapping[str, Sequence[Tensor]]) -> Stage:
        """It ends. resident: the tensors of what is loaded, by name."""
        ...


@dataclass(frozen=True)
class RehearsalMeter:
    """Counts every byte of the rehearsal device."""

    rehearsal: Rehearsal

    @property
    def device(self) -> torch.device:
        return self.rehearsal.device

    def name_networks(self, networks: Mapping[str, nn.Module]) -> None:
        self.rehearsal.memory.name_modules(networks)

    def start(self) -> None:
        self.rehearsal.memory.reset_peak()
        self.rehearsal.take_waits()

    def finish(self, name: str, resident: Mapping[str, Sequence[Tensor]]) -> Stage:
        memory = self.rehearsal.memory
        sizes = {name: memory.sum_storages(tensors) for name, tensors in resident.items()}
        return Stage(
            name=name,
            peak=memory.peak,
            resident={name: size for name, size in sizes.items() if size},
            largest=tuple(memory.list_peak()[:LARGEST]),
            waits=tuple(self.rehearsal.take_waits()),
        )


@dataclass
class StageRecorder:
    """Measures stages one after another."""

    meter: StageMeter
    parts: Mapping[str, Part] = field(default_factory=dict)
    method: Method | None = None
    trained: nn.ModuleList = field(default_factory=nn.ModuleList)  # what the method adds to the parts' networks
    optimizer: Optimizer | None = None
    stages: list[Stage] = field(default_factory=list)
    ranks: RankMemory | None = None  # where what several processes need is counted, too

    @contextmanager
    def watch_loading(self) -> Iterator[Self]:
        """A context in which tensors of a network that is loaded are named at once, so also those that it makes."""
        load = Part.load

        def load_and_name(part: Part) -> None:
            load(part)
            self.name_networks()

        with patch.object(Part, "load", load_and_name):
            yield self

    def add_trained(self, method: Method) -> None:
        """List what the method has added to the networks."""
        known = {id(part.module) for part in self.parts.values()}
        self.trained.extend(module for module in method.modules.values() if id(module) not in known)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self.start_stage()
        yield
        self.end_stage(name)

    @contextmanager
    def caching_stages(self) -> Iterator[None]:
        """A context in which each network's time in memory is a stage, up to where it is unloaded."""
        unload = Part.unload

        def end_stage_and_unload(part: Part) -> None:
            if part.is_loaded:
                self.end_stage(f"caching of {part.spec.name}")
            unload(part)
            self.start_stage()

        self.start_stage()
        with patch.object(Part, "unload", end_stage_and_unload):
            yield

    def start_stage(self) -> None:
        self.name_networks()
        self.meter.start()

    def end_stage(self, name: str) -> None:
        self.name_networks()
        resident = self.list_resident()
        stage = self.meter.finish(name, resident)
        if self.ranks is not None:
            peaks = self.ranks.list_peaks(self.parts, resident.get("optimizer", ()))
            stage = replace(stage, by_rank=tuple(peaks))
        self.stages.append(stage)

    def name_networks(self) -> None:
        self.meter.name_networks(self.list_networks())

    def list_networks(self) -> dict[str, nn.Module]:
        """The networks that are loaded, and what is trained beside them."""
        loaded = {name: part.module for name, part in self.parts.items() if part.is_loaded}
        frozen = nn.ModuleList(self.method.list_frozen() if self.method else ())
        return {**loaded, TRAINED: self.trained, FROZEN: frozen}

    def list_resident(self) -> dict[str, list[Tensor]]:
        """Name -> tensors, of what is loaded."""
        tensors: dict[str, list[Tensor]] = {}
        for name, network in self.list_networks().items():
            tensors[name] = [*network.parameters(), *network.buffers()]
        if self.optimizer is not None:
            states = self.optimizer.state.values()
            tensors["optimizer"] = [x for state in states for x in state.values() if isinstance(x, Tensor)]
        return tensors


def format_stages(stages: Sequence[Stage]) -> Iterator[str]:
    """A table: stage, peak, what is resident; below each its largest tensors and its waits."""
    width = max(len(stage.name) for stage in stages)
    yield f"{'stage':{width}}  peak GB  on the device afterwards (GB)"
    for stage in stages:
        resident = ", ".join(f"{name} {size / GB:.2f}" for name, size in stage.resident.items())
        yield f"{stage.name:{width}}  {stage.peak / GB:7.2f}  {resident or 'nothing'}"
        for tensor in stage.largest:
            shape = " x ".join(map(str, tensor.shape))
            yield f"{'':{width}}  {tensor.size / GB:7.2f}  {tensor.origin}: {shape} {tensor.dtype}"
        for wait in stage.waits if stage.name == STEP else ():  # elsewhere a wait costs nothing worth a line
            yield f"{'':{width}}  waits    {wait.place} {wait.reason}"


def format_ranks(stages: Sequence[Stage]) -> Iterator[str]:
    """A table of what each of several processes needs; nothing where nobody asked for it."""
    if any(stage.by_rank for stage in stages):
        yield from format_peaks([stage.name for stage in stages], [stage.by_rank for stage in stages], GB)


def describe_stages(stages: Sequence[Stage]) -> list[dict[str, Any]]:
    """The same for JSON, sizes in bytes."""
    found: list[dict[str, Any]] = []
    for stage in stages:
        largest = [tensor._asdict() for tensor in stage.largest]
        waits = [wait._asdict() for wait in stage.waits]
        found.append(
            {
                "stage": stage.name,
                "peak": stage.peak,
                "resident": dict(stage.resident),
                "largest": largest,
                "waits": waits,
                **({"by_rank": [peak._asdict() for peak in stage.by_rank]} if stage.by_rank else {}),
            }
        )
    return found
