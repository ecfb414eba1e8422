"""What each method needs at published size, for docs/methods.md.

    python benchmarks/methods.py [--models sdxl flux-dev ...] [--methods full lllite ...]

Writes into benchmarks/methods.json, from which `make pages` makes the table. A rehearsal takes 10 to 60 s of one
processor: bf16, AdamW, batch size 1, the model's own resolution, checkpointed, latents and text cached where they are
not trained.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from sfumato.cli.main import main as sfumato
from sfumato.common import files

STORE = ROOT / "benchmarks" / "methods.json"
CACHED = ("cache_latents", "cache_text_encoder_outputs")
METHODS: dict[str, dict[str, Any]] = {  # method -> its options
    "adapter": {"network_dim": 16, "network_train_unet_only": True, **dict.fromkeys(CACHED, True)},
    "full": {"method": "full", **dict.fromkeys(CACHED, True)},
    "textual_inversion": {
        "method": "textual_inversion", "token_string": "zwx", "num_vectors_per_token": 4, "use_object_template": True,
        "cache_latents": True,
    },
    "control_net": {"method": "control_net", **dict.fromkeys(CACHED, True)},
    "lllite": {"method": "lllite", **dict.fromkeys(CACHED, True)},
    "leco": {"method": "leco", "network_dim": 16},
    "inpainting": {"network_dim": 16, "network_train_unet_only": True, "cache_text_encoder_outputs": True},
}  # fmt: skip
CONCEPT = '[[prompts]]\ntarget = "a cat"\npositive = "a dog"\nresolution = {side}\n'
INPAINTING = {"sd15": "sd15-inpainting", "sdxl": "sdxl-inpainting", "flux-dev": "flux-fill-dev"}
WITHOUT_CONTROL_NET = ("flux-kontext-dev", "chroma", "lumina-2")
MODELS = ("sd15", "sdxl", "sd35-medium", "flux-dev", "flux-kontext-dev", "chroma", "lumina-2")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--models", nargs="+", choices=MODELS, default=["sdxl", "flux-dev"])
    arguments.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    args = arguments.parse_args()
    for model in args.models:
        for method in args.methods:
            if not (method == "inpainting" and model not in INPAINTING) and not (
                method == "control_net" and model in WITHOUT_CONTROL_NET
            ):
                store(model, method, rehearse(INPAINTING[model] if method == "inpainting" else model, method))


def rehearse(model: str, method: str) -> dict[str, Any]:
    """Bytes of the training step's peak, and the places where it waits for the device."""
    options = {**METHODS[method], "mixed_precision": "bf16", "gradient_checkpointing": True}
    with tempfile.TemporaryDirectory(prefix="sfumato-bench-") as folder:
        path = Path(folder) / "stages.json"
        if method == "leco":
            (Path(folder) / "concept.toml").write_text(CONCEPT.format(side=512 if model == "sd15" else 1024))
            options["prompts_file"] = Path(folder) / "concept.toml"
        line = ["plan", "--rehearse", "--published", model, "--json", str(path)]
        line += [f"--{name}" if value is True else f"--{name}={value}" for name, value in options.items()]
        with redirect_stdout(StringIO()):
            if sfumato(line) != 0:
                sys.exit(f"{model} cannot be rehearsed: {' '.join(line)}")
        stages = {stage["stage"]: stage for stage in json.loads(path.read_text())["stages"]}
    step = stages["training step"]
    return {"peak": step["peak"], "waits": len(step["waits"])}


def store(model: str, method: str, values: dict[str, Any]) -> None:
    """Put one measurement into the file, beside the others."""
    content = json.loads(STORE.read_text(encoding="utf-8")) if STORE.is_file() else {}
    content.setdefault(model, {})[method] = values
    files.write_text(STORE, json.dumps(content, indent=1, sort_keys=True) + "\n")
    print(model, method, json.dumps(values), flush=True)


if __name__ == "__main__":
    main()
