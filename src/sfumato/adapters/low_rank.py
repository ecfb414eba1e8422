"""Changes as matrices of low rank: their singular values, the rank that is enough, and the tensors in files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Generator, Tensor

from sfumato.adapters.lokr import W1, W2, factorize
from sfumato.adapters.lora_files import DOWN, UP
from sfumato.adapters.norm_difference import B_NORM, W_NORM
from sfumato.formats.adapter_keys import ALPHA
from sfumato.formats.adapter_kind import LayerTensors
from sfumato.formats.groups import LayerGroup

RankMethod = Literal["sv_ratio", "sv_fro", "sv_cumulative"]
OVERSAMPLING = 10  # further columns of a random projection (Halko et al. 2011, sec. 4.4)
POWER_STEPS = 2  # the most passes that sharpen it (the same, alg. 4.4)
SMALL_GAIN = 0.001  # share of what is lost that one more pass has to win to be made
FLOAT32_NOISE = 1e-6  # share of a squared norm that sums in float32 do not tell from 0
NO_CHANGE = 1e-6  # a largest singular value up to this is no change


class Factors(NamedTuple):
    """A change up @ down: down (rank, columns), up (rows, rank), both float32."""

    down: Tensor
    up: Tensor


class Svd(NamedTuple):
    """matrix = u @ diag(s) @ vh, as far as its singular values were computed; they fall."""

    u: Tensor  # (rows, count)
    s: Tensor  # (count,)
    vh: Tensor  # (count, columns)
    norm: float  # Frobenius norm of the whole matrix

    def truncate(self, rank: int, clamp_quantile: float = 1.0) -> Factors:
        """The nearest matrix of this rank. clamp_quantile: share of the values that stay as they are."""
        factors = Factors(down=self.vh[:rank], up=self.u[:, :rank] * self.s[:rank])
        return clamp_factors(factors, clamp_quantile) if clamp_quantile < 1 else factors

    def measure_error(self, rank: int) -> float:
        """The norm of what `truncate` loses, by the norm of the matrix: of its further values, known or not."""
        if not self.norm:
            return 0.0
        squares = self.s.double().square()
        unknown = 1 - float(squares.sum()) / self.norm**2
        further = float(squares[rank:].sum()) / self.norm**2
        return (further + (unknown if unknown > FLOAT32_NOISE else 0.0)) ** 0.5


def join_factors(several: Sequence[Factors]) -> Factors:
    """One change that is the sum of all; exact."""
    return Factors(torch.cat([each.down for each in several]), torch.cat([each.up for each in several], dim=1))


def decompose_product(factors: Factors) -> Svd:
    """The singular values of up @ down, from those of a matrix of rank x rank; the product is never formed."""
    q_up, r_up = torch.linalg.qr(factors.up)
    q_down, r_down = torch.linalg.qr(factors.down.t())
    u, s, vh = torch.linalg.svd(r_up @ r_down.t(), full_matrices=False)
    return Svd(q_up @ u, s, vh @ q_down.t(), float(s.double().norm()))


def decompose(matrix: Tensor) -> Svd:
    """All singular values of a matrix; slow for large ones."""
    u, s, vh = torch.linalg.svd(matrix.float(), full_matrices=False)
    return Svd(u, s, vh, float(s.double().norm()))


def decompose_randomly(matrix: Tensor, rank: int) -> Svd:
    """The largest singular values, nearly; `Svd.measure_error` says what the result lacks.

    Halko, Martinsson and Tropp 2011, "Finding structure with randomness", alg. 4.4 and 5.1, with a fixed seed.
    """
    columns = rank + OVERSAMPLING
    if 2 * columns >= min(matrix.shape):
        return decompose(matrix)
    generator = Generator(matrix.device).manual_seed(0)
    start = torch.randn(matrix.shape[1], columns, generator=generator, device=matrix.device)
    norm = sum_squares(matrix) ** 0.5
    svd, gain = restrict(matrix, matrix @ start, norm), None
    for _ in range(POWER_STEPS):
        captured = sum_squares(svd.s[:rank])
        lost = norm**2 - captured
        # What a pass wins shrinks from one to the next as the fourth power of this ratio, or faster.
        ratio = float(svd.s[-1] / svd.s[rank - 1])
        if lost <= FLOAT32_NOISE * norm**2 or (gain is not None and gain * ratio**4 <= SMALL_GAIN * lost):
            break
        svd = restrict(matrix, matrix @ svd.vh.t(), norm)
        gain = sum_squares(svd.s[:rank]) - captured
    return svd


def restrict(matrix: Tensor, columns: Tensor, norm: float) -> Svd:
    """The singular values of a matrix within the space of some columns. norm: of the matrix."""
    basis = torch.linalg.qr(columns).Q
    q, r = torch.linalg.qr((basis.t() @ matrix).t())  # a QR of the transpose, which is tall
    u, s, vh = torch.linalg.svd(r.t(), full_matrices=False)
    return Svd(basis @ u, s, vh @ q.t(), norm)


def sum_squares(tensor: Tensor) -> float:
    """Of all values: of each row in float32, of the rows in float64, which is exact to 1e-7 and twenty times as fast
    as float64 throughout."""
    rows = tensor.flatten(1) if tensor.ndim > 1 else tensor.reshape(1, -1)
    return float(torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32).double().square().sum())


def find_needed_rank(svd: Svd, method: RankMethod | None, param: float | None, limit: int) -> int:
    """The smallest rank that is enough, at least 1 and at most `limit`; `limit` itself without a method.

    sv_ratio: singular values above the largest / param. sv_fro: param of the norm. sv_cumulative: param of the sum of
    the singular values.
    """
    limit = max(1, min(limit, len(svd.s)))
    if method is None or param is None:
        return limit
    if float(svd.s[0]) <= NO_CHANGE:
        return 1
    values = svd.s.double()
    if method == "sv_ratio":
        needed = int((values > values[0] / param).sum())
    else:
        summed = values.square() if method == "sv_fro" else values
        whole = svd.norm**2 if method == "sv_fro" else float(summed.sum())
        share = param**2 if method == "sv_fro" else param
        needed = int((summed.cumsum(0) < whole * share * (1 - 1e-12)).sum()) + 1
    return max(1, min(needed, limit))


def count_effective_rank(values: Tensor) -> float:
    """exp of the entropy of the singular values (Roy and Vetterli 2007, eq. 4): how many of them matter."""
    shares = values.double() / values.double().sum().clamp(min=1e-300)
    return float(torch.exp(-(shares * shares.clamp(min=1e-300).log()).sum()))


def clamp_factors(factors: Factors, quantile: float) -> Factors:
    """Both matrices with values no larger than this quantile of all values of both, as sd-scripts does."""
    values = torch.cat([factors.up.flatten(), factors.down.flatten()])
    place = max(0, min(values.numel() - 1, int(quantile * values.numel())))
    largest = float(values.kthvalue(place + 1).values)
    return Factors(factors.down.clamp(-largest, largest), factors.up.clamp(-largest, largest))


def make_low_rank_tensors(factors: Factors, kernel: Sequence[int], alpha: float) -> LayerTensors:
    """The tensors in files, under their names here; alpha / rank is multiplied into the product when they are read."""
    down, up = factors
    down = down.reshape(len(down), -1, *kernel).contiguous()
    return {DOWN: down, UP: up.reshape(*up.shape, *[1] * len(kernel)).contiguous(), ALPHA: torch.tensor(float(alpha))}


def make_peft_tensors(factors: Factors, kernel: Sequence[int]) -> LayerTensors:
    """The same under PEFT's ends of keys, which have no place for alpha."""
    down, up = factors
    down = down.reshape(len(down), -1, *kernel).contiguous()
    return {"lora_A.weight": down, "lora_B.weight": up.reshape(*up.shape, *[1] * len(kernel)).contiguous()}


def make_kronecker_tensors(group: LayerGroup, change: Tensor, factor: int) -> tuple[LayerTensors, float]:
    """The tensors of the Kronecker product that is nearest to a change, and its relative error.

    change: (rows, columns, ...) of the whole group. factor: as LoKr's argument. The nearest is the largest singular
    value of the rearranged matrix (Van Loan and Pitsianis 1993, sec. 4).
    """
    rows, columns, *kernel = change.shape
    (m, n), (l, k) = factorize(columns, factor), factorize(rows, factor)  # noqa: E741
    blocks = change.reshape(l, k, m, -1).permute(0, 2, 1, 3).reshape(l * m, -1)
    svd = decompose_randomly(blocks, 1)
    root = svd.s[0].sqrt()
    first, second = svd.u[:, 0] * root, svd.vh[0] * root
    tensors = {W1: first.reshape(l, m), W2: second.reshape(k, n, *kernel), ALPHA: torch.tensor(1.0)}
    return {name: tensor.contiguous() for name, tensor in tensors.items()}, svd.measure_error(1)


def make_norm_tensors(weight: Tensor, bias: Tensor | None) -> LayerTensors:
    """The tensors of a norm layer, from the changes of its weight and its bias."""
    return {W_NORM: weight} | ({} if bias is None else {B_NORM: bias})


def cut_ranks(tensors: LayerTensors, rank: int) -> LayerTensors:
    """The first ranks of an adapter in a file, with the same alpha."""
    return {DOWN: tensors[DOWN][:rank], UP: tensors[UP][:, :rank], ALPHA: tensors[ALPHA]}
