"""Options of evaluation while training: samples and the validation loss."""

from __future__ import annotations

from typing import Literal

from sfumato.config.base import Options, option
from sfumato.config.values import FilePath, Seed


class SampleOptions(Options):
    """Samples"""

    sample_prompts: FilePath | None = option(
        None, "file of prompts for sample images: .txt, .toml or .json", path="file"
    )
    sample_every_n_steps: int | None = option(None, "generate samples every N steps")
    sample_every_n_epochs: int | None = option(
        None, "generate samples every N epochs; takes precedence over --sample_every_n_steps"
    )
    sample_at_first: bool = option(False, "generate samples before training, too")
    sample_sampler: Literal[
        "ddim",
        "pndm",
        "lms",
        "euler",
        "euler_a",
        "heun",
        "dpm_2",
        "dpm_2_a",
        "dpmsolver",
        "dpmsolver++",
        "dpmsingle",
        "k_lms",
        "k_euler",
        "k_euler_a",
        "k_dpm_2",
        "k_dpm_2_a",
    ] = option("ddim", "sampler of prompts that name none")
    prompt_weighting: bool = option(True, "weighted prompts: (words) and [words] are emphasized more and less")
    sample_batch_size: int | None = option(
        None, "batch size for samples of equal size, steps and guidance; default: 1", ge=1
    )


VALIDATION_LEVELS = 4  # noise levels at which the loss of every validation image is measured


class ValidationOptions(Options):
    """Validation"""

    validation_split: float = option(0.0, "share of the images held out for validation", ge=0, le=1)
    validation_seed: Seed | None = option(None, "seed of the split and of the validation noise; default: --seed, or 0")
    validate_every_n_steps: int | None = option(
        None, "validate every N steps; always done before the first and after the last step", ge=1
    )
    validate_every_n_epochs: int | None = option(
        None, "validate every N epochs; default: 1 if --validate_every_n_steps is not given", ge=1
    )
    max_validation_steps: int | None = option(None, "maximum number of batches per validation", ge=1)
    save_best: bool = option(False, "save NAME-best whenever the validation loss reaches a new minimum")

    @property
    def every_n_epochs(self) -> int | None:
        """--validate_every_n_epochs, or its default."""
        if self.validate_every_n_epochs is None and self.validate_every_n_steps is None:
            return 1
        return self.validate_every_n_epochs
