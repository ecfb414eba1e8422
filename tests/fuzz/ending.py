"""A target that ends its process, for a test of the harness; `make fuzz` does not have it."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

from fuzz.target import Setup, target


@target()
def ending(_folder: Path) -> Setup:
    """Ends the process at the third reading: the good input is the first."""
    readings = itertools.count(1)
    return Setup(seeds=[b"good"], read=lambda _: os._exit(7) if next(readings) == 3 else None)
