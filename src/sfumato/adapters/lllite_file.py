"""Files of ControlNet-LLLite, of either version: what is in them says which, how large, and beside which layers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sfumato.adapters.control_modules import ControlModules
from sfumato.adapters.lllite import LLLite
from sfumato.adapters.lllite_shared import TRUNK, SharedLLLite
from sfumato.adapters.lllite_trunk import DILATIONS, MASK_SIDE, LLLiteSizes
from sfumato.common.text import list_some, plural
from sfumato.diffusion.objective import LatentSpec
from sfumato.errors import UserError
from sfumato.formats.checkpoint import open_checkpoint
from sfumato.formats.controlled import ControlledLayer

_CHANNELS = (3, 4)  # of a control image, without and with a mask
_METADATA = "lllite."


def read_lllite_file(
    path: Path, layers: Mapping[str, ControlledLayer], latents: LatentSpec, *, dropout: float = 0.0
) -> ControlModules:
    """The modules of a file. layers: those of the model, by name. latents: the model's.

    UserError where the file is for another model.
    """
    with open_checkpoint(path) as file:
        state = {key: file.read(key, dtype=torch.float32) for key in file.keys()}  # noqa: SIM118
        facts = {name.removeprefix(_METADATA): value for name, value in file.header.metadata.items()}
    names = {key.partition(".")[0] for key in state}
    unknown = sorted(names - {*layers, TRUNK})
    if unknown:
        raise UserError(
            f"{path} is no LLLite file for this model, which has no layer {list_some(unknown)}",
            code="lllite-layers-unknown",
            fix="give a file that was trained for the base model's family",
        )
    some = {name: layer for name, layer in layers.items() if name in names}
    if TRUNK in names:
        made: ControlModules = SharedLLLite(some, read_sizes(path, state, facts, latents), dropout=dropout)
    else:
        made = _make_first(path, state, some, dropout)
    expected = {name: tensor.shape for name, tensor in made.parts.state_dict().items()}
    found = {name: tensor.shape for name, tensor in state.items()}
    differing = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
    if differing:
        raise UserError(
            f"{path} is no LLLite file for this model: {list_some(differing)} are missing or of another shape",
            code="lllite-shapes-mismatch",
        )
    made.parts.load_state_dict(state)
    return made


def _make_first(
    path: Path, state: Mapping[str, Tensor], layers: Mapping[str, ControlledLayer], dropout: float
) -> LLLite:
    down = next((tensor for key, tensor in state.items() if key.endswith(".down.0.weight")), None)
    middle = next((tensor for key, tensor in state.items() if key.endswith(".mid.0.weight")), None)
    if down is None or middle is None:
        raise UserError(f"{path} is no LLLite file: it has no down and mid layers", code="lllite-file-incomplete")
    width = down.shape[0]
    return LLLite(layers, width=width, image_width=middle.shape[1] - width, dropout=dropout)


def read_sizes(path: Path, state: Mapping[str, Tensor], facts: Mapping[str, str], latents: LatentSpec) -> LLLiteSizes:
    """What the tensors and the metadata of a file of the second version say."""
    if facts.get("trunk", "stem") != "stem":
        raise UserError(
            f"{path} is an LLLite file of version 3, whose control image the model itself reads",
            code="lllite-version-3",
            fix="give a file of version 1, 2 or 2.1",
        )
    down = next((tensor for key, tensor in state.items() if key.endswith(".down.weight")), None)
    in_latents = f"{TRUNK}.lat_conv1.weight" in state
    names = ("lat_conv1", "lat_conv2") if in_latents else ("conv1", "conv3")
    first, third = (state.get(f"{TRUNK}.{name}.weight") for name in names)
    last = state.get(f"{TRUNK}.out_norm.weight")
    if down is None or first is None or third is None or last is None:
        raise UserError(
            f"{path} is no whole LLLite file: it has no down layers, or not all of the trunk",
            code="lllite-trunk-incomplete",
        )
    branches = {key.split(".")[3] for key in state if key.startswith(f"{TRUNK}.aspp.branches.")}
    dilations = read_dilations(facts.get("aspp_dilations", ""))
    hides_masked = facts.get("inpaint_masked_input", "").lower() == "true"
    has_mask = f"{TRUNK}.mask_conv1.weight" in state
    if in_latents:
        check_read_latents(
            path, first.shape[1] // (1 + has_mask), latents, reads_mask=has_mask, hides_masked=hides_masked
        )
    channels = 3 + has_mask if in_latents else first.shape[1]
    if channels not in _CHANNELS or len(branches) not in (0, len(dilations)):
        raise UserError(
            f"{path} is an LLLite file whose images have {plural(channels, 'channel')} and whose pyramid has "
            f"{plural(len(branches), 'branch', 'branches')}; those with 3 or 4 channels, and no or "
            f"{len(dilations)} branches are read",
            code="lllite-variant-unsupported",
        )
    return LLLiteSizes(
        width=down.shape[0],
        image_width=last.shape[0],
        trunk_width=third.shape[0],
        residual_blocks=len({key.split(".")[2] for key in state if key.startswith(f"{TRUNK}.resblocks.")}),
        has_pyramid=bool(branches),
        dilations=dilations,
        image_channels=channels,
        hides_masked=hides_masked,
        latent_channels=latents.channels if in_latents else 0,
        latent_side=latents.downscale,
    )


def check_read_latents(path: Path, channels: int, latents: LatentSpec, *, reads_mask: bool, hides_masked: bool) -> None:
    """Raise UserError where a file of version 2.1 reads latents that are not the model's, or that are not made here."""
    if channels != latents.channels:
        raise UserError(
            f"{path} is an LLLite file that reads latents of {channels} channels, this model's have {latents.channels}",
            code="lllite-latents-mismatch",
            fix="give a file that was trained for the base model's family",
        )
    if reads_mask and (hides_masked or latents.downscale != MASK_SIDE):
        raise UserError(
            f"{path} is an LLLite file that reads latents of images that are gray where the mask is, which is not "
            "implemented",
            code="lllite-latents-hidden",
            fix="give one without lllite.inpaint_masked_input, or one that reads pixels",
        )


def read_dilations(text: str) -> tuple[int, ...]:
    """Of a pyramid's branches, as a file's metadata has them: "1,2,4,8"; where it has none, the usual ones."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    return tuple(map(int, parts)) if parts and all(map(str.isdecimal, parts)) else DILATIONS
