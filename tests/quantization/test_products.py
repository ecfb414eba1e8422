"""Products in 8 bits: the numbers of both kernels, and how far outputs and gradients are from those in bfloat16."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.quantization.products import (
    LARGEST_NUMBER,
    divide_rows,
    multiply_numbers,
    multiply_rows,
    multiply_rows_back,
)
from sfumato.quantization.scaled_blocks import ScaledBlocks
from sfumato.quantization.weight import quantize

FLOAT8, INT8 = torch.float8_e4m3fn, torch.int8
# Relative errors of a product over many channels, root mean square: of both factors' rounding, whose steps are 1/127
# of a row's largest number (about 3.5 deviations of 256 normal ones), or a sixteenth of each number.
BOUNDS = {INT8: 0.02, FLOAT8: 0.05}


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", [INT8, FLOAT8], ids=str)
def test_the_kernels_sum_what_the_numbers_say(dtype: torch.dtype) -> None:
    """In whole numbers, or in float64; bfloat16 is what the float8 kernel writes."""
    torch.manual_seed(0)
    a, scale_a = divide_rows(torch.randn(32, 64), dtype)
    b, scale_b = divide_rows(torch.randn(48, 64), dtype)
    sums = a.double() @ b.double().t()
    expected = sums * scale_a.double().unsqueeze(1) * scale_b.double()
    found = multiply_numbers(a, b.t(), scale_a, scale_b, torch.float32)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6 if dtype == INT8 else 2**-8, atol=1e-4)
    if dtype == INT8:
        assert torch.equal(torch._int_mm(a, b.t()), sums.int())  # pyright: ignore


def test_rows_are_divided_by_their_largest() -> None:
    rows = torch.tensor([[1.0, -4.0, 0.5], [0.0, 0.0, 0.0]])
    numbers, scales = divide_rows(rows, INT8)
    assert numbers.tolist() == [[32, -127, 16], [0, 0, 0]]
    torch.testing.assert_close(scales, torch.tensor([4 / 127, 0.0]))
    assert LARGEST_NUMBER[FLOAT8] == torch.finfo(FLOAT8).max


@pytest.mark.parametrize("rotation", [0, 256], ids=["plain", "rotated"])
@pytest.mark.parametrize("dtype", [INT8, FLOAT8], ids=str)
@pytest.mark.parametrize("rows", [1, 40])
def test_outputs_and_gradients_are_within_the_bound(dtype: torch.dtype, rotation: int, rows: int) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(256, 112).requires_grad_(False).bfloat16()
    x, gradient = torch.randn(rows, 256).bfloat16(), torch.randn(rows, 112).bfloat16()
    dense = layer.weight.detach().clone()
    form = ScaledBlocks(dtype=dtype, rotation=rotation, computes=True)
    layer.weight = nn.Parameter(quantize(dense, form), requires_grad=False)
    y = layer(x.requires_grad_())
    y.backward(gradient)
    assert x.grad is not None
    expected = F.linear(x.detach().double(), dense.double(), layer.bias.double())
    assert relative_error(y, expected) < BOUNDS[dtype]
    assert relative_error(x.grad, gradient.double() @ dense.double()) < BOUNDS[dtype]


SIZES = {  # outputs and inputs of every kind of linear layer in the blocks of FLUX.1 and SDXL
    "FLUX.1": [(3072, 3072), (3072, 15360), (18432, 3072)],
    "SDXL": [
        (640, 640),
        (1280, 1280),
        (1280, 2048),
        (640, 2048),
        (10240, 1280),
        (1280, 5120),
        (5120, 640),
        (640, 2560),
    ],
}


@pytest.mark.full
@pytest.mark.parametrize("dtype", [INT8, FLOAT8], ids=str)
@pytest.mark.parametrize("model", SIZES)
def test_layers_of_published_sizes_are_within_the_bound(model: str, dtype: torch.dtype) -> None:
    for rows, columns in SIZES[model]:
        torch.manual_seed(0)
        dense, x, gradient = torch.randn(rows, columns), torch.randn(32, columns), torch.randn(32, rows)
        weight = quantize(dense, ScaledBlocks(dtype=dtype, computes=True))
        y = F.linear(x.requires_grad_(), weight)
        y.backward(gradient)
        assert x.grad is not None
        assert relative_error(y, x.detach() @ dense.t()) < BOUNDS[dtype], (rows, columns)
        assert relative_error(x.grad, gradient @ dense) < BOUNDS[dtype], (rows, columns)


def test_outliers_in_some_channels_need_the_rotation_in_int8() -> None:
    """One input channel with numbers a hundred times larger than all others."""
    torch.manual_seed(0)
    weight, x = torch.randn(64, 256), torch.randn(32, 256)
    x[:, 5] *= 100
    weight[:, 5] /= 100
    errors: list[float] = []
    for rotation in (0, 256):
        form = ScaledBlocks(dtype=INT8, rotation=rotation, computes=True)
        errors.append(relative_error(F.linear(x, quantize(weight, form)), F.linear(x.double(), weight.double())))
    assert errors[1] < 0.25 * errors[0]


@pytest.mark.parametrize("form", [ScaledBlocks(dtype=d, computes=True) for d in (INT8, FLOAT8)], ids=str)
def test_sizes_that_the_kernels_refuse_are_decoded(form: ScaledBlocks) -> None:
    """And convolutions: all of their products are of the weight that is meant."""
    torch.manual_seed(0)
    weight, x = torch.randn(10, 24), torch.randn(3, 24)
    small = quantize(weight, form)
    assert torch.equal(F.linear(x, small), F.linear(x, small.decode()))
    kernel, image = quantize(torch.randn(16, 16, 3, 3), form), torch.randn(1, 16, 8, 8)
    assert torch.equal(F.conv2d(image, kernel), F.conv2d(image, kernel.decode()))


@pytest.mark.parametrize("dtype", [INT8, FLOAT8], ids=str)
def test_both_directions_are_of_one_weight(dtype: torch.dtype) -> None:
    """With inputs that 8 bits hold exactly, both products are exact ones of the weight that is stored."""
    torch.manual_seed(0)
    numbers = torch.randint(-8, 9, (32, 48)).to(dtype)
    scales = 2.0 ** torch.randint(-3, 3, (32, 1)).float()
    weight = numbers.float() * scales
    x = torch.randint(-8, 9, (32, 48)).float()
    x[:, 0] = LARGEST_NUMBER[dtype] / 4  # so that the rows' own scales are powers of 2
    torch.testing.assert_close(multiply_rows(x, numbers, scales), x @ weight.t(), rtol=2**-8, atol=1e-3)
    gradient = torch.randint(-8, 9, (32, 32)).float() / scales.reshape(-1)
    gradient[:, 0] = LARGEST_NUMBER[dtype] / 4 / scales[0]
    torch.testing.assert_close(multiply_rows_back(gradient, numbers, scales), gradient @ weight, rtol=2**-8, atol=1e-3)
