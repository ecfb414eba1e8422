"""Matrix products in eight bits: rows of both factors with a scale each, summed in int32 or float32 by the hardware.

A row is one token of the input, or one output channel of the weight. `torch._int_mm` and `torch._scaled_mm` run on the
CPU, too, where they give the same sums: exactly for int8, but for the order of summation for float8.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST_NUMBER = {  # what the largest number of a row or block is stored as; int8's -128 is not used
    torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0, torch.int8: 127.0,
}  # fmt: skip
KERNEL_STEP = 16  # sizes that the kernels take are multiples of it
FEWEST_ROWS = 32  # torch._int_mm refuses 16 and fewer on a GPU


def divide_rows(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(..., K) -> its numbers in `dtype`, and the float32 scales (...) whose products with them are the rows."""
    largest = LARGEST_NUMBER[dtype]
    scales = rows.abs().amax(-1).float() / largest
    scaled = rows / torch.where(scales > 0, scales, 1).unsqueeze(-1)
    if dtype == torch.int8:
        scaled = scaled.round()
    return scaled.clamp(-largest, largest).to(dtype), scales


def can_multiply(rows: int, columns: int) -> bool:
    """Whether the kernels take a weight of this size; others are decoded."""
    return rows % KERNEL_STEP == 0 and columns % KERNEL_STEP == 0


def multiply_rows(x: Tensor, numbers: Tensor, scales: Tensor) -> Tensor:
    """x (M, K) @ (numbers (N, K) * scales (N, 1)) transposed -> (M, N) in x's dtype; x is rounded to their dtype."""
    own, own_scales = divide_rows(pad_rows(x), numbers.dtype)
    product = multiply_numbers(own, numbers.t(), own_scales, scales.reshape(-1), x.dtype)
    return product[: len(x)]


def multiply_rows_back(gradient: Tensor, numbers: Tensor, scales: Tensor) -> Tensor:
    """gradient (M, N) @ (numbers (N, K) * scales (N, 1)) -> (M, K): the scales go into the gradient before rounding."""
    scaled = gradient * scales.reshape(-1).to(torch.float32)
    own, own_scales = divide_rows(pad_rows(scaled), numbers.dtype)
    columns = numbers.t().contiguous().t()  # the kernels want the second factor's columns in memory one by one
    ones = torch.ones(numbers.shape[1], dtype=torch.float32, device=numbers.device)
    return multiply_numbers(own, columns, own_scales, ones, gradient.dtype)[: len(gradient)]


def multiply_numbers(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype) -> Tensor:
    """a (M, K) @ b (K, N) in eight bits, times scale_a (M,) and scale_b (N,), in `dtype`."""
    if a.dtype == torch.int8:
        sums = torch._int_mm(a, b)  # pyright: ignore
        return (sums * scale_a.unsqueeze(1) * scale_b).to(dtype)
    # With a scale for each row the kernels write bfloat16 alone.
    scales = scale_a.unsqueeze(1), scale_b.unsqueeze(0)
    return torch._scaled_mm(a, b, *scales, out_dtype=torch.bfloat16).to(dtype)  # pyright: ignore


def pad_rows(x: Tensor) -> Tensor:
    """With rows of zeros up to a size that the kernels take."""
    missing = max(FEWEST_ROWS - len(x), -len(x) % KERNEL_STEP)
    return F.pad(x, (0, 0, 0, missing)) if missing else x
