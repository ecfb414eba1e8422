"""The lowest validation loss of a run so far."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(kw_only=True)
class Best:
    """The best validation so far; None before the first one. A saved state holds these fields by their names."""

    conditions: str = ""  # describes the images and timesteps; losses over other ones are not comparable
    loss: float | None = None
    step: int = 0
    before: float | None = None  # the loss before the first step
    validated: int = -1  # the step after which the last validation was

    def reset(self, conditions: str) -> None:
        """Start over with losses of other images or timesteps."""
        self.conditions, self.loss, self.step, self.before = conditions, None, 0, None

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)

    def is_beaten_by(self, loss: float) -> bool:
        return math.isfinite(loss) and (self.loss is None or loss < self.loss)

    def __str__(self) -> str:
        """Empty where no step was validated."""
        if self.loss is None:
            return ""
        before = "" if self.before is None else f", {self.before:.4f} before training"
        return f"the lowest validation loss is {self.loss:.4f}, after step {self.step}{before}"
