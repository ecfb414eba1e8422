"""`sfumato report`: the report page of a run, made again from its files."""

from __future__ import annotations

from collections.abc import Sequence

from sfumato.cli.options_command import run_with_options
from sfumato.config.base import Options, option
from sfumato.config.values import FilePath


class ReportOptions(Options):
    """Makes NAME.report.html of a run again: curves, samples, options, data."""

    output_dir: FilePath = option(None, "the run's --output_dir", positional=True, required=True)
    name: str | None = option(None, "the run's --output_name, where the folder holds several runs")


def main(argv: Sequence[str]) -> int:
    """Run `sfumato report`."""
    return run_with_options("sfumato report", argv, ReportOptions, run)


def run(options: ReportOptions) -> int:
    from sfumato.track.report import rebuild_report

    print(rebuild_report(options.output_dir, options.name))
    return 0
