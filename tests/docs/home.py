"""A home folder with every file that the manual names: models, photos, masks, control images; all of it toy-sized."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from families.toys import ToyShelf
from wild.layout import make_images, place_toy, save_vae, write

ROOT = Path(__file__).parents[2]
MODELS = (  # family, its main file, what its other files are called
    ("sd", "models/sd15/sd15.safetensors", {}),
    ("sdxl", "models/sdxl/sd_xl_base_1.0.safetensors", {}),
    ("sd3", "models/sd3/sd3_medium_incl_clips_t5xxlfp16.safetensors", {}),
    ("flux", "models/flux/flux1-dev.safetensors", {"t5xxl": "t5xxl_fp16.safetensors"}),
    ("chroma", "models/chroma/chroma.safetensors", {"t5xxl": "t5xxl_fp16.safetensors"}),
    ("lumina", "models/lumina/lumina-image-2.safetensors", {"gemma2": "gemma-2-2b.safetensors"}),
)
PROMPTS = "# prompts.txt\na robot on a table --w 64 --h 64 --d 1 --s 2\na cat --n blurry --w 64 --h 64 --d 2 --s 2\n"


def make_home(shelf: ToyShelf, home: Path, change: Callable[[str], str] = str) -> Path:
    """change: what happens to the example configurations."""
    for family, name, others in MODELS:
        place_toy(shelf.paths(family), home / name, others)  # type: ignore[arg-type]
    sdxl = home / "models/sdxl/sd_xl_base_1.0.safetensors"
    save_vae(sdxl, home / "models/sdxl/sdxl_vae.safetensors")
    for folder in ("photos/10_robot", "examples/photos/10_chelsea"):
        make_images(home / folder, captions=True)
    for file in (ROOT / "examples" / "train").glob("*.toml"):
        write(home / "examples" / "train" / file.name, change(file.read_text(encoding="utf-8")))
    make_images(home / "reg/1_robot")
    make_images(home / "masks", mode="L")
    make_images(home / "controls")
    for folder in ("more", "less"):
        make_images(home / folder, captions=True)
    write(home / "prompts.txt", PROMPTS)
    return home
