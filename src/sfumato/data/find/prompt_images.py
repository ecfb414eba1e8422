"""The image files that prompts name, looked at before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from sfumato.config.prompts import Prompt
from sfumato.data.images import read_image


def check_prompt_images(prompts: Iterable[Prompt], *, control: bool) -> None:
    """UserError for an image that cannot be read. control: whether control images are used."""
    files: dict[str | None, None] = {}
    for prompt in prompts:
        controls = (prompt.controlnet_image, *prompt.further_control_images) if control else ()
        files |= dict.fromkeys((prompt.reference_image, prompt.init_image, prompt.mask_image, *controls))
    for path in files:
        if path:
            read_image(Path(path))
