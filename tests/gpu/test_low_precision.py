"""Weights in fewer bits on the GPU: the numbers of the CPU, and the time of products in 8 bits at FLUX layer sizes."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gpu.conftest import Record
from sfumato.memory.low_precision import FLOAT8_PRODUCTS
from sfumato.quantization.nf4 import NormalFloat4
from sfumato.quantization.scaled_blocks import PlainFloat8, ScaledBlocks
from sfumato.quantization.weight import quantize
from sfumato.quantization.weight_format import WeightFormat

FLOAT8, INT8 = torch.float8_e4m3fn, torch.int8
FORMATS: dict[str, WeightFormat] = {
    "float8": PlainFloat8(),
    "float8 blocks": ScaledBlocks(dtype=FLOAT8, block=64),
    "int8 blocks": ScaledBlocks(dtype=INT8, block=128, rotation=256),
    "nf4": NormalFloat4(),
    "float8 products": ScaledBlocks(dtype=FLOAT8, computes=True),
    "int8 products": ScaledBlocks(dtype=INT8, rotation=256, computes=True),
}
SIZES = (4608, 12288, 3072)  # tokens at 1024 x 1024, outputs, inputs


def can_run(form: WeightFormat) -> bool:
    needs_float8 = form.computes and isinstance(form, ScaledBlocks) and form.dtype == FLOAT8
    return not needs_float8 or torch.cuda.get_device_capability() >= FLOAT8_PRODUCTS


def run_both(weight: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Output, and the gradient of x."""
    x = x.clone().requires_grad_()
    output = F.linear(x, weight)
    (gradient,) = torch.autograd.grad(output.float().square().sum(), x)
    return output.detach().float().cpu(), gradient.float().cpu()


@pytest.mark.parametrize("name", FORMATS)
def test_the_numbers_are_those_of_the_cpu(name: str, cuda: torch.device) -> None:
    form = FORMATS[name]
    if not can_run(form):
        pytest.skip("this GPU cannot multiply in float8")
    torch.manual_seed(0)
    weight, x = torch.randn(512, 256).bfloat16(), torch.randn(40, 256).bfloat16()
    small = quantize(weight, form)
    moved = small.to(cuda)
    torch.testing.assert_close(moved.decode().cpu(), small.decode(), rtol=2**-7, atol=1e-3)
    for found, expected in zip(run_both(moved, x.to(cuda)), run_both(small, x), strict=True):
        assert (found - expected).norm() <= 0.01 * expected.norm()


@pytest.mark.parametrize("name", ["float8 products", "int8 products"])
def test_products_in_8_bits_are_fast(name: str, cuda: torch.device, record: Record) -> None:
    form = FORMATS[name]
    if not can_run(form):
        pytest.skip("this GPU cannot multiply in float8")
    tokens, outputs, inputs = SIZES
    weight = torch.randn(outputs, inputs, device=cuda, dtype=torch.bfloat16)
    x = torch.randn(tokens, inputs, device=cuda, dtype=torch.bfloat16)
    small = quantize(weight, form)
    plain = measure_ms(lambda: F.linear(x, weight))
    found = measure_ms(lambda: F.linear(x, small))
    record(plain_ms=plain, found_ms=found, ratio=found / plain)
    assert found < 2 * plain  # what is measured is the record; this is to see that the kernel runs at all


def measure_ms(run: Callable[[], object], repeats: int = 20) -> float:
    run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats * 1000
