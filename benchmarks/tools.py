"""What the tools for files cost at the true width of FLUX.1: `python benchmarks/tools.py [--folder F]`.

A transformer of two double and three single blocks (2.3 GB in bfloat16) and a LoRA of rank 16; with --model a whole
published model with random weights, e.g. sdxl. Each tool runs in a process of its own; beside its seconds and peak
memory stands what a plain read and write of the same bytes takes. The last column is what of the peak is beyond that
of importing torch, which is in every tool's seconds, too, by the largest tensor in float32, in which a tool computes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from sfumato.families.published import write_published
from sfumato.formats.checkpoint import SAFETENSORS_DTYPES
from sfumato.formats.checkpoint_writer import write_stream
from sfumato.formats.header import read_header

WIDTH, RANK = 3072, 16
DOUBLE, SINGLE = 2, 3  # blocks
PROGRAM = """
import re, sys, time
from pathlib import Path
from sfumato.cli.main import main
start, cpu = time.perf_counter(), time.process_time()
code = main(sys.argv[1:])
peak = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])  # getrusage has the parent's, too
print(f"RESULT {code} {time.perf_counter() - start} {time.process_time() - cpu} {peak * 1024}")
"""


def list_shapes(width: int = WIDTH, double: int = DOUBLE, single: int = SINGLE) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the transformer."""
    w, shapes = width, dict[str, tuple[int, ...]]()
    for name, columns in {"img_in": 64, "txt_in": 4096, "time_in.in_layer": 256, "vector_in.in_layer": 768}.items():
        shapes[f"{name}.weight"] = (w, columns)
    for name in ("time_in.out_layer", "vector_in.out_layer", "guidance_in.out_layer"):
        shapes[f"{name}.weight"] = (w, w)
    shapes |= {"guidance_in.in_layer.weight": (w, 256), "final_layer.linear.weight": (64, w)}
    shapes["final_layer.adaLN_modulation.1.weight"] = (2 * w, w)
    for i in range(double):
        for side in ("img", "txt"):
            block = f"double_blocks.{i}.{side}"
            shapes |= {f"{block}_attn.qkv.weight": (3 * w, w), f"{block}_attn.proj.weight": (w, w)}
            shapes |= {f"{block}_mlp.0.weight": (4 * w, w), f"{block}_mlp.2.weight": (w, 4 * w)}
            shapes[f"{block}_mod.lin.weight"] = (6 * w, w)
            shapes |= {f"{block}_attn.norm.{name}_norm.scale": (128,) for name in ("query", "key")}
    for i in range(single):
        block = f"single_blocks.{i}"
        shapes |= {f"{block}.linear1.weight": (7 * w, w), f"{block}.linear2.weight": (w, 5 * w)}
        shapes[f"{block}.modulation.lin.weight"] = (3 * w, w)
        shapes |= {f"{block}.norm.{name}_norm.scale": (128,) for name in ("query", "key")}
    biases = {key.replace(".weight", ".bias"): shape[:1] for key, shape in shapes.items() if key.endswith(".weight")}
    return shapes | biases


def write_weights(path: Path, specs: Mapping[str, tuple[torch.dtype, Sequence[int]]]) -> None:
    """One tensor in memory at a time; values repeat, since drawing billions of them takes minutes."""
    values = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).mul_(0.02)

    def make(key: str) -> torch.Tensor:
        dtype, shape = specs[key]
        count = torch.Size(shape).numel()
        return values.to(dtype).repeat(-(-count // len(values)))[:count].reshape(tuple(shape))

    write_stream(path, specs, make)


def write_flux(path: Path) -> dict[str, tuple[int, ...]]:
    """The transformer alone; gives the layers for a LoRA by their names in its file."""
    shapes = list_shapes()
    write_weights(path, {key: (torch.bfloat16, shape) for key, shape in shapes.items()})
    weights = {key: shape for key, shape in shapes.items() if "blocks" in key and key.endswith(".weight")}
    return {f"lora_unet_{key.removesuffix('.weight').replace('.', '_')}": shape for key, shape in weights.items()}


def write_whole(name: str, folder: Path) -> dict[str, tuple[int, ...]]:
    """All networks of a published model, in diffusers' layout; gives the denoiser's attention for a LoRA."""
    write_published(name, folder)
    for path in folder.rglob("*.safetensors"):
        infos = read_header(path).tensors
        write_weights(path, {key: (SAFETENSORS_DTYPES[info.dtype], info.shape) for key, info in infos.items()})
    denoiser = next(path for path in folder.rglob("*.safetensors") if path.parent.name in ("unet", "transformer"))
    shapes = {key: info.shape for key, info in read_header(denoiser).tensors.items()}
    weights = {key: shape for key, shape in shapes.items() if ".attn" in key and len(shape) == 2}
    return {f"lora_unet_{key.removesuffix('.weight').replace('.', '_')}": shape for key, shape in weights.items()}


def write_adapter(path: Path, layers: Mapping[str, Sequence[int]]) -> None:
    generator, state = torch.Generator().manual_seed(1), dict[str, torch.Tensor]()
    for name, (rows, columns) in layers.items():
        state[f"{name}.lora_down.weight"] = torch.randn(RANK, columns, generator=generator) * 0.02
        state[f"{name}.lora_up.weight"] = torch.randn(rows, RANK, generator=generator) * 0.02
        state[f"{name}.alpha"] = torch.tensor(float(RANK))
    save_file(state, path)


def run_tool(words: list[str], program: str = PROGRAM) -> dict[str, float]:
    """Seconds, CPU seconds and peak memory in bytes of one command."""
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=True)
    code, seconds, cpu, peak = done.stdout.split("RESULT ")[1].split()
    assert code == "0", done.stderr
    return {"seconds": float(seconds), "cpu": float(cpu), "peak": float(peak)}


def list_weight_files(model: Path) -> list[Path]:
    return sorted(model.rglob("*.safetensors")) if model.is_dir() else [model]


def copy_plainly(sources: Sequence[Path], target: Path) -> dict[str, float]:
    """Read all bytes and write them, in pieces, and wait for the disk as the tools do."""
    start, cpu = time.perf_counter(), time.process_time()
    with target.open("wb") as writer:
        for source in sources:
            with source.open("rb") as reader:
                shutil.copyfileobj(reader, writer, 16 << 20)
        writer.flush()
        os.fsync(writer.fileno())
    seconds = time.perf_counter() - start
    target.unlink()
    return {"seconds": seconds, "cpu": time.process_time() - cpu, "peak": 0.0}


def measure(folder: Path, name: str) -> dict[str, dict[str, float]]:
    """name: of a published model; empty for the blocks of FLUX.1."""
    suffix = "" if name else ".safetensors"
    model, merged, adapter = folder / f"model{suffix}", folder / f"merged{suffix}", folder / "adapter.safetensors"
    write_adapter(adapter, write_whole(name, model) if name else write_flux(model))
    files = list_weight_files(model)
    largest = 4 * max(info.numel for file in files for info in read_header(file).tensors.values())
    results = {"plain copy": copy_plainly(files, folder / "copy")}
    results["import torch"] = run_tool([], PROGRAM.replace("main(sys.argv[1:])", "__import__('torch') and 0"))
    small, single = str(folder / "small.safetensors"), str(folder / "single.safetensors")
    results["help"] = run_tool(["lora", "merge", "--help"])
    results["merge"] = run_tool(["lora", "merge", str(adapter), "--model", str(model), "--save_to", str(merged)])
    extract = ["lora", "extract", "--model_org", str(model), "--model_tuned", str(merged), "--dim", str(RANK)]
    results["extract"] = run_tool([*extract, "--save_to", small])
    results["resize"] = run_tool(["lora", "resize", str(adapter), "--new_rank", "8", "--save_to", small])
    results["inspect"] = run_tool(["lora", "inspect", str(adapter)])
    if name:
        shutil.rmtree(merged)
        results["convert"] = run_tool(["model", "convert", str(model), single])
    source, quantized = single if name else str(model), str(folder / "quantized.safetensors")
    results["quantize"] = run_tool(["model", "quantize", source, "--bits", "int8_rotated", "--save_to", quantized])
    for found in results.values():
        found["tensors"] = max(found["peak"] - results["import torch"]["peak"], 0.0) / largest
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--folder", type=Path, default=None, help="where the files are for a while; 8 GB, of sdxl 22 GB"
    )
    parser.add_argument(
        "--model", default="", help="a published model as `sfumato plan --published` knows it, e.g. sdxl"
    )
    parser.add_argument("--json", type=Path, default=None, help="also write the numbers there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        results = measure(Path(folder), arguments.model)
    plain = results["plain copy"]["seconds"]
    print(f"{'tool':<13}{'seconds':>9}{'CPU s':>9}{'of a copy':>11}{'peak GB':>9}{'tensors':>9}")
    for name, found in results.items():
        row = f"{name:<13}{found['seconds']:>9.2f}{found['cpu']:>9.2f}{found['seconds'] / plain:>11.2f}"
        print(f"{row}{found['peak'] / 1e9:>9.2f}{found['tensors']:>9.2f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
