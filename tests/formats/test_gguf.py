"""GGUF files, written here byte for byte: every type of block means what its definition says, and models load."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from sfumato.errors import UserError
from sfumato.formats.checkpoint import open_checkpoint
from sfumato.formats.gguf import GGML_BLOCKS, GgufFile
from sfumato.quantization.gguf_blocks import BLOCK_TYPES
from sfumato.quantization.weight import QuantizedWeight

NUMBERS = {kind: number for number, kind in GGML_BLOCKS.items()} | {"F32": 0, "F16": 1, "BF16": 30}
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
Tensors = Mapping[str, tuple[str, tuple[int, ...], bytes]]  # name -> kind, shape, content


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def write_gguf(
    path: Path, tensors: Tensors, *, alignment: int = 32, version: int = 3, more: bytes = b"", network: str = "flux"
) -> Path:
    """As ggml lays it out: sizes with the innermost first, every tensor on a multiple of the alignment."""
    head = struct.pack("<4sIQQ", b"GGUF", version, len(tensors), 2 + bool(more))
    head += text("general.architecture") + struct.pack("<I", 8) + text(network)
    head += text("general.alignment") + struct.pack("<II", 4, alignment) + more
    body = b""
    for name, (kind, shape, content) in tensors.items():
        sizes = struct.pack(f"<{len(shape)}Q", *reversed(shape))
        head += text(name) + struct.pack("<I", len(shape)) + sizes + struct.pack("<IQ", NUMBERS[kind], len(body))
        body += content + bytes(-len(content) % alignment)
    path.write_bytes(head + bytes(-len(head) % alignment) + body)
    return path


def half(content: bytes, place: int) -> float:
    return struct.unpack_from("<e", content, place)[0]


def six_bits(scales: bytes, j: int) -> tuple[int, int]:
    """The scale and the minimum of 32 columns in the K types of 4 and 5 bits (ggml's get_scale_min_k4)."""
    if j < 4:
        return scales[j] & 63, scales[j + 4] & 63
    return (scales[j + 4] & 15) | (scales[j - 4] >> 6 << 4), (scales[j + 4] >> 4) | (scales[j] >> 6 << 4)


def read_element(kind: str, block: bytes, e: int) -> float:
    """The number in column e of a block, one at a time, by the place of each of its bits."""
    if kind == "Q8_0":
        return half(block, 0) * struct.unpack_from("<b", block, 2 + e)[0]
    if kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1"):
        has_minimum, has_fifth = kind.endswith("1"), kind.startswith("Q5")
        start = 2 + 2 * has_minimum
        number = block[start + 4 * has_fifth + e % 16] >> (4 * (e // 16)) & 15
        if has_fifth:
            number |= (int.from_bytes(block[start : start + 4], "little") >> e & 1) << 4
        middle = 0 if has_minimum else 16 if has_fifth else 8
        return half(block, 0) * (number - middle) + (half(block, 2) if has_minimum else 0)
    part, rest = divmod(e, 128)  # of two halves
    if kind == "Q2_K":
        number = block[16 + 32 * part + rest % 32] >> (2 * (rest // 32)) & 3
        return half(block, 80) * (block[e // 16] & 15) * number - half(block, 82) * (block[e // 16] >> 4)
    if kind == "Q3_K":
        number = block[32 + 32 * part + rest % 32] >> (2 * (rest // 32)) & 3
        number -= 0 if block[e % 32] >> (e // 32) & 1 else 4
        i = e // 16
        low = block[96 + i % 8] >> (4 * (i // 8)) & 15
        return half(block, 108) * ((low | (block[104 + i % 4] >> (2 * (i // 4)) & 3) << 4) - 32) * number
    if kind in ("Q4_K", "Q5_K"):
        scale, minimum = six_bits(block[4:16], e // 32)
        start = 16 if kind == "Q4_K" else 48
        number = block[start + 32 * (e // 64) + e % 32] >> (4 * (e // 32 % 2)) & 15
        if kind == "Q5_K":
            number |= (block[16 + e % 32] >> (e // 32) & 1) << 4
        return half(block, 0) * scale * number - half(block, 2) * minimum
    assert kind == "Q6_K"
    low = block[64 * part + rest % 64] >> (4 * (rest // 64)) & 15
    high = block[128 + 32 * part + rest % 32] >> (2 * (rest // 32)) & 3
    scale = struct.unpack_from("<b", block, 192 + e // 16)[0]
    return half(block, 208) * scale * ((low | high << 4) - 32)


def make_blocks(kind: str, count: int) -> bytes:
    """Any bits, but scales that are finite."""
    generator = torch.Generator().manual_seed(count)
    content = b""
    for _ in range(count):
        for size in BLOCK_TYPES[kind].pieces:
            bits = torch.randint(0, 256, (size,), generator=generator, dtype=torch.uint8)
            content += struct.pack("<e", 0.01 * int(bits[0])) if size == 2 else bytes(bits.tolist())
    return content


def expect(kind: str, content: bytes, shape: tuple[int, ...]) -> Tensor:
    block = BLOCK_TYPES[kind]
    blocks = [content[i : i + block.size] for i in range(0, len(content), block.size)]
    return torch.tensor([read_element(kind, each, e) for each in blocks for e in range(block.columns)]).reshape(shape)


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_blocks_mean_what_their_definition_says(kind: str, tmp_path: Path) -> None:
    shape = (3, 2 * BLOCK_TYPES[kind].columns)
    content = make_blocks(kind, 6)
    expected = expect(kind, content, shape)
    path = write_gguf(tmp_path / "m.gguf", {"a.weight": (kind, shape, content)})
    with open_checkpoint(path) as file:
        assert isinstance(file, GgufFile)
        assert file.header.shapes == {"a.weight": shape}
        torch.testing.assert_close(file.read("a.weight", dtype=torch.float32), expected, rtol=1e-6, atol=1e-5)
        assert torch.equal(file.read("a.weight"), file.read("a.weight", dtype=torch.float32).bfloat16())
        kept = file.read_stored("a.weight", dtype=torch.bfloat16)
        assert kept.format == file.find_format("a.weight")
        assert kept.format.count_bytes(shape) == len(content) == sum(each.nbytes for each in kept.stored.values())
        joined = torch.cat(kept.split([1, 2]))
        assert isinstance(joined, QuantizedWeight)
        assert torch.equal(joined.decode(), kept.decode())


@pytest.mark.parametrize("kind", BLOCK_TYPES)
def test_as_the_package_decodes_them(kind: str) -> None:
    content = make_blocks(kind, 4)
    theirs = gguf.quants.dequantize(np.frombuffer(content, np.uint8), gguf.GGMLQuantizationType[kind])
    block = BLOCK_TYPES[kind]
    raw = torch.frombuffer(bytearray(content), dtype=torch.uint8).reshape(-1, block.size)
    ours = block.decode(list(raw.split(block.pieces, 1)))
    torch.testing.assert_close(ours.flatten(), torch.from_numpy(theirs).flatten(), rtol=1e-6, atol=1e-6)


def test_plain_types_and_reshaped_tensors(tmp_path: Path) -> None:
    """A convolution's kernel of 27 numbers a row has whole blocks only across rows: its own shape is in the header."""
    tensors: dict[str, tuple[str, tuple[int, ...], bytes]] = {}
    for kind, dtype in PLAIN.items():
        values = torch.arange(10).to(dtype).reshape(2, 5)
        tensors[kind] = (kind, (2, 5), bytes(values.view(torch.uint8).flatten().tolist()))
    content = make_blocks("Q8_0", 27)
    tensors["conv.weight"] = ("Q8_0", (27, 32), content)
    shape = struct.pack("<IIQ4I", 9, 4, 4, 32, 3, 3, 3)
    more = text("comfy.gguf.orig_shape.conv.weight") + shape
    with open_checkpoint(write_gguf(tmp_path / "m.gguf", tensors, alignment=64, more=more)) as file:
        for kind, dtype in PLAIN.items():
            assert torch.equal(file.read(kind), torch.arange(10).to(dtype).reshape(2, 5))
            assert file.find_format(kind) is None
        assert file.header.shapes["conv.weight"] == (32, 3, 3, 3)
        assert file.find_format("conv.weight") is None
        found = file.read("conv.weight", dtype=torch.float32)
        torch.testing.assert_close(found, expect("Q8_0", content, (32, 3, 3, 3)))


@pytest.mark.parametrize(("change", "code"), [
    (lambda content: content[:40], "gguf-damaged"),
    (lambda content: content[:-200], "gguf-damaged"),
    (lambda content: b"GGUF" + struct.pack("<IQQ", 9, 1, 1) + content[24:], "gguf-damaged"),
    (lambda content: b"GGUF" + struct.pack("<IQQ", 3, 2**40, 1) + content[24:], "gguf-damaged"),
    (lambda content: content.replace(struct.pack("<IQ", 8, 0), struct.pack("<IQ", 16, 0)), "gguf-type-unknown"),
], ids=["header", "end", "version", "count", "type"])  # fmt: skip
def test_what_cannot_be_read(change: Callable[[bytes], bytes], code: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", {"a.weight": ("Q8_0", (4, 64), make_blocks("Q8_0", 8))})
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=r"m\.gguf") as error:
        open_checkpoint(path)
    assert error.value.code == code
