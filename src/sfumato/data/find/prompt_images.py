"""The image files that prompts name, looked at before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from sfumato.config.prompts import Prompt
from sfumato.data.images import read_image


def check_prompt_images(prompts: Iterable[Prompt]) -> None:
    """UserError for a reference image that cannot be read."""
    for path in dict.fromkeys(prompt.reference_image for prompt in prompts):
        if path:
            read_image(Path(path))
