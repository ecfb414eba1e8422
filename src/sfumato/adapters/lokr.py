"""LoKr (Yeh et al. 2024, "Navigating text-to-image customization", sec. 3): W + scale * w1 ⊗ w2, a Kronecker product.

w1 (l, m) and w2 (k, n, kernel) make a change of l * k rows and m * n columns. Either may be a product of two matrices,
and the w2 of a convolution may be one with a core of its kernel's size (Tucker decomposition).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.adapters.base import ADAPTERS, Adapter, AdapterRequest
from sfumato.adapters.formed_change import add_parameters, drop_rows, export_parameters, make_zeros
from sfumato.config.base import Options, option
from sfumato.errors import UserError
from sfumato.formats.adapter_keys import ALPHA, SCALAR
from sfumato.formats.adapter_kind import FileLayer, LayerTensors
from sfumato.formats.groups import LayerGroup

W1, W1_A, W1_B = "lokr_w1", "lokr_w1_a", "lokr_w1_b"
W2, W2_A, W2_B, T2 = "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"
NAMES = (W1, W1_A, W1_B, W2, W2_A, W2_B, T2)
SPELLINGS = {f"{name}{end}": name for name in NAMES for end in ("", ".default")}  # the second is PEFT's, at times


class LokrOptions(Options):
    """The arguments of LoKr."""

    factor: int = option(-1, "into what rows and columns are divided: the size of w1, -1 for about the square root")
    use_tucker: bool = option(False, "divide the second matrix of convolutions into three")
    decompose_both: bool = option(False, "divide the first matrix, too, where the rank is small enough")
    full_matrix: bool = option(False, "keep the second matrix whole, whatever --network_dim says")
    unbalanced_factorization: bool = option(False, "take the larger factor of the rows for w1")


@ADAPTERS.register("lokr")
class LoKr(Adapter):
    """The change of a whole group is one product; a layer computes the part of it that its rows lie in.

    rank_dropout drops rows of the change, the same for the whole batch.
    """

    label = "LoKr"
    spellings = SPELLINGS
    options_class = LokrOptions
    dim_meaning = "the rank of the second matrix, which is whole from half its larger side on"
    plus_params = (W1,)
    linear_tensors = (W1, W1_A)
    has_norm_limit = True
    dropouts = frozenset({"rank", "module"})

    lokr_w1: nn.Parameter | None
    lokr_w1_a: nn.Parameter | None
    lokr_w1_b: nn.Parameter | None
    lokr_w2: nn.Parameter | None
    lokr_w2_a: nn.Parameter | None
    lokr_w2_b: nn.Parameter | None
    lokr_t2: nn.Parameter | None

    def __init__(self, group: LayerGroup, tensors: Mapping[str, Tensor], *, rank: int | None, alpha: float) -> None:
        """tensors: under the names above, without alpha. rank: None where it is only known that both are whole."""
        super().__init__(group)
        self.rank, self.alpha = rank, alpha
        add_parameters(self, NAMES, tensors)

    @classmethod
    def create(cls, group: LayerGroup, request: AdapterRequest) -> Self:
        """w1 and all but the last factor of w2 are drawn as linear layers' weights are; the last one is 0."""
        options = request.options
        assert isinstance(options, LokrOptions)
        tensors = make_zeros(group, choose_shapes(group, request.rank, options))
        last = W2 if W2 in tensors else W2_B
        for name in (W1, W1_A, W1_B, T2, W2_A):
            if name in tensors and name != last and request.generator is not None and not tensors[name].is_meta:
                nn.init.kaiming_uniform_(tensors[name], a=math.sqrt(5), generator=request.generator)
        is_whole = W1 in tensors and W2 in tensors
        return cls(group, tensors, rank=request.rank, alpha=float(request.rank) if is_whole else request.alpha)

    @property
    def known_rank(self) -> int | None:
        return self.rank

    @property
    def scale(self) -> float:
        """alpha / rank, but 1 where both matrices are whole."""
        if self.rank is None or (self.lokr_w1 is not None and self.lokr_w2 is not None):
            return 1.0
        return self.alpha / self.rank

    def build_first(self) -> Tensor:
        """w1 (l, m)."""
        if self.lokr_w1 is not None:
            return self.lokr_w1
        assert self.lokr_w1_a is not None
        assert self.lokr_w1_b is not None
        return self.lokr_w1_a @ self.lokr_w1_b

    def build_second(self) -> Tensor:
        """w2 (k, n), or (k, n, kernel) for convolutions."""
        second = self.lokr_w2
        if second is None:
            assert self.lokr_w2_a is not None
            assert self.lokr_w2_b is not None
            if self.lokr_t2 is None:
                second = self.lokr_w2_a @ self.lokr_w2_b.flatten(1)
            else:
                second = torch.einsum("abhw,ak,bn->knhw", self.lokr_t2, self.lokr_w2_a, self.lokr_w2_b)
        return second.reshape(len(second), -1, *self.group.layers[0].weight.shape[2:]).contiguous()

    def delta(self, i: int) -> Tensor:
        first, second = self.build_first(), self.build_second()
        stacked = torch.kron(first.reshape(*first.shape, *[1] * (second.ndim - 2)), second)
        return self.scale * self.group.take_rows(stacked, i)

    def forward(self, x: Tensor, i: int) -> Tensor:
        """(w1 ⊗ w2) x = w1 X w2ᵀ with x as the matrix X (m, n): the product is never formed."""
        layer, first, second = self.group.layers[i], self.build_first().to(x.dtype), self.build_second().to(x.dtype)
        is_linear = isinstance(layer, nn.Linear)
        if is_linear:
            low = F.linear(x.unflatten(-1, (first.shape[1], -1)), second) * self.scale  # (..., m, k)
        else:
            blocks = x.unflatten(1, (first.shape[1], -1)).flatten(0, 1)
            low = F.conv2d(blocks, second, None, layer.stride, layer.padding, layer.dilation)  # pyright: ignore
            low = low.unflatten(0, (len(x), first.shape[1])) * self.scale  # (B, m, k, H, W)
        pieces = [self._multiply_first(first, low, start, stop, is_linear) for start, stop in self.group.rows[i]]
        return drop_rows(self, torch.cat(pieces, -1 if is_linear else 1) if len(pieces) > 1 else pieces[0], i)

    def _multiply_first(self, first: Tensor, low: Tensor, start: int, stop: int, is_linear: bool) -> Tensor:
        """The rows from start to stop of the change's output; only the rows of w1 that they lie in are used."""
        height = low.shape[-1 if is_linear else 2]
        begin = start // height
        rows = first[begin : -(-stop // height)]
        if is_linear:
            found = torch.matmul(rows, low).flatten(-2)
            return found[..., start - begin * height : stop - begin * height]
        found = torch.einsum("lm,bmkhw->blkhw", rows, low).flatten(1, 2)
        return found[:, start - begin * height : stop - begin * height]

    @torch.no_grad()
    def limit_norm(self, maximum: float) -> tuple[Tensor, Tensor]:
        """|w1 ⊗ w2| = |w1| |w2|; every factor is scaled by the same root of the ratio."""
        norm = self.scale * self.build_first().norm() * self.build_second().norm()
        ratio = (maximum / norm.clamp(min=maximum / 2)).clamp(max=1)
        factors = list(self.parameters())
        for factor in factors:
            factor.mul_(ratio ** (1 / len(factors)))
        return norm * ratio, ratio < 1

    # ------------------------------------------------------------ files

    def export_tensors(self) -> dict[str, Tensor]:
        return export_parameters(self)

    @classmethod
    def from_tensors(cls, group: LayerGroup, tensors: Mapping[str, Tensor], inner: Adapter | None = None) -> Self:
        own = {name: tensors[name].float() for name in NAMES if name in tensors}
        return cls(group, own, rank=find_rank(own), alpha=float(tensors[ALPHA]))

    @staticmethod
    def complete(layer: FileLayer) -> LayerTensors:
        """The matrices and alpha. scalar is multiplied into w1, and so is PEFT's scale of two whole matrices."""
        tensors = {name: layer.tensors[name] for name in NAMES if name in layer.tensors}
        layer.check_complete([*([] if W1 in tensors else (W1_A, W1_B)), *([] if W2 in tensors else (W2_A, W2_B))])
        check_shapes(layer, tensors)
        rank = find_rank(tensors)
        factor = float(layer.tensors[SCALAR]) if SCALAR in layer.tensors else 1.0
        if rank is None and layer.config is not None and (own := layer.config.find_rank(layer.config_name)):
            factor *= layer.config.find_alpha(layer.config_name, round(own)) / own
        if factor != 1:
            name = W1 if W1 in tensors else W1_A
            tensors[name] = tensors[name].float() * factor
        return {**tensors, ALPHA: torch.tensor(layer.find_alpha(rank or 1))}

    @staticmethod
    def find_weight_shape(tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        first, second = find_first_shape(tensors), find_second_shape(tensors)
        return (first[0] * second[0], first[1] * second[1], *second[2:])


# ---------------------------------------------------------------- shapes


def factorize(size: int, factor: int) -> tuple[int, int]:
    """(smaller, larger) whose product is `size`: `factor` and the rest where it divides the size.

    Else the pair with the smallest sum, and with no smaller one above `factor`; -1 for no such limit.
    """
    if factor > 0 and size % factor == 0:
        small, large = sorted((factor, size // factor))
        return small, large
    limit = size if factor < 0 else factor
    best = max(small for small in range(1, math.isqrt(size) + 1) if size % small == 0 and small <= max(limit, 1))
    return best, size // best


def choose_shapes(group: LayerGroup, rank: int, options: LokrOptions) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the matrices of a group's adapter."""
    columns, *kernel = group.layers[0].weight.shape[1:]
    m, n = factorize(columns, options.factor)
    l, k = factorize(group.num_rows, options.factor)  # noqa: E741
    if options.unbalanced_factorization:
        l, k = k, l  # noqa: E741
    shapes: dict[str, tuple[int, ...]] = {}
    if options.decompose_both and rank < max(l, m) / 2 and not options.full_matrix:
        shapes |= {W1_A: (l, rank), W1_B: (rank, m)}
    else:
        shapes[W1] = (l, m)
    if options.full_matrix or rank >= max(k, n) / 2:
        shapes[W2] = (k, n, *kernel)
    elif options.use_tucker and any(size > 1 for size in kernel):
        shapes |= {T2: (rank, rank, *kernel), W2_A: (rank, k), W2_B: (rank, n)}
    else:
        shapes |= {W2_A: (k, rank), W2_B: (rank, n * math.prod(kernel))}
    return shapes


def find_rank(tensors: Mapping[str, Tensor]) -> int | None:
    """None where both matrices are whole."""
    if W1 not in tensors:
        return tensors[W1_A].shape[1]
    return None if W2 in tensors else len(tensors[W2_B])


def find_first_shape(tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
    return tuple(tensors[W1].shape) if W1 in tensors else (len(tensors[W1_A]), tensors[W1_B].shape[1])


def find_second_shape(tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
    """With the kernel flattened into the columns where the file has it so."""
    if W2 in tensors:
        return tuple(tensors[W2].shape)
    if T2 in tensors:
        return (tensors[W2_A].shape[1], tensors[W2_B].shape[1], *tensors[T2].shape[2:])
    return (len(tensors[W2_A]), math.prod(tensors[W2_B].shape[1:]))


def check_shapes(layer: FileLayer, tensors: Mapping[str, Tensor]) -> None:
    """UserError for matrices that do not belong together."""
    thin = [name for name, tensor in tensors.items() if tensor.ndim < 2 or 0 in tensor.shape]
    if thin:
        raise UserError(
            f"{layer.path}: {layer.name}.{thin[0]} is no matrix: {tuple(tensors[thin[0]].shape)}",
            code="lokr-tensor-no-matrix",
            fix="save or download the file again",
        )
    if W1 not in tensors and tensors[W1_A].shape[1] != len(tensors[W1_B]):
        raise layer.make_mismatch_error(W1_A, W1_B)
    if W2 not in tensors:
        inner = tensors[W2_A].shape[0 if T2 in tensors else 1]
        if inner != len(tensors[W2_B]):
            raise layer.make_mismatch_error(W2_A, W2_B)
        if T2 in tensors and (tensors[T2].ndim != 4 or tensors[T2].shape[:2] != (inner, inner)):
            raise layer.make_mismatch_error(T2, W2_A)
