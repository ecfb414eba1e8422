"""The steps of image sizes that the model of the options needs."""

from __future__ import annotations

from sfumato.config import Config
from sfumato.data.find.bucket_settings import SizeSteps
from sfumato.errors import Problems
from sfumato.families.detection import detect_family, read_size_steps


def detect_size_steps(config: Config, problems: Problems) -> SizeSteps:
    """What sides of images must be multiples of, as `find_data` takes it; 1 where the options name no model."""
    if config.model.pretrained_model_name_or_path is not None:
        with problems.catch():
            return read_size_steps(detect_family(config)[0])
    return read_size_steps(None)
