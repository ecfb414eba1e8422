"""The memory of training runs of published models on a GPU, by rehearsal: no GPU and no weights are needed.

    python benchmarks/rehearsal.py [--models flux-dev sdxl ...] [--page] [--json FILE] [--known FILE ...]

Every run takes 6 to 30 s of one processor: a LoRA of rank 16 and the whole model, in bf16 with
AdamW at batch size 1, latents and text cached. Below the table stands where their steps wait for the device. --page
writes both into docs/performance.md. --json keeps the runs; those in files of --known are not repeated.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Iterable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from sfumato.cli.main import main as sfumato
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
    "whole model, 512, checkpointed": ["--method", "full", "--resolution", "512", "--gradient_checkpointing"],
    "whole model, 1024, checkpointed": ["--method", "full", "--resolution", "1024", "--gradient_checkpointing"],
}
CACHING = "LoRA, 1024, checkpointed"  # the run whose caching is in the table

STEP = "training step"

Stages = dict[str, dict[str, Any]]  # stage -> what --json says of it; sizes in bytes


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--models", nargs="+", choices=list_published(), default=list_published())
    arguments.add_argument("--page", action="store_true", help="write the table into docs/performance.md")
    arguments.add_argument("--json", type=Path, help="write all stages of all runs as JSON, sizes in bytes")
    arguments.add_argument(
        "--known", type=Path, nargs="+", default=[], help="files of --json whose runs are not repeated"
    )
    args = arguments.parse_args()
    known = {model: runs for path in args.known for model, runs in json.loads(path.read_text()).items()}
    found = {model: known.get(model) or rehearse_model(model) for model in args.models}
    table = "".join([*make_lines(found), "\n", *make_wait_lines(found)])
    print(table, end="")
    if args.page:
        write_page(table)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


def rehearse_model(model: str) -> dict[str, Stages]:
    """Run -> its stages."""
    return {run: rehearse(model, options) for run, options in RUNS.items()}


def rehearse(model: str, options: Iterable[str]) -> Stages:
    """The stages of one run."""
    with tempfile.TemporaryDirectory(prefix="sfumato-bench-") as folder:
        path = Path(folder) / "stages.json"
        command = ["plan", "--rehearse", "--published", model, "--json", str(path)]
        with redirect_stdout(StringIO()):
            if sfumato([*command, *COMMON, *options]) != 0:
                sys.exit(f"{model} cannot be rehearsed with {' '.join(options)}")
        stages: list[dict[str, Any]] = json.loads(path.read_text())["stages"]
    return {stage["stage"]: stage for stage in stages}


def make_lines(found: dict[str, dict[str, Stages]]) -> Iterable[str]:
    """A row for each model: the largest caching stage, and the step of every run, in GB."""
    yield f"| Model | caching, 1024 | {' | '.join(RUNS)} |\n"
    yield f"| --- |{' ---: |' * (1 + len(RUNS))}\n"
    for model, runs in found.items():
        title = read_published(model)["title"]
        steps = [f"{stages[STEP]['peak'] / GB:.1f}" for stages in runs.values()]
        yield f"| {title} (`{model}`) | {describe_caching(runs[CACHING])} | {' | '.join(steps)} |\n"


def describe_caching(stages: Stages) -> str:
    prefix = "caching of "
    caching = [stage for name, stage in stages.items() if name.startswith(prefix)]
    largest = max(caching, key=lambda stage: stage["peak"])
    return f"{largest['peak'] / GB:.1f} ({largest['stage'].removeprefix(prefix)})"


def make_wait_lines(found: dict[str, dict[str, Stages]]) -> Iterable[str]:
    """A line for each place where a step waits, with the models whose steps do."""
    models: dict[str, list[str]] = {}
    for model, runs in found.items():
        waits = {describe_wait(wait) for stages in runs.values() for wait in stages[STEP]["waits"]}
        for wait in sorted(waits):
            models.setdefault(wait, []).append(model)
    yield "No tensor of these runs is on the wrong device. "
    yield (
        f"Their steps wait for the device at {len(models)} places:\n\n" if models else "No step waits for the device.\n"
    )
    for wait, names in sorted(models.items()):
        yield f"* {wait} ({'all models' if len(names) == len(found) else ', '.join(names)})\n"


def describe_wait(wait: dict[str, str]) -> str:
    """Place and reason; files without their lines, which change too often for a page."""
    return f"{re.sub(r':[0-9]+', '', wait['place'])}: {wait['reason']}"


def write_page(table: str) -> None:
    """Put the table between its marks."""
    head, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    files.write_text(PAGE, f"{head}{BEGIN}{table}{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
