"""Whether images with an alpha channel are transparent anywhere, which only their pixels show, and what is said of it.

Nobody sees the colors under transparent pixels: often they are black, or rests of an older background. They are trained
like any other color, as in sd-scripts, unless --alpha_mask excludes them from the loss.
"""

from __future__ import annotations

import os

import numpy as np

from sfumato.common.text import plural
from sfumato.data.find.findings import Findings
from sfumato.data.find.image_notes import find_rows_with, list_names
from sfumato.data.find.image_table import ImageTable, IntColumn
from sfumato.data.find.policy import Policy
from sfumato.data.find.settings import SubsetSettings
from sfumato.data.find.traits import ALPHA
from sfumato.data.find.verify_images import OPAQUE, check_pixels, list_origins

EXAMINED_IMAGES = 100  # with an alpha channel in a subset, whose pixels are read at the first start
TRANSPARENT_FIX = (
    "the colors stored there are trained (--alpha_mask excludes them from the loss; or give the images a background)"
)


def report_alpha(images: ImageTable, subset: SubsetSettings, policy: Policy, findings: Findings) -> None:
    """Report transparent images that are trained without a mask, and opaque ones where alpha_mask is given."""
    with_alpha = find_rows_with(images, ALPHA)
    masked = subset.images.alpha_mask and not (subset.images.masked_loss and subset.conditioning_data_dir)
    if masked:
        report_opaque(images, with_alpha, find_transparent(images, with_alpha, subset, policy), subset, findings)
    elif len(with_alpha) and not subset.images.alpha_mask:
        report_transparent(images, with_alpha, find_transparent(images, with_alpha, subset, policy), subset, findings)


def find_transparent(images: ImageTable, rows: IntColumn, subset: SubsetSettings, policy: Policy) -> IntColumn | None:
    """Which of the first of these images are transparent anywhere; None where no image may be decoded."""
    rows = rows[:EXAMINED_IMAGES]
    if not policy.may_decode:
        return None if len(rows) else rows
    examined = images.take(rows)
    index = policy.index("decoded", *list_origins(examined, subset.where))
    check = check_pixels(examined, index, workers=os.cpu_count() or 1)
    return rows[check.lowest_alpha < OPAQUE]


def report_transparent(
    images: ImageTable, with_alpha: IntColumn, transparent: IntColumn | None, subset: SubsetSettings, findings: Findings
) -> None:
    if transparent is None:
        what = (
            f"{len(with_alpha)} of {plural(len(images), 'image has', 'images have')} an alpha channel, and where they "
            "are transparent"
        )
        findings.note(f"{subset.where}: {what}, {TRANSPARENT_FIX}: {list_names(images, with_alpha)}")
    elif len(transparent):
        of = plural(len(images), "image")
        if len(with_alpha) > EXAMINED_IMAGES:
            of = f"the first {EXAMINED_IMAGES} of the {plural(len(with_alpha), 'image')} with an alpha channel"
        what = f"{len(transparent)} of {of} have transparent parts"
        findings.note(f"{subset.where}: {what}, and {TRANSPARENT_FIX}: {list_names(images, transparent)}")


def report_opaque(
    images: ImageTable, with_alpha: IntColumn, transparent: IntColumn | None, subset: SubsetSettings, findings: Findings
) -> None:
    """with_alpha: rows of the images that have an alpha channel. transparent: of those found to be transparent."""
    unexamined = with_alpha if transparent is None else with_alpha[EXAMINED_IMAGES:]
    may_be_transparent = np.concatenate([unexamined, unexamined[:0] if transparent is None else transparent])
    opaque = np.setdiff1d(np.arange(len(images)), may_be_transparent)
    if len(opaque) == len(images):
        findings.report_no_effect(
            f"{subset.where}: alpha_mask has no effect: all {plural(len(images), 'image is', 'images are')} opaque"
        )
    elif len(opaque):
        least = "at least " if len(unexamined) else ""
        what = (
            f"{least}{len(opaque)} of {plural(len(images), 'image is', 'images are')} opaque, so that the loss covers "
            "all of them"
        )
        findings.note(f"{subset.where}: alpha_mask: {what}: {list_names(images, opaque)}")
