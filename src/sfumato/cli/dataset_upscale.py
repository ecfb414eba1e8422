"""`sfumato dataset upscale-latents`: images of twice the size by a network on their latents."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from sfumato.cli.options_command import run_with_options
from sfumato.config.base import Options, option
from sfumato.config.values import FilePath


class LatentUpscaleOptions(Options):
    """Writes images of twice the size, NAME_upscaled: enlarged, encoded, sharpened as latents by the network of
    sd-scripts' latent upscaler, and decoded.
    """

    vae_path: str = option(None, "the model whose autoencoder is used: a folder, a file, or OWNER/NAME", required=True)
    weights: FilePath = option(None, "the network's weights", required=True)
    image_pattern: str = option(None, "the images, e.g. 'images/*.png'", required=True)
    output_dir: FilePath = option(Path(), "where the images are written")
    batch_size: int = option(4, "accepted without effect: one image at a time", ge=1)
    vae_batch_size: int = option(1, "accepted without effect: one image at a time", ge=1)
    debug: bool = option(False, "write the images that are only enlarged, too: NAME_lanczos4")


def main(argv: Sequence[str]) -> int:
    """Run `sfumato dataset upscale-latents`."""
    return run_with_options("sfumato dataset upscale-latents", argv, LatentUpscaleOptions, run_latent_upscale)


def run_latent_upscale(options: LatentUpscaleOptions) -> int:
    """Upscale; gives the exit code."""
    from sfumato.tools.upscale_latents import list_matching_images, open_upscale

    images = list_matching_images(options.image_pattern)
    upscale = open_upscale(options.vae_path, options.weights, with_plain=options.debug)
    faults = upscale.run(images, options.output_dir)
    bad = f", {faults:,} could not be read" if faults else ""
    sys.stdout.write(f"the images are in {options.output_dir}{bad}\n")
    return 0
