"""The header reader agrees with the safetensors library, and says what is wrong with a damaged file."""

import contextlib
import json
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save, save_file

from sfumato.errors import UserError
from sfumato.formats.header import MAX_HEADER_BYTES, read_header
from sfumato.formats.shards import read_sharded_headers

TENSORS = {
    "unet.weight": torch.randn(3, 4),
    "unet.bias": torch.randn(3).half(),
    "scalar": torch.tensor(2.0, dtype=torch.bfloat16),
    "empty": torch.zeros(0, 5),
    "small": torch.zeros(4).to(torch.float8_e4m3fn),
    "ids": torch.arange(6).reshape(2, 3),
}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt", "comment": "größer ✓"})
    return path


def raw(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def entry(**changes):
    return json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}).encode()


def test_it_reads_what_the_library_reads(file):
    header = read_header(file)
    with safe_open(file, "pt") as library:
        assert set(header.tensors) == set(library.keys())
        assert header.metadata == library.metadata()
        assert header.shapes == {name: tuple(library.get_slice(name).get_shape()) for name in library.keys()}  # noqa: SIM118
        assert {n: i.dtype for n, i in header.tensors.items()} == {n: library.get_slice(n).get_dtype() for n in TENSORS}
    content = file.read_bytes()
    for name, tensor in TENSORS.items():
        info = header.tensors[name]
        assert content[info.start : info.end] == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert info.numel == tensor.numel()
        assert info.nbytes == tensor.nbytes


def test_a_file_without_tensors_and_metadata(tmp_path):
    path = tmp_path / "none.safetensors"
    path.write_bytes(raw(b"{}"))
    assert read_header(path).tensors == {}
    assert read_header(path).metadata == {}


def test_missing_and_folder(tmp_path):
    with pytest.raises(UserError, match=r"gone\.safetensors") as missing:
        read_header(tmp_path / "gone.safetensors")
    assert missing.value.code == "tensor-file-missing"
    with pytest.raises(UserError) as folder:
        read_header(tmp_path)
    assert folder.value.code == "tensor-file-is-folder"


def test_every_truncation_is_named_with_both_sizes(file):
    content = file.read_bytes()
    for size in range(len(content)):
        file.write_bytes(content[:size])
        with pytest.raises(UserError) as error:
            read_header(file)
        assert str(file) in str(error.value)
        assert f"{size:,}" in str(error.value)
        if size >= len(content) - 50:
            assert error.value.code == "tensor-file-truncated"
            assert f"{len(content):,}" in str(error.value)


def test_surplus_bytes(file):
    file.write_bytes(file.read_bytes() + b"xx")
    with pytest.raises(UserError, match="2 bytes") as error:
        read_header(file)
    assert error.value.code == "tensor-file-too-long"


@pytest.mark.parametrize(
    ("content", "code", "detail"),
    [
        (b"", "not-safetensors", "0 bytes"),
        (b"PK\x03\x04" + b"x" * 100, "not-safetensors", "pickled checkpoint"),
        (b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P", "not-safetensors", "old pickled"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12", "not-safetensors", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>" + b"x" * 100, "not-safetensors", "web page"),
        (b"\n <html>" + b"x" * 100, "not-safetensors", "web page"),
        (b"GGUF" + b"\x03\0\0\0" + b"x" * 100, "not-safetensors", "GGUF"),
        (b"x" * 1000, "not-safetensors", ""),
        (struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{" + b" " * 100, "not-safetensors", ""),
        (struct.pack("<Q", 2**63) + b"{}", "not-safetensors", ""),
        (struct.pack("<Q", MAX_HEADER_BYTES) + b"{" + b" " * 100, "tensor-file-truncated", ""),
        (raw(b"{nonsense}"), "safetensors-header-damaged", ""),
        (raw(b'{"a": "\xff"}'), "safetensors-header-damaged", ""),
        (raw(b"{" + b'"a":{' * 90_000), "safetensors-header-damaged", ""),
        (raw(b'{"__metadata__": {"a": 1}}'), "safetensors-header-damaged", "metadata"),
        (raw(b'{"a": []}'), "safetensors-header-damaged", "entry 'a'"),
        (raw(b'{"a": {"dtype": "F32"}}'), "safetensors-header-damaged", "entry 'a'"),
        (raw(entry(dtype="F33"), b"x" * 8), "safetensors-dtype-unknown", "'F33'"),
        (raw(entry(dtype=[1]), b"x" * 8), "safetensors-header-damaged", "entry 'a'"),
        (raw(entry(shape=[3]), b"x" * 8), "safetensors-header-damaged", "size of 'a'"),
        (raw(entry(shape=[-1, -2]), b"x" * 8), "safetensors-header-damaged", "size of 'a'"),
        (raw(entry(shape=[2.0]), b"x" * 8), "safetensors-header-damaged", "size of 'a'"),
        (raw(entry(shape=["2"]), b"x" * 8), "safetensors-header-damaged", "'a'"),
        (raw(entry(shape=["x", 10**11]), b"x" * 8), "safetensors-header-damaged", "size of 'a'"),
        (raw(entry(shape=[[0], 10**10]), b"x" * 8), "safetensors-header-damaged", "size of 'a'"),
        (raw(entry(shape=[10**4000], data_offsets=[0, 10**4000]), b"x" * 8), "safetensors-header-damaged", "'a'"),
        (raw(entry(shape=[True, 2]), b"x" * 8), "safetensors-header-damaged", "size of 'a'"),
        (raw(entry()[:-1] + b"," + entry()[1:], b"x" * 8), "safetensors-header-damaged", "'a' is in it twice"),
        (raw(b'{"__metadata__": {"a": "x", "a": "y"}}'), "safetensors-header-damaged", "'a' is in it twice"),
        (raw(b'{"__metadata__": {"a": "\\ud83d"}}'), "safetensors-header-damaged", "half a letter"),
        (raw(b'{"__metadata__": {"a": "\xed\xa0\xbd"}}'), "safetensors-header-damaged", "half a letter"),
        (raw(entry(data_offsets=[8, 0]), b"x" * 8), "safetensors-header-damaged", "size of 'a'"),
        (raw(entry(data_offsets=[8, 16]), b"x" * 16), "safetensors-header-damaged", "gap or overlap"),
    ],
)
def test_files_that_are_no_complete_safetensors_file(tmp_path, content, code, detail):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_header(path)
    assert error.value.code == code
    assert str(path) in str(error.value)
    assert detail in str(error.value)


@given(st.data())
def test_no_change_of_a_byte_gets_another_error(tmp_path_factory, data):
    content = bytearray(save(TENSORS))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("fuzz") / "model.safetensors"
    path.write_bytes(content)
    with contextlib.suppress(UserError):
        assert max(info.end for info in read_header(path).tensors.values()) == len(content)


# ---------------------------------------------------------------- sharded models


@pytest.fixture
def shards(tmp_path):
    names = list(TENSORS)
    files = {"model-00001-of-00002.safetensors": names[:3], "model-00002-of-00002.safetensors": names[3:]}
    for file, keys in files.items():
        save_file({key: TENSORS[key] for key in keys}, tmp_path / file)
    weight_map = {key: file for file, keys in files.items() for key in keys}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return tmp_path


def test_shards_by_index_and_by_folder(shards):
    by_folder = read_sharded_headers(shards)
    assert by_folder == read_sharded_headers(shards / "model.safetensors.index.json")
    assert {name for header in by_folder.values() for name in header.tensors} == set(TENSORS)
    assert [path.name for path in by_folder] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def test_a_folder_with_one_file_and_a_variant(tmp_path):
    save_file(TENSORS, tmp_path / "diffusion_pytorch_model.safetensors")
    save_file(TENSORS, tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    assert list(read_sharded_headers(tmp_path)) == [tmp_path / "diffusion_pytorch_model.safetensors"]
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    assert list(read_sharded_headers(tmp_path)) == [tmp_path / "diffusion_pytorch_model.fp16.safetensors"]


def test_folders_that_do_not_say_which_file(tmp_path):
    with pytest.raises(UserError) as empty:
        read_sharded_headers(tmp_path)
    assert empty.value.code == "model-folder-empty"
    save_file(TENSORS, tmp_path / "a.safetensors")
    save_file(TENSORS, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match=r"a\.safetensors, b\.safetensors") as several:
        read_sharded_headers(tmp_path)
    assert several.value.code == "model-folder-ambiguous"


def test_a_missing_or_foreign_shard(shards):
    second = shards / "model-00002-of-00002.safetensors"
    save_file({"other": torch.zeros(1)}, second)
    with pytest.raises(UserError, match="4 tensors") as foreign:
        read_sharded_headers(shards)
    assert foreign.value.code == "shard-index-mismatch"
    second.unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00002\.safetensors") as missing:
        read_sharded_headers(shards)
    assert missing.value.code == "tensor-file-missing"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("[]", "shard-index-damaged"),
        ("nonsense", "shard-index-damaged"),
        ('{"weight_map": 3}', "shard-index-damaged"),
        ('{"weight_map": {}}', "shard-index-invalid"),
        ('{"weight_map": {"a": "../x.safetensors"}}', "shard-index-invalid"),
        ('{"weight_map": {"a": 3}}', "shard-index-invalid"),
    ],
)
def test_a_broken_index(tmp_path, text, code):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(text)
    with pytest.raises(UserError) as error:
        read_sharded_headers(index)
    assert error.value.code == code


def test_one_shard_opens_all_of_them(tmp_path):
    """Shards are recognized by their names, without an index; one that is missing is named."""
    for i, name in enumerate("abc"):
        save_file({name: torch.full((2,), i)}, tmp_path / f"model-{i + 1:05d}-of-00003.safetensors")
    for path in (tmp_path / "model-00002-of-00003.safetensors", tmp_path):
        headers = read_sharded_headers(path)
        assert {name for header in headers.values() for name in header.tensors} == {"a", "b", "c"}
    (tmp_path / "model-00003-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"model-00003-of-00003\.safetensors") as error:
        read_sharded_headers(tmp_path / "model-00001-of-00003.safetensors")
    assert error.value.code == "tensor-file-missing"
