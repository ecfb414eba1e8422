"""Reading and writing a checkpoint of the size of Stable Diffusion 1: time, speed, memory beyond the weights.

    python benchmarks/files.py [--gigabytes 2.13] [--repeat 5] [--folder DIR] [--json FILE]

Every row runs in a fresh process, the rows interleaved, with the file in the system's cache. `zeros` only touches as
much fresh memory as the read needs: no reader can be faster than that. Memory is the peak beyond the process's start
and the weights that it returns. Each row runs twice in its process and the second run is timed: a virtual machine has
to get fresh memory from its host, which can take ten times longer than what is measured here. Writing through to the
disk (fsync) is timed apart.
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
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

SHAPES = [(1280, 1280, 3, 3), (2560, 1280), (640, 640, 3, 3), (5120, 640), (320, 320), (320,), (320,), (640,)]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--gigabytes", type=float, default=2.13)
    arguments.add_argument("--repeat", type=int, default=5)
    arguments.add_argument("--folder", type=Path, help="where the files are written; a temporary folder by default")
    arguments.add_argument("--json", type=Path, help="write the table as JSON, too")
    arguments.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    args = arguments.parse_args()
    if args.row:
        print(json.dumps(measure(args.row, args.folder)))
        return
    with tempfile.TemporaryDirectory(prefix="sfumato-bench-", dir=args.folder) as folder:
        make_file(Path(folder) / "in.safetensors", args.gigabytes)
        table = [summarize(row, runs) for row, runs in run_all(Path(folder), args.repeat).items()]
    print_table(table)
    if args.json:
        args.json.write_text(json.dumps(table, indent=1))


def run_all(folder: Path, repeat: int) -> dict[str, list[dict[str, float]]]:
    runs: dict[str, list[dict[str, float]]] = {row: [] for row in ROWS}
    for _ in range(repeat):
        for row in ROWS:
            command = [sys.executable, __file__, "--row", row, "--folder", str(folder)]
            runs[row].append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    return runs


def summarize(row: str, runs: list[dict[str, float]]) -> dict[str, float | str]:
    seconds = [run["seconds"] for run in runs]
    median = statistics.median(seconds)
    return {
        "row": row,
        "seconds": median,
        "fastest": min(seconds),
        "slowest": max(seconds),
        "cpu_seconds": statistics.median(run["cpu"] for run in runs),
        "fsync_seconds": statistics.median(run["fsync"] for run in runs),
        "gigabytes_per_second": runs[0]["file"] / median / 1e9,
        "extra_megabytes": statistics.median(run["extra"] for run in runs) / 1e6,
    }


def print_table(table: list[dict[str, float | str]]) -> None:
    print(f"{'':26} seconds (spread)        CPU    fsync   GB/s of file   memory beyond weights")
    for r in table:
        spread = f"{r['seconds']:6.2f} ({r['fastest']:.2f}-{r['slowest']:.2f})"
        print(
            f"{r['row']:26} {spread:20} {r['cpu_seconds']:6.2f} {r['fsync_seconds']:8.2f} "
            f"{r['gigabytes_per_second']:12.2f} {r['extra_megabytes']:16.0f} MB"
        )


def make_file(path: Path, gigabytes: float) -> None:
    import torch

    from sfumato.formats.checkpoint_writer import write_stream

    generator = torch.Generator().manual_seed(0)
    specs, total = {}, 0
    while total < gigabytes * 1e9:
        shape = SHAPES[len(specs) % len(SHAPES)]
        specs[f"model.block.{len(specs):04d}.weight"] = (torch.float16, shape)
        total += 2 * torch.Size(shape).numel()
    write_stream(path, specs, lambda name: torch.randn(specs[name][1], generator=generator).half())


def measure(row: str, folder: Path) -> dict[str, float]:
    """One run of a row: seconds without fsync, CPU seconds, and the peak of memory beyond start and result."""
    import torch

    from sfumato.common import files
    from sfumato.formats.checkpoint import open_checkpoint

    path = folder / "in.safetensors"
    if row.startswith(("write", "hash")):  # what is written is there before the clock starts
        with open_checkpoint(path) as file:
            tensors = {name: file.read(name) for name in file.header.tensors}
    else:
        tensors = {}
    sync_seconds = 0.0

    def timed_sync(path: Path, sync: Callable[[Path], None] = files.sync) -> None:
        nonlocal sync_seconds
        start = time.perf_counter()
        sync(path)
        sync_seconds += time.perf_counter() - start

    files.sync = timed_sync
    torch.empty(1).half().float()
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = memory("VmRSS")
    result = ROWS[row](path, tensors)
    extra = memory("VmHWM") - before - sum(tensor.nbytes for tensor in result.values())
    del result
    sync_seconds = 0.0
    path.with_name("out.safetensors").unlink(missing_ok=True)
    start, cpu = time.perf_counter(), time.process_time()
    ROWS[row](path, tensors)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {
        "seconds": seconds - sync_seconds,
        "cpu": cpu,
        "fsync": sync_seconds,
        "file": path.stat().st_size,
        "extra": extra,
    }


def memory(kind: str) -> int:
    """Bytes that this process holds (VmRSS) or has held at most (VmHWM); Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(kind)) * 1024


def read(path: Path, tensors: dict, dtype: str | None = None) -> dict:
    import torch

    from sfumato.formats.checkpoint import open_checkpoint

    with open_checkpoint(path) as file:
        return {name: file.read(name, dtype=getattr(torch, dtype) if dtype else None) for name in file.header.tensors}


def read_with_library(path: Path, tensors: dict, dtype: str = "float16") -> dict:
    import torch
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name).to(getattr(torch, dtype), copy=True) for name in file.keys()}  # noqa: SIM118


def zeros(path: Path, tensors: dict) -> dict:
    import torch

    from sfumato.formats.header import read_header

    return {name: torch.empty(info.shape).zero_() for name, info in read_header(path).tensors.items()}


def write(path: Path, tensors: dict, dtype: str | None = None) -> dict:
    import torch

    from sfumato.formats.checkpoint_writer import write_safetensors

    write_safetensors(path.with_name("out.safetensors"), tensors, dtype=getattr(torch, dtype) if dtype else None)
    return {}


def write_with_library(path: Path, tensors: dict) -> dict:
    from safetensors.torch import save_file

    save_file(tensors, path.with_name("out.safetensors"))
    return {}


def hashes(path: Path, tensors: dict) -> dict:
    from sfumato.formats.hashes import calculate_adapter_hashes

    calculate_adapter_hashes(tensors, {})
    return {}


def sha256(path: Path, tensors: dict) -> dict:
    from sfumato.formats.hashes import calculate_sha256

    os.utime(path)  # forgets the cached hash of the file
    calculate_sha256(path)
    return {}


ROWS: dict[str, Callable[[Path, dict], dict]] = {
    "zeros, fp32": zeros,
    "read fp16 -> fp32": lambda path, tensors: read(path, tensors, "float32"),
    "  safe_open + to fp32": lambda path, tensors: read_with_library(path, tensors, "float32"),
    "read fp16 -> fp16": read,
    "  safe_open + copy to fp16": read_with_library,
    "read fp16 -> bf16": lambda path, tensors: read(path, tensors, "bfloat16"),
    "write fp16": write,
    "write fp16, save_file": write_with_library,
    "write fp16 -> bf16": lambda path, tensors: write(path, tensors, "bfloat16"),
    "hash of tensors": hashes,
    "sha256 of the file": sha256,
}


if __name__ == "__main__":
    main()
