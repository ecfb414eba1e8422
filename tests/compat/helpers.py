"""The options that the scripts have in sd-scripts, as stored: method -> option -> facts."""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
GOLDENS = ROOT / "tests" / "goldens"
THEIR_OPTIONS = {
    "adapter": json.loads((GOLDENS / "network_script_options.json").read_text()),
    "lllite": json.loads((GOLDENS / "lllite_script_options.json").read_text()),
    "control_net": json.loads((GOLDENS / "control_net_script_options.json").read_text()),
    "full": json.loads((GOLDENS / "full_script_options.json").read_text()),
    "textual_inversion": json.loads((GOLDENS / "inversion_script_options.json").read_text()),
}
