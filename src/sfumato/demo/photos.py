"""Where the example photos are: inside an installed package, or in a checkout's examples folder."""

from __future__ import annotations

from pathlib import Path

from sfumato.errors import UserError

INSTALLED_PHOTOS = Path(__file__).parent / "example_photos"
CHECKOUT_PHOTOS = Path(__file__).parents[3] / "examples" / "photos"


def find_example_photos() -> Path:
    """A folder for --train_data_dir: one subject, eight images with captions."""
    for folder in (INSTALLED_PHOTOS, CHECKOUT_PHOTOS):
        if folder.is_dir():
            return folder
    raise UserError(
        f"the example photos are missing: neither {INSTALLED_PHOTOS} nor {CHECKOUT_PHOTOS} exists",
        code="example-photos-missing",
        fix="install sfumato again",
    )
