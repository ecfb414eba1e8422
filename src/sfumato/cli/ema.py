"""`sfumato ema`: EMA weights of any width, after training."""

from __future__ import annotations

from collections.abc import Sequence

from sfumato.cli.options_command import run_with_options
from sfumato.config.base import Options, option
from sfumato.config.optim import MAX_SIGMA_REL
from sfumato.config.values import FilePath, FilePaths


class EmaFileOptions(Options):
    """Makes a power-function EMA of another width out of those that a run saved, best of two widths
    (--ema_sigma_rel 0.05 0.1) that were saved several times.
    """

    saved: FilePaths = option((), "the run's --output_dir, or files of its EMAs", positional=True, required=True)
    sigma_rel: float = option(None, "relative width of the new EMA", required=True, gt=0, le=MAX_SIGMA_REL)
    name: str | None = option(None, "the run's --output_name, where the folder holds several runs")
    output: FilePath | None = option(None, "file to write; NAME-ema and the width, beside the others, by default")


def main(argv: Sequence[str]) -> int:
    """Run `sfumato ema`."""
    return run_with_options("sfumato ema", argv, EmaFileOptions, run)


def run(options: EmaFileOptions) -> int:
    from sfumato.tools.ema import reconstruct_ema

    print(reconstruct_ema(options.saved, options.sigma_rel, name=options.name, output=options.output))
    return 0
