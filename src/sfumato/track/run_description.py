"""The types of what a report says besides its curves: a stored description that is not of these is damaged."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=0, lt=2**53)]
UnixTime = Annotated[float, Field(ge=0, lt=1e11)]
Number = Annotated[float, Field(ge=0, lt=1e300)]


class _Table(BaseModel):
    """A JSON object; further keys are ignored."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class SessionFacts(_Table):
    """One start of the program for this run: first and last step, Unix times, state and what ended it."""

    started: UnixTime
    updated: UnixTime
    start: Count
    step: Count
    seconds_per_step: Number
    state: str
    error: str = ""
    images_per_second: Number = 0.0
    peak_memory: Count | None = None  # bytes, of recent steps


class WarningFacts(_Table):
    """A warning, the step before which it first came, and how often."""

    step: Count
    text: str
    times: Count


class SubsetFacts(_Table):
    """A folder of a dataset."""

    folder: str
    images: Count
    repeats: Count
    samples: Count
    is_reg: bool


class DatasetFacts(_Table):
    """A dataset; buckets: width, height, samples."""

    resolution: str
    batch_size: Count
    subsets: list[SubsetFacts]
    buckets: list[Annotated[list[Count], Field(min_length=3, max_length=3)]]


class RunDescription(_Table):
    """All of it. trained_parts: part, layers, parameters, learning rate. options: name, value, where it was given."""

    name: str
    model: str = ""
    checkpoint: str = ""
    method: str = ""
    trained_parts: list[Annotated[list[str | Count | Number], Field(min_length=4, max_length=4)]] = []
    total: Count
    steps_per_epoch: Count = 1
    seed: int | None = None
    device: str = ""
    clip: Number = 0.0
    options: list[Annotated[list[str], Field(min_length=3, max_length=3)]]
    data: list[DatasetFacts]
    notes: list[str] = []
    versions: dict[str, str] = {}
    sessions: list[SessionFacts]
    warnings: list[WarningFacts]
