"""Options of running averages of the weights."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field

from sfumato.config.base import Options, Shown, option
from sfumato.config.values import as_tuple

WIDEST = 0.28  # a power average of relative width 0.289 counts every step alike, and none is wider


def different(widths: tuple[float, ...]) -> tuple[float, ...]:
    """Widths name files, with six digits."""
    if len({f"{width:g}" for width in widths}) < len(widths):
        raise ValueError("has the same width twice")
    return widths


Widths = Annotated[
    tuple[Annotated[float, Field(gt=0, le=WIDEST)], ...],
    BeforeValidator(as_tuple),
    AfterValidator(different),
    Shown("X ..."),
]


class EmaOptions(Options):
    """Averages of the weights"""

    ema_decay: float | None = option(
        None, "save a running average of the weights, too, of which each step keeps this share, as 0.999", gt=0, lt=1
    )
    ema_sigma_rel: Widths = option((), "save power-function averages of these relative widths, too, as 0.05 0.1")
    ema_on_cpu: bool = option(False, "keep the averages in main memory: slower, and no room on the device")
    evaluate_with_ema: bool = option(False, "make samples, and validate, with the first of the averages")

    @property
    def averages(self) -> int:
        """How many running averages are kept."""
        return (self.ema_decay is not None) + len(self.ema_sigma_rel)
