"""The two scripts of sd-scripts that fill caches without training, run as `sfumato dataset cache`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import PurePath

from sfumato.cli.dataset_cache import DatasetCacheOptions, run_cache_command
from sfumato.cli.help import asks_for_help, command_help
from sfumato.config.base import Options, option
from sfumato.config.command import NO_DRY_RUN, read_command

CACHE_TOOLS = {
    "tools/cache_latents": "cache_latents",
    "tools/cache_text_encoder_outputs": "cache_text_encoder_outputs",
}


class CacheToolOptions(Options):
    """Fills one cache without training. The model is Stable Diffusion 1 or 2 unless an option says another family."""

    sdxl: bool = option(False, "the model is Stable Diffusion XL")
    flux: bool = option(False, "the model is FLUX.1")
    skip_existing: bool = option(False, "accepted without effect: what is cached is never encoded again")


def find_cache_tool(name: str) -> str | None:
    """The script's name in CACHE_TOOLS; None for other scripts."""
    plain = PurePath(name).as_posix().removesuffix(".py")
    return plain if plain in CACHE_TOOLS else None


def run_cache_tool(name: str, argv: Sequence[str]) -> int:
    """Run one of them; gives the exit code."""
    if asks_for_help(argv):
        sys.stdout.write(command_help(f"{name}.py", CacheToolOptions, DatasetCacheOptions))
        return 0
    line = read_command(argv, CacheToolOptions, DatasetCacheOptions, absent=NO_DRY_RUN)
    options = line.options(CacheToolOptions)
    if options.sdxl and options.flux:
        line.problems.add(
            "--sdxl and --flux are two families", code="cache-tool-families-conflict", fix="give one of them"
        )
    if options.skip_existing:
        sys.stderr.write("note: --skip_existing has no effect: what is cached is never encoded again\n")
    family = "sdxl" if options.sdxl else "flux" if options.flux else "sd"
    return run_cache_command(line, kinds=(CACHE_TOOLS[name],), defaults={"family": family})
