"""The options of a run on a published model whose files nobody needs to have: headers, a blank image, a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from sfumato.common import files
from sfumato.config import Config
from sfumato.config.run import CONTROL_METHODS, PAIR_METHODS
from sfumato.config.schema import vocabulary
from sfumato.families.published import read_published, write_published

CAPTION = "a photo"
STAND_INS = (
    "pretrained_model_name_or_path",
    "train_data_dir",
    "reference_data_dirs",
    "conditioning_data_dir",
    "caption_extension",
    "output_dir",
    "cache_dir",
)
BLANK_SIZE = 2048  # pixels of a side; larger than any resolution, so that nothing is enlarged
REPEATS = 1000  # of the image, so that any batch is full


def make_published_options(name: str, folder: Path, *, method: str | None) -> dict[str, Any]:
    """Write what the run needs into `folder`; gives option -> value, for whatever the user does not give.

    method: some take control images, or pairs of images. Raises UserError for an unknown name.
    """
    content = read_published(name)
    images = folder / "images" / f"{REPEATS}_blank"
    references = [
        folder / f"references_{number}"
        for number in range(1 if method in PAIR_METHODS else content.get("references", 0))
    ]
    control, controls = method in CONTROL_METHODS, folder / "controls"
    for place in (images, *references, *([controls] if control else [])):
        place.mkdir(parents=True)
        Image.new("RGB", (BLANK_SIZE, BLANK_SIZE)).save(place / "blank.png")
    files.write_text(images / "blank.txt", CAPTION)
    resolution = content["resolution"]
    return {
        "pretrained_model_name_or_path": str(write_published(name, folder / "model")),
        "train_data_dir": images.parent,
        "reference_data_dirs": tuple(references),
        "conditioning_data_dir": controls if control else None,
        "caption_extension": ".txt",
        "output_dir": folder / "output",
        "cache_dir": folder / "cache",
        "resolution": (resolution, resolution),
        "learning_rate": 1e-4,
        "seed": 0,
        **content.get("options", {}),
    }


def drop_stand_ins(config: Config) -> Config:
    """Without the options that only name what `make_published_options` wrote, for a file that outlives it."""
    names = [name for name in STAND_INS if config.source(name) == "launcher"]
    return config.with_values({name: vocabulary()[name].default for name in names})
