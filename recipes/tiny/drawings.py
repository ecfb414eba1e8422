"""The images that the recipe trains on: packages of drawings, rasterized once, set on colored backgrounds."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

PACKAGES = {  # from the registry of npm
    "fluent-emoji-flat": "@iconify-json/fluent-emoji-flat@1.2.6",  # MIT, Microsoft
    "noto": "@iconify-json/noto@1.2.9",  # Apache-2.0, Google
}
SPRITE_SIZE = 128  # pixels of a rasterized drawing
SCENE_SIZE = 64  # pixels of a scene
PEOPLE = ("man", "woman", "person", "skin", "flag", "hand", "people", "boy", "girl", "child", "worker")


def download(work: Path) -> None:
    """Download the packages into `work`; existing files stay."""
    for name, package in PACKAGES.items():
        folder = work / "packages" / name
        if (folder / "icons.json").is_file():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        npm = shutil.which("npm")
        if npm is None:
            raise SystemExit(f"npm is needed to download {package}; or put its icons.json into {folder} yourself")
        packed = subprocess.run([npm, "pack", "--silent", package], cwd=folder, check=True, capture_output=True)
        archive = folder / packed.stdout.decode().split()[-1]
        with tarfile.open(archive) as files:
            member = files.extractfile("package/icons.json")
            assert member is not None
            (folder / "icons.json").write_bytes(member.read())
        archive.unlink()


def list_names(work: Path, package: str) -> list[str]:
    """Every drawing of a package that shows no person and no flag, in order of its name."""
    names = json.loads((work / "packages" / package / "icons.json").read_text(encoding="utf-8"))["icons"]
    return sorted(name for name in names if not set(PEOPLE) & set(name.split("-")))


def load_sprites(work: Path, package: str, names: Iterable[str]) -> dict[str, Image.Image]:
    """Name -> SPRITE_SIZE x SPRITE_SIZE RGBA, rasterized at the first call and then read from `work`."""
    wanted = list(names)
    folder = work / "sprites" / package
    folder.mkdir(parents=True, exist_ok=True)
    missing = [name for name in wanted if not (folder / f"{name}.png").is_file()]
    if missing:
        import resvg_py  # pyright: ignore  (only this recipe needs it)

        icons = json.loads((work / "packages" / package / "icons.json").read_text(encoding="utf-8"))
        for name in missing:
            svg = make_svg(icons, name)
            png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SPRITE_SIZE, height=SPRITE_SIZE))
            (folder / f"{name}.png").write_bytes(png)
    sprites = {}
    for name in wanted:
        data = (folder / f"{name}.png").read_bytes()
        sprites[name] = Image.open(io.BytesIO(data)).convert("RGBA")
    return sprites


def make_svg(icons: dict, name: str) -> str:
    icon = icons["icons"][name]
    box = [icon.get(key, icons.get(key, 0)) for key in ("left", "top", "width", "height")]
    view = " ".join(str(number) for number in box)
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {spaces} viewBox="{view}">{icon["body"]}</svg>'


def draw_scene(
    sprite: Image.Image,
    color: tuple[int, int, int],
    rng: np.random.Generator,
    *,
    sides: tuple[int, int] = (52, 55),
    shift: int = 1,
) -> Image.Image:
    """SCENE_SIZE x SCENE_SIZE RGB: a drawing, large and near the middle, on a background close to `color`."""
    side = int(rng.integers(sides[0], sides[1] + 1))
    tint = np.clip(np.array(color) + rng.integers(-6, 7, 3), 0, 255)
    page = Image.new("RGB", (SCENE_SIZE, SCENE_SIZE), tuple(int(channel) for channel in tint))
    small = sprite.resize((side, side), Image.Resampling.LANCZOS)
    free = (SCENE_SIZE - side) // 2
    x, y = (free + int(rng.integers(-shift, shift + 1)) for _ in range(2))
    page.paste(small, (x, y), small)
    return page
