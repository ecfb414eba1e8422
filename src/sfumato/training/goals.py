"""What a run's loss compares in the place of noised images, for methods that have something else."""

from __future__ import annotations

from sfumato.config import Config
from sfumato.loss import Goal
from sfumato.training.concept_loss import make_concept_goal
from sfumato.training.pair_loss import PairGoal


def make_goal(config: Config) -> Goal | None:
    """None for noised images."""
    return PairGoal() if config.run.has_pairs else make_concept_goal(config.leco)
