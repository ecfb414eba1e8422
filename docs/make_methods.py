"""Write docs/methods.md: what can be trained, for which families: `make pages`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "methods.md"
REHEARSED = ROOT / "benchmarks" / "methods.json"
sys.path[:0] = [str(ROOT / "tests")]
from methods.method_cells import FAMILIES, NOES, ROWS, list_cells  # pyright: ignore[reportMissingImports]

TITLES = {
    "sd": "Stable Diffusion 1",
    "sd2": "Stable Diffusion 2",
    "sdxl": "Stable Diffusion XL",
    "sd3": "Stable Diffusion 3",
    "sd35": "Stable Diffusion 3.5",
    "flux": "FLUX.1",
    "flux_kontext": "FLUX.1 Kontext",
    "chroma": "Chroma",
    "lumina": "Lumina-Image 2.0",
}
METHODS = {
    "adapter": ("Adapters (LoRA and others)", "[adapters.md](adapters.md)"),
    "full": ("The whole model", "[fine_tune.md](fine_tune.md)"),
    "textual_inversion": ("New words (textual inversion)", "[train_textual_inversion.md](train_textual_inversion.md)"),
    "control_net": ("ControlNet", "[control.md](control.md)"),
    "lllite": ("ControlNet-LLLite", "[control.md](control.md)"),
    "leco": ("Concepts and sliders (LECO)", "[concepts.md](concepts.md)"),
    "inpainting": ("Inpainting models", "[train_textual_inversion.md](train_textual_inversion.md#inpainting)"),
}
HEAD = """# What can be trained

Each yes names its runs of the test in `tests/methods/test_every_method.py`, at toy size. Two steps on the same samples
lower their loss and change all that trains and, bit for bit, nothing else. A run that is resumed after the first step
ends with the same file, bit for bit. Training that goes on from the file (`--network_weights`, `--weights`,
`--controlnet_model_name_or_path`, `--pretrained_model_name_or_path`) and the options of `sfumato generate` both predict
what training did, bit for bit. Another program that reads the file computes the same, to 2e-5 of the largest number:

| what is saved | who reads it |
| --- | --- |
| adapters, concepts and sliders | PEFT's layers in diffusers' denoiser, from `sfumato lora convert` |
| whole models | `from_single_file` of diffusers, and transformers; the files have the entries of the originals |
| new words | the pipeline's `load_textual_inversion` and its tokenizers, or rows of transformers' table (SD3, Lumina) |
| ControlNet | diffusers' class, from a folder with the file and the configuration in its metadata |
| ControlNet-LLLite | no other library: its structure, written out in functions of torch |

The other tests of `tests/methods` and `tests/families` train each method longer, and compare whole images with those of
diffusers' pipelines; `tests/test_learning.py`, `tests/test_method_learning.py` and `tests/test_slider_learning.py` have
a small model learn something with each.

"""
TAIL = """
FLUX.1 covers dev, schnell and what is made from them; its model for inpainting is FLUX.1 Fill. Inpainting models are
trained as adapters, whole, or with new words. U-Nets have both versions of LLLite, the other models the second, which
reads the control image or its latents.
"""
MODEL_TITLES = {
    "sd15": "Stable Diffusion 1.5",
    "sdxl": "Stable Diffusion XL",
    "sd35-medium": "Stable Diffusion 3.5 medium",
    "flux-dev": "FLUX.1 dev",
    "flux-kontext-dev": "FLUX.1 Kontext",
    "chroma": "Chroma",
    "lumina-2": "Lumina-Image 2.0",
}
MEMORY = """
## What a step needs

The peak of a training step in GB, rehearsed without a GPU by `python benchmarks/methods.py`: bfloat16, AdamW, one image
of the model's resolution, gradient checkpointing, latents and text cached where they can be. Adapters, concepts and
inpainting are LoRA of rank 16; the whole model has its weights in float32; new words keep the text encoders on the
card. What takes less: [memory.md](memory.md).

"""


def page() -> str:
    lines = ["| | " + " | ".join(TITLES[family] for family in FAMILIES) + " |\n", "| --- |" + " --- |" * len(FAMILIES)]
    rows = [lines[0], lines[1] + "\n"]
    for method in ROWS:
        title, link = METHODS[method]
        cells = [describe_cell(method, family) for family in FAMILIES]
        rows.append(f"| {title}: {link} | " + " | ".join(cells) + " |\n")
    return HEAD + "".join(rows) + TAIL + make_memory_table(json.loads(REHEARSED.read_text(encoding="utf-8")))


def make_memory_table(rehearsed: dict[str, dict[str, dict[str, int]]]) -> str:
    """The peak of a step of each method in GB, by model."""
    models = [name for name in MODEL_TITLES if name in rehearsed]
    lines = ["| | " + " | ".join(f"{MODEL_TITLES[name]} (`{name}`)" for name in models) + " |"]
    lines.append("| --- |" + " ---: |" * len(models))
    for method in ROWS:
        found = [rehearsed[name].get(method) for name in models]
        if any(found):
            cells = [f"{values['peak'] / 1e9:.1f}" if values else "" for values in found]
            lines.append(f"| {METHODS[method][0]} | " + " | ".join(cells) + " |")
    return MEMORY + "\n".join(lines) + "\n"


def describe_cell(method: str, family: str) -> str:
    if (method, family) in NOES:
        return f"no: {NOES[method, family][1]}"
    return f"yes ({', '.join(f'`{cell}`' for cell in list_cells(method, family))})"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
