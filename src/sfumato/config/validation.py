"""Options of the validation loss."""

from __future__ import annotations

from sfumato.config.base import Options, option


class ValidationOptions(Options):
    """Validation"""

    validation_split: float = option(
        0.0, "share of the images that is kept for validation", planned="validation", ge=0, le=1
    )
    validation_seed: int | None = option(None, "seed that chooses them; without it --seed", planned="validation")
    validate_every_n_steps: int | None = option(None, "validate after every Nth step", planned="validation", ge=1)
    validate_every_n_epochs: int | None = option(
        None, "validate after every Nth epoch; every epoch without it", planned="validation", ge=1
    )
    max_validation_steps: int | None = option(None, "batches of one validation, at most", planned="validation", ge=1)
