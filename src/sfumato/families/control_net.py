"""ControlNets: a second network that reads a control image, and whose outputs are added to the denoiser's blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from sfumato.families.part import Builder, RowSplit
from sfumato.formats.keymap import KeyMap, KeyRule

if TYPE_CHECKING:
    from sfumato.families.base import Family

CONTROL_NET = "control_net"  # its name among a model's parts, of the first where there are several
_IMAGE_LAYERS = 8  # convolutions that bring a control image to the latents' size
NetworkConfig = Mapping[str, Any]


class FileLayout(NamedTuple):
    """The names that another program gives the tensors of a file."""

    prefix: str
    key_map: KeyMap


@dataclass(frozen=True, kw_only=True)
class ControlNetSupport:
    """What a family says of its ControlNets, which are networks of diffusers."""

    class_name: str  # of diffusers
    build: Builder
    # The denoiser's configuration, and how often the autoencoder halves -> the configuration of a new ControlNet.
    make_config: Callable[[NetworkConfig, int], dict[str, Any]]
    blocks: tuple[str, ...]  # patterns on the paths of the repeated blocks
    drawn: tuple[str, ...]  # patterns on tensors of a new one that are drawn; others are copied, or begin at 0
    # Of the model, the ControlNet's name among its parts, the denoiser's arguments and the control image (B, C, H, W):
    # the further arguments of the denoiser.
    run: Callable[[Family, str, Mapping[str, Any], Tensor], dict[str, object]]
    # The configuration of a file that holds none: from the denoiser's and the shapes of its tensors under our names.
    guess_config: Callable[[NetworkConfig, Mapping[str, Sequence[int]]], dict[str, Any]] | None = None
    # Values of fields that a file's own configuration lacks, where diffusers' are not those of a new ControlNet.
    declared_defaults: Mapping[str, Any] = field(default_factory=dict)
    list_layouts: Callable[[NetworkConfig], Sequence[FileLayout]] = lambda config: ()  # beside diffusers' own names
    # Whether one of this configuration takes the control image as latents, else as pixels in [-1, 1].
    takes_latents: Callable[[NetworkConfig], bool] = lambda config: False
    # How often one that reads pixels halves them before its first block.
    count_halvings: Callable[[NetworkConfig], int] = lambda config: _IMAGE_LAYERS // 2 - 1
    list_unread: Callable[[NetworkConfig], Sequence[str]] = lambda config: ()  # patterns on weights without any effect
    constant_tensors: tuple[str, ...] = ()  # as of PartSpec
    row_split: RowSplit | None = None  # as of PartSpec, for the layouts
    unsupported_options: Mapping[str, str] = field(default_factory=dict)  # option of the base model -> why
    find_fault: Callable[[NetworkConfig], str] = lambda config: (
        ""
    )  # what of a published one's configuration is not supported


def name_control_net(number: int) -> str:
    """The part of the ControlNet of this number, counted from 0."""
    return f"{CONTROL_NET}_{number + 1}" if number else CONTROL_NET


def is_control_net(part: str) -> bool:
    return part.startswith(CONTROL_NET)


def scale_arguments(arguments: Mapping[str, object], strength: float) -> dict[str, object]:
    """A ControlNet's further arguments of the denoiser at this strength; what is no tensor stays."""
    return {name: _scale(value, strength) for name, value in arguments.items()}


def _scale(value: object, strength: float) -> object:
    if isinstance(value, Tensor):
        return value * strength
    return [_scale(each, strength) for each in value] if isinstance(value, tuple | list) else value


def sum_arguments(first: Mapping[str, object], second: Mapping[str, object]) -> dict[str, object]:
    """What two ControlNets of one family steer together."""
    names = dict.fromkeys((*first, *second))
    return {name: _sum(first.get(name), second.get(name)) for name in names}


def _sum(first: object, second: object) -> object:
    if first is None or second is None:
        return second if first is None else first
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first + second
    if isinstance(first, tuple | list) and isinstance(second, tuple | list):
        return [_sum(*pair) for pair in zip(first, second, strict=True)]
    return first


def make_image_layer_rules(ours: str) -> list[KeyRule]:
    """The original names of those convolutions, which count the activations between them. ours: diffusers' name."""
    rules = [KeyRule("input_hint_block.0", (f"{ours}.conv_in",))]
    for layer in range(1, _IMAGE_LAYERS - 1):
        rules.append(KeyRule(f"input_hint_block.{2 * layer}", (f"{ours}.blocks.{layer - 1}",)))
    return [*rules, KeyRule(f"input_hint_block.{2 * _IMAGE_LAYERS - 2}", (f"{ours}.conv_out",))]
