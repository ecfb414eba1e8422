"""Stored loss curves: five steps of every family and method at toy size, to show that a change moved no number.

`make curves` trains them anew and compares: bit for bit where processor and libraries are those of the stored file,
else within 1e-5. `make curves WRITE=1` stores what it finds, for a change that is meant to move numbers.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from families.toys import ToyShelf
from toy_runs import make_images, read_metrics, train_toy

FOLDER = Path(__file__).parent / "goldens" / "curves"
STEPS = 5
TOLERANCE = 1e-5  # relative, on another processor or with other libraries
SERIES = ("loss/current", "grad_norm")
FULL = {"method": "full", "network_dim": None, "learning_rate": "1e-4"}
CACHED = {"cache_latents": True, "cache_text_encoder_outputs": True, "network_train_unet_only": True}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A family's toy and the options of one run."""

    family: str
    variant: str = ""
    options: dict[str, Any] = field(default_factory=dict)


CASES = {
    "sd-adapter": Case(family="sd", options={"noise_offset": 0.1, "min_snr_gamma": 5, "gradient_checkpointing": True}),
    "sd-full": Case(family="sd", options={**FULL, "train_text_encoder": True}),
    "sd2-adapter": Case(family="sd", variant="2-v", options={"v_parameterization": True, "zero_terminal_snr": True}),
    "sdxl-adapter": Case(family="sdxl", options={"network_args": ["conv_dim=2"], "multires_noise_iterations": 4}),
    "sdxl-full": Case(family="sdxl", options={**FULL, "cache_latents": True}),
    "sd3-adapter": Case(family="sd3", options={"gradient_accumulation_steps": 2}),
    "sd3-full": Case(family="sd3", options=FULL),
    "flux-adapter": Case(family="flux", options={"network_args": ["split_qkv=True"], "network_dropout": 0.2}),
    "flux-full": Case(family="flux", options={**FULL, "cache_text_encoder_outputs": True}),
    "chroma-adapter": Case(family="chroma", options=CACHED),
    "chroma-full": Case(family="chroma", options=FULL),
    "lumina-adapter": Case(family="lumina", options={"train_batch_size": 2, "loss_type": "huber"}),
    "lumina-full": Case(family="lumina", options=FULL),
}


def machine() -> dict[str, str]:
    """What bits may depend on besides the code: the processor and the libraries that compute."""
    libraries = {name: version(name).partition("+")[0] for name in ("torch", "diffusers", "transformers")}
    return {"processor": processor_name(), **libraries}


def processor_name() -> str:
    """The processor's model, as the system names it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def train_case(case: Case, shelf: ToyShelf, folder: Path) -> dict[str, Any]:
    """The curve of one case: two series of numbers, and a hash of the tensors that were saved."""
    images = make_images(folder / "images", 3)
    toy = shelf.paths(case.family, variant=case.variant)
    train_toy(toy, images, folder / "output", **{"max_train_steps": STEPS, **case.options})
    rows = read_metrics(folder / "output")
    curve: dict[str, Any] = {name: [row[name] for row in rows] for name in SERIES}
    return {**curve, "tensors": hash_tensors(load_file(folder / "output" / "lora.safetensors"))}


def hash_tensors(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, shapes, types and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def differences(stored: dict[str, Any], curve: dict[str, Any], *, exact: bool) -> Iterator[str]:
    """What of a curve is not as stored; `exact`: to the bit, the saved tensors too."""
    for name in SERIES:
        for step, (before, now) in enumerate(zip(stored[name], curve[name], strict=True), 1):
            if before != now if exact else abs(before - now) > TOLERANCE * max(1.0, abs(before)):
                yield f"{name} of step {step} was {before!r}, is {now!r}"
    if exact and stored["tensors"] != curve["tensors"]:
        yield "the saved tensors have other bytes"


def stored_curve(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text())


def main() -> int:
    """Train every case and compare, or store with --write; the exit code says whether anything differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="store the curves instead of comparing them")
    parser.add_argument("--only", nargs="+", choices=sorted(CASES), default=sorted(CASES), metavar="CASE")
    asked = parser.parse_args()
    torch.set_num_threads(1)  # as in the tests: sums do not depend on the number of cores
    faults = 0
    with tempfile.TemporaryDirectory() as scratch:
        shelf = ToyShelf(Path(scratch) / "toys")
        for name in asked.only:
            curve = train_case(CASES[name], shelf, Path(scratch) / name)
            if asked.write:
                FOLDER.mkdir(parents=True, exist_ok=True)
                (FOLDER / f"{name}.json").write_text(json.dumps({**machine(), **curve}, indent=1) + "\n")
                continue
            stored = stored_curve(name)
            exact = {key: stored[key] for key in machine()} == machine()
            found = list(differences(stored, curve, exact=exact))
            faults += len(found)
            print(f"{name:<16} {'bit-identical' if exact else 'within 1e-5'}" if not found else f"{name:<16} DIFFERS")
            print("".join(f"    {line}\n" for line in found), end="")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
