"""What the launchers call."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from sfumato.cli.main import HELP, guarded, train
from sfumato.compat.cache_tools import CACHE_TOOLS, find_cache_tool, run_cache_tool
from sfumato.compat.scripts import SCRIPTS, absent_options, find_script
from sfumato.errors import UserError


def launch(module: str, name: str) -> None:
    """Run a script of the field with this process's arguments, and end the process.

    `module` is the launcher's __name__: worker processes import the launcher again and must not start a second run.
    """
    if module == "__main__":
        sys.exit(main([name, *sys.argv[1:]]))


def main(argv: Sequence[str]) -> int:
    """`NAME [--option value ...]` -> exit code, as of the command `sfumato`."""
    return guarded(lambda: run_script(argv), debug="--debug" in argv)


def run_script(argv: Sequence[str]) -> int:
    """Run the script that the first word names with the options that follow."""
    if not argv or argv[0] in HELP:
        lines = [f"  {name}{'' if each.available else ' (not available yet)'}\n" for name, each in SCRIPTS.items()]
        lines += [f"  {name}\n" for name in CACHE_TOOLS]
        sys.stdout.write(f"usage: python -m sfumato.compat SCRIPT [--option value ...]\n\nscripts:\n{''.join(lines)}")
        return 0
    if argv[0].startswith("-"):
        raise UserError(f"the name of a script comes before {argv[0]}", fix=f"one of {', '.join(SCRIPTS)}")
    tool = find_cache_tool(argv[0])
    if tool is not None:
        return run_cache_tool(tool, argv[1:])
    script = find_script(argv[0])
    return train(
        argv[1:],
        program=f"{script.name}.py",
        summary=script.summary,
        defaults=script.presets,
        absent=absent_options(script),
    )
