"""Checkpoints are written byte for byte as the safetensors library does, without a second copy."""

import os
import resource
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from formats.tensors import FLOATS, are_same, make_tensors
from sfumato.common import files
from sfumato.errors import InternalError
from sfumato.formats.checkpoint import CHUNK_NUMEL, SAFETENSORS_DTYPES, TensorFile
from sfumato.formats.checkpoint_writer import DiskFull, write_safetensors, write_stream

FNUZ = (torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)  # the library knows them only in newer versions


def known(tensors):
    return {name: tensor for name, tensor in tensors.items() if tensor.dtype not in FNUZ}


@pytest.mark.parametrize("metadata", [None, {}, {"key": 'quote " \\ \n\t\x01\x7f größer ✓ 😀'}])
def test_the_file_is_the_librarys_byte_for_byte(tmp_path, metadata):
    tensors = known(make_tensors())
    write_safetensors(tmp_path / "m.safetensors", tensors, metadata)
    assert (tmp_path / "m.safetensors").read_bytes() == safetensors.torch.save(tensors, metadata)


@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(list(SAFETENSORS_DTYPES.values())), st.lists(st.integers(0, 3), max_size=3)),
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
        assert all(are_same(opened.read(name), tensor) for name, tensor in tensors.items())


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
        assert are_same(tensor, tensors[name].detach()), name


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_conversion_on_the_way_out(tmp_path, dtype):
    tensors = make_tensors() | {"long": torch.randn(2 * CHUNK_NUMEL + 3), "strided": torch.randn(8, 9).T}
    write_safetensors(tmp_path / "m.safetensors", tensors, dtype=dtype)
    with TensorFile(tmp_path / "m.safetensors") as opened:
        for name, tensor in tensors.items():
            assert are_same(opened.read(name), tensor.to(dtype) if tensor.is_floating_point() else tensor)


def test_a_dtype_that_the_format_lacks(tmp_path):
    with pytest.raises(InternalError, match=r"'w'.*torch\.complex128"):
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
    with pytest.raises(DiskFull, match=r"m\.safetensors") as error:
        write_safetensors(path, {"w": torch.ones(1 << 16)})
    assert error.value.code == "disk-full"
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    write_safetensors(path, {"w": torch.zeros(2)})  # and the next one may fit again


def test_no_space_found_at_the_sync_and_other_faults(tmp_path, monkeypatch):
    for number, expected in ((28, DiskFull), (122, DiskFull), (5, OSError)):
        monkeypatch.setattr(files, "sync", Mock(side_effect=OSError(number, "quota reached")))
        with pytest.raises(expected, match="quota reached"):
            write_safetensors(tmp_path / "m.safetensors", {"w": torch.ones(2)})
    assert list(tmp_path.iterdir()) == []


MEMORY = """
import resource, sys, torch
from pathlib import Path
from sfumato.formats.checkpoint import TensorFile
from sfumato.formats.checkpoint_writer import write_safetensors
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


@pytest.mark.full
def test_neither_reading_nor_writing_needs_as_much_as_one_more_tensor(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(files.__file__).parents[2])}
    command = [sys.executable, "-c", MEMORY, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    write, read = map(int, done.stdout.split())
    assert write < 8 << 20
    assert read < 8 << 20  # the peak before, while the tensors lay in memory, was larger than what is read
