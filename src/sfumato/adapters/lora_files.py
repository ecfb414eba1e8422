"""LoRA in files: the names of its tensors, what makes them complete, and one of several as diffusers divides them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sfumato.data.batch import Tensors
from sfumato.formats.adapter_keys import ALPHA, SCALAR
from sfumato.formats.adapter_kind import FileLayer, LayerMatch, LayerTensors
from sfumato.formats.groups import LayerGroup

DOWN, UP, MIDDLE = "lora_down.weight", "lora_up.weight", "lora_mid.weight"
SPELLINGS = {  # the end of a key -> the name of this tensor here
    **dict.fromkeys(("lora_down.weight", "lora_A.weight", "lora_A.default.weight", "lora.down.weight"), DOWN),
    **dict.fromkeys(("lora_linear_layer.down.weight", "down.weight"), DOWN),
    **dict.fromkeys(("lora_up.weight", "lora_B.weight", "lora_B.default.weight", "lora.up.weight"), UP),
    **dict.fromkeys(("lora_linear_layer.up.weight", "up.weight"), UP),
    **dict.fromkeys(("lora.alpha", "lora_linear_layer.alpha"), ALPHA),
}


def complete_matrices(layer: FileLayer) -> LayerTensors:
    """Both matrices, as they are, and alpha; what other tensors say is multiplied into the matrices."""
    layer.check_complete((DOWN, UP))
    tensors = layer.tensors
    down, up = tensors[DOWN], tensors[UP]
    if min(down.ndim, up.ndim) < 2 or len(down) != up.shape[1] or 0 in (*down.shape, *up.shape):
        raise layer.make_mismatch_error(DOWN, UP)
    if SCALAR in tensors:
        up = up.float() * tensors[SCALAR].float().reshape(())
    return {DOWN: down, UP: up, ALPHA: torch.tensor(layer.find_alpha(len(down)))}


def find_product_shape(tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
    """The shape of the weight that up @ down changes."""
    return (tensors[UP].shape[0], *tensors[DOWN].shape[1:])


def find_factors(tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """down and up as matrices, with alpha / rank multiplied into up."""
    down, up = tensors[DOWN].flatten(1).float(), tensors[UP].flatten(1).float()
    return down, up * (float(tensors[ALPHA]) / len(down))


def name_for_peft(match: LayerMatch) -> list[Tensors]:
    """For each layer PEFT's two matrices, which have no place for alpha: alpha / rank is multiplied into the second."""
    view, down, up = match.view, match.tensors[DOWN], match.tensors[UP]
    scale = float(match.tensors[ALPHA]) / len(down)
    shape = view.layers[0].weight.shape[1:]
    down, up = down.reshape(-1, *shape), up.float().reshape(-1, len(down), *[1] * (len(shape) - 1))
    ups = [view.take_rows(up, i) for i in range(len(view.paths))]
    return [
        {"lora_A.weight": down[ranks], "lora_B.weight": layer_up[:, ranks] * scale}
        for layer_up, ranks in zip(ups, find_own_ranks(ups), strict=True)
    ]


def find_own_ranks(ups: Sequence[Tensor]) -> list[slice]:
    """Which ranks each layer needs: a share of its own where layers were trained one by one, else all of them.

    ups: the rows of `lora_up` of each layer, (rows, rank).
    """
    count, rank = len(ups), ups[0].shape[1]
    everything = [slice(None)] * count
    if count == 1 or rank % count or not any(up.any() for up in ups):
        return everything
    share = rank // count
    own_ranks = [slice(i * share, (i + 1) * share) for i in range(count)]
    for up, own in zip(ups, own_ranks, strict=True):
        if up[:, : own.start].any() or up[:, own.stop :].any():
            return everything
    return own_ranks


# ---------------------------------------------------------------- one of several


def join_matrices(group: LayerGroup, found: Sequence[LayerMatch]) -> LayerTensors:
    """One LoRA of the whole group, which changes its layers as all of them do; exact."""
    first = found[0]
    shape = group.layers[0].weight.shape[1:]
    if len(found) == 1 and (first.view.paths, first.view.rows) == (group.paths, group.rows):
        return {DOWN: first.tensors[DOWN].reshape(-1, *shape), UP: first.tensors[UP], ALPHA: first.tensors[ALPHA]}
    if share_down(found):
        up = _stack(group, [_take_ups(match) for match in found], len(first.tensors[DOWN]))
        return {DOWN: first.tensors[DOWN].reshape(-1, *shape), UP: up, ALPHA: first.tensors[ALPHA]}
    down = torch.cat([match.tensors[DOWN].float().reshape(-1, *shape) for match in found])
    wide: list[dict[str, Tensor]] = []
    start = 0
    for match in found:
        wide.append(_widen(match, start, len(down)))
        start += len(match.tensors[DOWN])
    return {DOWN: down, UP: _stack(group, wide, len(down)), ALPHA: torch.tensor(float(len(down)))}


def share_down(found: Sequence[LayerMatch]) -> bool:
    """Whether all have the same down matrix and scale: one LoRA whose up matrix was cut."""
    first, *others = found
    return all(
        torch.equal(other.tensors[DOWN], first.tensors[DOWN])
        and torch.equal(other.tensors[ALPHA], first.tensors[ALPHA])
        for other in others
    )


def _stack(group: LayerGroup, ups: Sequence[Mapping[str, Tensor]], rank: int) -> Tensor:
    """The up matrix of the group from those of its layers; 0 for layers that have none."""
    by_path: dict[str, Tensor] = {}
    for each in ups:
        by_path |= each
    like = next(iter(by_path.values()))
    pieces: list[Tensor] = []
    for path, layer in zip(group.paths, group.layers, strict=True):
        pieces.append(by_path[path] if path in by_path else like.new_zeros(len(layer.weight), rank))
    up = group.stack_rows(pieces)
    return up.reshape(*up.shape, *[1] * (group.layers[0].weight.ndim - 2))


def _take_ups(match: LayerMatch) -> dict[str, Tensor]:
    """Path of a layer -> its rows of the up matrix, (rows, rank)."""
    up = match.tensors[UP].flatten(1)
    return {path: match.view.take_rows(up, i) for i, path in enumerate(match.view.paths)}


def _widen(match: LayerMatch, start: int, rank: int) -> dict[str, Tensor]:
    """The same with the scale multiplied in, in columns from `start` of `rank`, and 0 in the others."""
    own = len(match.tensors[DOWN])
    scale = float(match.tensors[ALPHA]) / own
    wide: dict[str, Tensor] = {}
    for path, up in _take_ups(match).items():
        wide[path] = torch.zeros(len(up), rank)
        wide[path][:, start : start + own] = up.float() * scale
    return wide
