"""Where the example photos are: inside an installed package, or in a checkout's examples folder."""

from __future__ import annotations

from pathlib import Path

from sfumato.errors import UserError

INSTALLED = Path(__file__).parent / "example_photos"
CHECKOUT = Path(__file__).parents[3] / "examples" / "photos"


def example_photos() -> Path:
    """A folder for --train_data_dir: one subject, eight captioned pictures."""
    for folder in (INSTALLED, CHECKOUT):
        if folder.is_dir():
            return folder
    raise UserError(
        f"the example photos are missing: neither {INSTALLED} nor {CHECKOUT} exists", fix="install sfumato again"
    )
