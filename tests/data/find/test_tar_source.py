"""Images in tar archives."""

from __future__ import annotations

import tarfile
from collections import Counter
from itertools import islice

import pytest

from data.dataset_files import (
    ARCHIVES,
    encode_png,
    list_captions,
    list_items,
    write_archive,
    write_archives,
)
from sfumato.data.batch_sampler import BatchSampler
from sfumato.data.find.tar_source import expand_braces, read_archive
from sfumato.errors import UserError


def toml(find, text: str, *argv, **options):
    return find.toml(text.replace("{root}", find.root.as_posix()), *argv, **{"bucket_step": 16, **options})


def test_a_cache_beside_archives_is_refused(find, tmp_path):
    write_archives(tmp_path / "set")
    with pytest.raises(UserError) as error:
        toml(find, ARCHIVES, "--cache_dir", tmp_path / "set")
    assert error.value.code == "cache-dir-among-images"
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == ["000.tar", "001.tar", "002.tar"]


def test_archives_are_read_in_place(find, tmp_path):
    write_archives(tmp_path / "set")
    plan = toml(find, ARCHIVES)
    assert [item.image.caption for item in list_items(plan)] == [f"caption {s} {i}" for s in range(3) for i in range(4)]
    assert any("12 captions are from .txt files, because there is no .caption file" in note for note in plan.notes)
    for index, item in enumerate(list_items(plan)):
        assert item.image.read() == encode_png(index // 4 * 100 + index % 4, item.size)
    assert toml(find, ARCHIVES).datasets == plan.datasets  # from the index
    write_archive(tmp_path / "set" / "001.tar", {"x.png": encode_png(9), "x.caption": "new"})
    assert [item.image.caption for item in list_items(toml(find, ARCHIVES))][4] == "new"
    assert len(list_items(toml(find, ARCHIVES))) == 9


@pytest.mark.parametrize("processes", [1, 2])
def test_archives_give_disjoint_samples_and_whole_buckets(find, tmp_path, processes):
    write_archives(tmp_path / "set")
    plan = toml(find, ARCHIVES, processes=processes)
    seen: Counter[str] = Counter()
    for rank in range(processes):
        sampler = BatchSampler(plan, seed=1, rank=rank)
        for step in islice(sampler.steps(), sampler.steps_per_epoch):
            for batch in step.batches:
                assert {sample.item.choice.bucket for sample in batch.samples} == {batch.bucket}
                seen.update(sample.item.image.path for sample in batch.samples if sample.real)
    assert seen == Counter({item.image.path: 2 for item in list_items(plan)})


def test_faults_of_archives(find, tmp_path):
    write_archives(tmp_path / "set", count=2)
    write_archive(
        tmp_path / "set" / "001.tar",
        {"a.png": encode_png(0), "a.txt": "x", "bad.png": b"no", "bad.txt": "x", "alone.png": encode_png(1)},
    )
    (tmp_path / "set" / "002.tar").write_bytes(b"this is no archive" * 100)
    with pytest.raises(UserError):
        toml(find, ARCHIVES)
    messages = dict(zip(find.codes, find.messages, strict=True))
    assert "002.tar" in messages["archive-damaged"]
    assert "001.tar/bad.png" in messages["image-header-damaged"]
    assert "1 of 6 images" in messages["captions-missing"]
    assert "alone.png" in messages["captions-missing"]
    with pytest.raises(UserError):
        toml(find, ARCHIVES.replace("{000..002}", "{001..010}"))
    assert "8 of 10" in dict(zip(find.codes, find.messages, strict=True))["archives-missing"]
    (tmp_path / "set" / "a.tar.gz").write_bytes(b"")
    with pytest.raises(UserError) as error:
        toml(find, ARCHIVES.replace("{000..002}.tar", "a.tar.gz"))
    assert error.value.code == "archive-compressed"


def test_of_repeated_members_the_last_counts(find, tmp_path):
    """tar appends a member to replace it."""
    path = write_archive(tmp_path / "set" / "000.tar", {"x.png": encode_png(0), "x.txt": "old"})
    with tarfile.open(path, "a") as archive:
        (tmp_path / "x.txt").write_text("new")
        archive.add(tmp_path / "x.txt", "x.txt")
    assert list_captions(toml(find, ARCHIVES.replace("{000..002}", "000"))) == {"x.png": "new"}


def test_an_archive_that_is_cut_or_damaged_anywhere_is_reported(find, tmp_path):
    """An error wherever it ends and whichever header is damaged; a note where it ends after a complete member."""
    samples = {"0.png": encode_png(0), "0.txt": "x", "1.png": encode_png(1), "1.txt": "x"}
    path = write_archive(tmp_path / "set" / "000.tar", samples)
    text = ARCHIVES.replace("{000..002}", "000")
    complete = path.read_bytes()
    with tarfile.open(path) as archive:
        members = archive.getmembers()
    ends = [member.offset for member in members[1:]] + [members[-1].offset_data + 512]
    for cut in [*range(100, ends[-1] + 1, 200), *ends]:
        path.write_bytes(complete[:cut])
        if cut not in ends:
            with pytest.raises(UserError, match=r"000\.tar") as error:
                toml(find, text)
            assert error.value.code == "archive-damaged"
            continue
        plan = toml(find, text, "--on_missing_caption", "empty")
        assert len(list_items(plan)) == (1 if cut < ends[1] + 512 else 2)
        assert any("000.tar has no end-of-archive marker" in note for note in plan.notes)
    for member in members:
        damaged = bytearray(complete)
        damaged[member.offset + 100] ^= 64
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"000\.tar") as error:
            toml(find, text)
        assert error.value.code == "archive-damaged"
    path.write_bytes(complete)
    assert not any("end-of-archive" in note for note in toml(find, text).notes)


def test_hidden_files_in_an_archive_are_ignored(find, tmp_path):
    """Some systems add one for every file."""
    write_archive(
        tmp_path / "set" / "000.tar",
        {"a/x.png": encode_png(0), "a/x.txt": "cat", "a/._x.png": "no image", "a/._x.txt": ""},
    )
    assert list_captions(toml(find, ARCHIVES.replace("{000..002}", "000"))) == {"x.png": "cat"}


def test_an_archive_that_shrinks_under_the_run_is_named(find, tmp_path):
    write_archives(tmp_path / "set")
    plan = toml(find, ARCHIVES)
    with (tmp_path / "set" / "002.tar").open("r+b") as file:
        file.truncate(2000)
    with pytest.raises(UserError, match=r"002\.tar") as error:
        list_items(plan)[-1].image.read()
    assert error.value.code == "archived-image-cut-short"
    assert not list_items(plan)[-1].image.is_unchanged()


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("{000..002}.tar", ["000.tar", "001.tar", "002.tar"]),
        ("{9..11}", ["9", "10", "11"]),
        ("{b,a}{1..2}", ["b1", "b2", "a1", "a2"]),
        ("{3..1}", ["3", "2", "1"]),
        ("{a}..{b", ["a..{b"]),
    ],
)
def test_expand_braces(pattern, names):
    assert expand_braces(pattern) == names


@pytest.mark.parametrize(
    "pattern", ["{0..999999999}", "{000..999}{0..999}", "{a,b}" * 40, "{0..99999}{0..99999}{0..99999}"]
)
def test_braces_that_stand_for_too_many_archives(pattern):
    with pytest.raises(UserError) as error:
        expand_braces(pattern)
    assert error.value.code == "archives-too-many"


def make_member(size: int, kind: bytes) -> bytes:
    """The header of a member of an impossible size, with a checksum that fits (POSIX ustar; GNU's base-256 numbers)."""
    block = bytearray(tarfile.TarInfo("a.png").tobuf(tarfile.GNU_FORMAT))
    block[124:136] = (b"\x80" if size >= 0 else b"\xff") + (size % 2**88).to_bytes(11, "big")
    block[156:157] = kind
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize("kind", [b"0", b"x", b"g", b"L", b"K", b"S", b"5", b"7"])
@pytest.mark.parametrize("size", [2**33, 2**62, 2**63 - 1, 2**64, 2**87, -1, -512, -(2**80)])
def test_members_of_impossible_sizes(tmp_path, size, kind):
    """A negative size leads tarfile back to where it was (CVE-2025-8194); of folders it means nothing."""
    first = tarfile.TarInfo("first.txt").tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "a.tar").write_bytes(first + make_member(size, kind) + bytes(2048))
    if kind == b"5" and size == 2**33:
        assert not len(read_archive(str(tmp_path / "a.tar"), [".txt"])["offsets"])
        return
    with pytest.raises(UserError) as error:
        read_archive(str(tmp_path / "a.tar"), [".txt"])
    assert error.value.code == "archive-damaged"
    assert str(tmp_path / "a.tar") in error.value.what


def test_a_member_whose_attributes_give_it_a_negative_size(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        for name in ("a.png", "b.png"):
            member = tarfile.TarInfo(name)
            member.pax_headers = {"size": "-512"}
            archive.addfile(member)
    with pytest.raises(UserError) as error:
        read_archive(str(tmp_path / "a.tar"), [".txt"])
    assert error.value.code == "archive-damaged"
