"""Script name -> family, method, defaults and options."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import PurePath
from typing import Any

from sfumato.common.names import PLANNED_SCRIPTS, RETIRED_SCRIPTS, SCRIPT_ALIASES
from sfumato.common.registry import did_you_mean
from sfumato.errors import UserError

# Options that the field gives only some scripts, and that every script has here.
SHARED = frozenset(
    {"validation_split", "validation_seed", "validate_every_n_steps", "validate_every_n_epochs", "max_validation_steps"}
)


@dataclass(frozen=True, kw_only=True)
class Script:
    """One script of the field. `family` None: the checkpoint says which of several it is; --model_type goes before."""

    name: str
    family: str | None
    method: str
    summary: str
    available: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def presets(self) -> dict[str, Any]:
        """What the script sets before the user's options."""
        return {"family": self.family, "method": self.method, **self.defaults}

    @property
    def options(self) -> frozenset[str]:
        """The names of the field's options that it has; those of ours alone it has, too."""
        table = option_table()
        return SHARED.union(table["every script"], table[self.method], table[self.name])


FLUX_DEFAULTS = {
    "model_type": "flux",
    "timestep_sampling": "sigma",
    "model_prediction_type": "sigma_scaled",
    "discrete_flow_shift": 3.0,
}
SCRIPTS = {
    script.name: script
    for script in (
        Script(
            name="train_network",
            family="sd",
            method="adapter",
            summary="Trains an adapter for Stable Diffusion 1 and 2.",
            available=True,
        ),
        Script(
            name="sdxl_train_network",
            family="sdxl",
            method="adapter",
            summary="Trains an adapter for Stable Diffusion XL.",
            available=True,
        ),
        Script(
            name="flux_train_network",
            family="flux",
            method="adapter",
            summary="Trains an adapter for FLUX.1, or with --model_type chroma for Chroma.",
            available=True,
            defaults=FLUX_DEFAULTS,
        ),
        Script(
            name="sd3_train_network",
            family="sd3",
            method="adapter",
            summary="Trains an adapter for Stable Diffusion 3 and 3.5.",
            available=True,
            defaults={"t5xxl_max_token_length": 256},
        ),
        Script(
            name="lumina_train_network",
            family="lumina",
            method="adapter",
            summary="Trains an adapter for Lumina-Image 2.0.",
            available=True,
            defaults={"timestep_sampling": "shift", "model_prediction_type": "raw", "discrete_flow_shift": 6.0},
        ),
        Script(
            name="fine_tune",
            family="sd",
            method="full",
            summary="Trains the whole model of Stable Diffusion 1 and 2.",
            available=True,
        ),
        Script(
            name="train_db",
            family="sd",
            method="full",
            summary="Trains the whole model of Stable Diffusion 1 and 2, text encoder included.",
            available=True,
            defaults={"train_text_encoder": True},
        ),
        Script(
            name="sdxl_train",
            family="sdxl",
            method="full",
            summary="Trains the whole model of Stable Diffusion XL.",
            available=True,
        ),
        Script(
            name="flux_train",
            family="flux",
            method="full",
            summary="Trains the whole transformer of FLUX.1.",
            available=True,
            defaults=FLUX_DEFAULTS,
        ),
    )
}


@cache
def option_table() -> dict[str, list[str]]:
    """The option names that every script of the table has, every one of a method, and what each has beyond them."""
    return json.loads(files("sfumato.compat").joinpath("options.json").read_text(encoding="utf-8"))


def find_script(name: str) -> Script:
    """The script of a name, with or without .py; UserError for one that is unknown, retired or not available yet."""
    plain = PurePath(name).as_posix().removesuffix(".py")
    plain = SCRIPT_ALIASES.get(plain, plain)
    if plain in RETIRED_SCRIPTS:
        raise UserError(f"{plain} is out of use", fix=f"{RETIRED_SCRIPTS[plain]} takes its place")
    script = SCRIPTS.get(plain)
    if script is not None and script.available:
        return script
    if script is not None or plain in PLANNED_SCRIPTS:
        raise UserError(f"{plain} is not available yet", fix=f"available: {', '.join(available())}")
    raise UserError(f"{plain!r} is not a script", fix=did_you_mean(plain, {*SCRIPTS, *PLANNED_SCRIPTS}))


def available() -> list[str]:
    return [name for name, script in SCRIPTS.items() if script.available]


def absent_options(script: Script) -> dict[str, str]:
    """Every option that a script does not have, with what to tell the user."""
    absent = {}
    for name in {*OWN_ELSEWHERE, *(name for names in option_table().values() for name in names)} - script.options:
        homes = [other for other, each in SCRIPTS.items() if name in each.options]
        absent[name] = OWN_ELSEWHERE.get(name) or f"{script.name} does not have it; it belongs to {' and '.join(homes)}"
    return absent


OWN_ELSEWHERE = {  # what the script's name says already
    "family": "the script's name says it; `sfumato train` takes it",
    "method": "the script's name says it; `sfumato train` takes it",
}
