"""The pictures that the recipe learns from: packages of drawings, rasterised once, set on coloured backgrounds."""

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
SPRITE = 128  # pixels of a rasterised drawing
SIZE = 64  # pixels of a scene
PEOPLE = ("man", "woman", "person", "skin", "flag", "hand", "people", "boy", "girl", "child", "worker")


def fetch(work: Path) -> None:
    """Download the packages into `work`; what is there stays."""
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


def names_of(work: Path, package: str) -> list[str]:
    """Every drawing of a package that shows no person and no flag, in order of its name."""
    names = json.loads((work / "packages" / package / "icons.json").read_text(encoding="utf-8"))["icons"]
    return sorted(name for name in names if not set(PEOPLE) & set(name.split("-")))


def sprites(work: Path, package: str, names: Iterable[str]) -> dict[str, Image.Image]:
    """Name -> SPRITE x SPRITE RGBA, rasterised at the first call and then read from `work`."""
    wanted = list(names)
    folder = work / "sprites" / package
    folder.mkdir(parents=True, exist_ok=True)
    missing = [name for name in wanted if not (folder / f"{name}.png").is_file()]
    if missing:
        import resvg_py

        icons = json.loads((work / "packages" / package / "icons.json").read_text(encoding="utf-8"))
        for name in missing:
            picture = bytes(resvg_py.svg_to_bytes(svg_string=svg(icons, name), width=SPRITE, height=SPRITE))
            (folder / f"{name}.png").write_bytes(picture)
    return {name: Image.open(io.BytesIO((folder / f"{name}.png").read_bytes())).convert("RGBA") for name in wanted}


def svg(icons: dict, name: str) -> str:
    icon = icons["icons"][name]
    box = [icon.get(key, icons.get(key, 0)) for key in ("left", "top", "width", "height")]
    view = " ".join(str(number) for number in box)
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {spaces} viewBox="{view}">{icon["body"]}</svg>'


def scene(
    sprite: Image.Image,
    colour: tuple[int, int, int],
    rng: np.random.Generator,
    *,
    sides: tuple[int, int] = (52, 55),
    shift: int = 1,
) -> Image.Image:
    """SIZE x SIZE RGB: a drawing, large and near the middle, on a background close to `colour`."""
    side = int(rng.integers(sides[0], sides[1] + 1))
    tint = np.clip(np.array(colour) + rng.integers(-6, 7, 3), 0, 255)
    page = Image.new("RGB", (SIZE, SIZE), tuple(int(each) for each in tint))
    small = sprite.resize((side, side), Image.Resampling.LANCZOS)
    free = (SIZE - side) // 2
    x, y = (free + int(rng.integers(-shift, shift + 1)) for _ in range(2))
    page.paste(small, (x, y), small)
    return page
