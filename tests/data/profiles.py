"""ICC profiles of three colors and a curve, written by hand (ICC.1:2001-04, sections 6.1 and 6.5)."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np

Chromaticity = tuple[float, float]
D65 = (0.3127, 0.3290)
D50_XYZ = np.array([0.9642, 1.0, 0.8249])
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
PRIMARIES: dict[str, Sequence[Chromaticity]] = {  # red, green, blue
    "sRGB": ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06)),
    "Adobe RGB": ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06)),
    "Display P3": ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
}


def to_xyz(color: Chromaticity) -> np.ndarray:
    x, y = color
    return np.array([x / y, 1.0, (1 - x - y) / y])


def make_matrix(name: str) -> np.ndarray:
    """Linear RGB -> XYZ under D50, adapted by Bradford's method."""
    columns = np.stack([to_xyz(color) for color in PRIMARIES[name]], 1)
    white = to_xyz(D65)
    matrix = columns * np.linalg.solve(columns, white)
    scale = np.diag((BRADFORD @ D50_XYZ) / (BRADFORD @ white))
    return np.linalg.inv(BRADFORD) @ scale @ BRADFORD @ matrix


def srgb_curve(levels: np.ndarray) -> np.ndarray:
    """Encoded values from 0 to 1 -> linear light (IEC 61966-2-1)."""
    return np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)


def make_profile(name: str, *, gamma: float | None = None) -> bytes:
    """gamma: of the curve; that of sRGB by default."""
    tags = {b"desc": text_tag(name), b"cprt": b"text\0\0\0\0none\0", b"wtpt": xyz_tag(D50_XYZ)}
    matrix = make_matrix(name)
    for i, letter in enumerate("rgb"):
        tags[f"{letter}XYZ".encode()] = xyz_tag(matrix[:, i])
        tags[f"{letter}TRC".encode()] = curve_tag(gamma)
    return join_tags(tags, space=b"RGB ")


def make_gray_profile(gamma: float) -> bytes:
    tags = {b"desc": text_tag("gray"), b"cprt": b"text\0\0\0\0none\0", b"wtpt": xyz_tag(D50_XYZ)}
    return join_tags({**tags, b"kTRC": curve_tag(gamma)}, space=b"GRAY")


def make_cmyk_profile(inks: dict[tuple[int, int, int, int], tuple[float, float, float]]) -> bytes:
    """A table of 8 bits with a color in Lab for each combination of full and no inks; white where none is given."""
    corners = [tuple(number >> shift & 1 for shift in (3, 2, 1, 0)) for number in range(16)]
    table = b""
    for corner in corners:
        lightness, a, b = inks.get(corner, (100.0, 0.0, 0.0))  # pyright: ignore[reportArgumentType]
        table += bytes([round(lightness * 2.55), round(a) + 128, round(b) + 128])
    identity = b"".join(fixed(float(i in (0, 4, 8))) for i in range(9))
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + identity + bytes(range(256)) * 4 + table + bytes(range(256)) * 3
    tags = {b"desc": text_tag("inks"), b"cprt": b"text\0\0\0\0none\0", b"wtpt": xyz_tag(D50_XYZ), b"A2B0": lut}
    return join_tags(tags, space=b"CMYK", connection=b"Lab ", device=b"prtr")


def join_tags(tags: dict[bytes, bytes], *, space: bytes, connection: bytes = b"XYZ ", device: bytes = b"mntr") -> bytes:
    table, body = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for signature, content in tags.items():
        table += signature + struct.pack(">II", start + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    header = struct.pack(">I4sI4s4s4s", start + len(body), b"none", 0x02400000, device, space, connection)
    header += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28)
    header += b"".join(fixed(value) for value in D50_XYZ)
    return header.ljust(128, b"\0") + table + body


def fixed(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def xyz_tag(value: np.ndarray) -> bytes:
    return b"XYZ \0\0\0\0" + b"".join(fixed(part) for part in value)


def curve_tag(gamma: float | None) -> bytes:
    if gamma is not None:
        return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))
    table = np.rint(srgb_curve(np.linspace(0, 1, 1024)) * 65535).astype(">u2")
    return b"curv\0\0\0\0" + struct.pack(">I", 1024) + table.tobytes()


def text_tag(text: str) -> bytes:
    data = text.encode() + b"\0"
    return b"desc\0\0\0\0" + struct.pack(">I", len(data)) + data + bytes(78)
