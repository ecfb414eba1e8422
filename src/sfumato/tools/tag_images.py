"""Tags of images by a tagger model, written as captions."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sfumato.tools.caption_output import CaptionOutput, write_texts
from sfumato.tools.image_batches import ImageReader, ReadImage
from sfumato.tools.tag_choice import TagChooser, append_tags
from sfumato.tools.tag_model import Tagger
from sfumato.tools.tag_table import split_tag_list


@dataclass(frozen=True, kw_only=True)
class TagRun:
    """append: keep the tags that are there. skip_existing: leave images alone that have some. verbose: print them."""

    tagger: Tagger
    chooser: TagChooser
    output: CaptionOutput
    separator: str
    append: bool = False
    skip_existing: bool = False
    verbose: bool = False

    def tag(self, images: Sequence[Path], *, batch_size: int, workers: int) -> int:
        """Tag every image; gives how many could not be read. What is tagged is kept whatever ends it."""
        size = self.tagger.batch_size or batch_size
        reader = ImageReader(prepare=self.tagger.read_pixels, batch_size=size, workers=workers, faults=[])
        return write_texts(
            images, self.output, reader, self._tag_batch,
            skip_existing=self.skip_existing, label="tagging", missing="not tagged",
        )  # fmt: skip

    def _tag_batch(self, batch: Sequence[ReadImage[NDArray[np.float32]]]) -> None:
        rows = self.tagger.predict([image.content for image in batch])
        for image, probabilities in zip(batch, rows, strict=True):
            tags = self.chooser.choose(probabilities)
            present = self.output.read(image.path) if self.append else None
            if present:
                tags = append_tags(split_tag_list(present, self.separator), tags)
            text = self.separator.join(tags)
            self.output.write(image.path, text, image.size)
            if self.verbose:
                sys.stdout.write(f"{image.path}: {text}\n")
