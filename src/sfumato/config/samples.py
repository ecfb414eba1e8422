"""Options of the sample pictures made during training."""

from __future__ import annotations

from typing import Literal

from sfumato.config.base import Options, option
from sfumato.config.values import FilePath


class SampleOptions(Options):
    """Sample pictures"""

    sample_prompts: FilePath | None = option(None, "file of prompts: .txt, .toml or .json", path="file")
    sample_every_n_steps: int | None = option(None, "make samples after every Nth step")
    sample_every_n_epochs: int | None = option(None, "make samples after every Nth epoch; goes before steps")
    sample_at_first: bool = option(False, "make samples before training, too")
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
    ] = option("ddim", "sampler where a prompt names none")
    prompt_weighting: bool = option(True, "(words) and [words] in prompts count more and less")
    sample_batch_size: int | None = option(
        None, "how many samples of equal size, steps and guidance are made together; without it 1", ge=1
    )
