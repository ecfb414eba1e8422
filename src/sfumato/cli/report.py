"""`sfumato report`: the page of a run, made again from its files."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="sfumato report",
        description="Makes NAME.report.html of a run again: curves, previews, options, data.",
        allow_abbrev=False,
    )
    parser.add_argument("output_dir", type=Path, help="the run's --output_dir")
    parser.add_argument("--name", help="the run's --output_name, where the folder holds several")
    chosen = parser.parse_args(argv)
    from sfumato.track.report import remake

    print(remake(chosen.output_dir, chosen.name))
    return 0
