"""`sfumato plan`: what a run will do, before it does it; `sfumato train` and every script do the same with --plan."""

from __future__ import annotations

from collections.abc import Sequence

from sfumato.cli.train import run_training


def main(argv: Sequence[str]) -> int:
    """Run `sfumato plan`."""
    summary = "Shows what a run will do, before it does it. Every training command does the same with --plan."
    return run_training(argv, program="sfumato plan", summary=summary, planning=True)
