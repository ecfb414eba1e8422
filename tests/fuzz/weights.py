"""Files of weights: safetensors headers and bodies, shard indexes, pickles, LoRA files, configurations of networks."""

from __future__ import annotations

import json
import struct
from collections import defaultdict
from collections.abc import Callable
from contextlib import redirect_stdout
from io import BytesIO, StringIO
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save

from fuzz.target import Read, Setup, target, through_file
from sfumato.adapters.kinds import read_adapter_file
from sfumato.errors import UserError
from sfumato.families.source import Source, read_json
from sfumato.formats.checkpoint import open_checkpoint
from sfumato.formats.header import read_header
from sfumato.formats.shards import read_sharded_headers
from sfumato.tools.ema import find_saved_emas
from sfumato.tools.export_lora import export_lora

TENSORS = {
    "a.weight": torch.arange(12.0).reshape(3, 4),
    "b": torch.tensor(1, dtype=torch.int64),
    "c": torch.zeros(0, 2),
}
HEADER_TOKENS = (
    b'"dtype":"F32"', b'"BF16"', b'"F4"', b'"F8_E4M3"', b'"shape":[', b'"x"', b"[0]", b"1e3", b"1.5", b"true", b"null",
    b'"data_offsets":[0,0]', b"100000000000", b'"__metadata__":{"a":1}', b'"a.weight":', b'"\\ud800"',
)  # fmt: skip
PICKLE_TOKENS = (
    b"cos\nsystem\n",
    b"c__builtin__\neval\n",
    b"ctorch\nload\n",
    b"R",
    b"\x80\x02",
    b"Q",
    b"(",
    b"t",
    b"}",
    b"\x8a\x0a",
)


def keep_length(read: Read) -> Read:
    """The length of the JSON header mended after the damage, so that the JSON is read."""

    def mend_and_read(data: bytes) -> object:
        end = data.rfind(b"}", 8) + 1
        end += len(data[end:]) - len(data[end:].lstrip(b" "))
        return read(struct.pack("<Q", max(end - 8, 2)) + data[8:end] + data[end:])

    return mend_and_read


def read_tensors(path: Path) -> object:
    with open_checkpoint(path) as file:
        return [file.read(name, dtype=torch.float32) for name in file.header.tensors]


@target(*HEADER_TOKENS, b"GGUF", b"PK\3\4", b"<html>", share=2)
def safetensors_header(folder: Path) -> Setup:
    return Setup(seeds=[save(TENSORS, {"format": "pt"})], read=through_file(folder / "a.safetensors", read_header))


@target(*HEADER_TOKENS, share=2)
def safetensors_json(folder: Path) -> Setup:
    read = keep_length(through_file(folder / "a.safetensors", read_tensors))
    return Setup(seeds=[save(TENSORS, {"format": "pt"})], read=read)


@target(b'"weight_map":', b"../a", b"/etc/passwd", b"null", b"[]", b"model-00001-of-99999.safetensors", b"\\u0000")
def shard_index(folder: Path) -> Setup:
    (folder / "one.safetensors").write_bytes(save({"a": torch.ones(2)}))
    (folder / "two.safetensors").write_bytes(save({"b": torch.ones(2)}))
    content = {"metadata": {}, "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    read = through_file(folder / "model.safetensors.index.json", read_sharded_headers)
    return Setup(seeds=[json.dumps(content).encode()], read=read)


def make_pickle(content: object, *, old: bool = False) -> bytes:
    written = BytesIO()
    torch.save(content, written, _use_new_zipfile_serialization=not old)
    return written.getvalue()


STATE = {"state_dict": {**TENSORS, "half": torch.ones(2, dtype=torch.float16)}, "epoch": 3, "global_step": 10**6}
HARMLESS = {"model": defaultdict(dict, {"x": 1}), "loss": np.float64(0.5), **STATE}


@target(*PICKLE_TOKENS)
def old_pickle(folder: Path) -> Setup:
    return Setup(seeds=[make_pickle(STATE, old=True)], read=through_file(folder / "a.ckpt", read_tensors))


@target(*PICKLE_TOKENS, b"PK\1\2", b"PK\5\6", b"PK\6\6", share=1)
def zip_pickle(folder: Path) -> Setup:
    return Setup(seeds=[make_pickle(STATE)], read=through_file(folder / "a.ckpt", read_tensors))


@target(*PICKLE_TOKENS)
def other_named_pickle(folder: Path) -> Setup:
    """A .bin, as networks in diffusers folders have it; anything may be in it."""
    return Setup(
        seeds=[make_pickle(TENSORS), make_pickle(TENSORS, old=True)], read=through_file(folder / "a.bin", read_tensors)
    )


def make_lora() -> bytes:
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {
        f"{name}.lora_down.weight": torch.ones(2, 8),
        f"{name}.lora_up.weight": torch.ones(8, 2),
        f"{name}.alpha": torch.tensor(1.0),
    }
    return save(tensors, {"ss_network_dim": "2", "ss_network_args": "{}", "sfumato.ema": '{"sigma_rel": 0.1}'})


@target(*HEADER_TOKENS, b".alpha", b".lora_down.weight", b"lora_te_", b"lora_unet_", b"[8,2,1,1]", b"[16]")
def lora_file(folder: Path) -> Setup:
    def read(path: Path) -> object:
        entries = read_adapter_file(path)
        with redirect_stdout(StringIO()):
            export_lora(path, folder / "out.safetensors", program="diffusers")
        return entries

    return Setup(seeds=[make_lora()], read=keep_length(through_file(folder / "a.safetensors", read)))


@target(b'"sigma_rel": null', b'"of": 3', b"[]", b"NaN", share=0.3)
def saved_ema(folder: Path) -> Setup:
    """What a file's metadata says of its EMA."""
    facts = json.dumps({"sigma_rel": 0.1, "of": "run", "steps": 10})

    def read(data: bytes) -> object:
        text = data.decode("utf-8", "replace")
        path = folder / "a.safetensors"
        path.write_bytes(save({"a": torch.ones(2)}, {"sfumato.ema": text}))
        return list(find_saved_emas([path]))

    return Setup(seeds=[facts.encode()], read=read)


@target(b"null", b"[]", b"NaN", b'"in_channels": "4"', share=0.5)
def network_config(folder: Path) -> Setup:
    """A config.json, and the same inside the metadata of a single file."""
    content = {"unet": {"in_channels": 4, "block_out_channels": [32, 64], "prediction_type": "epsilon"}}

    def read(data: bytes) -> object:
        path = folder / "a.safetensors"
        path.write_bytes(save({"a": torch.ones(2)}, {"sfumato.config": data.decode("utf-8", "replace")}))
        (folder / "config.json").write_bytes(data)
        found = each_refused(lambda: read_json(folder / "config.json"))
        return found, Source(path).read_config("unet")

    return Setup(seeds=[json.dumps(content).encode()], read=read)


def each_refused(read: Callable[[], object]) -> object:
    try:
        return read()
    except UserError as error:
        return error
