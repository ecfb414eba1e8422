"""The difference of norm layers' weights and biases (LyCORIS' `train_norm`), beside whatever the other layers have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.adapters.base import ADAPTERS, Adapter, AdapterRequest, drop_module
from sfumato.adapters.formed_change import add_parameters
from sfumato.config.base import Options, option
from sfumato.errors import UserError
from sfumato.formats.adapter_kind import FileLayer, LayerTensors
from sfumato.formats.groups import LayerGroup

W_NORM, B_NORM = "w_norm", "b_norm"
SPELLINGS = {W_NORM: W_NORM, B_NORM: B_NORM}


class NormOptions(Options):
    """The argument of norm layers, beside those of any kind."""

    train_norm: bool = option(False, "train the norm layers of the blocks that are adapted, too")


@ADAPTERS.register("norm_difference")
class NormDifference(Adapter):
    """A layer's output is its normalized input times weight, plus bias: the change is that of both differences.

    rank_dropout drops channels of the change, the same for the whole batch.
    """

    label = "norm difference"
    of_norms = True
    changes_biases = True
    spellings = SPELLINGS
    options_class = NormOptions
    dim_meaning = "without effect, but 0 gives a layer none"
    uses_rank = False
    takes_wrappers = False
    has_norm_limit = True
    dropouts = frozenset({"rank", "module"})
    alpha = 1.0

    w_norm: nn.Parameter
    b_norm: nn.Parameter | None

    def __init__(self, group: LayerGroup, tensors: Mapping[str, Tensor]) -> None:
        """tensors: w_norm (channels,), and b_norm (channels,) where the layer has a bias."""
        super().__init__(group)
        add_parameters(self, SPELLINGS, tensors)

    @classmethod
    def is_wanted(cls, options: Options, group: LayerGroup | None) -> bool:
        assert isinstance(options, NormOptions)
        return options.train_norm

    @classmethod
    def check(cls, options: Options, groups: Sequence[LayerGroup]) -> None:
        assert isinstance(options, NormOptions)
        if options.train_norm and not groups:
            raise UserError(
                "--network_args train_norm has no effect: no norm layer with a weight is among what is adapted",
                code="train-norm-without-norms",
                fix="remove train_norm",
            )

    @classmethod
    def create(cls, group: LayerGroup, request: AdapterRequest) -> Self:
        zeros = torch.zeros(group.num_rows, device=group.layers[0].weight.device)
        return cls(group, {W_NORM: zeros} | ({B_NORM: zeros.clone()} if has_bias(group) else {}))

    @property
    def known_rank(self) -> None:
        return None

    def delta(self, i: int) -> Tensor:
        return self.w_norm

    def bias_delta(self, i: int) -> Tensor | None:
        return self.b_norm

    def forward(self, x: Tensor, i: int) -> Tensor:
        weight, bias = self.w_norm, self.b_norm
        dropout = self.dropout
        if self.training and dropout.rank:
            mask = (torch.rand(len(weight), device=weight.device) >= dropout.rank).to(weight.dtype)
            weight, bias = weight * mask, None if bias is None else bias * mask
        change = normalize(self.group.layers[i], x, weight, bias)
        return drop_module(change, dropout.module) if self.training and dropout.module else change

    @torch.no_grad()
    def limit_norm(self, maximum: float) -> tuple[Tensor, Tensor]:
        """The norm is that of the weight's change; both differences are scaled alike."""
        norm = self.w_norm.norm()
        ratio = (maximum / norm.clamp(min=maximum / 2)).clamp(max=1)
        for parameter in self.parameters():
            parameter.mul_(ratio)
        return norm * ratio, ratio < 1

    # ------------------------------------------------------------ files

    def export_tensors(self) -> LayerTensors:
        return dict(self.named_parameters())

    @classmethod
    def from_tensors(cls, group: LayerGroup, tensors: Mapping[str, Tensor], inner: Adapter | None = None) -> Self:
        if B_NORM in tensors and not has_bias(group):
            raise UserError(
                f"{group.name} has no bias in this model, but {B_NORM} in the file: it was made for another model",
                code="norm-of-missing-bias",
            )
        return cls(group, {name: tensors[name].float() for name in SPELLINGS if name in tensors})

    @staticmethod
    def complete(layer: FileLayer) -> LayerTensors:
        layer.check_complete((W_NORM,))
        tensors = {name: layer.tensors[name].flatten() for name in SPELLINGS if name in layer.tensors}
        if B_NORM in tensors and len(tensors[B_NORM]) != len(tensors[W_NORM]):
            raise layer.make_mismatch_error(W_NORM, B_NORM)
        return tensors

    @staticmethod
    def find_weight_shape(tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        return tuple(tensors[W_NORM].shape)


def has_bias(group: LayerGroup) -> bool:
    """Whether the norm layer has one; those of root mean squares do not even have the attribute."""
    return group.layers[0]._parameters.get("bias") is not None


def normalize(layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The layer's operation with another weight and bias, in x's dtype.

    A norm of root mean squares (Zhang and Sennrich 2019, eq. 4) is computed in float32, as all libraries do; where it
    multiplies with 1 + weight, as Gemma's, its change is that of the weight all the same.
    """
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    match layer:
        case nn.LayerNorm():
            return F.layer_norm(x, layer.normalized_shape, weight, bias, layer.eps)
        case nn.GroupNorm():
            return F.group_norm(x, layer.num_groups, weight, bias, layer.eps)
        case _:
            precise = x.float()
            scale = torch.rsqrt(precise.square().mean(-1, keepdim=True) + find_eps(layer, x.dtype))
            return (precise * scale).to(x.dtype) * weight


def find_eps(layer: nn.Module, dtype: torch.dtype) -> float:
    """What is added to mean squares: under T5's name, or torch's and diffusers', which may give none."""
    own = vars(layer)
    eps = own["variance_epsilon"] if "variance_epsilon" in own else own["eps"]
    return torch.finfo(dtype).eps if eps is None else float(eps)
