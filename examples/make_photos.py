"""Cut the example photos from the freely licensed images that scikit-image ships (SOURCES.md): run once, by hand.

pip install scikit-image
python examples/make_photos.py
"""

from __future__ import annotations

import importlib.util
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

HERE = Path(__file__).resolve().parent
LARGEST = 40_000  # bytes of one JPEG


@dataclass(frozen=True, kw_only=True)
class Photo:
    """A box (left, top, right, bottom) of one source image, its size here, and its caption."""

    name: str
    source: str
    box: tuple[int, int, int, int]
    size: tuple[int, int]
    caption: str
    mirrored: bool = False


CAT = "a photo of chelsea cat"
PHOTOS = (
    Photo(name="photos/10_chelsea/whole", source="chelsea.png", box=(0, 0, 451, 300), size=(451, 300),
          caption=f"{CAT}, tabby, green eyes, looking to the side, blurred background"),
    Photo(name="photos/10_chelsea/whole_mirrored", source="chelsea.png", box=(0, 0, 451, 300), size=(384, 256),
          mirrored=True, caption=f"{CAT}, tabby, green eyes, facing left, blurred background"),
    Photo(name="photos/10_chelsea/face", source="chelsea.png", box=(75, 0, 375, 300), size=(300, 300),
          caption=f"{CAT}, tabby, close-up of the face, green eyes, whiskers"),
    Photo(name="photos/10_chelsea/face_mirrored", source="chelsea.png", box=(90, 10, 370, 290), size=(280, 280),
          mirrored=True, caption=f"{CAT}, tabby, close-up of the face, facing left, whiskers"),
    Photo(name="photos/10_chelsea/left_eye", source="chelsea.png", box=(20, 0, 276, 300), size=(256, 300),
          caption=f"{CAT}, tabby, one green eye, striped fur, portrait"),
    Photo(name="photos/10_chelsea/nose", source="chelsea.png", box=(140, 0, 396, 300), size=(256, 300),
          caption=f"{CAT}, tabby, pink nose, whiskers, portrait"),
    Photo(name="photos/10_chelsea/eyes", source="chelsea.png", box=(0, 0, 451, 256), size=(451, 256),
          caption=f"{CAT}, tabby, both eyes open, wide picture"),
    Photo(name="photos/10_chelsea/chin", source="chelsea.png", box=(67, 12, 451, 300), size=(384, 288),
          caption=f"{CAT}, tabby, whiskers, white chin, looking to the side"),
    Photo(name="things/2_things/coffee", source="coffee.png", box=(0, 0, 600, 400), size=(384, 256),
          caption="a photo of a red cup of espresso on a saucer, wooden table"),
    Photo(name="things/2_things/coffee_tall", source="coffee.png", box=(150, 0, 417, 400), size=(256, 384),
          caption="a photo of a red cup of espresso on a saucer, tall picture"),
    Photo(name="things/2_things/rocket", source="rocket.jpg", box=(0, 0, 640, 427), size=(384, 256),
          caption="a photo of a rocket on its launch pad at dusk, blue sky, lights"),
    Photo(name="things/2_things/rocket_tall", source="rocket.jpg", box=(180, 0, 465, 427), size=(256, 384),
          caption="a photo of a rocket on its launch pad at dusk, tall picture"),
)  # fmt: skip


def main() -> None:
    sources = find_source_folder()
    for photo in PHOTOS:
        with Image.open(sources / photo.source) as source:
            cut = source.convert("RGB").resize(photo.size, Image.Resampling.LANCZOS, box=photo.box)
        target = HERE / photo.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.with_suffix(".jpg").write_bytes(encode_small_jpeg(ImageOps.mirror(cut) if photo.mirrored else cut))
        target.with_suffix(".txt").write_text(photo.caption + "\n", encoding="utf-8")


def find_source_folder() -> Path:
    """The images inside an installed scikit-image, without importing it."""
    spec = importlib.util.find_spec("skimage")
    assert spec, "pip install scikit-image"
    assert spec.origin
    return Path(spec.origin).parent / "data"


def encode_small_jpeg(image: Image.Image) -> bytes:
    """The best quality that stays below LARGEST bytes."""
    for quality in range(92, 20, -2):
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=quality, optimize=True)
        if stream.tell() <= LARGEST:
            return stream.getvalue()
    raise ValueError(f"an image of {image.size} does not fit into {LARGEST} bytes")


if __name__ == "__main__":
    main()
