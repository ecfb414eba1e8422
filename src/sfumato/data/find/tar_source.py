"""Pictures in tar archives, as large data sets come: shards/{000..099}.tar; read where they lie, never unpacked."""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

from sfumato.data.find.caption_files import OTHER_ENDINGS, read_contents, with_captions
from sfumato.data.find.folders import decoded, is_image
from sfumato.data.find.headers import BINARY, header_at
from sfumato.data.find.image_table import Column, Pictures, Texts
from sfumato.data.find.index import Columns, Index, packed, unpacked
from sfumato.data.find.policy import Policy, some, told_of_bad, told_of_memory
from sfumato.data.find.report import Report
from sfumato.data.find.settings import SubsetSettings
from sfumato.errors import UserError

BRACES = re.compile(r"\{([^{}]+)\}")
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


def are_shards(place: Path) -> bool:
    return place.name.lower().endswith((".tar", *COMPRESSED))


def of_shards(subset: SubsetSettings, policy: Policy, report: Report) -> Pictures:
    """The pictures of all archives, each with the caption that has its name."""
    paths = expanded(os.path.abspath(subset.place))  # noqa: PTH100
    missing = [path for path in paths if not os.path.isfile(path)]  # noqa: PTH113
    if missing:
        what = f"{subset.where}: {len(missing)} of {len(paths)} archives are not there: {some(missing)}"
        report.problems.add(what, fix="check image_dir")
    shards: list[Shard] = []
    for path in paths:
        if path not in missing:
            with report.problems.catch():
                shards.append(shard_of(path, subset, policy, report))
    shards = [shard for shard in shards if len(shard.names)]
    if not shards:
        if not missing and not report.problems.found:
            report.problems.add(f"{subset.where}: no images in {subset.place}", fix="check image_dir")
        return Pictures.of([])
    return joined(shards, subset, policy, report)


def expanded(pattern: str) -> list[str]:
    """{000..099} and {a,b} written out, in order."""
    parts = BRACES.split(pattern)
    choices = [choices_of(part) if place % 2 else [part] for place, part in enumerate(parts)]
    return ["".join(each) for each in product(*choices)]


def choices_of(braces: str) -> list[str]:
    first, dots, last = braces.partition("..")
    if dots and first.isdigit() and last.isdigit():
        step = 1 if int(first) <= int(last) else -1
        return [str(each).zfill(len(first)) for each in range(int(first), int(last) + step, step)]
    return braces.split(",")


def shard_of(path: str, subset: SubsetSettings, policy: Policy, report: Report) -> Shard:
    """What is in an archive: remembered while its size and time are the same."""
    endings = list(dict.fromkeys((subset.caption_extension, *OTHER_ENDINGS)))
    index = Index(policy.cache_dir, ("archive", path, *endings))
    facts = os.stat(path)  # noqa: PTH116
    now = np.array([facts.st_size, facts.st_mtime_ns], np.int64)
    known = index.load()
    if known is None or not np.array_equal(known["facts"], now):
        known = {"facts": now, **read_archive(path, endings)}
        told_of_memory(index.save(known), policy, report)
    if not known["ended"].all():
        report.note(f"{subset.where}: {path} ends without the mark of an archive's end; it may have been cut short")
    columns = {name: known[name] for name in ("offsets", "byte_counts", "widths", "heights", "endings")}
    texts = {name: unpacked(name, known) for name in ("names", "texts", "faults")}
    return Shard(path=path, mtime_ns=facts.st_mtime_ns, endings=endings, columns=columns, **texts)


def read_archive(path: str, endings: Sequence[str]) -> Columns:
    """Walk over the archive once; UserError where it cannot be read at any place."""
    if path.lower().endswith(COMPRESSED):
        fix = "unpack it, so that a picture can be read without all before it"
        raise UserError(f"{path} is compressed", fix=fix)
    images: list[tuple[str, int, int]] = []
    captions: dict[str, tuple[int, int, int]] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for name, offset, size in members_of(archive):
                stem, ending = os.path.splitext(name)  # noqa: PTH122
                if is_image(name):
                    images.append((name, offset, size))
                elif ending in endings and (endings.index(ending), 0, 0) < captions.get(stem, (len(endings), 0, 0)):
                    captions[stem] = (endings.index(ending), offset, size)
            ended = ends_well(archive)
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise UserError(f"{path} is no tar archive, or is damaged ({error})", fix="make it anew") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})", fix="check image_dir") from error
    return {"ended": np.array([ended]), **columns_of(path, images, captions)}


def members_of(archive: tarfile.TarFile) -> Iterator[tuple[str, int, int]]:
    """(name, offset, size) of every plain file in the archive; hidden ones are passed over."""
    for member in archive:
        if member.isreg() and not member.issparse() and not member.name.rpartition("/")[2].startswith("."):
            yield member.name, member.offset_data, member.size
        vars(archive)["members"].clear()  # it would keep them all


def ends_well(archive: tarfile.TarFile) -> bool:
    """Whether the members read are all: the mark of the end follows the last. False where nothing follows it.

    TarError where anything else does: the reader takes a damaged header for the end and says nothing.
    """
    assert archive.fileobj is not None
    archive.fileobj.seek(archive.offset)
    block = archive.fileobj.read(tarfile.BLOCKSIZE)
    if block.strip(b"\0"):
        raise tarfile.ReadError(f"byte {archive.offset} should begin a file in it, and does not")
    return bool(block)


def columns_of(
    path: str, images: Sequence[tuple[str, int, int]], captions: Mapping[str, tuple[int, int, int]]
) -> Columns:
    widths, heights, chosen = (np.zeros(len(images), np.int64) for _ in range(3))
    faults, texts = [""] * len(images), [""] * len(images)
    descriptor = os.open(path, os.O_RDONLY | BINARY)
    try:
        for place, (name, offset, size) in enumerate(images):
            chosen[place] = -1
            ending, start, length = captions.get(name[: name.rfind(".")], (-1, 0, 0))
            try:
                header = header_at(descriptor, f"{path}/{name}", size, offset)
                widths[place], heights[place] = header.width, header.height
                if ending >= 0:
                    os.lseek(descriptor, start, os.SEEK_SET)
                    texts[place] = decoded(os.read(descriptor, length), f"the caption of {path}/{name}")
                    chosen[place] = ending
            except UserError as error:
                faults[place] = str(error)
    finally:
        os.close(descriptor)
    numbers = np.array([image[1:] for image in images], np.int64).reshape(len(images), 2)
    return {
        **packed("names", Texts.of(image[0] for image in images)),
        **packed("texts", Texts.of(texts)),
        **packed("faults", Texts.of(faults)),
        "offsets": numbers[:, 0], "byte_counts": numbers[:, 1],
        "widths": widths, "heights": heights, "endings": chosen,
    }  # fmt: skip


def joined(shards: Sequence[Shard], subset: SubsetSettings, policy: Policy, report: Report) -> Pictures:
    """One after the other, without those that cannot be used."""
    faults = [
        (name, UserError(fault))
        for shard in shards
        for name, fault in zip(shard.names, shard.faults, strict=True)
        if fault
    ]
    told_of_bad(faults, subset.where, policy, report)
    good = [np.array([place for place, fault in enumerate(shard.faults) if not fault], np.int64) for shard in shards]
    names = Texts.of(shard.names.row(place) for shard, places in zip(shards, good, strict=True) for place in places)
    counts = [len(places) for places in good]

    def column(name: str) -> Column:
        return np.concatenate([shard.columns[name][places] for shard, places in zip(shards, good, strict=True)])

    told_of_endings(shards, good, subset, report)
    kinds = [*shards[0].endings, ""]  # the last for no caption
    endings = column("endings")
    contents = (shard.texts.row(place) for shard, places in zip(shards, good, strict=True) for place in places)
    origin = np.repeat(np.arange(len(shards)), counts)
    unread: dict[int, UserError] = {}
    texts = read_contents(
        contents,
        (kinds[ending] for ending in endings.tolist()),
        lambda place: f"the caption of {shards[origin[place]].path}/{names.row(place)}",
        subset,
        unread,
    )
    what = f"({subset.caption_extension} file in the archive)"
    wanted = with_captions(
        names, texts, unread, what, subset, policy, report, empty=lambda place: bool(endings[place] >= 0)
    )
    pictures = Pictures(
        origins=tuple(shard.path for shard in shards),
        origin=origin,
        names=names,
        mtimes=np.repeat(np.array([shard.mtime_ns for shard in shards], np.int64), counts),
        offsets=column("offsets"),
        byte_counts=column("byte_counts"),
        widths=column("widths"),
        heights=column("heights"),
        captions=wanted.captions,
    )
    return pictures if len(wanted.keep) == len(pictures) else pictures.take(wanted.keep)


def told_of_endings(shards: Sequence[Shard], good: Sequence[Column], subset: SubsetSettings, report: Report) -> None:
    """Say where captions were taken from other files than the configured ones."""
    chosen = np.concatenate([shard.columns["endings"][places] for shard, places in zip(shards, good, strict=True)])
    for place, ending in enumerate(shards[0].endings[1:], 1):
        count = int((chosen == place).sum())
        if count:
            wanted = shards[0].endings[0]
            report.note(f"{subset.where}: {count} captions are from {ending} files, for want of {wanted} files")


@dataclass(frozen=True, kw_only=True)
class Shard:
    """What is in one archive, a row for each image."""

    path: str
    mtime_ns: int
    endings: list[str]  # of caption files, the wanted one first
    columns: Columns  # endings: which of them the caption has, -1 for no caption
    names: Texts
    texts: Texts
    faults: Texts  # empty where the image can be used
