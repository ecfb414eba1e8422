"""Weights in eight bits with scales are read as the product, whatever the layout of the scales."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sfumato.errors import UserError
from sfumato.formats import scaled
from sfumato.formats.checkpoint import TensorFile, open_checkpoint
from sfumato.formats.scaled import ScaledFile, multiply_by_scale

FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]
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


@pytest.mark.parametrize("stored", FLOAT8, ids=str)
@pytest.mark.parametrize("name", SCALES)
def test_the_product_is_rounded_once(name: str, stored: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaled, "ROWS_NUMEL", 3 * K)  # several passes
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(0)).to(stored)
    scale, each = SCALES[name]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(multiply_by_scale(weight, scale, dtype), (weight.float() * each).to(dtype))


@pytest.mark.parametrize("shape", [(), (4,), (4, 2), (4, 2, 3, 3)])
def test_weights_of_any_rank(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape).to(torch.float8_e4m3fn)
    product = multiply_by_scale(weight, torch.tensor(0.5), torch.float32)
    assert torch.equal(product, weight.float() * 0.5)


def test_a_scale_that_does_not_fit(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.ones(4, 4).to(torch.float8_e4m3fn), "a.scale_weight": torch.ones(7)}
    save_file(tensors, tmp_path / "m.safetensors")
    with (
        open_checkpoint(tmp_path / "m.safetensors") as file,
        pytest.raises(UserError, match=r"a\.scale_weight") as error,
    ):
        file.read("a.weight")
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
    (torch.zeros(4, 4, dtype=torch.int8), torch.ones(4)),
    (torch.zeros(4, 4).to(torch.float8_e4m3fn), torch.zeros(4, 1, dtype=torch.uint8)),  # exponents alone
])  # fmt: skip
def test_other_formats_are_refused(weight: Tensor, scale: Tensor, tmp_path: Path) -> None:
    save_file({"a.weight": weight, "a.weight_scale": scale}, tmp_path / "m.safetensors")
    with pytest.raises(UserError, match=r"m\.safetensors") as error:
        open_checkpoint(tmp_path / "m.safetensors")
    assert error.value.code == "weight-format-unsupported"
