"""`sfumato ema`: averages of the weights of any width, after training."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from sfumato.errors import UserError


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="sfumato ema",
        description="Makes a power-function average of another width out of those that a run saved, best of two "
        "(--ema_sigma_rel 0.05 0.1) saved several times.",
        allow_abbrev=False,
    )
    parser.add_argument("saved", nargs="+", type=Path, help="the run's --output_dir, or files of its averages")
    parser.add_argument("--sigma_rel", type=float, required=True, help="relative width of the new one, 0 to 0.28")
    parser.add_argument("--name", help="the run's --output_name, where the folder holds several")
    parser.add_argument("--output", type=Path, help="file to write; without it NAME-ema + the width, beside the others")
    chosen = parser.parse_args(argv)
    from sfumato.config.ema import WIDEST

    if not 0 < chosen.sigma_rel <= WIDEST:
        raise UserError(f"--sigma_rel {chosen.sigma_rel:g} is no width of a power function", fix=f"0 to {WIDEST}")
    from sfumato.tools.ema import make_average

    print(make_average(chosen.saved, chosen.sigma_rel, name=chosen.name, output=chosen.output))
    return 0
