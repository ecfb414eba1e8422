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

# Options that only some scripts have in sd-scripts, and that every script has here.
SHARED_OPTIONS = frozenset(
    {"validation_split", "validation_seed", "validate_every_n_steps", "validate_every_n_epochs", "max_validation_steps"}
    | {"masked_loss", "conditioning_data_dir"}
    | {f"metadata_{name}" for name in ("author", "description", "is_negative_embedding", "license", "merged_from")}
    | {f"metadata_{name}" for name in ("preprocessor", "tags", "thumbnail", "title", "trigger_phrase", "usage_hint")}
)


@dataclass(frozen=True, kw_only=True)
class Script:
    """One script. `family` None: the checkpoint says which of several it is; --model_type takes precedence."""

    name: str
    family: str | None
    method: str
    description: str
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def presets(self) -> dict[str, Any]:
        """What the script sets before the user's options."""
        return {"family": self.family, "method": self.method, **self.defaults}

    @property
    def options(self) -> frozenset[str]:
        """The options of sd-scripts that it has; it also has all that are ours alone."""
        table = load_script_options()
        return SHARED_OPTIONS.union(table["every script"], table[self.method], table[self.name])


FLUX_DEFAULTS = {
    "model_type": "flux",
    "timestep_sampling": "sigma",
    "model_prediction_type": "sigma_scaled",
    "discrete_flow_shift": 3.0,
}
LUMINA_DEFAULTS = {"timestep_sampling": "shift", "model_prediction_type": "raw", "discrete_flow_shift": 6.0}
SCRIPTS = {
    script.name: script
    for script in (
        Script(
            name="train_network",
            family="sd",
            method="adapter",
            description="Trains an adapter for Stable Diffusion 1 and 2.",
        ),
        Script(
            name="sdxl_train_network",
            family="sdxl",
            method="adapter",
            description="Trains an adapter for Stable Diffusion XL.",
        ),
        Script(
            name="flux_train_network",
            family="flux",
            method="adapter",
            description="Trains an adapter for FLUX.1, or with --model_type chroma for Chroma (experimental).",
            defaults=FLUX_DEFAULTS,
        ),
        Script(
            name="sd3_train_network",
            family="sd3",
            method="adapter",
            description="Trains an adapter for Stable Diffusion 3 and 3.5 (experimental).",
            defaults={"t5xxl_max_token_length": 256},
        ),
        Script(
            name="lumina_train_network",
            family="lumina",
            method="adapter",
            description="Trains an adapter for Lumina-Image 2.0.",
            defaults=LUMINA_DEFAULTS,
        ),
        Script(
            name="train_leco",
            family="sd",
            method="leco",
            description="Trains an adapter for Stable Diffusion 1 and 2 from prompts alone: concepts and sliders.",
        ),
        Script(
            name="sdxl_train_leco",
            family="sdxl",
            method="leco",
            description="Trains an adapter for Stable Diffusion XL from prompts alone: concepts and sliders.",
        ),
        Script(
            name="fine_tune",
            family="sd",
            method="full",
            description="Trains the whole model of Stable Diffusion 1 and 2.",
        ),
        Script(
            name="train_db",
            family="sd",
            method="full",
            description="Trains the whole model of Stable Diffusion 1 and 2, text encoder included.",
            defaults={"train_text_encoder": True},
        ),
        Script(
            name="sdxl_train",
            family="sdxl",
            method="full",
            description="Trains the whole model of Stable Diffusion XL.",
        ),
        Script(
            name="flux_train",
            family="flux",
            method="full",
            description="Trains the whole transformer of FLUX.1 (experimental).",
            defaults=FLUX_DEFAULTS,
        ),
        Script(
            name="sd3_train",
            family="sd3",
            method="full",
            description="Trains the whole transformer of Stable Diffusion 3 and 3.5 (experimental).",
            defaults={"t5xxl_max_token_length": 256},
        ),
        Script(
            name="lumina_train",
            family="lumina",
            method="full",
            description="Trains the whole transformer of Lumina-Image 2.0.",
            defaults=LUMINA_DEFAULTS,
        ),
        Script(
            name="train_textual_inversion",
            family="sd",
            method="textual_inversion",
            description="Trains the vectors of new words for Stable Diffusion 1 and 2.",
            defaults={"save_model_as": "pt"},
        ),
        Script(
            name="sdxl_train_textual_inversion",
            family="sdxl",
            method="textual_inversion",
            description="Trains the vectors of new words for Stable Diffusion XL.",
            defaults={"save_model_as": "pt"},
        ),
        Script(
            name="train_control_net",
            family="sd",
            method="control_net",
            description="Trains a ControlNet for Stable Diffusion 1 and 2.",
        ),
        Script(
            name="sdxl_train_control_net",
            family="sdxl",
            method="control_net",
            description="Trains a ControlNet for Stable Diffusion XL.",
            defaults={"control_net_lr": 1e-4},
        ),
        Script(
            name="flux_train_control_net",
            family="flux",
            method="control_net",
            description="Trains a ControlNet for FLUX.1 (experimental).",
            defaults=FLUX_DEFAULTS,
        ),
        Script(
            name="sdxl_train_control_net_lllite",
            family="sdxl",
            method="lllite",
            description="Trains ControlNet-LLLite for Stable Diffusion XL.",
        ),
    )
}


@cache
def load_script_options() -> dict[str, list[str]]:
    """The option names that every script of the table has, every one of a method, and what each has beyond them."""
    return json.loads(files("sfumato.compat").joinpath("options.json").read_text(encoding="utf-8"))


def find_script(name: str) -> Script:
    """The script of a name, with or without .py; UserError for one that is unknown, retired or not implemented yet."""
    plain = PurePath(name).as_posix().removesuffix(".py")
    plain = SCRIPT_ALIASES.get(plain, plain)
    if plain in RETIRED_SCRIPTS:
        raise UserError(
            f"{plain} is out of use", code="script-retired", fix=f"{RETIRED_SCRIPTS[plain]} takes its place"
        )
    if plain in SCRIPTS:
        return SCRIPTS[plain]
    if plain in PLANNED_SCRIPTS:
        raise UserError(
            f"{plain} is not implemented yet", code="script-not-implemented", fix=f"available: {', '.join(SCRIPTS)}"
        )
    raise UserError(
        f"{plain!r} is not a script", code="script-unknown", fix=did_you_mean(plain, {*SCRIPTS, *PLANNED_SCRIPTS})
    )


def list_absent_options(script: Script) -> dict[str, str]:
    """Option that a script does not have -> the reason for the user."""
    every = set(NAMED_BY_SCRIPT)
    for names in load_script_options().values():
        every |= set(names)
    absent: dict[str, str] = {}
    for name in every - script.options:
        homes = [other.name for other in SCRIPTS.values() if name in other.options]
        elsewhere = f"{script.name} does not have it; it belongs to {' and '.join(homes)}"
        absent[name] = NAMED_BY_SCRIPT.get(name, elsewhere)
    return absent


NAMED_BY_SCRIPT = {  # what the script's name says already
    "family": "the script's name says it; `sfumato train` takes it",
    "method": "the script's name says it; `sfumato train` takes it",
}
