"""Weights in eight bits with scales are read as the product, whatever the layout of the scales."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from quantization.meant import hadamard
from sfumato.errors import UserError
from sfumato.formats.checkpoint import Checkpoint, TensorFile, open_checkpoint
from sfumato.formats.scaled import ScaledFile, divide_by_scale
from sfumato.quantization.weight import QuantizedWeight

EIGHT_BITS = [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8]
N, K = 130, 200


def spread(scale: Tensor, rows: int, columns: int) -> Tensor:
    """(N, K): the scale of each weight."""
    return scale.repeat_interleave(rows, 0)[:N].repeat_interleave(columns, 1)[:, :K]


SCALES = {
    "one number": (torch.tensor(0.3), torch.full((N, K), 0.3)),
    "one in a list": (torch.tensor([0.3]), torch.full((N, K), 0.3)),
    "for each row": (rows := torch.rand(N) + 0.1, rows[:, None].expand(N, K)),
    "for each row as a column": (rows[:, None], rows[:, None].expand(N, K)),
    "for blocks": (blocks := torch.rand(2, 2) + 0.1, spread(blocks, 65, 100)),
    "for blocks that do not divide": (blocks := torch.rand(3, 4) + 0.1, spread(blocks, 44, 50)),
    "for parts of rows": (parts := torch.rand(N, 4, 1) + 0.1, spread(parts[..., 0], 1, 50)),
}


def open_weight(folder: Path, weight: Tensor, scale: Tensor, **more: Tensor) -> Checkpoint:
    tensors = {"a.weight": weight, "a.weight_scale": scale.clone().contiguous()}
    save_file({**tensors, **{f"a.{name}": tensor for name, tensor in more.items()}}, folder / "m.safetensors")
    return open_checkpoint(folder / "m.safetensors")


@pytest.mark.parametrize("stored", EIGHT_BITS, ids=str)
@pytest.mark.parametrize("name", SCALES)
def test_the_product_is_rounded_once(name: str, stored: torch.dtype, tmp_path: Path) -> None:
    """Read as a product, or kept as it is stored: what it means is the same."""
    weight = (torch.randn(N, K, generator=torch.Generator().manual_seed(0)) * 20).to(stored)
    scale, each = SCALES[name]
    with open_weight(tmp_path, weight, scale) as file:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            expected = (weight.float() * each).to(dtype)
            assert torch.equal(file.read("a.weight", dtype=dtype), expected)
            kept = file.read_stored("a.weight", dtype=dtype)
            assert isinstance(kept, QuantizedWeight)
            assert kept.format == file.find_format("a.weight")
            assert torch.equal(kept.decode(), expected)
            assert torch.equal(kept.stored["numbers"].view(torch.uint8), weight.view(torch.uint8))


@pytest.mark.parametrize("shape", [(), (4,), (4, 2), (4, 2, 3, 3)])
@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.bfloat16, torch.float32], ids=str)
def test_weights_of_any_rank(shape: tuple[int, ...], stored: torch.dtype, tmp_path: Path) -> None:
    weight = torch.randn(shape).to(stored)
    with open_weight(tmp_path, weight, torch.tensor(0.3)) as file:
        assert torch.equal(file.read("a.weight", dtype=torch.float16), (weight.float() * 0.3).half())
        is_kept = stored.itemsize == 1 and len(shape) > 1
        assert (file.find_format("a.weight") is not None) == is_kept


def describe(**entries: object) -> Tensor:
    return torch.tensor(list(json.dumps(entries).encode()), dtype=torch.uint8)


@pytest.mark.parametrize("place", ["beside", "metadata"])
def test_rotated_int8(place: str, tmp_path: Path) -> None:
    """Each 16 columns of the weight times a regular Hadamard matrix, then rounded with a scale for each row."""
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    turned = torch.cat([part @ hadamard(16) for part in weight.split(16, 1)], 1)
    scale = turned.abs().amax(1, keepdim=True) / 127
    numbers = (turned / scale).round().to(torch.int8)
    entries = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 16}
    path = tmp_path / "m.safetensors"
    tensors = {"a.weight": numbers, "a.weight_scale": scale}
    if place == "beside":
        save_file({**tensors, "a.comfy_quant": describe(**entries)}, path)
    else:
        save_file(tensors, path, {"_quantization_metadata": json.dumps({"layers": {"a": entries}})})
    meant = torch.cat([part @ hadamard(16) for part in (numbers * scale).split(16, 1)], 1)
    with open_checkpoint(path) as file:
        assert isinstance(file, ScaledFile)
        torch.testing.assert_close(file.read("a.weight", dtype=torch.float32), meant, rtol=1e-5, atol=1e-6)
        kept = file.read_stored("a.weight", dtype=torch.float32)
        assert isinstance(kept, QuantizedWeight)
        assert torch.equal(kept.stored["numbers"], numbers)
        torch.testing.assert_close(kept.decode(), meant, rtol=1e-5, atol=1e-6)
        assert (meant - weight).abs().max() < 2 * scale.max()
        again, new_scale = divide_by_scale(meant, torch.int8, scale.shape, rotation=file.find_rotation("a.weight"))
    assert torch.equal(again, numbers)
    torch.testing.assert_close(new_scale, scale, rtol=1e-5, atol=0)


def test_a_scale_that_does_not_fit(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.ones(4, 4).to(torch.float8_e4m3fn), "a.scale_weight": torch.ones(7)}
    save_file(tensors, tmp_path / "m.safetensors")
    with pytest.raises(UserError, match=r"a\.scale_weight") as error:
        open_checkpoint(tmp_path / "m.safetensors")
    assert error.value.code == "weight-scale-shape"


@pytest.mark.parametrize("name", ["scale_weight", "weight_scale", "weight_scale_inv"])
@pytest.mark.parametrize("pickled", [False, True])
def test_the_file_looks_like_one_without_scales(name: str, pickled: bool, tmp_path: Path) -> None:
    weight = torch.randn(6, 4).to(torch.float8_e4m3fn)
    tensors = {
        "net.a.weight": weight, f"net.a.{name}": torch.tensor(0.25), "net.a.scale_input": torch.tensor(2.0),
        "net.a.comfy_quant": torch.zeros(3, dtype=torch.uint8), "net.a.bias": torch.randn(6).bfloat16(),
        "net.plain.weight": weight.clone(), "net.scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn),
    }  # fmt: skip
    path = tmp_path / ("m.ckpt" if pickled else "m.safetensors")
    torch.save(tensors, path) if pickled else save_file(tensors, path)
    with open_checkpoint(path) as file:
        assert isinstance(file, ScaledFile)
        assert set(file.keys()) == {"net.a.weight", "net.a.bias", "net.plain.weight"}
        assert file.header.tensors["net.a.weight"].dtype == "BF16"
        assert file.header.tensors["net.a.weight"].nbytes == 2 * 24
        product = weight.float() * 0.25
        assert torch.equal(file.read("net.a.weight"), product.bfloat16())
        assert torch.equal(file.read("net.a.weight", dtype=torch.float32), product)
        assert torch.equal(file.read("net.a.bias"), tensors["net.a.bias"])
        assert torch.equal(file.read("net.plain.weight", dtype=torch.float32), weight.float())
        assert file.paths() == [path]


def test_a_file_without_scales_is_read_as_ever(tmp_path: Path) -> None:
    save_file({"a.weight": torch.ones(2, 2).to(torch.float8_e4m3fn)}, tmp_path / "m.safetensors")
    assert isinstance(open_checkpoint(tmp_path / "m.safetensors"), TensorFile)


@pytest.mark.parametrize(("weight", "scale"), [
    (torch.zeros(4, 2, dtype=torch.uint8), torch.ones(4, 1)),  # four bits, two in a byte
    (torch.zeros(4, 4).to(torch.float8_e4m3fn), torch.zeros(4, 1, dtype=torch.uint8)),  # exponents alone
])  # fmt: skip
def test_other_formats_are_refused(weight: Tensor, scale: Tensor, tmp_path: Path) -> None:
    save_file({"a.weight": weight, "a.weight_scale": scale}, tmp_path / "m.safetensors")
    with pytest.raises(UserError, match=r"m\.safetensors") as error:
        open_checkpoint(tmp_path / "m.safetensors")
    assert error.value.code == "weight-format-unsupported"


@pytest.mark.parametrize("entries", [
    {"format": "int4_tensorwise"},
    {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 8},  # no power of 4
    {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64},  # more than the columns
    {"format": "int8_asymmetric", "zero_point": 3},
])  # fmt: skip
def test_int8_of_another_kind_is_refused(entries: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.weight") as error:
        open_weight(tmp_path, torch.zeros(4, 16, dtype=torch.int8), torch.ones(4, 1), comfy_quant=describe(**entries))
    assert error.value.code == "int8-format-unsupported"
