"""`sfumato doctor`: whether this machine is ready, and for what."""

from __future__ import annotations

from collections.abc import Sequence

from sfumato.cli.options_command import run_with_options
from sfumato.cli.plan import DeviceMemory
from sfumato.config.base import Options, option


class DoctorOptions(Options):
    """Shows the device, versions, what is optional and what it would bring, disks, caches, and what fits the card.

    Works offline and changes nothing. What would stop a run is an error.
    """

    device: DeviceMemory | None = option(None, "the memory of a card, if not of the one in this machine")


def main(argv: Sequence[str]) -> int:
    """Run `sfumato doctor`."""
    return run_with_options("sfumato doctor", argv, DoctorOptions, run)


def run(options: DoctorOptions) -> int:
    from sfumato.tools.doctor import show_doctor

    show_doctor(options.device)
    return 0
