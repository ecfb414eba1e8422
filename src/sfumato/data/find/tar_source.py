"""Images in tar archives, the shards of large datasets: shards/{000..099}.tar; read in place, never unpacked."""

from __future__ import annotations

import math
import os
import re
import struct
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Self

import numpy as np

from sfumato.common.files import open_descriptor, open_file, refuse_special_file
from sfumato.common.text import list_some, plural
from sfumato.common.text_files import decode_text
from sfumato.data.captions import check_caption_size
from sfumato.data.find.caption_files import FALLBACK_EXTENSIONS, fill_missing_captions, parse_captions, report_shortened
from sfumato.data.find.findings import Findings
from sfumato.data.find.folders import HEADER_COLUMNS
from sfumato.data.find.headers import read_image_header
from sfumato.data.find.image_formats import (
    MISSING_PLUGINS,
    UNREAD_EXTENSIONS,
    find_lost_plugins,
    get_extension,
    is_image,
)
from sfumato.data.find.image_notes import report_unread
from sfumato.data.find.image_table import ImageTable, IntColumn, TextColumn
from sfumato.data.find.index import Columns, pack_texts, unpack_texts
from sfumato.data.find.policy import Policy, report_bad_images, report_unsaved_index
from sfumato.data.find.settings import SubsetSettings
from sfumato.errors import UserError

NUMBER_RANGE = re.compile(r"([0-9]{1,18})\.\.([0-9]{1,18})")
BRACES = re.compile(r"\{([^{}]+)\}")
ADDITIONAL_HEADERS = (  # about the member that follows
    tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE,
)  # fmt: skip
MAX_ADDITION_BYTES = 1 << 20
MAX_MEMBER_BYTES = 1 << 60
MAX_ARCHIVES = 100_000  # that one image_dir can stand for
TEXT_COLUMNS = ("names", "texts", "faults", "fault_codes", "unread")
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


def is_archive_path(path: Path) -> bool:
    return path.name.lower().endswith((".tar", *COMPRESSED))


def load_archive_images(subset: SubsetSettings, policy: Policy, findings: Findings) -> ImageTable:
    """The images of all archives, each with the caption of the same name."""
    paths = expand_braces(os.path.abspath(subset.source))  # noqa: PTH100
    for path in paths:
        with findings.problems.catch():
            refuse_special_file(Path(path))
    missing = [path for path in paths if not os.path.isfile(path)]  # noqa: PTH113
    if missing:
        findings.problems.add(
            f"{subset.where}: {len(missing)} of {plural(len(paths), 'archive is', 'archives are')} missing: "
            f"{list_some(missing)}",
            code="archives-missing",
            fix="check image_dir",
        )
    shards: list[Shard] = []
    for path in paths:
        if path not in missing:
            with findings.problems.catch():
                shards.append(load_shard(path, subset, policy, findings))
    shards = [shard for shard in shards if len(shard.names)]
    if not shards:
        if not missing and not findings.problems.found:
            findings.problems.add(
                f"{subset.where}: no images in {subset.source}", code="archives-without-images", fix="check image_dir"
            )
        return ImageTable.from_rows([])
    return join_shards(shards, subset, policy, findings)


def expand_braces(pattern: str) -> list[str]:
    """All texts that {000..099} and {a,b} stand for, in order."""
    parts = BRACES.split(pattern)
    choices = [expand_brace(part) if position % 2 else [part] for position, part in enumerate(parts)]
    if math.prod(map(len, choices)) > MAX_ARCHIVES:
        raise UserError(
            f"image_dir {pattern} stands for more than {MAX_ARCHIVES} archives",
            code="archives-too-many",
            fix="check the numbers in braces",
        )
    return ["".join(chosen) for chosen in product(*choices)]


def expand_brace(content: str) -> list[str]:
    match = NUMBER_RANGE.fullmatch(content)
    if not match:
        return content.split(",")
    first, last = int(match[1]), int(match[2])
    step = 1 if first <= last else -1
    numbers = range(first, last + step, step)[: MAX_ARCHIVES + 1]  # one too many is refused, and counting on is work
    return [str(number).zfill(len(match[1])) for number in numbers]


def load_shard(path: str, subset: SubsetSettings, policy: Policy, findings: Findings) -> Shard:
    """The contents of an archive, from the index while its size and time are the same."""
    fallbacks = () if subset.caption_extension_given else FALLBACK_EXTENSIONS
    extensions = list(dict.fromkeys((subset.caption_extension.lower(), *fallbacks)))
    index = policy.index("archive", path, *extensions)
    stat = os.stat(path)  # noqa: PTH116
    identity = np.array([stat.st_size, stat.st_mtime_ns], np.int64)
    known = index.load()
    if known is None or not np.array_equal(known["facts"], identity) or lacks_plugin(known):
        known = {"facts": identity, **read_archive(path, extensions)}
        report_unsaved_index(index.save(known), policy, findings)
    if not known["ended"].all():
        findings.note(f"{subset.where}: {path} has no end-of-archive marker; it may have been cut short")
    columns = {name: known[name] for name in ("offsets", "byte_counts", *HEADER_COLUMNS, "endings")}
    texts = {name: unpack_texts(name, known) for name in TEXT_COLUMNS}
    return Shard(path=path, mtime_ns=stat.st_mtime_ns, extensions=extensions, columns=columns, **texts)


def lacks_plugin(known: Columns) -> bool:
    """Whether images could not be read for want of a plugin, which may be there now, or the other way round."""
    wanted = any(code in MISSING_PLUGINS for code in unpack_texts("fault_codes", known))
    return wanted or bool(find_lost_plugins(known["traits"]).any())


def read_archive(path: str, extensions: Sequence[str]) -> Columns:
    """The columns of an archive, read once from start to end. UserError where it is compressed or damaged."""
    if path.lower().endswith(COMPRESSED):
        raise UserError(
            f"{path} is compressed", code="archive-compressed", fix="decompress it to .tar, for access to single images"
        )
    images: list[tuple[str, int, int]] = []
    captions: dict[str, tuple[int, int, int]] = {}  # stem -> (index of the extension, offset, size)
    unread: list[str] = []
    try:
        with open_file(path) as file, tarfile.open(fileobj=file, mode="r:", tarinfo=CheckedMember) as archive:
            for name, offset, size in list_members(archive, os.fstat(file.fileno()).st_size):
                stem, extension = name[: name.rfind(".")], get_extension(name)
                if is_image(name):
                    images.append((name, offset, size))
                elif extension in UNREAD_EXTENSIONS:
                    unread.append(name)
                elif extension in extensions:
                    rank = extensions.index(extension)
                    if stem not in captions or rank <= captions[stem][0]:  # of repeated members the last counts
                        captions[stem] = (rank, offset, size)
            ended = check_end(archive)
    except (tarfile.TarError, EOFError, ValueError, ArithmeticError, MemoryError, struct.error) as error:
        raise UserError(
            f"{path} is no tar archive, or is damaged ({error})", code="archive-damaged", fix="create it again"
        ) from error
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror})", code="archive-unreadable", fix="check image_dir"
        ) from error
    columns = read_columns(path, images, captions)
    return {"ended": np.array([ended]), **columns, **pack_texts("unread", TextColumn.encode(unread))}


def list_members(archive: tarfile.TarFile, end: int) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of every plain file in the archive, without hidden ones.

    end: size of the archive; a member that goes beyond it is as long as what is there. TarError where a member does not
    lie behind the one before it.
    """
    last = -1
    for member in archive:
        if not last < member.offset_data <= archive.offset:
            raise tarfile.ReadError(f"{member.name} has an impossible size")
        last = member.offset_data
        if member.isreg() and not member.issparse() and not member.name.rpartition("/")[2].startswith("."):
            yield member.name, member.offset_data, max(min(member.size, end - member.offset_data), 0)
        vars(archive)["members"].clear()  # it would keep them all


class CheckedMember(tarfile.TarInfo):
    """A member's header, refused where its size is impossible: a negative one leads tarfile back to where it was, and
    the additional headers of long names and attributes are read at once, however long they say they are.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        member = super().frombuf(buf, encoding, errors)
        limit = MAX_ADDITION_BYTES if member.type in ADDITIONAL_HEADERS else MAX_MEMBER_BYTES
        if not 0 <= member.size <= limit:
            raise tarfile.ReadError(f"{member.name} has an impossible size")
        return member


def check_end(archive: tarfile.TarFile) -> bool:
    """Whether the end-of-archive marker follows the last member; False where the file ends there.

    TarError where anything else follows: the reader silently takes a damaged header for the end.
    """
    assert archive.fileobj is not None
    archive.fileobj.seek(archive.offset)
    block = archive.fileobj.read(tarfile.BLOCKSIZE)
    if block.strip(b"\0"):
        raise tarfile.ReadError(f"no file header at byte {archive.offset}")
    return bool(block)


def read_columns(
    path: str, images: Sequence[tuple[str, int, int]], captions: Mapping[str, tuple[int, int, int]]
) -> Columns:
    """Sizes and captions of an archive's images.

    images: (name, offset, size in bytes). captions: stem -> (index of the extension, offset, size in bytes).
    """
    widths, heights, traits, extensions = (np.zeros(len(images), np.int64) for _ in range(4))
    faults, fault_codes, texts = ([""] * len(images) for _ in range(3))
    in_lower_case = {stem.lower(): caption for stem, caption in captions.items()}
    descriptor, _ = open_descriptor(path)
    try:
        for row, (name, offset, size) in enumerate(images):
            extensions[row] = -1
            stem = name[: name.rfind(".")]
            extension, start, length = captions.get(stem) or in_lower_case.get(stem.lower(), (-1, 0, 0))
            try:
                header = read_image_header(descriptor, f"{path}/{name}", size, offset)
                widths[row], heights[row], traits[row] = header.width, header.height, header.traits
                if extension >= 0:
                    check_caption_size(length, f"the caption of {path}/{name}")
                    os.lseek(descriptor, start, os.SEEK_SET)
                    texts[row] = decode_text(os.read(descriptor, length), f"the caption of {path}/{name}")
                    extensions[row] = extension
            except UserError as error:
                faults[row], fault_codes[row] = str(error), error.code
    finally:
        os.close(descriptor)
    numbers = np.array([image[1:] for image in images], np.int64).reshape(len(images), 2)
    return {
        **pack_texts("names", TextColumn.encode(image[0] for image in images)),
        **pack_texts("texts", TextColumn.encode(texts)),
        **pack_texts("faults", TextColumn.encode(faults)),
        **pack_texts("fault_codes", TextColumn.encode(fault_codes)),
        "offsets": numbers[:, 0],
        "byte_counts": numbers[:, 1],
        "widths": widths,
        "heights": heights,
        "traits": traits,
        "endings": extensions,
    }


def join_shards(shards: Sequence[Shard], subset: SubsetSettings, policy: Policy, findings: Findings) -> ImageTable:
    """The valid images of all archives, in order."""
    report_shard_faults(shards, subset, policy, findings)
    report_unread([name for shard in shards for name in shard.unread], subset.where, findings)
    valid = [shard.find_valid_rows() for shard in shards]
    counts = [len(rows) for rows in valid]
    names = join_texts([shard.names for shard in shards], valid)
    origin = np.repeat(np.arange(len(shards)), counts)
    extensions = join_columns("endings", shards, valid)
    report_fallback_extensions(extensions, shards[0].extensions, subset, findings)

    def get_caption_name(row: int) -> str:
        return f"the caption of {shards[origin[row]].path}/{names.get_row(row)}"

    contents = iterate_rows([shard.texts for shard in shards], valid)
    extension_names = [*shards[0].extensions, ""]  # the last for -1: no caption
    caption_extensions = (extension_names[extension] for extension in extensions.tolist())
    faults: dict[int, UserError] = {}
    shortened: list[int] = []
    texts = parse_captions(contents, caption_extensions, get_caption_name, subset, faults, shortened)
    what = f"({subset.caption_extension} file in the archive)"
    table = fill_missing_captions(
        names, texts, faults, what, subset, policy, findings, empty=lambda row: bool(extensions[row] >= 0)
    )
    report_shortened([names.get_row(row) for row in shortened], len(names), subset, findings)
    images = ImageTable(
        origins=tuple(shard.path for shard in shards),
        origin=origin,
        names=names,
        mtimes=np.repeat(np.array([shard.mtime_ns for shard in shards], np.int64), counts),
        offsets=join_columns("offsets", shards, valid),
        byte_counts=join_columns("byte_counts", shards, valid),
        widths=join_columns("widths", shards, valid),
        heights=join_columns("heights", shards, valid),
        traits=join_columns("traits", shards, valid),
        captions=table.captions,
    )
    return images if len(table.kept_rows) == len(images) else images.take(table.kept_rows)


def report_shard_faults(shards: Sequence[Shard], subset: SubsetSettings, policy: Policy, findings: Findings) -> None:
    bad: list[tuple[str, UserError]] = []
    for shard in shards:
        for name, fault, code in zip(shard.names, shard.faults, shard.fault_codes, strict=True):
            if fault:
                bad.append((name, UserError(fault, code=code)))
    report_bad_images(bad, subset.where, policy, findings)


def join_columns(name: str, shards: Sequence[Shard], rows: Sequence[IntColumn]) -> IntColumn:
    """The column of all shards, only the given rows of each."""
    return np.concatenate([shard.columns[name][wanted] for shard, wanted in zip(shards, rows, strict=True)])


def iterate_rows(columns: Sequence[TextColumn], rows: Sequence[IntColumn]) -> Iterator[str]:
    """The texts of all columns, only the given rows of each."""
    for column, wanted in zip(columns, rows, strict=True):
        for row in wanted:
            yield column.get_row(row)


def join_texts(columns: Sequence[TextColumn], rows: Sequence[IntColumn]) -> TextColumn:
    return TextColumn.encode(iterate_rows(columns, rows))


def report_fallback_extensions(
    used: IntColumn, extensions: Sequence[str], subset: SubsetSettings, findings: Findings
) -> None:
    """Report captions that are from files without the configured extension. used: index into `extensions`."""
    for index, extension in enumerate(extensions[1:], 1):
        count = int((used == index).sum())
        if count:
            findings.note(
                f"{subset.where}: {plural(count, 'caption is', 'captions are')} from {extension} files, because there "
                f"is no {extensions[0]} file"
            )


@dataclass(frozen=True, kw_only=True)
class Shard:
    """The contents of one archive, a row per image."""

    path: str
    mtime_ns: int
    extensions: list[str]  # of caption files, the configured one first
    columns: Columns  # endings: index of the caption's extension, -1 for no caption
    names: TextColumn
    texts: TextColumn
    faults: TextColumn  # "" where the image is valid
    fault_codes: TextColumn
    unread: TextColumn  # images and videos of kinds that are not read

    def find_valid_rows(self) -> IntColumn:
        return np.array([row for row, fault in enumerate(self.faults) if not fault], np.int64)
