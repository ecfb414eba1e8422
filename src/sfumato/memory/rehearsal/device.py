"""The rehearsal device itself: tensors on it have shapes and no values; those on the CPU stay real.

But for weights, which may be more than the machine has: those that stay on the CPU have no values, either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from threading import RLock, Thread
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.optim.optimizer as torch_optimizer
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import DefaultDeviceType

from sfumato.memory.rehearsal.attention import flash_attention
from sfumato.memory.rehearsal.autocast import autocast_rules
from sfumato.memory.rehearsal.backend import DEVICE_TYPE, register_backend
from sfumato.memory.rehearsal.meter import MemoryMeter
from sfumato.memory.rehearsal.places import find_place
from sfumato.quantization.weight import QuantizedWeight

COMPARE = torch.ops.aten.equal.default
ASK_DEVICE = torch.ops.prim.device.default  # every `tensor.device`: more often than anything that computes
READ_VALUE = torch.ops.aten._local_scalar_dense.default
COPIES = {torch.ops.aten._to_copy.default: 0, torch.ops.aten.copy_.default: 1}  # operator -> argument that is copied
INDEXING = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default}


class Wait(NamedTuple):
    """A place where the program waits for the device."""

    place: str  # file:line of the innermost line of ours, or of the caller where none is
    reason: str


class UnknownValueError(RuntimeError):
    """A value of the device decides about a shape, so nothing can be rehearsed beyond it."""


@dataclass(kw_only=True)
class Rehearsal:
    """What is seen while rehearsing."""

    device: torch.device = field(default_factory=lambda: torch.device(DEVICE_TYPE))
    memory: MemoryMeter = field(default_factory=MemoryMeter)
    waits: list[Wait] = field(default_factory=list)
    gives_values: bool = True  # whether what is made on the CPU is real

    @contextmanager
    def without_values(self) -> Iterator[None]:
        """A context in which what is made on the CPU has no values and takes no memory, either."""
        before, self.gives_values = self.gives_values, False
        yield
        self.gives_values = before

    def take_waits(self) -> list[Wait]:
        """The places seen since the last call, each once."""
        places, self.waits = list(dict.fromkeys(self.waits)), []
        return places


@contextmanager
def rehearsal_device() -> Iterator[Rehearsal]:
    """A context with a device that has a GPU's rules: a tensor on the wrong device is an error, waits are noted.

    A number read from the device is 1, what is copied from it is zeros (True in bool): steps take the way of a run
    without faults. All that is changed in torch is undone at the end, but for the device's name. Raises UserError
    where torch is too old.
    """
    register_backend()
    rehearsal = Rehearsal()
    with ExitStack() as stack:
        stack.enter_context(autocast_rules())
        stack.enter_context(flash_attention())
        stack.enter_context(patch.object(torch, "tensor", _make_tensor_function(torch.tensor)))
        stack.enter_context(patch.object(torch, "Generator", _make_generator_class(torch.Generator)))
        stack.enter_context(patch.object(Tensor, "pin_memory", lambda tensor, *_: tensor))
        stack.enter_context(
            patch.object(FakeTensor, "numpy", lambda tensor: make_real_zeros(tensor).numpy(), create=True)
        )
        stack.enter_context(patch.object(Tensor, "record_stream", lambda *_: None))
        # Recomputation asks once per process which device it is for where a block gets its tensors by keyword.
        stack.enter_context(patch.object(DefaultDeviceType, "_default_device_type", DEVICE_TYPE))
        # Optimizers choose their fast implementations by the tensors' type.
        types = [*torch_optimizer._foreach_supported_types, FakeTensor]
        stack.enter_context(patch.object(torch_optimizer, "_foreach_supported_types", types))
        fake, lock = _QuickFakeMode(), RLock()

        def run_thread(thread: Thread, run: Callable[[Thread], None] = Thread.run) -> None:
            """torch's modes hold for one thread; those that the program starts meanwhile are rehearsed, too."""
            with torch.autograd.set_multithreading_enabled(False), _DeviceMode(rehearsal, fake, lock):
                run(thread)

        stack.enter_context(patch.object(Thread, "run", run_thread))
        # torch's own threads for backward are those of the devices that it knew at the first backward of the process.
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(_DeviceMode(rehearsal, fake, lock))
        yield rehearsal


def _make_tensor_function(make: Any) -> Any:
    """torch.tensor that goes over the CPU, since torch's own writes into the device's memory."""

    def tensor(data: Any, *, device: Any = None, **options: Any) -> Tensor:
        on_cpu = make(data, **options)
        return on_cpu if device is None else on_cpu.to(device)

    return tensor


def _make_generator_class(real: type[torch.Generator]) -> type:
    """torch.Generator that also takes the device, whose random numbers have no values."""

    class Meta(type):
        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, real)

    class Generator(metaclass=Meta):
        def __new__(cls, device: Any = "cpu") -> Any:
            return real("cpu" if torch.device(device).type == DEVICE_TYPE else device)

    return Generator


class _QuickFakeMode(FakeTensorMode):
    """Remembers the results of operators as its parent does, by a key that takes a fifth of the time."""

    def _prep_args_for_hash(self, result: list[Any], args: Any, state: Any, id_hashed_objects: list[Any]) -> None:
        if type(args) not in (list, tuple):
            super()._prep_args_for_hash(result, args, state, id_hashed_objects)
            return
        result.append(len(args))
        for arg in args:
            if type(arg) is FakeTensor and arg.layout == torch.strided and arg.constant is None:
                result.append(
                    (
                        arg.dtype,
                        arg.shape,
                        arg.stride(),
                        arg.fake_device,
                        arg.storage_offset(),
                        arg.untyped_storage().nbytes(),
                        arg.requires_grad,
                        arg.is_conj(),
                        arg.is_neg(),
                        arg.is_inference(),
                    )
                )
            elif type(arg) in (list, tuple):
                self._prep_args_for_hash(result, arg, state, id_hashed_objects)
            else:
                super()._prep_args_for_hash(result, (arg,), state, id_hashed_objects)


class _DeviceMode(TorchDispatchMode):
    """Sends operators that touch the device to fake tensors, leaves all others alone, and counts memory."""

    def __init__(self, rehearsal: Rehearsal, fake: FakeTensorMode, lock: RLock) -> None:
        super().__init__()
        self.rehearsal, self.fake = rehearsal, fake
        self.lock = lock  # the fake tensors' mode serves one thread at a time

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is ASK_DEVICE and isinstance(args[0], FakeTensor):
            return args[0].fake_device
        kwargs = kwargs or {}
        leaves = list(iterate_leaves((*args, *kwargs.values())))
        if any(isinstance(leaf, QuantizedWeight) for leaf in leaves):
            return NotImplemented  # its own dispatch first; what that calls comes back here
        if self.rehearsal.gives_values and not any(_has_no_values(leaf) for leaf in leaves):
            return func(*args, **kwargs)
        if func in (READ_VALUE, COMPARE):
            return self._answer(func, args[0])
        if func in INDEXING and any(_is_cpu_index(leaf) for leaf in leaves):
            self._note("copies an index to the device and waits for it")
        if func in COPIES:
            source = args[COPIES[func]]
            target = kwargs.get("device", source.device) if COPIES[func] == 0 else args[0].device
            if target.type == "meta":
                return torch.empty_like(source, device="meta", dtype=kwargs.get("dtype"))
            if source.device.type != target.type:
                self._note_copy(source, target, waits=not _is_non_blocking(func, args, kwargs))
                if target.type == "cpu":
                    return self._copy_to_cpu(func, args, kwargs)
        return self._run(func, types, args, kwargs, leaves)

    def _run(self, func: Any, types: Any, args: Any, kwargs: Any, leaves: Sequence[Any]) -> Any:
        """With fake tensors; the CPU's real ones take part, as they do on a GPU where they have no dimension."""
        if any(isinstance(leaf, Tensor) and not isinstance(leaf, FakeTensor) for leaf in leaves):
            args, kwargs = tree_map_only(Tensor, self._to_fake, (args, kwargs))
        try:
            with self.lock:  # at once, not by entering the mode: a fourth of the time
                result = self.fake.__torch_dispatch__(func, types, args, kwargs)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            what = f"{find_place()}: {func} waits for the device, since the size of its result depends on values"
            raise UnknownValueError(what) from error
        # torch moves a module's parameters by swapping them, which it refuses where somebody remembers them.
        self.fake.fake_tensor_converter.meta_converter.tensor_memo.clear()
        for leaf in iterate_leaves((result,)):
            if isinstance(leaf, Tensor) and leaf.device.type == DEVICE_TYPE:
                self.rehearsal.memory.count(leaf)
        return result

    def _to_fake(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        with self.lock, self.fake:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)

    def _answer(self, func: Any, tensor: Tensor) -> bool | int | float:
        self._note(f"reads a value of a {str(tensor.dtype).removeprefix('torch.')} tensor")
        if func is COMPARE:
            return True
        kind = float if tensor.is_floating_point() else bool if tensor.dtype == torch.bool else int
        return kind(1)

    def _copy_to_cpu(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        """A real tensor of zeros, True where it is bool."""
        if COPIES[func] == 1:
            return args[0]
        return make_real_zeros(args[0], dtype=kwargs.get("dtype"))

    def _note_copy(self, source: Tensor, target: torch.device, *, waits: bool) -> None:
        if waits:
            way = "to the device" if target.type == DEVICE_TYPE else "from the device"
            self._note(f"copies {way} and waits for it")

    def _note(self, reason: str) -> None:
        self.rehearsal.waits.append(Wait(find_place(), reason))


def make_real_zeros(tensor: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """A real tensor of zeros in the place of one without values; True where it is bool."""
    dtype = dtype or tensor.dtype
    made = torch.ones if dtype == torch.bool else torch.zeros
    return made(tuple(tensor.shape), dtype=dtype)


def iterate_leaves(values: Iterable[Any]) -> Iterator[Any]:
    """What is in arguments or results of an operator, whose only containers are lists and tuples."""
    for value in values:
        if isinstance(value, list | tuple):
            yield from iterate_leaves(value)
        else:
            yield value


def _has_no_values(leaf: Any) -> bool:
    if isinstance(leaf, torch.device):
        return leaf.type == DEVICE_TYPE
    return isinstance(leaf, FakeTensor)


def _is_cpu_index(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.device.type == "cpu" and leaf.dim() > 0


def _is_non_blocking(func: Any, args: Any, kwargs: Any) -> bool:
    return bool(kwargs.get("non_blocking") or (COPIES[func] == 1 and len(args) > 2 and args[2]))
