"""The options that the scripts have in sd-scripts, as stored: method -> option -> facts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sfumato.compat.scripts import Script

ROOT = Path(__file__).parents[2]
GOLDENS = ROOT / "tests" / "goldens"
THEIR_OPTIONS = {
    "adapter": json.loads((GOLDENS / "network_script_options.json").read_text()),
    "lllite": json.loads((GOLDENS / "lllite_script_options.json").read_text()),
    "control_net": json.loads((GOLDENS / "control_net_script_options.json").read_text()),
    "full": json.loads((GOLDENS / "full_script_options.json").read_text()),
    "textual_inversion": json.loads((GOLDENS / "inversion_script_options.json").read_text()),
}


def list_needed(script: Script, images: Path) -> dict[str, Any]:
    """Options of `make_arguments` without which a script does not start. images: of `make_images`."""
    if script.method == "adapter":
        return {}
    options: dict[str, Any] = {"network_dim": None, "network_module": None}
    if script.method in ("control_net", "lllite"):
        options |= {"conditioning_data_dir": images / "2_cat"}
    elif script.method == "textual_inversion":
        options |= {"token_string": "zwx", "init_word": "cat", "use_object_template": True}
    elif script.method == "leco":
        prompts = images.parent / "prompts.toml"
        prompts.write_text('[[prompts]]\ntarget = "cat"\nneutral = ""\n')
        options |= {"prompts_file": prompts, "train_data_dir": None}
    return options
