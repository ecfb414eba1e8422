"""`sfumato plan`: what a run will do, before it does it."""

from __future__ import annotations

from collections.abc import Sequence

from sfumato.cli.exits import run_guarded
from sfumato.cli.train import read_run_config


def main(argv: Sequence[str]) -> int:
    """Run `sfumato plan`."""
    config = read_run_config(argv, program="sfumato plan", summary="Shows what a run will do, before it does it.")
    if config is None:
        return 0
    from sfumato.tools.plan import show_plan

    return run_guarded(lambda: show_plan(config), debug=config.log.debug)
