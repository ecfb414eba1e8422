"""The device type of the rehearsal, as torch knows it: no memory, no kernels, an empty random state."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from sfumato.errors import UserError

DEVICE_TYPE = "rehearsal"
TESTED_TORCH = (2, 13)  # older versions lack parts of it or count otherwise
_UNNAMED = "privateuseone"  # torch's device type that belongs to no vendor


class RehearsedStream:
    """A stream, on which nothing takes time."""

    def __init__(self, device: object = None) -> None:
        return

    def wait_stream(self, other: RehearsedStream) -> None:
        return

    def wait_event(self, event: RehearsedEvent) -> None:
        return


class RehearsedEvent:
    """An event, which has happened as soon as it is recorded."""

    def __init__(self, *, enable_timing: bool = False) -> None:
        return

    def record(self, stream: RehearsedStream) -> None:
        return

    def synchronize(self) -> None:
        return

    def elapsed_time(self, later: RehearsedEvent) -> float:
        return 0.0


class BackendModule:
    """What torch asks of a device type: the module `torch.rehearsal`."""

    Stream = RehearsedStream
    Event = RehearsedEvent

    def current_stream(self, device: object = None) -> RehearsedStream:
        return RehearsedStream()

    def stream(self, stream: RehearsedStream) -> AbstractContextManager[None]:
        return nullcontext()

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def device(self, index: int) -> AbstractContextManager[None]:
        return nullcontext()

    def synchronize(self) -> None:
        return

    def empty_cache(self) -> None:
        return

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self) -> Tensor:
        """Nothing is drawn on this device, so there is nothing to replay."""
        return torch.zeros(0, dtype=torch.uint8)

    def set_rng_state(self, state: Tensor) -> None:
        return

    def manual_seed_all(self, seed: int) -> None:
        return

    def _is_in_bad_fork(self) -> bool:
        return False


def register_backend() -> None:
    """Make the device type known. It stays known until the process ends; torch cannot forget one.

    Raises UserError where torch is older than what this was tested with, or where another vendor's device has the
    place that torch keeps for one.
    """
    if not is_supported():
        raise UserError(
            f"a rehearsal needs torch {'.'.join(map(str, TESTED_TORCH))} or newer, this is {torch.__version__}",
            code="rehearsal-torch-too-old",
            fix="pip install --upgrade torch",
        )
    name = torch._C._get_privateuse1_backend_name()
    if name == DEVICE_TYPE:
        return
    if name != _UNNAMED:
        raise UserError(
            f"a rehearsal cannot run where torch has the device {name!r}",
            code="rehearsal-device-taken",
            fix=f"rehearse in an environment without the package that adds {name!r} to torch",
        )
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(DEVICE_TYPE, backend_module=BackendModule())


def is_supported() -> bool:
    """Whether this torch is one that the rehearsal was tested with."""
    major, minor = torch.__version__.split(".")[:2]
    return (int(major), int(minor)) >= TESTED_TORCH
