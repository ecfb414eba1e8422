"""Which files are images: the endings of their names, the formats that may be opened, and plugins of Pillow for some.

Pillow is only ever given the formats named here: of the others it knows, some start a program on the file (PostScript)
and some take nearly any bytes for an image.
"""

from __future__ import annotations

import struct
import zlib
from importlib import import_module
from importlib.util import find_spec
from io import BytesIO
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, features

from sfumato.data.find.headers_jxl import CONTAINER, START
from sfumato.data.find.traits import HEIF_PLUGIN, JXL_PLUGIN, PLAIN, Traits
from sfumato.errors import UserError

EXTENSIONS_BY_FORMAT = {  # Pillow's name of the format -> endings, in upper or lower case
    "PNG": (".png", ".apng"),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".mpo"),
    "WEBP": (".webp",),
    "AVIF": (".avif", ".avifs"),
    "BMP": (".bmp", ".dib"),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "QOI": (".qoi",),
    "JXL": (".jxl",),
    "HEIF": (".heic", ".heif", ".hif"),
}
PLUGIN_FORMATS = frozenset({"JXL", "HEIF"})  # which Pillow reads with a plugin
IMAGE_EXTENSIONS = tuple(extension for group in EXTENSIONS_BY_FORMAT.values() for extension in group)
EXTENSION_SET = frozenset(IMAGE_EXTENSIONS)
# Files that people take for images, or keep among them, and that are not read.
UNREAD_EXTENSIONS = frozenset(
    {
        ".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dcr", ".dng", ".erf", ".fff", ".iiq", ".kdc", ".mef", ".mos", ".mrw",
        ".nef", ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".rwl", ".sr2", ".srf", ".srw", ".x3f",
        ".ai", ".djvu", ".emf", ".eps", ".kra", ".pdf", ".pict", ".psb", ".psd", ".svg", ".svgz", ".wmf", ".xcf",
        ".bpg", ".cur", ".dds", ".exr", ".fits", ".hdr", ".icns", ".ico", ".pcx", ".sgi", ".tga", ".xbm", ".xpm",
        ".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm",
    }
)  # fmt: skip
# What Pillow's readers raise on damaged files, collected by damaging some 200,000.
DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    LookupError,
    ArithmeticError,
    MemoryError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
AVIF_BRANDS = frozenset({b"avif", b"avis"})
HEIF_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"})
FOREIGN_STARTS = (  # the first bytes of files that often have the name of an image
    (b"%!PS", "a PostScript file"),
    (b"\xc5\xd0\xd3\xc6", "a PostScript file"),
    (b"%PDF", "a PDF file"),
    (b"8BPS", "a Photoshop file"),
    (b"gimp xcf", "a GIMP file"),
    (b"<svg", "an SVG drawing"),
    (b"<!DOCTYPE", "a web page"),
    (b"<!doctype", "a web page"),
    (b"<html", "a web page"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"version https://git-lfs", "a Git LFS pointer, not the image itself"),
)


class MissingPlugin(NamedTuple):
    """What is said of the images that need one, once for all of them."""

    format_name: str
    fix: str


MISSING_PLUGINS = {  # by the code of the error
    "jxl-plugin-missing": MissingPlugin("JPEG XL", 'pip install "sfumato[jxl]", or pip install pillow-jxl-plugin'),
    "heif-plugin-missing": MissingPlugin("HEIC/HEIF", 'pip install "sfumato[heif]", or pip install pillow-heif'),
    "avif-unsupported": MissingPlugin("AVIF", "pip install --upgrade pillow"),
}


def get_extension(name: str) -> str:
    """The ending of a file's name with its dot, in lower case."""
    return name[name.rfind(".") :].lower()


def is_image(name: str) -> bool:
    return get_extension(name) in EXTENSION_SET


def open_image(file: IO[bytes] | BytesIO) -> Image.Image:
    """Pillow's image of an open file, of one of the formats above; raises DECODER_ERRORS for anything else."""
    formats = [name for name in EXTENSIONS_BY_FORMAT if name not in PLUGIN_FORMATS or name in Image.OPEN]
    return Image.open(file, formats=formats)


def import_plugin(head: bytes, path: str) -> Traits:
    """Register in Pillow the format that the first bytes of a file are of, if a plugin reads it; gives its trait.

    path: for messages. UserError where the plugin is missing.
    """
    if head.startswith((START, CONTAINER)):
        import_jxl_plugin(path)
        return JXL_PLUGIN
    if is_heif(head):
        import_heif_plugin(path)
        return HEIF_PLUGIN
    if list_brands(head) & AVIF_BRANDS and not features.check("avif"):
        missing = MISSING_PLUGINS["avif-unsupported"]
        raise UserError(
            f"{path} is an AVIF image, which this Pillow cannot read", code="avif-unsupported", fix=missing.fix
        )
    return PLAIN


def find_lost_plugins(traits: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which images were read with a plugin that is not installed any more. traits: of each image."""
    lost = PLAIN
    for trait, module in ((JXL_PLUGIN, "pillow_jxl"), (HEIF_PLUGIN, "pillow_heif")):
        if (traits & trait).any() and find_spec(module) is None:
            lost |= trait
    return (traits & lost) != 0


def import_jxl_plugin(path: str) -> None:
    try:
        import_module("pillow_jxl")
    except ImportError as error:
        raise UserError(
            f"{path} is a JPEG XL image, which needs a Pillow plugin",
            code="jxl-plugin-missing",
            fix=MISSING_PLUGINS["jxl-plugin-missing"].fix,
        ) from error


def import_heif_plugin(path: str) -> None:
    try:
        plugin = import_module("pillow_heif")
    except ImportError as error:
        raise UserError(
            f"{path} is a HEIC/HEIF image, which needs a Pillow plugin",
            code="heif-plugin-missing",
            fix=MISSING_PLUGINS["heif-plugin-missing"].fix,
        ) from error
    if "HEIF" not in Image.OPEN:
        plugin.register_heif_opener(thumbnails=False)


def is_heif(head: bytes) -> bool:
    """Whether a file begins as HEIC or HEIF does, and not as AVIF, which shares its container."""
    brands = list_brands(head)
    return bool(brands & HEIF_BRANDS) and not brands & AVIF_BRANDS


def list_brands(head: bytes) -> set[bytes]:
    """The brands that the first box of an ISO media file names; none for other files."""
    if head[4:8] != b"ftyp":
        return set()
    length = min(int.from_bytes(head[:4], "big"), len(head))
    return {head[8:12], *(head[start : start + 4] for start in range(16, length - 3, 4))}


def describe_foreign_file(head: bytes) -> str:
    """What a file is that is no image, by its first bytes; "" where that is open."""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    return next((what for mark, what in FOREIGN_STARTS if start.startswith(mark)), "")
