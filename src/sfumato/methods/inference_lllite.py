"""ControlNet-LLLite files on a model that only generates images, or in training a new one's place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sfumato.adapters.control_modules import ControlModules
from sfumato.adapters.lllite_file import read_lllite_file
from sfumato.data.batch import CONTROL, Extras
from sfumato.errors import UserError
from sfumato.families.base import FAMILIES, Family
from sfumato.families.blueprint import Blueprint


def attach_lllite(model: Family, path: Path) -> ControlModules:
    """The modules of a file, hooked to the denoiser. UserError where the model's family has none."""
    list_layers = type(model).list_controlled_layers
    if list_layers is None:
        raise make_no_lllite_error(model.blueprint)
    made = read_lllite_file(path, list_layers(model.blueprint.networks["denoiser"]))
    made.to(model.device).requires_grad_(False).eval()
    model.parts["denoiser"].load()
    made.attach(model.denoiser)
    model.has_control_adapter = True
    return made


def show_control_image(attached: Sequence[ControlModules], model: Family, extras: Extras) -> None:
    """Have them read the control image of these inputs, until the next call."""
    control = extras.images.get(CONTROL)
    pixels = None if control is None else control.pixels
    for each in attached:
        each.set_image(None if pixels is None else pixels.to(model.device, non_blocking=True))


def make_no_lllite_error(blueprint: Blueprint) -> UserError:
    known = [name for name in FAMILIES.names if FAMILIES.get(name).list_controlled_layers]
    return UserError(
        f"{blueprint.title} has no layers that are known to LLLite",
        code="lllite-unsupported",
        fix=f"take a model of one of these families: {', '.join(known)}",
    )
