"""Formats of weights: what is stored means what the formulas say, in every shape and dtype."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from quantization.meant import FLOAT8, INT8, hadamard, round_float8, round_nf4, round_scaled
from sfumato.quantization.nf4 import NormalFloat4
from sfumato.quantization.rotation import choose_group, rotate
from sfumato.quantization.scaled_blocks import PlainFloat8, ScaledBlocks
from sfumato.quantization.weight import QuantizedWeight, list_stored, quantize
from sfumato.quantization.weight_format import WeightFormat

FORMATS: dict[str, tuple[WeightFormat, Callable[[Tensor], Tensor]]] = {
    "float8": (PlainFloat8(), round_float8),
    "float8 rows": (ScaledBlocks(dtype=FLOAT8), lambda w: round_scaled(w, 0, FLOAT8)),
    "float8 blocks": (ScaledBlocks(dtype=FLOAT8, block=64), lambda w: round_scaled(w, 64, FLOAT8)),
    "int8 rows": (ScaledBlocks(dtype=INT8), lambda w: round_scaled(w, 0, INT8)),
    "int8 blocks": (ScaledBlocks(dtype=INT8, block=128), lambda w: round_scaled(w, 128, INT8)),
    "nf4": (NormalFloat4(), round_nf4),
}
SHAPES = [(6, 256), (5, 70), (3, 1), (4, 8, 3, 3)]


def make_weight(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weight[0] = 0  # a row without a largest number
    weight[1] *= 1e-3
    return weight.to(dtype)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_what_is_stored_is_what_is_meant(name: str, shape: tuple[int, ...]) -> None:
    form, meant = FORMATS[name]
    weight = make_weight(shape)
    small = quantize(weight, form)
    expected = meant(weight)
    torch.testing.assert_close(small.decode(), expected, rtol=2e-7, atol=0)
    assert small.decode(torch.float64).dtype == torch.float64
    assert (small.shape, small.dtype) == (weight.shape, weight.dtype)
    assert form.count_bytes(shape) == sum(tensor.nbytes for tensor in small.stored.values())
    again = quantize(small.decode(), form).decode()
    torch.testing.assert_close(again, small.decode(), rtol=2e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FORMATS)
def test_the_product_with_the_scale_is_rounded_once(name: str, dtype: torch.dtype) -> None:
    small = quantize(make_weight((6, 256), dtype), FORMATS[name][0])
    assert torch.equal(small.decode(), small.decode(torch.float32).to(dtype))


def test_nf4_as_bitsandbytes_has_it() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = make_weight((6, 256))
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    small = quantize(weight, NormalFloat4())
    assert torch.equal(small.stored["pairs"].flatten(), packed.view(torch.uint8).flatten())
    assert torch.equal(small.stored["scales"].flatten(), state.absmax)
    torch.testing.assert_close(small.decode(), functional.dequantize_4bit(packed, state), rtol=2e-7, atol=0)


def test_rotation_is_orthogonal_and_undoes_itself() -> None:
    for columns, group in ((96, 16), (512, 256), (7, 1)):
        assert choose_group(columns) == group
        rows = torch.randn(3, columns, dtype=torch.float64)
        turned = rotate(rows, group)
        expected = torch.cat([part @ hadamard(group).double() for part in rows.split(group, 1)], 1)
        torch.testing.assert_close(turned, expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(rotate(turned, group), rows, rtol=1e-6, atol=1e-6)


def test_rotation_makes_the_rounding_of_outliers_smaller() -> None:
    weight = torch.randn(16, 256, generator=torch.Generator().manual_seed(1))
    weight[:, 3] *= 50
    errors = [(quantize(weight, ScaledBlocks(dtype=INT8, rotation=on)).decode() - weight).norm() for on in (0, 256)]
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("name", FORMATS)
def test_rows_of_a_weight_are_stored_alone(name: str) -> None:
    """As rows of a fused layer are: nothing is decoded for it."""
    small = quantize(make_weight((6, 70)), FORMATS[name][0])
    first, second = small.split([2, 4])
    for piece, expected in (
        (first, small.decode()[:2]),
        (second, small.decode()[2:]),
        (small[1:3], small.decode()[1:3]),
    ):
        assert isinstance(piece, QuantizedWeight)
        assert torch.equal(piece.decode(), expected)
    first, second = small.chunk(2)
    swapped = torch.cat([second, first])
    assert isinstance(swapped, QuantizedWeight)
    assert torch.equal(swapped.decode(), torch.cat([small.decode()[3:], small.decode()[:3]]))


@pytest.mark.parametrize("name", FORMATS)
def test_what_reads_it_gets_numbers(name: str) -> None:
    """Adapters and merging compute with it as with any weight."""
    small = quantize(make_weight((6, 70)), FORMATS[name][0])
    dense = small.decode()
    assert torch.equal(small + 1, dense + 1)
    assert torch.equal(small.float(), dense)
    assert torch.equal(small.double(), small.decode(torch.float64))
    assert torch.equal(small.t() * 2, dense.t() * 2)
    assert torch.equal(small.norm(dim=1), dense.norm(dim=1))
    assert small.to("meta").shape == (6, 70)
    assert list(list_stored([small, dense])) == [*small.stored.values(), dense]
    small.copy_(dense * 3)
    torch.testing.assert_close(small.decode(), quantize(dense * 3, FORMATS[name][0]).decode(), rtol=0, atol=0)
