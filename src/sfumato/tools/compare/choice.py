"""Which checkpoint to take: a rule that can be said in three sentences, and said of each decision.

The value of a checkpoint is what it has learned, at most 1, less its drift, less what it has memorized. Checkpoints
whose value differs from the highest by no more than the standard error of the difference are as good as that one.
Of these the one with the fewest steps is taken. Without an image encoder, the one with the lowest validation loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sfumato.tools.compare.scores import Scores

NOT_WORTH_IT = "No checkpoint is clearly worth more than the model before training: the highest value is"
ADVICE = (
    "Where little was learned, train longer or faster; where drift is high, shorter, or with regularization images."
)
CHANCE = "no more than chance makes of so few images, and then fewer steps are better."


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A checkpoint as the rule sees it."""

    name: str
    step: int
    scores: Scores | None = None  # None without an image encoder
    validation_loss: float = math.nan

    @property
    def value(self) -> float:
        """nan where nothing says what it has learned."""
        if self.scores is None:
            return math.nan
        drift, memorized = [or_zero(each) for each in (self.drift, self.memorized)]
        return float(self.gains.mean()) - drift - memorized

    @property
    def gains(self) -> Tensor:
        """(N,) what each image shows of the concept, at most 1."""
        assert self.scores is not None
        return self.scores.learned.clamp(max=1)

    @property
    def losses(self) -> Tensor:
        """(M,) the drift of each neutral image, at least 0."""
        assert self.scores is not None
        return self.scores.drift.clamp(min=0)

    @property
    def drift(self) -> float:
        return math.nan if self.scores is None else float(self.losses.mean())

    @property
    def memorized(self) -> float:
        return math.nan if self.scores is None else self.scores.memorized


@dataclass(frozen=True, kw_only=True)
class CheckpointChoice:
    """The checkpoint to take, None where nothing speaks for any; and why, as sentences."""

    index: int | None
    reasons: Sequence[str]


def choose_checkpoint(checkpoints: Sequence[Judged]) -> CheckpointChoice:
    """The rule."""
    valued = [i for i, each in enumerate(checkpoints) if math.isfinite(each.value)]
    if valued:
        return choose_by_value(checkpoints, valued)
    measured = [i for i, each in enumerate(checkpoints) if math.isfinite(each.validation_loss)]
    if measured:
        index = min(measured, key=lambda i: (checkpoints[i].validation_loss, checkpoints[i].step))
        lowest = f"It has the lowest validation loss, {checkpoints[index].validation_loss:.4f}."
        return CheckpointChoice(index=index, reasons=[lowest, "What it has learned and forgotten was not measured."])
    return CheckpointChoice(
        index=None, reasons=["There is neither an image encoder with training images nor a validation loss."]
    )


def choose_by_value(checkpoints: Sequence[Judged], valued: Sequence[int]) -> CheckpointChoice:
    """The one with the fewest steps of those that are as good as the one with the highest value."""
    best = max(valued, key=lambda i: (checkpoints[i].value, -checkpoints[i].step))
    equal = [i for i in valued if is_as_good(checkpoints[i], checkpoints[best])]
    index = min(equal, key=lambda i: (checkpoints[i].step, i))
    taken, highest = checkpoints[index], checkpoints[best]
    if taken.value <= standard_error_of(taken.gains, taken.losses):
        return CheckpointChoice(
            index=None, reasons=[f"{NOT_WORTH_IT} {highest.value:.2f}, that of {highest.name}.", ADVICE]
        )
    parts = [taken.value, float(taken.gains.mean()), or_zero(taken.drift), or_zero(taken.memorized)]
    value, learned, drift, memorized = (f"{part:.2f}" for part in parts)
    first = f"Its value is {value}: learned {learned}, drift {drift}, memorized {memorized}."
    if index == best:
        return CheckpointChoice(index=index, reasons=[first, "That is the highest."])
    return CheckpointChoice(
        index=index, reasons=[first, f"The highest is {highest.value:.2f}, after step {highest.step:,}: {CHANCE}"]
    )


def is_as_good(other: Judged, best: Judged) -> bool:
    """Whether chance explains the difference of values: at most its standard error, over images with the same seeds."""
    if other is best:
        return True
    error = standard_error_of(best.gains - other.gains, best.losses - other.losses)
    return best.value - other.value <= error


def standard_error_of(gains: Tensor, losses: Tensor) -> float:
    """Of the difference of two means."""
    return math.hypot(standard_error(gains), standard_error(losses))


def standard_error(differences: Tensor) -> float:
    """Of the mean of (N,) paired differences; 0 where there are fewer than two or they are not known."""
    if len(differences) < 2 or not torch.isfinite(differences).all():
        return 0.0
    return float(differences.std() / math.sqrt(len(differences)))


def or_zero(value: float) -> float:
    return value if math.isfinite(value) else 0.0
