"""Which file of a network's folder is read, and pickled models in several files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sfumato.errors import UserError
from sfumato.formats.checkpoint import open_checkpoint
from sfumato.formats.shards import find_network_file, is_sharded

MODEL = "diffusion_pytorch_model"
# What diffusers takes without a variant comes first, then variants; safetensors before pickled files.
ORDER = [
    f"{MODEL}.safetensors", f"{MODEL}.safetensors.index.json", "model.safetensors", f"{MODEL}.bin",
    "pytorch_model.bin", "pytorch_model.bin.index.json", f"{MODEL}.fp16.safetensors",
    f"{MODEL}.safetensors.index.fp16.json", "model.fp16.safetensors", f"{MODEL}.fp16.bin", "pytorch_model.fp16.bin",
]  # fmt: skip


def test_the_file_that_diffusers_would_read(tmp_path: Path) -> None:
    for name in ORDER:
        (tmp_path / name).touch()
    (tmp_path / "optimizer.bin").touch()
    for name in ORDER:
        assert find_network_file(tmp_path) == tmp_path / name
        (tmp_path / name).unlink()
    assert find_network_file(tmp_path) is None


@pytest.mark.parametrize("name", [
    "model-00001-of-00002.safetensors", "model.fp16-00001-of-00002.safetensors",
    f"{MODEL}-00001-of-00002.fp16.safetensors",
    "pytorch_model-00001-of-00002.bin",
])  # fmt: skip
def test_shards_without_an_index(name: str, tmp_path: Path) -> None:
    tensors = [{"a": torch.ones(2)}, {"b": torch.zeros(3)}]
    for number, each in enumerate(tensors, 1):
        path = tmp_path / name.replace("00001-of", f"{number:05d}-of")
        torch.save(each, path) if name.endswith(".bin") else save_file(each, path)
    first = find_network_file(tmp_path)
    assert first == tmp_path / name
    assert is_sharded(first)
    with open_checkpoint(first) as file:
        assert file.header.shapes == {"a": (2,), "b": (3,)}
        assert torch.equal(file.read("b"), torch.zeros(3))
        assert len(file.paths()) == 2


@pytest.mark.parametrize("variant", ["", ".fp16"])
@pytest.mark.parametrize("ending", ["bin", "safetensors"])
def test_an_index(variant: str, ending: str, tmp_path: Path) -> None:
    places = {"a": f"m{variant}-00001-of-00002.{ending}", "b": f"m{variant}-00002-of-00002.{ending}"}
    for key, name in places.items():
        torch.save({key: torch.ones(2)}, tmp_path / name) if ending == "bin" else save_file(
            {key: torch.ones(2)}, tmp_path / name
        )
    index = tmp_path / f"m.{ending}.index{variant}.json"
    index.write_text(json.dumps({"weight_map": places}))
    with open_checkpoint(index) as file:
        assert set(file.keys()) == {"a", "b"}
        file.close()
        assert torch.equal(file.read("b"), torch.ones(2))


def test_a_missing_pickled_shard(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "m-00001-of-00002.bin")
    with pytest.raises(UserError, match="m-00002-of-00002") as error:
        open_checkpoint(tmp_path / "m-00001-of-00002.bin")
    assert error.value.code == "pickle-unreadable"
