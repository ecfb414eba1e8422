"""Runs a script by its name in sd-scripts: what the launchers call."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from sfumato.cli.exits import run_guarded
from sfumato.cli.help import HELP_FLAGS
from sfumato.cli.train import run_training
from sfumato.common.stop_signals import exit_process
from sfumato.compat.cache_tools import CACHE_TOOLS, find_cache_tool, run_cache_tool
from sfumato.compat.file_tools import FILE_TOOLS, find_file_tool
from sfumato.compat.image_tools import IMAGE_TOOLS, find_image_tool
from sfumato.compat.scripts import SCRIPTS, find_script, list_absent_options
from sfumato.errors import UserError


def launch(module: str, name: str) -> None:
    """Run a script with this process's arguments, and end the process.

    `module` is the launcher's __name__: worker processes import the launcher again and must not start a second run.
    """
    if module == "__main__":
        exit_process(main([name, *sys.argv[1:]]))


def main(argv: Sequence[str]) -> int:
    """`NAME [--option value ...]` -> exit code, like that of the command `sfumato`."""
    return run_guarded(lambda: run_script(argv), debug="--debug" in argv)


def list_script_names() -> list[str]:
    """The names of all scripts."""
    return [*SCRIPTS, *CACHE_TOOLS, *FILE_TOOLS, *IMAGE_TOOLS]


def run_script(argv: Sequence[str]) -> int:
    """Run the script that the first word names with the options that follow."""
    if not argv or argv[0] in HELP_FLAGS:
        lines = [f"  {name}\n" for name in list_script_names()]
        sys.stdout.write(f"usage: python -m sfumato.compat SCRIPT [--option value ...]\n\nscripts:\n{''.join(lines)}")
        return 0
    if argv[0].startswith("-"):
        raise UserError(
            f"the name of a script comes before {argv[0]}",
            code="script-name-missing",
            fix=f"one of {', '.join(SCRIPTS)}",
        )
    cache_tool, file_tool = find_cache_tool(argv[0]), find_file_tool(argv[0]) or find_image_tool(argv[0])
    if cache_tool is not None:
        return run_cache_tool(cache_tool, argv[1:])
    if file_tool is not None:
        return file_tool.start(argv[1:])
    script = find_script(argv[0])
    return run_training(
        argv[1:],
        program=f"{script.name}.py",
        summary=script.description,
        defaults=script.presets,
        absent=list_absent_options(script),
    )
