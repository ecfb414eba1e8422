"""The memory of training runs of published models on a GPU, by rehearsal: no GPU and no weights are needed.

    python benchmarks/rehearsal.py [--models flux-dev sdxl ...] [--page] [--json FILE]

Every run is rehearsed in a process of its own, 6 to 30 s each: a LoRA of rank 16 and the whole model, in bf16 with
AdamW at batch size 1, latents and text cached. --page writes the table into docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from sfumato.common import files
from sfumato.families.published import list_published, read_published

PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- rehearsed: begin -->\n", "<!-- rehearsed: end -->\n"  # of what --page replaces
GB = 1e9
COMMON = ["--mixed_precision", "bf16", "--cache_latents", "--cache_text_encoder_outputs"]
LORA = ["--network_dim", "16", "--network_train_unet_only"]
RUNS = {  # column -> its options
    "LoRA, 512, checkpointed": [*LORA, "--resolution", "512", "--gradient_checkpointing"],
    "LoRA, 1024, checkpointed": [*LORA, "--resolution", "1024", "--gradient_checkpointing"],
    "LoRA, 1024": [*LORA, "--resolution", "1024"],
    "whole model, 1024, checkpointed": ["--method", "full", "--resolution", "1024", "--gradient_checkpointing"],
}
CACHING = "LoRA, 1024, checkpointed"  # the run whose caching is in the table

Stages = dict[str, int]  # stage -> peak, bytes


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--models", nargs="+", choices=list_published(), default=list_published())
    arguments.add_argument("--page", action="store_true", help="write the table into docs/performance.md")
    arguments.add_argument("--json", type=Path, help="write the peaks of all stages as JSON, in bytes")
    args = arguments.parse_args()
    peaks = {model: {run: rehearse(model, options) for run, options in RUNS.items()} for model in args.models}
    table = "".join(make_lines(peaks))
    print(table, end="")
    if args.page:
        write_page(table)
    if args.json:
        args.json.write_text(json.dumps(peaks, indent=1))


def rehearse(model: str, options: Iterable[str]) -> Stages:
    """The peak of every stage of one run."""
    with tempfile.TemporaryDirectory(prefix="sfumato-bench-") as folder:
        path = Path(folder) / "stages.json"
        command = [sys.executable, "-m", "sfumato", "plan", "--rehearse", "--published", model, "--json", str(path)]
        subprocess.run([*command, *COMMON, *options], check=True, stdout=subprocess.DEVNULL, cwd=ROOT / "src")
        stages: list[dict[str, Any]] = json.loads(path.read_text())["stages"]
    return {stage["stage"]: stage["peak"] for stage in stages}


def make_lines(peaks: dict[str, dict[str, Stages]]) -> Iterable[str]:
    """A row for each model: the largest caching stage, and the step of every run, in GB."""
    yield f"| Model | caching, 1024 | {' | '.join(RUNS)} |\n"
    yield f"| --- |{' ---: |' * (1 + len(RUNS))}\n"
    for model, runs in peaks.items():
        title = read_published(model)["title"]
        steps = [f"{stages['training step'] / GB:.1f}" for stages in runs.values()]
        yield f"| {title} (`{model}`) | {describe_caching(runs[CACHING])} | {' | '.join(steps)} |\n"


def describe_caching(stages: Stages) -> str:
    prefix = "caching of "
    stage, peak = max((item for item in stages.items() if item[0].startswith(prefix)), key=lambda item: item[1])
    return f"{peak / GB:.1f} ({stage.removeprefix(prefix)})"


def write_page(table: str) -> None:
    """Put the table between its marks."""
    head, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    files.write_text(PAGE, f"{head}{BEGIN}{table}{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
