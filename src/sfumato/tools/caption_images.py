"""Captions of the images of a folder by a model, written beside them or into one file."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from sfumato.data.images import decode_image
from sfumato.tools.caption_output import CaptionOutput, write_texts
from sfumato.tools.captioner import Captioner
from sfumato.tools.image_batches import ImageReader, ReadImage

READ_WORDS = r"""(?:"[^"]*"|'[^']*'|\w+)"""
READ_PLACE = r"(?: (?:is )?(?:on|in) (?:(?:the|her|his|their|its|it) ?)?\w*)?"
READ_PHRASES = tuple(  # what models read in images, or believe to: right words are rare among them
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"\b(?:has|with|and) the (?:words?|letters?|names?|text|numbers?) {READ_WORDS}{READ_PLACE}",
        rf"\b(?:with a sign )?that (?:says|reads)(?: the words?)? ?{READ_WORDS}{READ_PLACE}",
    )
)


@dataclass(frozen=True, kw_only=True)
class CaptionRun:
    """prompt: a template; {caption} in it is what the image has already, {folder} and {name} are those of its file.

    skip_existing: leave images alone that have a caption. remove_words: of texts that were read in the image.
    """

    captioner: Captioner
    output: CaptionOutput
    prompt: str = ""
    remove_words: bool = False
    skip_existing: bool = False
    verbose: bool = False

    def caption(self, images: Sequence[Path], *, batch_size: int, workers: int) -> int:
        """Caption every image; gives how many could not be read. What is done is kept whatever ends it."""
        reader = ImageReader(prepare=decode_image, batch_size=batch_size, workers=workers, faults=[])
        return write_texts(
            images, self.output, reader, self._caption_batch,
            skip_existing=self.skip_existing, label="captioning", missing="no caption",
        )  # fmt: skip

    def _caption_batch(self, batch: Sequence[ReadImage[Image.Image]]) -> None:
        prompts = [self.fill_prompt(image.path) for image in batch]
        texts = self.captioner.make_captions([image.content for image in batch], prompts)
        for image, text in zip(batch, texts, strict=True):
            caption = remove_read_words(text) if self.remove_words else text
            self.output.write(image.path, caption, image.size)
            if self.verbose:
                sys.stdout.write(f"{image.path}: {caption}\n")

    def fill_prompt(self, path: Path) -> str:
        known = self.output.read(path) if "{caption}" in self.prompt else None
        values = {"{caption}": known or "", "{folder}": path.parent.name, "{name}": path.stem}
        return re.sub(r"\{caption\}|\{folder\}|\{name\}", lambda match: values[match[0]], self.prompt)


def remove_read_words(caption: str) -> str:
    """Without phrases like `with the word "summer" on it`."""
    for pattern in READ_PHRASES:
        caption = pattern.sub("", caption)
    return re.sub(r"\s+([,.])", r"\1", " ".join(caption.split()))
