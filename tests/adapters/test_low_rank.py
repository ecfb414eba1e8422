"""Singular values of products and of whole matrices, and the ranks that methods find, against torch's SVD."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from adapters.groups import make_group
from sfumato.adapters.low_rank import (
    Factors,
    Svd,
    clamp_factors,
    count_effective_rank,
    decompose_product,
    decompose_randomly,
    find_needed_rank,
    make_kronecker_tensors,
)


def draw_matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("rows", "columns", "rank"), [(40, 30, 6), (5, 30, 8), (30, 4, 8)])
def test_a_product_is_decomposed_exactly(rows: int, columns: int, rank: int) -> None:
    """Also where the rank is larger than a side."""
    factors = Factors(down=draw_matrix(rank, columns), up=draw_matrix(rows, rank, 1))
    svd, whole = decompose_product(factors), factors.up @ factors.down
    values = torch.linalg.svdvals(whole)[: len(svd.s)]
    torch.testing.assert_close(svd.s, values, rtol=1e-4, atol=1e-4)
    cut = svd.truncate(len(svd.s))
    torch.testing.assert_close(cut.up @ cut.down, whole, rtol=0, atol=1e-4)
    assert svd.measure_error(len(svd.s)) < 1e-6
    half = svd.truncate(2)
    lost = (half.up @ half.down - whole).norm() / whole.norm()
    assert svd.measure_error(2) == pytest.approx(float(lost), abs=1e-5)


def test_the_randomized_values_are_nearly_those_of_torch() -> None:
    """A spectrum that falls slowly, the hard case; the error is exact whatever the values are."""
    u, v = torch.linalg.qr(draw_matrix(200, 150)).Q, torch.linalg.qr(draw_matrix(150, 150, 1)).Q
    values = torch.arange(1, 151).float() ** -0.5
    matrix = (u * values) @ v.t()
    svd = decompose_randomly(matrix, 8)
    torch.testing.assert_close(svd.s[:8], values[:8], rtol=2e-2, atol=0)
    cut = svd.truncate(8)
    lost = (cut.up @ cut.down - matrix).norm() / matrix.norm()
    best = values[8:].norm() / values.norm()
    assert svd.measure_error(8) == pytest.approx(float(lost), abs=1e-5)
    assert float(lost) < float(best) * 1.002


@pytest.mark.parametrize(
    ("method", "param", "rank"),
    [("sv_ratio", 3.0, 3), ("sv_ratio", 2.0, 1), ("sv_fro", 0.9, 2), ("sv_fro", 1.0, 4), ("sv_cumulative", 0.8, 2),
     ("sv_cumulative", 0.81, 3), ("sv_cumulative", 0.01, 1), (None, None, 4)],
)  # fmt: skip
def test_the_smallest_rank_that_is_enough(method, param, rank: int) -> None:
    """Values 8, 4, 3, 0: 8 + 4 is 0.8 of the sum, and their norm 0.948 of the whole."""
    values = torch.tensor([8.0, 4.0, 3.0, 0.0])
    svd = Svd(torch.eye(4), values, torch.eye(4), float(values.norm()))
    expected = {("sv_fro", 1.0): 3}.get((method, param), rank)
    assert find_needed_rank(svd, method, param, 8) == expected
    assert find_needed_rank(svd, method, param, 2) == min(expected, 2)


def test_effective_rank() -> None:
    assert count_effective_rank(torch.ones(5)) == pytest.approx(5)
    assert count_effective_rank(torch.tensor([1.0, 0.0])) == pytest.approx(1)
    assert count_effective_rank(torch.tensor([3.0, 1.0])) == pytest.approx(
        math.exp(0.75 * math.log(4 / 3) + 0.25 * math.log(4))
    )


def test_clamped_values() -> None:
    """torch.quantile's place, without interpolation."""
    factors = Factors(torch.arange(-50.0, 50.0).reshape(2, 50), torch.arange(50.0, 150.0).reshape(50, 2))
    down, up = clamp_factors(factors, 0.9)
    assert float(up.max()) == 130.0
    assert torch.equal(down, factors.down)


@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_the_nearest_kronecker_product(kernel: tuple[int, ...]) -> None:
    """A change that is one comes back; of any other the error is what is said."""
    layer = nn.Conv2d(6, 8, 3) if kernel else nn.Linear(6, 8)
    group = make_group(nn.Sequential(layer))
    first, second = draw_matrix(2, 2), torch.randn(4, 3, *kernel, generator=torch.Generator().manual_seed(2))
    change = torch.kron(first.reshape(2, 2, *[1] * len(kernel)), second)
    tensors, error = make_kronecker_tensors(group, change, 2)
    found = torch.kron(tensors["lokr_w1"].reshape(2, 2, *[1] * len(kernel)), tensors["lokr_w2"])
    torch.testing.assert_close(found, change, rtol=0, atol=1e-5)
    assert error < 1e-5
    noisy = change + 0.1 * torch.randn(change.shape, generator=torch.Generator().manual_seed(3))
    tensors, error = make_kronecker_tensors(group, noisy, 2)
    found = torch.kron(tensors["lokr_w1"].reshape(2, 2, *[1] * len(kernel)), tensors["lokr_w2"])
    assert error == pytest.approx(float((found - noisy).norm() / noisy.norm()), abs=1e-5)
