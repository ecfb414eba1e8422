"""DoRA (Liu et al. 2024, eq. 5): the length of each row or column of the changed weight is trained on its own.

W' = m * (W + D) / |W + D|, where D is another adapter's change and m starts as |W|. Of rows (`wd_on_output`, PEFT's
lora_magnitude_vector) or of columns (LyCORIS before 3.0); in a fused layer a column is that of all its layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sfumato.adapters.base import (
    ADAPTERS,
    Adapter,
    AdapterRequest,
    Dropout,
    add_change,
    apply_weight,
    drop_module,
    over_channels,
    remove_bias,
)
from sfumato.config.base import Options, option
from sfumato.data.batch import Tensors
from sfumato.errors import InternalError, UserError
from sfumato.formats.adapter_kind import FileLayer, LayerMatch, LayerTensors, describe_kinds
from sfumato.formats.groups import LayerGroup

SCALE, MAGNITUDE = "dora_scale", "lora_magnitude_vector"
SPELLINGS = {  # the end of a key -> the name of this tensor here
    SCALE: SCALE,
    **dict.fromkeys((MAGNITUDE, f"{MAGNITUDE}.weight"), MAGNITUDE),
    **dict.fromkeys((f"{MAGNITUDE}.default", f"{MAGNITUDE}.default.weight"), MAGNITUDE),
}
EPS = torch.finfo(torch.float32).eps  # added to lengths, as LyCORIS does


class DoraOptions(Options):
    """The arguments of DoRA, which wraps any other kind."""

    dora_wd: bool = option(False, "DoRA: train the length of each row of the changed weight on its own")
    wd_on_output: bool = option(True, "with dora_wd: of each row, the weight's outputs; False: of each column")


@ADAPTERS.register("dora")
class DoRA(Adapter):
    """Wraps an adapter whose change is D. The gradient flows through the lengths, too, as in LyCORIS.

    rank_dropout is the inner adapter's; lengths are those of its whole change.
    """

    label = "DoRA"
    is_wrapper = True
    reads_weights = True
    spellings = SPELLINGS
    options_class = DoraOptions
    dropouts = frozenset({"rank", "module"})

    def __init__(self, inner: Adapter, scale: Tensor | None = None, *, on_output: bool = True) -> None:
        """scale: (rows, 1, ...) of the group or (1, columns, ...); None for the lengths that the weights have."""
        super().__init__(inner.group)
        self.inner = inner
        self.on_output = on_output
        self._factors: dict[int, Tensor] = {}
        self.alpha = inner.alpha
        self.plus_params = inner.plus_params
        with torch.no_grad():
            lengths = self._measure_group() if scale is None else scale.float()
        self.dora_scale = nn.Parameter(lengths.to(inner.group.layers[0].weight.device))

    @classmethod
    def is_wanted(cls, options: Options, group: LayerGroup | None) -> bool:
        assert isinstance(options, DoraOptions)
        return options.dora_wd

    @classmethod
    def create(cls, group: LayerGroup, request: AdapterRequest) -> Self:
        options = request.options
        assert isinstance(options, DoraOptions)
        assert request.inner is not None
        return cls(request.inner, on_output=options.wd_on_output)

    @property
    def known_rank(self) -> int | None:
        return self.inner.known_rank

    def set_dropout(self, dropout: Dropout) -> None:
        self.dropout = replace(dropout, neuron=0.0)
        self.inner.set_dropout(Dropout(rank=dropout.rank, scales_rows=dropout.scales_rows))

    def configure(self, options: Options) -> None:
        self.inner.configure(options)

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield SCALE, self.dora_scale
        yield from self.inner.trainable()

    # ------------------------------------------------------------ lengths

    def _measure_group(self) -> Tensor:
        """The lengths of the weights' rows, or of their columns, in the shape of `dora_scale`."""
        weights = [layer.weight.float() for layer in self.group.layers]
        if self.on_output:
            return self.group.stack_rows([_square_rows(weight) for weight in weights]).sqrt()
        return torch.stack([_square_columns(weight) for weight in weights]).sum(0).sqrt()

    def _measure_changed(self, i: int) -> Tensor:
        """The same of W + D, for the i-th layer; recomputed in backward, so that no full-size tensor is kept."""

        def measure() -> Tensor:
            if self.on_output:
                return _square_rows(self._change(i)).sqrt()
            squares = [_square_columns(self._change(j)) for j in range(len(self.group.layers))]
            return torch.stack(squares).sum(0).sqrt()

        if not torch.is_grad_enabled():
            return measure()
        lengths = checkpoint(measure, use_reentrant=False, preserve_rng_state=False)
        assert isinstance(lengths, Tensor)
        return lengths

    def _change(self, i: int) -> Tensor:
        return self.group.layers[i].weight.float() + self.inner.delta(i).float()

    def _find_factor(self, i: int) -> Tensor:
        """m / |W + D| for the i-th layer: (rows, 1, ...) or (1, columns, ...); of a frozen adapter computed once."""
        if not self.dora_scale.requires_grad and i in self._factors:
            return self._factors[i]
        factor = self._divide(i)
        if not self.dora_scale.requires_grad:
            self._factors[i] = factor.detach()
        return factor

    def _divide(self, i: int) -> Tensor:
        scale = self.group.take_rows(self.dora_scale, i) if self.on_output else self.dora_scale
        return scale / (self._measure_changed(i) + EPS)

    # ------------------------------------------------------------ the change

    def delta(self, i: int) -> Tensor:
        return self._change(i) * self._find_factor(i) - self.group.layers[i].weight.float()

    def forward(self, x: Tensor, i: int) -> Tensor:
        weight = self.group.layers[i].weight
        return self._find_change(apply_weight(self.group.layers[i], x, weight.to(x.dtype)), x, i)

    def add_to(self, output: Tensor, x: Tensor, i: int, strength: float | Tensor) -> Tensor:
        """The layer's own product is taken from its output, without a second one."""
        product = remove_bias(self.group.layers[i], output)
        return add_change(output, self._find_change(product, x, i), strength)

    def _find_change(self, product: Tensor, x: Tensor, i: int) -> Tensor:
        """The change of the output; product: W x without bias."""
        factor = over_channels(self.group.layers[i], self._find_factor(i)).to(product.dtype)
        if self.on_output:
            change = (factor - 1) * product + factor * self.inner(x, i).to(product.dtype)
        else:
            layer = self.group.layers[i]
            more = apply_weight(layer, (x * (factor - 1)).to(x.dtype), layer.weight.to(x.dtype))
            change = more + self.inner((x * factor).to(x.dtype), i).to(more.dtype)
        module = self.dropout.module
        return drop_module(change, module) if module and self.training else change

    # ------------------------------------------------------------ files

    def export_tensors(self) -> Tensors:
        return {**self.inner.export_tensors(), SCALE: self.dora_scale}

    @classmethod
    def from_tensors(cls, group: LayerGroup, tensors: Mapping[str, Tensor], inner: Adapter | None = None) -> Self:
        assert inner is not None
        scale, weight = tensors[SCALE], group.layers[0].weight
        shapes = {True: (group.num_rows, 1), False: (1, weight.shape[1])}
        sides = [side for side, shape in shapes.items() if tuple(scale.shape[:2]) == shape]
        if not sides or scale.numel() != max(scale.shape[:2]):
            raise UserError(
                f"{group.name}: {SCALE} has the shape {tuple(scale.shape)}, which is neither that of the weight's "
                f"{group.num_rows} rows nor of its {weight.shape[1]} columns",
                code="dora-scale-shape",
                fix="save or download the file again",
            )
        return cls(inner, scale.reshape(*scale.shape[:2], *[1] * (weight.ndim - 2)), on_output=sides[0])

    @staticmethod
    def complete(layer: FileLayer) -> LayerTensors:
        """Of PEFT's vectors the numbers are those of the rows, whatever their shape."""
        if MAGNITUDE in layer.tensors:
            return {SCALE: layer.tensors[MAGNITUDE].reshape(-1, 1)}
        layer.check_complete((SCALE,))
        scale = layer.tensors[SCALE]
        return {SCALE: scale if scale.ndim > 1 else scale.reshape(-1, 1)}

    @staticmethod
    def find_weight_shape(tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        raise InternalError("the shape is that of the adapter that is wrapped")

    @staticmethod
    def join(group: LayerGroup, found: Sequence[LayerMatch]) -> LayerTensors:
        """The rows of all layers; lengths of columns, and layers without a length, cannot be joined."""
        rows: dict[str, Tensor] = {}
        for match in found:
            scale = match.tensors[SCALE]
            if len(scale) == match.view.num_rows:
                rows |= {path: match.view.take_rows(scale, i) for i, path in enumerate(match.view.paths)}
        if len(found) == 1 and not rows:
            return {SCALE: found[0].tensors[SCALE]}
        if any(path not in rows for path in group.paths):
            raise UserError(
                f"{group.name} is one {describe_kinds(found[0].kinds)} here, but the file divides its layers otherwise",
                code="dora-layers-divided",
                fix="start from new values, and give the file with --frozen_lora or --base_weights",
            )
        return {SCALE: group.stack_rows([rows[path] for path in group.paths])}

    @staticmethod
    def to_peft(match: LayerMatch) -> list[Tensors] | None:
        """The lengths of rows, of convolutions in the place of their output's channels; PEFT has none of columns."""
        scale, view = match.tensors[SCALE], match.view
        if len(scale) != view.num_rows:
            return None
        shape = (1, -1, 1, 1) if any(tensor.ndim > 2 for tensor in match.tensors.values()) else (-1,)
        return [{f"{MAGNITUDE}.weight": view.take_rows(scale, i).reshape(shape)} for i in range(len(view.paths))]


def _square_rows(weight: Tensor) -> Tensor:
    """The squared lengths of rows, (rows, 1, ...)."""
    return weight.square().sum(dim=tuple(range(1, weight.ndim)), keepdim=True)


def _square_columns(weight: Tensor) -> Tensor:
    """The squared lengths of columns, each over the rows and the kernel: (1, columns, ...)."""
    return weight.square().sum(dim=(0, *range(2, weight.ndim)), keepdim=True)
