"""The images of a subset that are trained on, and what is said of them."""

from __future__ import annotations

from sfumato.data.find.alpha_notes import report_alpha
from sfumato.data.find.findings import Findings
from sfumato.data.find.image_notes import report_traits
from sfumato.data.find.image_table import ImageTable
from sfumato.data.find.policy import Policy
from sfumato.data.find.settings import SubsetSettings
from sfumato.data.find.sources import load_images
from sfumato.data.find.verify_images import find_decodable


def load_subset_images(subset: SubsetSettings, policy: Policy, findings: Findings) -> ImageTable:
    """The subset's images; that none is left is a problem."""
    problems_before = len(findings.problems.found)
    images = load_images(subset, policy, findings)
    rows = find_decodable(images, subset.where, policy, findings)
    images = images if len(rows) == len(images) else images.take(rows)
    if not len(images) and len(findings.problems.found) == problems_before:
        findings.problems.add(
            f"{subset.where}: every image is skipped, see the notes",
            code="all-images-skipped",
            fix="fix the images, or remove the subset",
        )
    report_traits(images, subset.where, findings)
    report_alpha(images, subset, policy, findings)
    return images
