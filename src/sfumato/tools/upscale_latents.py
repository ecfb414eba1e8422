"""Images of twice the size by way of their latents, which a residual network sharpens."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sfumato.common.files import check_writable, write_atomically
from sfumato.config import Config
from sfumato.data.find.image_formats import get_extension
from sfumato.errors import UserError
from sfumato.families.base import Family
from sfumato.families.detection import describe_model
from sfumato.families.encoding import decode_latents
from sfumato.sampling.latent_upscaler import LatentUpscaler, load_upscaler, upscale_images
from sfumato.tools.image_batches import UniqueNames, iterate_images, report_unreadable
from sfumato.track.progress_task import ProgressTask

FACTOR = 2
WRITTEN_KINDS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}  # all others become PNG


@dataclass(frozen=True, kw_only=True)
class LatentUpscale:
    """with_plain: write the image that was enlarged without the network, too."""

    model: Family
    network: LatentUpscaler
    with_plain: bool = False

    def run(self, images: Sequence[Path], target: Path) -> int:
        """Write NAME_upscaled beside each other; gives how many images could not be read."""
        check_writable(target, option="--output_dir")
        target.mkdir(parents=True, exist_ok=True)
        faults: list[str] = []
        with ProgressTask("upscaling", "images") as progress:
            names = UniqueNames()
            for path, image in iterate_images(images, faults, progress):
                cropped = crop_to_multiple(image, self.model.latents.downscale)
                self._write(cropped, path, target / names.choose(path))
        report_unreadable(faults, "not upscaled")
        return len(faults)

    def _write(self, image: Image.Image, path: Path, target: Path) -> None:
        """target: without ending."""
        if self.with_plain:
            plain = image.resize((image.width * FACTOR, image.height * FACTOR), Image.Resampling.LANCZOS)
            write_image(plain, target, path.name, "_lanczos4")
        write_image(self.upscale(image), target, path.name, "_upscaled")

    def upscale(self, image: Image.Image) -> Image.Image:
        """An image whose sides are multiples of the autoencoder's factor."""
        pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        size = (image.height * FACTOR, image.width * FACTOR)
        latents = upscale_images(self.model, self.network, pixels.to(self.model.device), size)
        return make_image(decode_latents(self.model, latents)[0])


def open_upscale(model: str, weights: Path, *, with_plain: bool) -> LatentUpscale:
    """model: whose autoencoder is used."""
    config = Config.model_validate({"model": {"pretrained_model_name_or_path": model}, "sources": {}})
    family, blueprint = describe_model(config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    opened = family(blueprint, config.model, dtype=torch.float32, device=device)
    opened.load_tokenizers(blueprint, config.model)
    return LatentUpscale(model=opened, network=load_upscaler(weights), with_plain=with_plain)


def list_matching_images(pattern: str) -> list[Path]:
    """UserError where nothing matches."""
    paths = [Path(path) for path in sorted(glob.glob(pattern)) if Path(path).is_file()]  # noqa: PTH207
    if not paths:
        raise UserError(
            f"--image_pattern: {pattern} matches no file", code="upscale-pattern-empty", fix="write 'images/*.png'"
        )
    return paths


def crop_to_multiple(image: Image.Image, step: int) -> Image.Image:
    """Without what is left over at the right and below."""
    return image.crop((0, 0, max(1, image.width // step) * step, max(1, image.height // step) * step))


def make_image(pixels: Tensor) -> Image.Image:
    """(3, H, W) in about [-1, 1]"""
    levels = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())


def write_image(image: Image.Image, target: Path, source: str, ending: str) -> None:
    """In the format of the source, where it can be written."""
    extension = get_extension(source).lower()
    kind = WRITTEN_KINDS.get(extension, "PNG")
    name = f"{target.name}{ending}{extension if extension in WRITTEN_KINDS else '.png'}"
    with write_atomically(target.with_name(name)) as temporary:
        image.save(temporary, kind, quality=95)
