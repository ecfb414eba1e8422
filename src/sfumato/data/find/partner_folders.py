"""The folders whose images belong to a subset's images: masks or control images, and reference images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sfumato.data.find.settings import SubsetSettings


@dataclass(frozen=True, kw_only=True)
class PartnerFolder:
    """A folder with one image for each image of a subset."""

    folder: Path
    key: str  # of the dataset file
    noun: str  # for messages
    is_reference: bool


def list_partner_folders(subset: SubsetSettings) -> Iterator[PartnerFolder]:
    if subset.conditioning_data_dir is not None:
        yield PartnerFolder(
            folder=subset.conditioning_data_dir,
            key="conditioning_data_dir",
            noun="conditioning image",
            is_reference=False,
        )
    for folder in subset.reference_data_dirs:
        yield PartnerFolder(folder=folder, key="reference_data_dirs", noun="reference image", is_reference=True)
