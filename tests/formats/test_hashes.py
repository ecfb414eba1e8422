"""Hashes are those of the reference trainer, stored and computed from written files."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from sfumato.formats.checkpoint_writer import write_safetensors
from sfumato.formats.hashes import calculate_adapter_hashes, calculate_model_hash, calculate_sha256

GOLDEN = json.loads((Path(__file__).parents[1] / "goldens" / "metadata_keys.json").read_text())


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
    assert calculate_adapter_hashes(golden_tensors(entry), entry["metadata"]) == expected


def test_adapter_hashes_are_those_of_the_written_file(tmp_path):
    tensors = {"b": torch.randn(300_000), "a": torch.randn(500, 1000).half().T, "c": torch.randn(200_001)}
    metadata = {"ss_b": "2", "ss_a": "1", "modelspec.title": "x"}
    for dtype in (None, torch.bfloat16, torch.float32):
        path = tmp_path / "m.safetensors"
        write_safetensors(path, tensors, {k: v for k, v in metadata.items() if k.startswith("ss_")}, dtype=dtype)
        content = path.read_bytes()
        data = content[8 + int.from_bytes(content[:8], "little") :]
        expected = hashlib.sha256(data).hexdigest(), hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]
        assert calculate_adapter_hashes(tensors, metadata, dtype=dtype) == expected
        assert calculate_model_hash(path) == expected[1]


def test_file_hashes_are_the_goldens(tmp_path):
    contents = {
        "file of 0x120000 bytes, byte i = i%251": bytes(i % 251 for i in range(0x120000)),
        "file b'abc'": b"abc",
    }
    for case, content in contents.items():
        (entry,) = [e for e in GOLDEN["hash_examples"] if e["case"] == case]
        path = tmp_path / "f"
        path.write_bytes(content)
        assert calculate_model_hash(path) == entry["model_hash"]
        assert calculate_sha256(path) == entry["calculate_sha256"]
    (entry,) = [e for e in GOLDEN["hash_examples"] if e["case"] == "missing / directory"]
    assert [calculate_model_hash(tmp_path / "gone"), calculate_model_hash(tmp_path)] == entry["model_hash"]
    assert [calculate_sha256(tmp_path / "gone"), calculate_sha256(tmp_path)] == entry["calculate_sha256"]


def test_a_hash_is_cached_until_the_file_changes(tmp_path, monkeypatch):
    path = tmp_path / "f"
    path.write_bytes(b"one")
    first = calculate_sha256(path)
    calls = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *given: calls.append(1) or digest(*given))
    assert calculate_sha256(path) == first
    assert calls == []
    path.write_bytes(b"two!")
    assert calculate_sha256(path) == hashlib.sha256(b"two!").hexdigest()
    assert calls == [1]
