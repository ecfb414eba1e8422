"""Options of the command itself: what is trained on what, and the file that holds further options."""

from __future__ import annotations

from typing import Literal

from sfumato.config.base import Options, option
from sfumato.config.values import FilePath


class RunOptions(Options):
    """The run"""

    family: str | None = option(None, "model family; without it found from the checkpoint")
    method: Literal["adapter", "full"] = option(
        "adapter", "what is trained: an adapter beside the frozen model, or the model itself"
    )
    config_file: FilePath | None = option(
        None, "TOML file with options as keys; section headings are free, .toml is added if missing", path="file"
    )
    plot_timesteps: FilePath | None = option(
        None, "draw how often each timestep is trained and how much its loss counts, as a PNG of this name"
    )
    output_config: bool = option(False, "write the options given into --config_file, which must not exist, and stop")
