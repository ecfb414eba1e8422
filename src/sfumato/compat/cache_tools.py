"""The field's two scripts that fill caches without training, in the words of `sfumato dataset cache`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import PurePath

from sfumato.cli.dataset import cache
from sfumato.errors import UserError

CACHE_TOOLS = {
    "tools/cache_latents": "cache_latents",
    "tools/cache_text_encoder_outputs": "cache_text_encoder_outputs",
}
FAMILY_WORDS = {"--sdxl": "sdxl", "--flux": "flux"}  # without either it is Stable Diffusion 1 or 2
IDLE_WORDS = ("--skip_existing",)  # what is there is never made again


def find_cache_tool(name: str) -> str | None:
    """The script's name as the table has it; None for other scripts."""
    plain = PurePath(name).as_posix().removesuffix(".py")
    return plain if plain in CACHE_TOOLS else None


def run_cache_tool(name: str, argv: Sequence[str]) -> int:
    """Run one of them; gives the exit code."""
    asked = [word for word in argv if word in FAMILY_WORDS]
    if len(set(asked)) > 1:
        raise UserError(f"{' and '.join(asked)} are two families", fix="give one of them")
    for word in IDLE_WORDS:
        if word in argv:
            sys.stderr.write(f"note: {word} has no effect: what is cached is never made again\n")
    rest = [word for word in argv if word not in FAMILY_WORDS and word not in IDLE_WORDS]
    return cache(rest, kinds=(CACHE_TOOLS[name],), defaults={"family": FAMILY_WORDS[asked[0]] if asked else "sd"})
