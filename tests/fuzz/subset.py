"""The settings of a subset, for readers that want some."""

from __future__ import annotations

from pathlib import Path

from sfumato.data.captions import CaptionRules
from sfumato.data.find.settings import ImageRules, SubsetSettings


def make_subset(image_dir: Path) -> SubsetSettings:
    return SubsetSettings(
        where="datasets[0].subsets[0]",
        image_dir=image_dir,
        is_reg=False,
        class_tokens=None,
        num_repeats=1,
        caption_extension=".txt",
        caption_extension_given=False,
        conditioning_data_dir=None,
        reference_data_dirs=(),
        images=ImageRules(),
        validation_split=0.0,
        validation_seed=None,
        rules=CaptionRules(enable_wildcard=True, shuffle_caption=True, keep_tokens_separator="|||"),
    )
