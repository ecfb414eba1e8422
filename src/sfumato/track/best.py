"""The lowest validation loss of a run so far."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(kw_only=True)
class Best:
    """Plain numbers, None before the first validation; a saved state holds them."""

    asked: str = ""  # of which images at which times, in words; losses of other ones cannot be compared
    loss: float | None = None
    step: int = 0
    before: float | None = None  # the loss of the model as it was before the first step

    def beaten_by(self, loss: float) -> bool:
        return math.isfinite(loss) and (self.loss is None or loss < self.loss)

    def __str__(self) -> str:
        """Empty where no step was validated."""
        if self.loss is None:
            return ""
        before = "" if self.before is None else f", {self.before:.4f} before training"
        return f"the lowest validation loss is {self.loss:.4f}, after step {self.step}{before}"
