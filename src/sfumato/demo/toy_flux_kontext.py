"""The toy FLUX.1 Kontext: that of FLUX.1 dev, whose folder names another pipeline."""

from __future__ import annotations

import json
from pathlib import Path

from sfumato.common import files
from sfumato.demo import toy_flux
from sfumato.demo.toy import TOYS, Layout, Toy
from sfumato.families.source import MODEL_INDEX, read_json


def write(folder: Path, *, seed: int, layout: Layout, variant: str) -> dict[str, Path]:
    paths = toy_flux.write(folder, seed=seed, layout=layout, variant="dev")
    if layout == "diffusers":
        index = read_json(folder / MODEL_INDEX) | {"_class_name": "FluxKontextPipeline"}
        files.write_text(folder / MODEL_INDEX, json.dumps(index, indent=2))
    return paths


TOYS.register("flux_kontext")(
    Toy(
        write=write,
        script="flux_train_network",
        options=toy_flux.FLUX_TOY_OPTIONS,
        variant_options={"": {"model_type": "flux_kontext"}},
    )
)
