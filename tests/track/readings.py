"""A step's values as a metrics logger gets them, for tests without a step."""

from __future__ import annotations

from sfumato.track.metrics_logger import StepValues
from sfumato.track.progress import Speed


class Late:
    """A step's loss and speed, and how often they were read."""

    def __init__(self, loss: float, *, seconds: float = 0.0, images: int = 0, peak_memory: int | None = None) -> None:
        self.values = StepValues(loss=loss, speed=Speed(seconds=seconds, images=images, peak_memory=peak_memory))
        self.reads = 0

    def read(self) -> StepValues:
        self.reads += 1
        return self.values
