"""The whole difference of weights and biases (LyCORIS' "full"): W + diff, as free as full training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from sfumato.adapters.base import ADAPTERS, Adapter, AdapterRequest, apply_weight
from sfumato.adapters.formed_change import drop_rows
from sfumato.errors import UserError
from sfumato.formats.adapter_kind import FileLayer, LayerMatch, LayerTensors
from sfumato.formats.groups import LayerGroup

DIFF, DIFF_BIAS = "diff", "diff_b"
SPELLINGS = {"diff": DIFF, "diff_b": DIFF_BIAS}


@ADAPTERS.register("full_difference")
class FullDifference(Adapter):
    """One tensor for the stacked weights of the group, and one for the biases where all of its layers have one.

    rank_dropout drops rows of the change, the same for the whole batch.
    """

    label = "full difference"
    changes_biases = True
    spellings = SPELLINGS
    dim_meaning = "without effect, but 0 gives a layer none"
    uses_rank = False
    takes_wrappers = False
    dropouts = frozenset({"rank", "module"})
    alpha = 1.0

    diff_b: nn.Parameter | None

    def __init__(self, group: LayerGroup, diff: Tensor, bias: Tensor | None) -> None:
        """diff: (rows of the group, columns, ...). bias: (rows,)."""
        super().__init__(group)
        device = group.layers[0].weight.device
        self.diff = nn.Parameter(diff.to(device))
        self.register_parameter(DIFF_BIAS, None if bias is None else nn.Parameter(bias.to(device)))

    @property
    def known_rank(self) -> None:
        return None

    @classmethod
    def create(cls, group: LayerGroup, request: AdapterRequest) -> Self:
        weight = group.layers[0].weight
        diff = torch.zeros(group.num_rows, *weight.shape[1:], device=weight.device)
        return cls(group, diff, diff.new_zeros(group.num_rows) if has_biases(group) else None)

    def delta(self, i: int) -> Tensor:
        return self.group.take_rows(self.diff, i)

    def bias_delta(self, i: int) -> Tensor | None:
        return None if self.diff_b is None else self.group.take_rows(self.diff_b, i)

    def forward(self, x: Tensor, i: int) -> Tensor:
        bias = self.bias_delta(i)
        bias = None if bias is None else bias.to(x.dtype)
        return drop_rows(self, apply_weight(self.group.layers[i], x, self.delta(i).to(x.dtype), bias), i)

    # ------------------------------------------------------------ files

    def export_tensors(self) -> dict[str, Tensor]:
        return dict(self.named_parameters())

    @classmethod
    def from_tensors(cls, group: LayerGroup, tensors: Mapping[str, Tensor], inner: Adapter | None = None) -> Self:
        diff, bias = tensors[DIFF].float(), tensors.get(DIFF_BIAS)
        if bias is not None and not has_biases(group):
            raise UserError(
                f"{group.name} has no bias in this model, but {DIFF_BIAS} in the file: it was made for another model",
                code="difference-of-missing-bias",
            )
        shape = (group.num_rows, *group.layers[0].weight.shape[1:])
        return cls(group, diff.reshape(shape), None if bias is None else bias.float().flatten())

    @staticmethod
    def complete(layer: FileLayer) -> LayerTensors:
        layer.check_complete((DIFF,))
        tensors = {name: layer.tensors[name] for name in (DIFF, DIFF_BIAS) if name in layer.tensors}
        if tensors[DIFF].ndim < 2 or (DIFF_BIAS in tensors and tensors[DIFF_BIAS].numel() != len(tensors[DIFF])):
            raise layer.make_mismatch_error(*tensors, *((DIFF,) if len(tensors) == 1 else ()))
        return tensors

    @staticmethod
    def find_weight_shape(tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        return tuple(tensors[DIFF].shape)

    @staticmethod
    def join(group: LayerGroup, found: Sequence[LayerMatch]) -> LayerTensors:
        """The rows of all layers; 0 for those that have none."""
        joined: LayerTensors = {}
        for name in (DIFF, DIFF_BIAS):
            rows: dict[str, Tensor] = {}
            for match in found:
                if name in match.tensors:
                    rows |= {
                        path: match.view.take_rows(match.tensors[name], i) for i, path in enumerate(match.view.paths)
                    }
            if rows:
                joined[name] = group.stack_rows([_find_rows(group, i, rows) for i in range(len(group.paths))])
        return joined


def has_biases(group: LayerGroup) -> bool:
    """Whether every layer of the group has one."""
    return all(layer.bias is not None for layer in group.layers)


def _find_rows(group: LayerGroup, i: int, rows: Mapping[str, Tensor]) -> Tensor:
    """The i-th layer's rows; 0 where there are none."""
    if group.paths[i] in rows:
        return rows[group.paths[i]]
    like = next(iter(rows.values()))
    return like.new_zeros(len(group.layers[i].weight), *like.shape[1:])
