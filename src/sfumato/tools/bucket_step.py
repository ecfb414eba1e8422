"""The step of bucket sizes that the model of the options needs."""

from __future__ import annotations

from sfumato.config import Config
from sfumato.errors import Problems
from sfumato.families.detection import detect_family


def read_bucket_step(config: Config, problems: Problems) -> int:
    """What bucket sides of the model must be multiples of, in pixels; 1 where the options name no model."""
    if config.model.pretrained_model_name_or_path is not None:
        with problems.catch():
            return detect_family(config)[0].bucket_step
    return 1
