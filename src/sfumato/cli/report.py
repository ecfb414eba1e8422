"""`sfumato report`: the report page of a run, made again from its files."""

from __future__ import annotations

from collections.abc import Sequence

from sfumato.cli.help import asks_for_help, command_help
from sfumato.config.base import Options, option
from sfumato.config.command import read_options
from sfumato.config.values import FilePath


class ReportOptions(Options):
    """Makes NAME.report.html of a run again: curves, samples, options, data."""

    output_dir: FilePath = option(None, "the run's --output_dir", positional=True, required=True)
    name: str | None = option(None, "the run's --output_name, where the folder holds several runs")


def main(argv: Sequence[str]) -> int:
    """Run `sfumato report`."""
    if asks_for_help(argv):
        print(command_help("sfumato report", ReportOptions), end="")
        return 0
    options = read_options(argv, ReportOptions)
    from sfumato.track.report import rebuild_report

    print(rebuild_report(options.output_dir, options.name))
    return 0
