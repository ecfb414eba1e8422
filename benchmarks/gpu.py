"""Training steps of published models on one GPU: s/step, images/s, peak memory, share of the GPU's arithmetic.

    python benchmarks/gpu.py [--only 'flux-*' ...] [--steps 12] [--rehearse] [--list] [--json FILE]

Networks have their published sizes and random weights, made on the GPU: nothing is downloaded. Each row runs in a
process of its own, through the program's own set-up, caching, loader and step; one that does not fit says so. --json
appends a line for each row as soon as it is measured. --rehearse adds the peak that a rehearsal predicts. The row `toy`
is for trying this script, on the CPU, too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from itertools import islice, pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

GIB = 2**30
WARM_UP = 4  # steps before those that are measured
COMMON = {
    "mixed_precision": "bf16",
    "cache_latents": True,
    "cache_text_encoder_outputs": True,
    "network_train_unet_only": True,
    "network_alpha": 1,
    "max_train_steps": 10_000,
    "console_log_level": "WARNING",
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointed": {"gradient_checkpointing": True},
    "compiled": {"compile": True},
    "compiled-checkpointed": {"compile": True, "gradient_checkpointing": True},
}
# Dense bf16 operations per second by a part of the device's name, the more specific names first.
PEAK_FLOPS = {
    "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "GH200": 989e12, "B200": 2250e12, "A100": 312e12,
    "L40S": 362e12, "RTX 5090": 210e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}  # fmt: skip
PRODUCTS = ("scaled_dot_product", "bmm")  # in the names of torch's products of two activations: attention


@dataclass(frozen=True, kw_only=True)
class Row:
    """One kind of training."""

    name: str
    model: str  # a published name, or a toy's family
    rank: int
    resolution: int
    batch: int
    method: str = "LoRA"
    options: Mapping[str, Any] = field(default_factory=dict)
    published: str = ""  # s/step / GiB of another trainer on an H100, for the plain and the checkpointed variant
    aim: str = ""
    is_toy: bool = False

    @property
    def work(self) -> str:
        """What is trained, for tables."""
        return f"{self.method} r{self.rank}, {self.resolution}, batch {self.batch}"

    @property
    def all_options(self) -> dict[str, Any]:
        own = {"network_dim": self.rank, "resolution": self.resolution, "train_batch_size": self.batch}
        return {**COMMON, **own, **self.options}


WORK = (
    Row(name="sd15", model="sd15", rank=16, resolution=512, batch=1,
        published="0.181 / 2.9, 0.305 / 2.0", aim="0.08"),
    Row(name="sdxl", model="sdxl", rank=16, resolution=1024, batch=1, method="LoKr",
        options={"network_module": "networks.lokr"},
        published="0.606 / 13.0, 1.080 / 6.5", aim="0.25 at 13, 0.35 at 6.5"),
    Row(name="sd3", model="sd3-medium", rank=128, resolution=1024, batch=3,
        published="0.529 / 34.6, 0.721 / 7.7", aim="0.32 at 35, 0.43 at 8"),
    Row(name="chroma", model="chroma", rank=16, resolution=512, batch=1,
        published="0.454 / 26.2, 1.276 / 17.7", aim="0.18 at 26, 0.25 at 18"),
    Row(name="lumina", model="lumina-2", rank=16, resolution=512, batch=2,
        published="0.235 / 16.0, 0.384 / 6.6", aim="0.12 at 16"),
    Row(name="flux", model="flux-dev", rank=16, resolution=1024, batch=1, aim="0.54, above 50 % of the arithmetic"),
)  # fmt: skip
TOY = Row(name="toy", model="flux", rank=2, resolution=64, batch=1, is_toy=True)


def list_rows() -> dict[str, Row]:
    """NAME-VARIANT -> the row with the variant's options; the toy last."""
    rows = {
        f"{row.name}-{variant}": replace(row, name=f"{row.name}-{variant}", options={**row.options, **options})
        for row in WORK
        for variant, options in VARIANTS.items()
    }
    return {**rows, TOY.name: TOY}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["*"], help="rows to measure, e.g. flux-* sdxl-plain")
    parser.add_argument("--steps", type=int, default=12, help=f"measured steps, after {WARM_UP} others")
    parser.add_argument("--rehearse", action="store_true", help="rehearse each row, too: predicted against measured")
    parser.add_argument("--list", action="store_true", help="print the names of the rows")
    parser.add_argument("--json", type=Path, help="append a line for each row")
    parser.add_argument("--row", help=argparse.SUPPRESS)  # what a row's own processes are started with
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    rows = {name: row for name, row in list_rows().items() if any(fnmatch(name, each) for each in args.only)}
    if args.list:
        print("\n".join(rows))
        return 0
    if args.peak:
        print(rehearse_peak(list_rows()[args.peak]))
        return 0
    if args.row:
        print(json.dumps(run_row(list_rows()[args.row], find_device(), steps=args.steps, rehearse=args.rehearse)))
        return 0
    if args.only == ["*"]:
        del rows[TOY.name]
    if not torch.cuda.is_available():
        rows = {name: row for name, row in rows.items() if row.is_toy}
        print("there is no CUDA device: published sizes are not measured")
    results = list(measure_rows(rows, steps=args.steps, rehearse=args.rehearse, path=args.json))
    print("\n".join(format_results(results)))
    return 0


def find_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def measure_rows(rows: Mapping[str, Row], *, steps: int, rehearse: bool, path: Path | None) -> Iterator[dict[str, Any]]:
    """Each row in a process of its own, so that none has another's memory, graphs or faults."""
    for name in rows:
        command = [sys.executable, __file__, "--row", name, "--steps", str(steps), *["--rehearse"] * rehearse]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        result = read_result(name, done.returncode, done.stdout, done.stderr)
        if path is not None:
            with path.open("a") as file:
                file.write(json.dumps(result) + "\n")
        yield result


def read_result(name: str, code: int, output: str, errors: str) -> dict[str, Any]:
    """What a row's process has printed; where it failed, its last line of errors."""
    lines = output.strip().splitlines()
    if code == 0 and lines:
        return json.loads(lines[-1])
    last = (errors.strip().splitlines() or [f"ended with code {code}"])[-1]
    return {"row": name, "outcome": f"failed: {last}"}


def run_row(row: Row, device: torch.device, *, steps: int, rehearse: bool = False) -> dict[str, Any]:
    """Measure one row in this process."""
    result: dict[str, Any] = {"row": row.name, "model": row.model, "method": f"{row.method} r{row.rank}"}
    result |= {"resolution": row.resolution, "batch": row.batch, "outcome": "measured", "torch": torch.__version__}
    result["device"] = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    with tempfile.TemporaryDirectory(prefix="sfumato-bench-") as folder:
        config = make_config(row, Path(folder))
        try:
            result |= {"rehearsed_gib": read_rehearsed_peak(row.name) / GIB} if rehearse else {}
            result |= measure_steps(config, device, steps=steps)
        except torch.OutOfMemoryError as error:
            result["outcome"] = f"does not fit: {str(error).partition('. ')[0]}"
    return result


def make_config(row: Row, folder: Path) -> Any:
    """The configuration of the row's run; everything that it names is written into the folder."""
    from sfumato.config import load_config
    from sfumato.tools.published_run import make_published_options

    options = (
        make_toy_options(row.model, folder) if row.is_toy else make_published_options(row.model, folder, method=None)
    )
    defaults = {**options, **row.all_options}
    size = defaults.pop("resolution")
    width, height = size if isinstance(size, tuple) else (size, size)
    return load_config(["--resolution", f"{width},{height}"], defaults=defaults)


def make_toy_options(family: str, folder: Path) -> dict[str, Any]:
    from PIL import Image

    from sfumato.demo.toy import write_toy

    images = folder / "images" / "1000_blank"
    images.mkdir(parents=True)
    Image.new("RGB", (64, 64)).save(images / "blank.png")
    (images / "blank.txt").write_text("a photo")
    toy = {name: str(path) for name, path in write_toy(family, folder / "toy").items() if "tokenizer" not in name}
    return {
        **toy,
        "train_data_dir": images.parent,
        "caption_extension": ".txt",
        "output_dir": folder / "output",
        "cache_dir": folder / "cache",
        "learning_rate": 1e-4,
        "seed": 0,
    }


def read_rehearsed_peak(name: str) -> int:
    """Bytes of the training step's peak, predicted in a process that sees no GPU: torch never forgets its device."""
    command, hidden = [sys.executable, __file__, "--peak", name], {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=hidden, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.split()[-1])


def rehearse_peak(row: Row) -> int:
    from sfumato.plan import make_run_plan
    from sfumato.tools.rehearsal_stages import STEP
    from sfumato.tools.rehearse import rehearse_plan

    with tempfile.TemporaryDirectory(prefix="sfumato-bench-") as folder:
        stages = rehearse_plan(make_run_plan(make_config(row, Path(folder)), processes=1))
    return next(stage.peak for stage in stages if stage.name == STEP)


def build_random_run(config: Any, device: torch.device) -> Any:
    """The run that `sfumato train` would build, with random weights instead of those of the files."""
    from sfumato.formats.checkpoint import HeaderFile
    from sfumato.parallel.single import Single
    from sfumato.plan import make_run_plan
    from sfumato.training import plan_report
    from sfumato.training.setup_run import build_run

    def make_plan(config: Any, *, processes: int) -> Any:
        plan = make_run_plan(config, processes=processes)
        return replace(plan, blueprint=plan.blueprint.without_weights())

    with patch.object(HeaderFile, "read", read_random), patch.object(plan_report, "make_run_plan", make_plan):
        run = build_run(config, Single(device))
    assert run is not None
    return run


def read_random(
    file: Any, name: str, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """A tensor of the header with random values of a size that keeps activations finite, made on the device."""
    from sfumato.formats.checkpoint import SAFETENSORS_DTYPES, resolve_dtype

    info = file.header.tensors[name]
    final = resolve_dtype(SAFETENSORS_DTYPES[info.dtype], dtype)
    if not final.is_floating_point:
        return torch.zeros(info.shape, dtype=final, device=device)
    if len(info.shape) < 2:  # scales of norms, and biases
        fill = 1.0 if name.endswith(("weight", "scale")) else 0.0
        return torch.full(info.shape, fill, dtype=final, device=device)
    inputs = torch.Size(info.shape[1:]).numel()
    return torch.randn(info.shape, dtype=final, device=device).mul_(inputs**-0.5)


def measure_steps(config: Any, device: torch.device, *, steps: int) -> dict[str, Any]:
    """Times and memory of steps after the warm-up, and the arithmetic of one."""
    from sfumato.train import train_step
    from sfumato.training.follow import follow_step
    from sfumato.training.prefetch import prefetch

    run = build_random_run(config, device)

    def take(step: Any) -> Any:
        result = train_step(run, step)
        follow_step(run, step, result, run.method.after_step())
        return result.loss

    with run.output_lock, run.hub, run.metrics:
        planned, loss = prefetch(run, 0), torch.zeros(())
        for step in islice(planned, WARM_UP):
            loss = take(step)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        marks = [mark_time(device)]
        for step in islice(planned, steps):
            loss = take(step)
            marks.append(mark_time(device))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times = [elapsed(first, second) for first, second in pairwise(marks)]
        memory = read_memory(device)
        flops = count_flops(run, next(planned))
        planned.close()
    return describe_steps(times, config.value("train_batch_size"), flops, device) | memory | {"loss": float(loss)}


def mark_time(device: torch.device) -> Any:
    """A point in time on the device, or on the CPU."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def elapsed(first: Any, second: Any) -> float:
    """Seconds."""
    return second - first if isinstance(first, float) else first.elapsed_time(second) / 1000


def read_memory(device: torch.device) -> dict[str, float]:
    """Peak of what was allocated, and what torch has taken from the device for it; {} on the CPU."""
    if device.type != "cuda":
        return {}
    allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    return {"peak_gib": allocated / GIB, "reserved_gib": reserved / GIB}


def count_flops(run: Any, step: Any) -> float:
    """Operations of a step of an adapter, without recomputation; the forward is run once more to count them."""
    from torch.utils.flop_counter import FlopCounterMode

    from sfumato.loss import training_loss
    from sfumato.training.latents import load_latents

    counts: Counter[str] = Counter()
    for batch in step.batches:
        with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
            with torch.no_grad(), run.autocast():
                training_loss(run.context, batch, load_latents(run, batch), step.real_samples)
        counts.update({str(operation): count for operation, count in counter.get_flop_counts()["Global"].items()})
    return add_backward(counts)


def add_backward(forward: Mapping[str, int]) -> float:
    """Operations of forward and backward. forward: torch's operation -> how many numbers it multiplies and adds.

    A frozen weight has no gradient, so a layer's backward costs what its forward does, for the gradient of its input. A
    product of two activations has two such gradients.
    """
    return sum(count * (3 if any(part in name for part in PRODUCTS) else 2) for name, count in forward.items())


def describe_steps(times: Sequence[float], batch: int, flops: float, device: torch.device) -> dict[str, Any]:
    seconds = statistics.median(times)
    described = {
        "seconds_per_step": seconds,
        "spread_s": max(times) - min(times),
        "images_per_second": batch / seconds,
        "tflop_per_step": flops / 1e12,
    }
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)
    return described | ({"mfu": flops / seconds / peak} if peak else {})


def format_results(results: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The table; rows without numbers say why."""
    if not results:
        return
    rows = list_rows()
    yield "| Row | work | s/step | images/s | peak GiB | rehearsed GiB | MFU | published: s / GiB | aim |"
    yield "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- | --- |"
    for result in results:
        row = rows[result["row"]]
        if result["outcome"] != "measured":
            yield f"| {row.name} | {row.work} | {result['outcome']} |||||| {row.aim} |"
            continue
        cells = [f"{result['seconds_per_step']:.3f}", f"{result['images_per_second']:.2f}"]
        for name, form in (("peak_gib", "{:.2f}"), ("rehearsed_gib", "{:.2f}"), ("mfu", "{:.0%}")):
            cells.append(form.format(result[name]) if name in result else "")
        yield f"| {row.name} | {row.work} | {' | '.join(cells)} | {row.published} | {row.aim} |"


if __name__ == "__main__":
    sys.exit(main())
