"""Images: headers of every format that is parsed here, and bodies through Pillow."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, features

from fuzz.target import Setup, target, through_file
from sfumato.data.find.headers import parse_image_header, read_image_header
from sfumato.data.find.headers_jxl import CONTAINER, parse_jxl
from sfumato.data.images import decode_layers
from sfumato.formats.metadata import read_thumbnail
from sfumato.track.report_samples import Thumbnails

JPEG_TOKENS = (b"\xff\xd8", b"\xff\xc0", b"\xff\xda", b"\xff\xe1", b"Exif\0\0", b"II*\0\x08\0\0\0", b"\xff\xff\xff\xff")
PNG_TOKENS = (b"IHDR", b"IDAT", b"IEND", b"eXIf", b"PLTE", b"tRNS", b"zTXt", b"iCCP", b"acTL", b"fdAT")
WEBP_TOKENS = (b"RIFF", b"WEBP", b"VP8 ", b"VP8L", b"VP8X", b"EXIF", b"ANIM", b"ICCP", b"ALPH")
BOXES = (b"ftypavif", b"meta", b"iloc", b"ispe", b"jxlc", b"jxlp", b"jbrd", b"\0\0\0\0jbrd", b"\0\0\0\1jxlc")
OTHER_STARTS = (
    b"%!PS-Adobe",
    b"DDS ",
    b"II*\0",
    b"MM\0*",
    b"GIF89a",
    b"BM",
    b"8BPS",
    b"\0\0\1\0",
    b"P6 ",
    b"\0\0\0\x0cjP  ",
)


def make_image(kind: str, mode: str = "RGB", size: tuple[int, int] = (17, 12), **more: Any) -> bytes:
    image = Image.linear_gradient("L").resize(size).convert(mode)
    if more.pop("exif", False):
        exif = Image.Exif()
        exif[0x0112] = 6
        more["exif"] = exif.tobytes()
    content = BytesIO()
    image.save(content, kind, **more)
    return content.getvalue()


def make_images(*kinds: str) -> list[bytes]:
    """Each kind as RGB, with EXIF where it has that, with alpha or a palette where it has these."""
    images: list[bytes] = []
    for kind in kinds:
        images.append(make_image(kind))
        if kind in ("JPEG", "PNG", "WEBP", "AVIF"):
            images.append(make_image(kind, exif=True))
        if kind in ("PNG", "WEBP", "AVIF"):
            images.append(make_image(kind, "RGBA"))
        if kind in ("PNG", "GIF"):
            images.append(make_image(kind, "P", transparency=0))
    return images


def list_kinds() -> tuple[str, ...]:
    return ("JPEG", "PNG", "WEBP", "BMP", *(("AVIF",) if features.check("avif") else ()))


def read_header_of(path: Path) -> object:
    """As a folder is read: from the open file, decoded where its end is missing."""
    with path.open("rb") as file:
        return read_image_header(file.fileno(), str(path), path.stat().st_size)


@target(*JPEG_TOKENS, *OTHER_STARTS)
def jpeg_header(_folder: Path) -> Setup:
    seeds = [make_image("JPEG"), make_image("JPEG", exif=True), make_image("JPEG", "CMYK", progressive=True)]
    return Setup(seeds=seeds, read=lambda data: parse_image_header(data, "a.jpg"))


@target(*PNG_TOKENS, *OTHER_STARTS)
def png_header(_folder: Path) -> Setup:
    return Setup(seeds=make_images("PNG"), read=lambda data: parse_image_header(data, "a.png"))


@target(*WEBP_TOKENS, *OTHER_STARTS)
def webp_header(_folder: Path) -> Setup:
    seeds = [*make_images("WEBP"), make_image("WEBP", lossless=True)]
    return Setup(seeds=seeds, read=lambda data: parse_image_header(data, "a.webp"))


@target(*BOXES)
def jpeg_xl_header(_folder: Path) -> Setup:
    """The parser alone, since the decoder is optional. It documents IndexError for a file that is cut short."""
    stream = b"\xff\x0a" + bytes(range(100))
    box = (len(stream) + 8).to_bytes(4, "big") + b"jxlc" + stream
    recompressed = (16).to_bytes(4, "big") + b"jbrd" + bytes(8)

    def read(data: bytes) -> object:
        return parse_jxl(data[:4096], lambda offset, count: data[offset : offset + count])

    return Setup(seeds=[stream, CONTAINER + box, CONTAINER + recompressed + box], read=read, documented=(IndexError,))


@target(*BOXES, *OTHER_STARTS, b"BITMAPV5", share=0.5)
def other_headers(_folder: Path) -> Setup:
    kinds = [kind for kind in list_kinds() if kind not in ("JPEG", "PNG", "WEBP")]
    return Setup(seeds=make_images(*kinds), read=lambda data: parse_image_header(data, "a.png"))


@target(*JPEG_TOKENS, *PNG_TOKENS, *WEBP_TOKENS)
def image_file(folder: Path) -> Setup:
    return Setup(seeds=make_images(*list_kinds()), read=through_file(folder / "a.png", read_header_of))


@target(*JPEG_TOKENS, *PNG_TOKENS, *WEBP_TOKENS, *OTHER_STARTS, share=2)
def image_body(_folder: Path) -> Setup:
    return Setup(seeds=make_images(*list_kinds()), read=lambda data: decode_layers(data, "a.png", alpha=True))


@target(*PNG_TOKENS, b"tEXtparameters\0", share=0.5)
def sample_thumbnail(folder: Path) -> Setup:
    """A sample of the run on its report page; one that is no image any more is not shown."""
    return Setup(seeds=make_images("PNG"), read=through_file(folder / "a.png", lambda path: Thumbnails().load(path)))


@target(share=0.1)
def metadata_thumbnail(folder: Path) -> Setup:
    def read(path: Path) -> object:
        read_thumbnail.cache_clear()
        return read_thumbnail(str(path))

    return Setup(seeds=make_images("PNG"), read=through_file(folder / "a.png", read))
