"""Tar archives: their member headers, and the images and captions in them."""

from __future__ import annotations

import tarfile
from io import BytesIO
from pathlib import Path

from fuzz.images import make_image
from fuzz.target import Setup, target, through_file
from sfumato.data.find.tar_source import read_archive

SIZE_FIELD, CHECKSUM_FIELD, KIND_FIELD = slice(124, 136), slice(148, 156), 156  # of a member's header (POSIX ustar)
SIZES = (2**33, 2**62, 2**63 - 1, 2**64, 2**87, -1, -512, -1024, -(2**62))
KINDS = b"01345679xgLKSDMVN\0"


def make_archive(archive_format: int, long_names: bool = False) -> bytes:
    content = BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=archive_format) as archive:
        for name, data in (("a.png", make_image("PNG")), ("a.txt", b"a cat"), ("b.jpg", make_image("JPEG"))):
            member = tarfile.TarInfo("long/" * 40 * long_names + name)
            member.size = len(data)
            archive.addfile(member, BytesIO(data))
    return content.getvalue().rstrip(b"\0") + bytes(1024)


def make_header(size: int, kind: int) -> bytes:
    """A member of an impossible size, with a checksum that fits."""
    block = bytearray(tarfile.TarInfo("b.png").tobuf(tarfile.GNU_FORMAT))
    block[SIZE_FIELD] = (b"\x80" if size >= 0 else b"\xff") + (size % 2**88).to_bytes(11, "big")
    block[KIND_FIELD] = kind
    return write_checksum(block)


def write_checksum(block: bytearray) -> bytes:
    block[CHECKSUM_FIELD] = b" " * 8
    block[CHECKSUM_FIELD] = b"%06o\0 " % sum(block)
    return bytes(block)


def mend_checksums(data: bytes) -> bytes:
    """Checksums that fit in all blocks that look like headers: a damaged one would end the reading."""
    blocks: list[bytes] = []
    for start in range(0, len(data), 512):
        block = data[start : start + 512]
        is_header = block[257:262] == b"ustar" and len(block) == 512
        blocks.append(write_checksum(bytearray(block)) if is_header else block)
    return b"".join(blocks)


SEEDS = (
    make_archive(tarfile.USTAR_FORMAT),
    make_archive(tarfile.GNU_FORMAT, long_names=True),
    make_archive(tarfile.PAX_FORMAT, long_names=True),
)
TOKENS = (b"ustar\0", b"00", b"GNU.sparse.size=1\n", b"30 mtime=1.5\n", b"20 size=-1\n", b"\x80\0\0\0", b"\xff\xff")


@target(*TOKENS)
def tar_archive(folder: Path) -> Setup:
    read = through_file(folder / "a.tar", lambda path: read_archive(str(path), [".txt", ".json"]))
    return Setup(seeds=SEEDS, read=read)


@target(*TOKENS)
def tar_with_checksums(folder: Path) -> Setup:
    """The same with checksums that fit, so that what is behind the damage is read, too."""
    read = through_file(folder / "a.tar", lambda path: read_archive(str(path), [".txt", ".json"]))
    return Setup(seeds=SEEDS, read=lambda data: read(mend_checksums(data)))


@target(*(make_header(size, kind) for size in SIZES for kind in KINDS), share=0.3)
def tar_sizes(folder: Path) -> Setup:
    """Members of impossible sizes among good ones."""
    read = through_file(folder / "a.tar", lambda path: read_archive(str(path), [".txt"]))
    return Setup(seeds=SEEDS, read=read)
