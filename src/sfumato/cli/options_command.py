"""A command with options of its own and none of training: its help, or its work."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from sfumato.cli.help import asks_for_help, command_help
from sfumato.common.text import EMPTY
from sfumato.config.command import Theme, read_options


def run_with_options(
    program: str,
    argv: Sequence[str],
    theme: type[Theme],
    run: Callable[[Theme], int],
    *,
    aliases: Mapping[str, str] = EMPTY,
) -> int:
    """Print the help where it is asked for, else read the options and call `run`; gives the exit code.

    aliases: other spellings of options. Raises all faults of the command line together.
    """
    if asks_for_help(argv):
        print(command_help(program, theme), end="")
        return 0
    return run(read_options(argv, theme, aliases=aliases))


def show_report(lines: Sequence[str]) -> int:
    """Print the lines of a report; gives the exit code of a command that did its work."""
    print("".join(f"{line}\n" for line in lines), end="")
    return 0
