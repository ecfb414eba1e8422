"""ControlNet-LLLite files on a model that only generates images, or in training a new one's place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sfumato.adapters.control_modules import ControlModules
from sfumato.adapters.lllite_file import read_lllite_file
from sfumato.data.batch import CONTROL_MASK, Extras, name_control
from sfumato.errors import UserError
from sfumato.families.base import FAMILIES, Family
from sfumato.families.blueprint import Blueprint


def attach_lllite(model: Family, path: Path) -> ControlModules:
    """The modules of a file, hooked to the denoiser. UserError where the model's family has none."""
    list_layers = type(model).list_controlled_layers
    if list_layers is None:
        raise make_no_lllite_error(model.blueprint)
    made = read_lllite_file(path, list_layers(model.blueprint), model.latents)
    made.to(model.device).requires_grad_(False).eval()
    model.parts["denoiser"].load()
    made.attach(model.denoiser)
    if made.reads_latents:
        model.controls_in_latents.add(model.control_adapters)
    model.control_adapters += 1
    model.takes_control_mask = model.takes_control_mask or made.reads_mask
    return made


def show_control_image(attached: Sequence[ControlModules], model: Family, extras: Extras) -> None:
    """Have each read its control image of these inputs, at its strength, until the next call."""
    given = extras.images.get(CONTROL_MASK)
    mask = None if given is None or given.pixels is None else given.pixels.to(model.device, non_blocking=True)
    for number, each in enumerate(attached):
        control = extras.images.get(name_control(number))
        own = None if control is None else control.latents if each.reads_latents else control.pixels
        image = None if own is None else own.to(model.device, non_blocking=True)
        each.set_image(image, strength=1.0 if control is None else control.strength, mask=mask)


def make_no_lllite_error(blueprint: Blueprint) -> UserError:
    known = [name for name in FAMILIES.names if FAMILIES.get(name).list_controlled_layers]
    return UserError(
        f"{blueprint.title} has no layers that are known to LLLite",
        code="lllite-unsupported",
        fix=f"take a model of one of these families: {', '.join(known)}",
    )
