"""Checkpoints are read and written byte for byte as the safetensors library does, without a second copy."""

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from sfumato.common import files
from sfumato.errors import UserError
from sfumato.formats.checkpoint import (
    DTYPES,
    PIECE,
    DiskFull,
    PickledFile,
    TensorFile,
    open_checkpoint,
    write_safetensors,
    write_stream,
)
from sfumato.formats.hashes import adapter_hashes, model_hash, sha256_of

GOLDEN = json.loads((Path(__file__).parents[1] / "goldens" / "metadata_keys.json").read_text())
FLOATS = [dtype for dtype in DTYPES.values() if dtype.is_floating_point]
FNUZ = (torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)  # the library knows them only in newer versions


def some_tensors():
    """One tensor of every type, with names out of order, and shapes that are easily got wrong."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for i, dtype in enumerate(DTYPES.values()):
        shape = [(3, 5), (), (0, 4), (7,), (2, 3, 2, 2)][i % 5]
        tensors[f"{'zyx'[i % 3]}.{i}"] = (torch.randn(shape, generator=generator) * 4).to(dtype)
    return tensors


def same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(as_bytes(a), as_bytes(b))


def as_bytes(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


# ---------------------------------------------------------------- reading


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(some_tensors(), path, metadata={"a": "b"})
    return path


def test_every_type_reads_as_the_library_reads_it(file):
    expected = safetensors.torch.load_file(file)
    with TensorFile(file) as opened:
        assert set(opened.keys()) == set(expected)
        assert opened.header.metadata == {"a": "b"}
        for name, tensor in expected.items():
            assert same(opened.read(name), tensor), name


@pytest.mark.parametrize("wanted", FLOATS, ids=str)
def test_every_float_type_converts_as_torch_does_and_others_stay(file, wanted):
    expected = safetensors.torch.load_file(file)
    with TensorFile(file) as opened:
        for name, tensor in expected.items():
            converted = tensor.to(wanted) if tensor.is_floating_point() else tensor
            assert same(opened.read(name, dtype=wanted), converted), name


@pytest.mark.parametrize("count", [PIECE - 1, PIECE, PIECE + 1, 20 * PIECE + 7])
@pytest.mark.parametrize("threads", [1, 3])
def test_pieces_and_threads_meet_at_their_ends(tmp_path, count, threads):
    tensor = torch.randn(count).half()
    before = torch.get_num_threads()
    write_safetensors(tmp_path / "m.safetensors", {"first": torch.ones(3), "x": tensor})
    torch.set_num_threads(threads)
    try:
        with TensorFile(tmp_path / "m.safetensors") as opened:
            assert same(opened.read("x", dtype=torch.float32), tensor.float())
            assert same(opened.read("x", dtype=torch.bfloat16), tensor.bfloat16())
            assert same(opened.read("x"), tensor)
    finally:
        torch.set_num_threads(before)


def test_what_is_read_is_owned(file):
    with TensorFile(file) as opened:
        tensor = opened.read("z.0")
        before = tensor.clone()
    file.write_bytes(b"\0" * file.stat().st_size)
    assert same(tensor, before)
    tensor.fill_(0)  # its own memory, so it may be written


def test_several_threads_may_read_one_file(tmp_path):
    tensors = {f"t{i}": torch.full((PIECE + i,), i).half() for i in range(8)}
    write_safetensors(tmp_path / "m.safetensors", tensors)
    right = []
    with TensorFile(tmp_path / "m.safetensors") as opened:

        def work(name):
            right.extend(same(opened.read(name, dtype=torch.float32), tensors[name].float()) for _ in range(20))

        workers = [threading.Thread(target=work, args=(name,)) for name in tensors]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert right == [True] * 160


def test_an_unknown_name_is_told_with_the_nearest(file):
    with TensorFile(file) as opened, pytest.raises(UserError, match=r"did you mean 'z\.0'"):
        opened.read("z.00")


def test_a_type_that_torch_lacks_is_told(tmp_path):
    path = tmp_path / "m.safetensors"
    header = json.dumps({"w": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"xxx")
    with TensorFile(path) as opened, pytest.raises(UserError, match="stored as F6_E2M3"):
        opened.read("w")


def test_a_file_that_shrinks_while_it_is_open(file):
    with TensorFile(file) as opened:
        os.truncate(file, file.stat().st_size // 2)
        with pytest.raises(UserError, match="became shorter"):
            opened.read("z.0")


def test_a_model_in_pieces(tmp_path):
    tensors = {f"block.{i}.weight": torch.randn(4, i) for i in range(1, 6)}
    pieces = {"m-1.safetensors": list(tensors)[:2], "m-2.safetensors": list(tensors)[2:]}
    for name, keys in pieces.items():
        write_safetensors(tmp_path / name, {key: tensors[key] for key in keys})
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {key: name for name, keys in pieces.items() for key in keys}}))
    for path in (tmp_path, index):
        with open_checkpoint(path) as opened:
            assert set(opened.keys()) == set(tensors)
            assert all(same(opened.read(name), tensor) for name, tensor in tensors.items())


# ---------------------------------------------------------------- pickled files


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin", ""])
def test_pickled_files_have_the_same_interface(tmp_path, zipped, suffix):
    tensors = {"a.weight": torch.randn(3, 4).T, "b": torch.arange(3), "c": torch.tensor(1.5).bfloat16()}
    path = tmp_path / f"model{suffix}"
    content = {"state_dict": tensors, "epoch": 3, "global_step": 120}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with open_checkpoint(path) as opened:
        assert isinstance(opened, PickledFile)
        assert opened.header.metadata == {"epoch": "3", "global_step": "120"}
        assert opened.header.shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        assert {name: DTYPES[info.dtype] for name, info in opened.header.tensors.items()} == {
            name: tensor.dtype for name, tensor in tensors.items()
        }
        for name, tensor in tensors.items():
            assert same(opened.read(name), tensor)
            assert opened.read(name).is_contiguous()
        half = opened.read("a.weight", dtype=torch.float16)
    assert same(half, tensors["a.weight"].half())
    half.fill_(0)


def test_a_flat_state_dict_and_a_nested_one(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "flat.pt")
    torch.save({"state_dict": {"state_dict": {"w": torch.ones(2)}, "x": "y"}}, tmp_path / "deep.pt")
    for name in ("flat.pt", "deep.pt"):
        with open_checkpoint(tmp_path / name) as opened:
            assert list(opened.keys()) == ["w"]


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_more_than_tensors_is_refused_and_not_run(tmp_path, zipped):
    path = tmp_path / "model.ckpt"
    torch.save({"w": torch.ones(2), "args": argparse.Namespace(a=1)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"more than tensors \(argparse.Namespace\).*would run code") as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_torn_pickle_is_told(tmp_path, zipped):
    path = tmp_path / "model.ckpt"
    torch.save({"w": torch.ones(200)}, path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    for size in (len(content) // 3, len(content) // 2, len(content) - 3):
        path.write_bytes(content[:size])
        with pytest.raises(UserError, match=r"model.ckpt is damaged") as caught:
            open_checkpoint(path)
        assert "\n" not in str(caught.value)


def test_files_that_are_no_checkpoint(tmp_path):
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "text.pt").write_text("hello, I am a text")
    torch.save({"w": torch.ones(2)}, tmp_path / "renamed.safetensors")
    for name, told in {
        "list.pt": "holds no tensors",
        "text.pt": "not a safetensors file",
        "gone.ckpt": "does not exist",
        "renamed.safetensors": r"pickled checkpoint.*rename it to end in .ckpt",
    }.items():
        with pytest.raises(UserError, match=told):
            open_checkpoint(tmp_path / name)


# ---------------------------------------------------------------- writing


def known(tensors):
    return {name: tensor for name, tensor in tensors.items() if tensor.dtype not in FNUZ}


@pytest.mark.parametrize("metadata", [None, {}, {"key": 'quote " \\ \n\t\x01\x7f größer ✓ 😀'}])
def test_the_file_is_the_librarys_byte_for_byte(tmp_path, metadata):
    tensors = known(some_tensors())
    write_safetensors(tmp_path / "m.safetensors", tensors, metadata)
    assert (tmp_path / "m.safetensors").read_bytes() == safetensors.torch.save(tensors, metadata)


@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(list(DTYPES.values())), st.lists(st.integers(0, 3), max_size=3)),
        max_size=6,
    )
)
def test_any_names_and_shapes_come_back(tmp_path_factory, specs):
    tensors = {name: torch.ones(shape).to(dtype) for name, (dtype, shape) in specs.items()}
    path = tmp_path_factory.mktemp("any") / "m.safetensors"
    write_safetensors(path, tensors)
    assert path.read_bytes() == safetensors.torch.save(known(tensors)) or known(tensors) != tensors
    with TensorFile(path) as opened:
        assert set(opened.keys()) == set(tensors)
        assert all(same(opened.read(name), tensor) for name, tensor in tensors.items())


def test_metadata_is_sorted_so_that_a_file_is_a_function_of_its_content(tmp_path):
    for order in ("abc", "cba"):
        write_safetensors(tmp_path / order, {"w": torch.ones(2)}, {key: key for key in order})
    assert (tmp_path / "abc").read_bytes() == (tmp_path / "cba").read_bytes()
    assert safetensors.torch.load_file(tmp_path / "abc").keys() == {"w"}


def test_shared_strided_and_trained_tensors(tmp_path):
    base = torch.randn(6, 8)
    tensors = {
        "tied": base,
        "again": base,
        "part": base[1:3],
        "columns": base[:, ::2],
        "turned": base.T,
        "wide": torch.ones(1, 1).expand(3, 4),
        "trained": torch.nn.Parameter(torch.randn(3)) * 2,
        "last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    }
    write_safetensors(tmp_path / "m.safetensors", tensors)
    for name, tensor in safetensors.torch.load_file(tmp_path / "m.safetensors").items():
        assert same(tensor, tensors[name].detach()), name


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_conversion_on_the_way_out(tmp_path, dtype):
    tensors = some_tensors() | {"long": torch.randn(2 * PIECE + 3), "strided": torch.randn(8, 9).T}
    write_safetensors(tmp_path / "m.safetensors", tensors, dtype=dtype)
    with TensorFile(tmp_path / "m.safetensors") as opened:
        for name, tensor in tensors.items():
            assert same(opened.read(name), tensor.to(dtype) if tensor.is_floating_point() else tensor)


def test_a_type_that_the_format_lacks(tmp_path):
    with pytest.raises(UserError, match=r"'w' has the type torch.complex128"):
        write_safetensors(tmp_path / "m.safetensors", {"w": torch.zeros(2, dtype=torch.complex128)})
    assert list(tmp_path.iterdir()) == []


def test_a_stream_makes_one_tensor_at_a_time_in_file_order(tmp_path):
    made = []

    def make(name):
        made.append(name)
        return torch.full((3,), len(made), dtype=torch.float64)

    specs = {"b": (torch.float16, (3,)), "a": (torch.float16, (3,)), "wide": (torch.float32, (3,))}
    write_stream(tmp_path / "m.safetensors", specs, make, {"x": "y"})
    assert made == ["wide", "a", "b"]
    assert safetensors.torch.load_file(tmp_path / "m.safetensors")["b"].tolist() == [3, 3, 3]


def test_a_failure_leaves_the_earlier_file_and_nothing_else(tmp_path):
    path = tmp_path / "m.safetensors"
    write_safetensors(path, {"w": torch.ones(2)})
    before = path.read_bytes()
    with pytest.raises(AssertionError, match="announced"):
        write_stream(path, {"w": (torch.float32, (3,))}, lambda name: torch.zeros(4))
    with pytest.raises(ZeroDivisionError):
        write_stream(path, {"w": (torch.float32, (3,))}, lambda name: torch.zeros(1 // 0))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.fixture
def small_disk():
    """No file may grow beyond 64 KiB (EFBIG, as on a full disk)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_an_error_of_its_own_and_harms_nothing(tmp_path, small_disk):
    path = tmp_path / "m.safetensors"
    write_safetensors(path, {"w": torch.ones(2)})
    before = path.read_bytes()
    with pytest.raises(DiskFull, match=r"m.safetensors could not be written.*make room") as caught:
        write_safetensors(path, {"w": torch.ones(1 << 16)})
    assert isinstance(caught.value, UserError)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    write_safetensors(path, {"w": torch.zeros(2)})  # and the next one may fit again


def test_no_space_found_at_the_sync_and_other_faults(tmp_path, monkeypatch):
    for number, expected in ((28, DiskFull), (122, DiskFull), (5, OSError)):
        monkeypatch.setattr(files, "sync", lambda place, number=number: (_ for _ in ()).throw(OSError(number, "told")))
        with pytest.raises(expected, match="told"):
            write_safetensors(tmp_path / "m.safetensors", {"w": torch.ones(2)})
    assert list(tmp_path.iterdir()) == []


MEMORY = """
import resource, sys, torch
from pathlib import Path
from sfumato.formats.checkpoint import TensorFile, write_safetensors
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
folder = Path(sys.argv[1])
small = {"w": torch.ones(8)}
write_safetensors(folder / "warm", small, dtype=torch.float16)
tensors = {f"t{i}": torch.ones(4 << 20) for i in range(8)}  # 16 MiB each
before = peak()
write_safetensors(folder / "m", tensors, dtype=torch.float16)
write_safetensors(folder / "m", tensors)
write = peak() - before
del tensors
with TensorFile(folder / "m") as file:
    before = peak()
    read = [file.read(name, dtype=torch.float16) for name in file.keys()]
print(write, peak() - before)
"""


@pytest.mark.slow
def test_neither_reading_nor_writing_needs_as_much_as_one_more_tensor(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(files.__file__).parents[1])}
    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    write, read = map(int, done.stdout.split())
    assert write < 8 << 20
    assert read < 8 << 20  # the peak before, while the tensors lay in memory, was larger than what is read


# ---------------------------------------------------------------- hashes


def golden_tensors(entry):
    kinds = {"torch.float32": torch.float32, "torch.float16": torch.float16, "torch.bfloat16": torch.bfloat16}
    return {
        name: torch.arange(torch.Size(facts["shape"]).numel(), dtype=torch.float32)
        .reshape(facts["shape"])
        .to(kinds[facts["dtype"]])
        for name, facts in entry["tensors"].items()
    }


@pytest.mark.parametrize("entry", [e for e in GOLDEN["hash_examples"] if "tensors" in e], ids=lambda e: e["case"])
def test_adapter_hashes_are_the_goldens(entry):
    expected = entry["sshs_model_hash"], entry["sshs_legacy_hash"]
    assert adapter_hashes(golden_tensors(entry), entry["metadata"]) == expected


def test_adapter_hashes_are_those_of_the_written_file(tmp_path):
    tensors = {"b": torch.randn(300_000), "a": torch.randn(500, 1000).half().T, "c": torch.randn(200_001)}
    metadata = {"ss_b": "2", "ss_a": "1", "modelspec.title": "x"}
    for dtype in (None, torch.bfloat16, torch.float32):
        path = tmp_path / "m.safetensors"
        write_safetensors(path, tensors, {k: v for k, v in metadata.items() if k.startswith("ss_")}, dtype=dtype)
        content = path.read_bytes()
        data = content[8 + int.from_bytes(content[:8], "little") :]
        expected = hashlib.sha256(data).hexdigest(), hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]
        assert adapter_hashes(tensors, metadata, dtype=dtype) == expected
        assert model_hash(path) == expected[1]


def test_file_hashes_are_the_goldens(tmp_path):
    contents = {
        "file of 0x120000 bytes, byte i = i%251": bytes(i % 251 for i in range(0x120000)),
        "file b'abc'": b"abc",
    }
    for case, content in contents.items():
        (entry,) = [e for e in GOLDEN["hash_examples"] if e["case"] == case]
        path = tmp_path / "f"
        path.write_bytes(content)
        assert model_hash(path) == entry["model_hash"]
        assert sha256_of(path) == entry["calculate_sha256"]
    (entry,) = [e for e in GOLDEN["hash_examples"] if e["case"] == "missing / directory"]
    assert [model_hash(tmp_path / "gone"), model_hash(tmp_path)] == entry["model_hash"]
    assert [sha256_of(tmp_path / "gone"), sha256_of(tmp_path)] == entry["calculate_sha256"]


def test_a_hash_is_remembered_until_the_file_changes(tmp_path, monkeypatch):
    path = tmp_path / "f"
    path.write_bytes(b"one")
    first = sha256_of(path)
    calls = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *given: calls.append(1) or digest(*given))
    assert sha256_of(path) == first
    assert calls == []
    path.write_bytes(b"two!")
    assert sha256_of(path) == hashlib.sha256(b"two!").hexdigest()
    assert calls == [1]
