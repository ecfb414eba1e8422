"""Checkpoints are read as the safetensors library and torch read them."""

import contextlib
import json
import os
import threading
import time

import pytest
import safetensors.torch
import torch

from formats.tensors import FLOATS, are_same, make_tensors
from sfumato.errors import UserError
from sfumato.formats.checkpoint import CHUNK_NUMEL, SAFETENSORS_DTYPES, PickledFile, TensorFile, open_checkpoint
from sfumato.formats.checkpoint_writer import write_safetensors


class Command:
    """Pickled as a call."""

    def __reduce__(self):
        return eval, ("1 / 0",)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(make_tensors(), path, metadata={"a": "b"})
    return path


def test_every_dtype_reads_as_the_library_reads_it(file):
    expected = safetensors.torch.load_file(file)
    with TensorFile(file) as opened:
        assert set(opened.keys()) == set(expected)
        assert opened.header.metadata == {"a": "b"}
        for name, tensor in expected.items():
            assert are_same(opened.read(name), tensor), name


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_float_dtype_converts_as_torch_does_and_others_stay(file, dtype):
    expected = safetensors.torch.load_file(file)
    with TensorFile(file) as opened:
        for name, tensor in expected.items():
            converted = tensor.to(dtype) if tensor.is_floating_point() else tensor
            assert are_same(opened.read(name, dtype=dtype), converted), name


@pytest.mark.parametrize("count", [CHUNK_NUMEL - 1, CHUNK_NUMEL, CHUNK_NUMEL + 1, 20 * CHUNK_NUMEL + 7])
@pytest.mark.parametrize("threads", [1, 3])
def test_chunks_and_threads_cover_every_element(tmp_path, count, threads):
    tensor = torch.randn(count).half()
    before = torch.get_num_threads()
    write_safetensors(tmp_path / "m.safetensors", {"first": torch.ones(3), "x": tensor})
    torch.set_num_threads(threads)
    try:
        with TensorFile(tmp_path / "m.safetensors") as opened:
            assert are_same(opened.read("x", dtype=torch.float32), tensor.float())
            assert are_same(opened.read("x", dtype=torch.bfloat16), tensor.bfloat16())
            assert are_same(opened.read("x"), tensor)
    finally:
        torch.set_num_threads(before)


def test_what_is_read_is_owned(file):
    with TensorFile(file) as opened:
        tensor = opened.read("z.0")
        before = tensor.clone()
    file.write_bytes(b"\0" * file.stat().st_size)
    assert are_same(tensor, before)
    tensor.fill_(0)  # its own memory, so it may be written


def test_several_threads_may_read_one_file(tmp_path):
    tensors = {f"t{i}": torch.full((CHUNK_NUMEL + i,), i).half() for i in range(8)}
    write_safetensors(tmp_path / "m.safetensors", tensors)
    right = []
    with TensorFile(tmp_path / "m.safetensors") as opened:

        def work(name):
            right.extend(are_same(opened.read(name, dtype=torch.float32), tensors[name].float()) for _ in range(20))

        workers = [threading.Thread(target=work, args=(name,)) for name in tensors]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert right == [True] * 160


def test_an_unknown_name_is_an_error_with_the_nearest(file):
    with TensorFile(file) as opened, pytest.raises(UserError, match=r"'z\.00'.*'z\.0'") as error:
        opened.read("z.00")
    assert error.value.code == "tensor-not-in-file"


def test_a_dtype_that_torch_lacks_is_an_error(tmp_path):
    path = tmp_path / "m.safetensors"
    header = json.dumps({"w": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"xxx")
    with TensorFile(path) as opened, pytest.raises(UserError, match="F6_E2M3") as error:
        opened.read("w")
    assert error.value.code == "tensor-dtype-unreadable"


def test_a_file_that_shrinks_while_it_is_open(file):
    with TensorFile(file) as opened:
        os.truncate(file, file.stat().st_size // 2)
        with pytest.raises(UserError) as error:
            opened.read("z.0")
    assert error.value.code == "tensor-file-shrank"


def test_a_sharded_model(tmp_path):
    tensors = {f"block.{i}.weight": torch.randn(4, i) for i in range(1, 6)}
    shards = {"m-1.safetensors": list(tensors)[:2], "m-2.safetensors": list(tensors)[2:]}
    weight_map = {}
    for name, keys in shards.items():
        write_safetensors(tmp_path / name, {key: tensors[key] for key in keys})
        weight_map |= dict.fromkeys(keys, name)
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    for path in (tmp_path, index):
        with open_checkpoint(path) as opened:
            assert set(opened.keys()) == set(tensors)
            assert all(are_same(opened.read(name), tensor) for name, tensor in tensors.items())


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
        assert {name: SAFETENSORS_DTYPES[info.dtype] for name, info in opened.header.tensors.items()} == {
            name: tensor.dtype for name, tensor in tensors.items()
        }
        for name, tensor in tensors.items():
            assert are_same(opened.read(name), tensor)
            assert opened.read(name).is_contiguous()
        half = opened.read("a.weight", dtype=torch.float16)
    assert are_same(half, tensors["a.weight"].half())
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
    torch.save({"w": torch.ones(2), "args": Command()}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"builtins\.eval") as error:
        open_checkpoint(path)
    assert error.value.code == "pickle-runs-code"
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_truncated_pickle_is_an_error(tmp_path, zipped):
    path = tmp_path / "model.ckpt"
    torch.save({"w": torch.ones(200)}, path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    for size in (len(content) // 3, len(content) // 2, len(content) - 3):
        path.write_bytes(content[:size])
        with pytest.raises(UserError, match=r"model\.ckpt") as error:
            open_checkpoint(path)
        assert error.value.code == "pickle-damaged"
        assert "\n" not in str(error.value)


def test_files_that_are_no_checkpoint(tmp_path):
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "text.pt").write_text("hello, I am a text")
    torch.save({"w": torch.ones(2)}, tmp_path / "renamed.safetensors")
    for name, code in {
        "list.pt": "pickle-without-tensors",
        "text.pt": "not-safetensors",
        "gone.ckpt": "tensor-file-missing",
        "renamed.safetensors": "not-safetensors",
    }.items():
        with pytest.raises(UserError, match=name) as error:
            open_checkpoint(tmp_path / name)
        assert error.value.code == code
    assert error.value.fix == "rename it to end in .ckpt"


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_any_byte_changed_is_read_or_refused(tmp_path, zipped):
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": {"w": torch.ones(3)}, "epoch": 1}, path, _use_new_zipfile_serialization=zipped)
    whole = path.read_bytes()
    for place in range(0, len(whole), 3):
        for damaged in (whole[:place], whole[:place] + b"\x01" + whole[place + 1 :]):
            path.write_bytes(damaged)
            with contextlib.suppress(UserError), open_checkpoint(path) as file:
                for name in file.keys():  # noqa: SIM118
                    file.read(name)


def test_a_pickle_with_an_endless_name_is_refused_at_once(tmp_path):
    """torch searches its message about the name in a time that grows with the square of its length."""
    torch.save({"w": torch.ones(2)}, tmp_path / "a.ckpt", _use_new_zipfile_serialization=False)
    content = (tmp_path / "a.ckpt").read_bytes()
    name = b"ctorch._utils\n_rebuild_tensor_v2"
    assert name in content
    (tmp_path / "a.ckpt").write_bytes(content.replace(name, name + b"x" * 200_000))
    start = time.process_time()
    with pytest.raises(UserError) as error:
        open_checkpoint(tmp_path / "a.ckpt")
    assert error.value.code == "pickle-damaged"
    assert time.process_time() - start < 2


def test_long_texts_beside_the_tensors_are_no_fault(tmp_path):
    torch.save({"state_dict": {"w": torch.ones(2)}, "notes": "long " * 5000}, tmp_path / "a.ckpt")
    with open_checkpoint(tmp_path / "a.ckpt") as file:
        assert file.header.metadata["notes"] == "long " * 5000
