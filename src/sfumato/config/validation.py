"""Options of the validation loss."""

from __future__ import annotations

from sfumato.config.base import Options, option

LEVELS = 4  # noise levels at which every held-out image is looked at


class ValidationOptions(Options):
    """Validation"""

    validation_split: float = option(0.0, "share of the images that is held out for validation", ge=0, le=1)
    validation_seed: int | None = option(
        None, "seed that chooses them, and their noise; without it --seed, without that 0"
    )
    validate_every_n_steps: int | None = option(
        None, "validate after every Nth step; before the first and after the last it is always done", ge=1
    )
    validate_every_n_epochs: int | None = option(
        None, "validate after every Nth epoch; every epoch where --validate_every_n_steps is not given either", ge=1
    )
    max_validation_steps: int | None = option(None, "batches of one validation, at most", ge=1)
    save_best: bool = option(False, "save NAME-best whenever the validation loss is lower than ever before")

    @property
    def every_n_epochs(self) -> int | None:
        """--validate_every_n_epochs, or what holds without it."""
        if self.validate_every_n_epochs is None and self.validate_every_n_steps is None:
            return 1
        return self.validate_every_n_epochs
