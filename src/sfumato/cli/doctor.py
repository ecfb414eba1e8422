"""`sfumato doctor`: whether this machine is ready, and for what."""

from __future__ import annotations

from collections.abc import Sequence

from sfumato.cli.help import asks_for_help, command_help
from sfumato.cli.plan import DeviceMemory
from sfumato.config.base import Options, option
from sfumato.config.command import read_options


class DoctorOptions(Options):
    """Shows the device, versions, what is optional and what it would bring, disks, caches, and what fits the card.

    Works offline and changes nothing. What would stop a run is an error.
    """

    device: DeviceMemory | None = option(None, "the memory of a card, if not of the one in this machine")


def main(argv: Sequence[str]) -> int:
    """Run `sfumato doctor`."""
    if asks_for_help(argv):
        print(command_help("sfumato doctor", DoctorOptions), end="")
        return 0
    options = read_options(argv, DoctorOptions)
    from sfumato.tools.doctor import show_doctor

    show_doctor(options.device)
    return 0
