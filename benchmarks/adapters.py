"""What each kind of adapter needs at published size, and what it teaches sfumato-tiny, for docs/adapters.md.

    python benchmarks/adapters.py rehearse [--models sdxl flux-dev] [--kinds loha lokr ...]
    python benchmarks/adapters.py learn [--kinds loha lokr ...]

Both write into benchmarks/adapters.json, from which `make pages` makes the tables. `rehearse` takes 10 to 60 s of one
processor for a kind and model: bf16, AdamW, batch size 1, 1024 x 1024, checkpointed, latents and text cached. `learn`
takes a minute: the demo's lesson, for every kind with the same images, prompts and seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from sfumato.cli.main import main as sfumato
from sfumato.common import files
from sfumato.config import load_config
from sfumato.demo import demo
from sfumato.demo.base import tiny_base
from sfumato.demo.classifier import load_classifier
from sfumato.demo.pipeline import load_pipeline
from sfumato.methods.inference_adapters import InferenceAdapters
from sfumato.train import train

STORE = ROOT / "benchmarks" / "adapters.json"
STEPS = 160  # of training
SEED = 42

Options = Mapping[str, str]

ARGUMENTS: dict[str, str] = {  # kind that is an argument of LoRA -> that
    "split_lora": "split_qkv=True",
    "pissa": "pissa=True",
    "dora": "dora_wd=True",
    "trained_scalar": "use_scalar=True",
    "tucker_lora": "use_tucker=True",
    "norm_difference": "train_norm=True",
}
DIMS = {"oft": 4, "diag_oft": 4, "boft": 80, "oft_v2": 32, "boft_v2": 8}  # else 16, as docs/adapters.md has them
TINY_DIMS = {"oft": 4, "diag_oft": 4, "boft": 16, "oft_v2": 16, "boft_v2": 4, "loha": 8}  # else 16
TINY_RATES = {  # learning rates at which each was tried; else 1e-3
    "ia3": "3e-2", "full_difference": "3e-4", "lokr": "1e-2", "diag_oft": "3e-3", "oft": "3e-3",
    "oft_v2": "3e-3", "boft_v2": "3e-3", "lora_fa": "2e-3", "boft": "8e-4",
}  # fmt: skip
TINY_STEPS = {"lokr": 120, "boft": 60}  # else STEPS
KINDS = (
    "lora", "lora_fa", "dylora", "split_lora", "pissa", "dora", "trained_scalar", "loha", "lokr", "full_difference",
    "ia3", "glora", "oft", "diag_oft", "boft", "oft_v2", "boft_v2", "tucker_lora", "norm_difference",
)  # fmt: skip


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("what", choices=("rehearse", "learn"))
    arguments.add_argument("--models", nargs="+", default=["sdxl", "flux-dev"])
    arguments.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    args = arguments.parse_args()
    if args.what == "learn":
        learn_all(args.kinds)
        return
    for model in args.models:
        for kind in args.kinds:
            store(model, kind, rehearse(model, kind))


def store(what: str, kind: str, values: Any) -> None:
    """Put one measurement into the file, beside those of other kinds."""
    content = json.loads(STORE.read_text(encoding="utf-8")) if STORE.is_file() else {}
    content.setdefault(what, {})[kind] = values
    files.write_text(STORE, json.dumps(content, indent=1, sort_keys=True) + "\n")
    print(what, kind, json.dumps(values), flush=True)


def list_options(kind: str, dim: int) -> dict[str, str]:
    """--network_module and what belongs to it."""
    options = {"network_module": "lora" if kind in ARGUMENTS else kind, "network_dim": str(dim)}
    options["network_alpha"] = str(dim)
    return options | ({"network_args": ARGUMENTS[kind]} if kind in ARGUMENTS else {})


# ------------------------------------------------------------ rehearsals


def rehearse(model: str, kind: str) -> dict[str, int] | None:
    """Bytes of the training step's peak and of what trains; None where the model has no layer for the kind."""
    options = {**list_options(kind, DIMS.get(kind, 16)), "mixed_precision": "bf16", "resolution": "1024"}
    flags = ["cache_latents", "cache_text_encoder_outputs", "network_train_unet_only", "gradient_checkpointing"]
    with tempfile.TemporaryDirectory(prefix="sfumato-bench-") as folder:
        path = Path(folder) / "stages.json"
        line = ["plan", "--rehearse", "--published", model, "--json", str(path)]
        line += [*(f"--{name}={value}" for name, value in options.items()), *(f"--{flag}" for flag in flags)]
        with redirect_stdout(StringIO()):
            if sfumato(line) != 0:
                return None
        stages = {stage["stage"]: stage for stage in json.loads(path.read_text())["stages"]}
    step = stages["training step"]
    return {"peak": step["peak"], "waits": len(step["waits"])}


# ------------------------------------------------------------ sfumato-tiny


def learn_all(kinds: Iterable[str]) -> None:
    classifier = load_classifier()
    before = make_images(classifier, None)
    for kind in kinds:
        store("sfumato-tiny", kind, learn(kind, before, classifier))


def learn(kind: str, before: demo.DemoImages, classifier: Callable[..., Any]) -> dict[str, Any]:
    """The size of the file in kB, the options, and what the images show."""
    options = {**list_options(kind, TINY_DIMS.get(kind, 16)), "learning_rate": TINY_RATES.get(kind, "1e-3")}
    steps = TINY_STEPS.get(kind, STEPS)
    options |= {"max_train_steps": str(steps), "console_log_level": "WARNING"}
    with tempfile.TemporaryDirectory(prefix="sfumato-bench-") as name:
        folder = Path(name)
        train(load_config(demo.make_command_line(tiny_base(), folder, {**options, "seed": str(SEED)})))
        file = folder / f"{demo.SUBJECT}.safetensors"
        judged = judge(before, make_images(classifier, file))
        size = file.stat().st_size / 1000
    unsaid = ("console_log_level", "max_train_steps")
    said = {name: value for name, value in options.items() if name not in unsaid}
    return {"kilobytes": round(size), "steps": steps, **said, **judged}


def make_images(classifier: Callable[..., Any], adapter: Path | None) -> demo.DemoImages:
    """The demo's images with a file, of whatever kind."""
    pipeline = load_pipeline(tiny_base())
    if adapter is not None:
        pipeline.model.parts["denoiser"].unload()
        pipeline = replace(pipeline, method=InferenceAdapters(pipeline.model, [(adapter, 1.0)], calculated=True))
    prompts = (*demo.SUBJECTS, *demo.OTHER_SUBJECTS)
    images = {prompt: [pipeline.generate(prompt, seed) for seed in demo.SEEDS] for prompt in prompts}
    predictions = {prompt: [found.name for found in classifier(images[prompt])] for prompt in prompts}
    return demo.DemoImages(images=images, predictions=predictions)


def judge(before: demo.DemoImages, after: demo.DemoImages) -> dict[str, float]:
    """Shares from 0 to 1; drift: the mean difference of the other subjects' images, of 255."""
    differences = [
        np.abs(np.asarray(old, dtype=np.float32) - np.asarray(new, dtype=np.float32)).mean()
        for prompt in demo.OTHER_SUBJECTS
        for old, new in zip(before.images[prompt], after.images[prompt], strict=True)
    ]
    return {
        "recognized": round(after.accuracy(demo.SUBJECTS), 3),
        "others": round(after.accuracy(demo.OTHER_SUBJECTS), 3),
        "drift": round(statistics.fmean(map(float, differences)), 1),
    }


if __name__ == "__main__":
    main()
