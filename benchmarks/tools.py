"""What the tools for files cost at the true width of FLUX.1: `python benchmarks/tools.py [--folder F]`.

A transformer of two double and three single blocks (2.3 GB in bfloat16) and a LoRA of rank 16. Each tool runs in a
process of its own; beside its seconds and peak memory stands what a plain read and write of the same bytes takes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

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


def list_shapes() -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the transformer."""
    w, shapes = WIDTH, dict[str, tuple[int, ...]]()
    for name, columns in {"img_in": 64, "txt_in": 4096, "time_in.in_layer": 256, "vector_in.in_layer": 768}.items():
        shapes[f"{name}.weight"] = (w, columns)
    for name in ("time_in.out_layer", "vector_in.out_layer", "guidance_in.out_layer"):
        shapes[f"{name}.weight"] = (w, w)
    shapes |= {"guidance_in.in_layer.weight": (w, 256), "final_layer.linear.weight": (64, w)}
    shapes["final_layer.adaLN_modulation.1.weight"] = (2 * w, w)
    for i in range(DOUBLE):
        for side in ("img", "txt"):
            block = f"double_blocks.{i}.{side}"
            shapes |= {f"{block}_attn.qkv.weight": (3 * w, w), f"{block}_attn.proj.weight": (w, w)}
            shapes |= {f"{block}_mlp.0.weight": (4 * w, w), f"{block}_mlp.2.weight": (w, 4 * w)}
            shapes[f"{block}_mod.lin.weight"] = (6 * w, w)
            shapes |= {f"{block}_attn.norm.{name}_norm.scale": (128,) for name in ("query", "key")}
    for i in range(SINGLE):
        block = f"single_blocks.{i}"
        shapes |= {f"{block}.linear1.weight": (7 * w, w), f"{block}.linear2.weight": (w, 5 * w)}
        shapes[f"{block}.modulation.lin.weight"] = (3 * w, w)
        shapes |= {f"{block}.norm.{name}_norm.scale": (128,) for name in ("query", "key")}
    biases = {key.replace(".weight", ".bias"): shape[:1] for key, shape in shapes.items() if key.endswith(".weight")}
    return shapes | biases


def write_model(path: Path) -> None:
    """Values repeat, since drawing billions of them takes minutes."""
    values = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    state: dict[str, torch.Tensor] = {}
    for key, shape in list_shapes().items():
        count = torch.Size(shape).numel()
        state[key] = values.repeat(-(-count // len(values)))[:count].reshape(shape)
    save_file(state, path)


def write_adapter(path: Path) -> None:
    generator, state = torch.Generator().manual_seed(1), dict[str, torch.Tensor]()
    for key, shape in list_shapes().items():
        if "blocks" in key and key.endswith(".weight"):
            name = "lora_unet_" + key.removesuffix(".weight").replace(".", "_")
            state[f"{name}.lora_down.weight"] = torch.randn(RANK, shape[1], generator=generator) * 0.02
            state[f"{name}.lora_up.weight"] = torch.randn(shape[0], RANK, generator=generator) * 0.02
            state[f"{name}.alpha"] = torch.tensor(float(RANK))
    save_file(state, path)


def run_tool(words: list[str]) -> dict[str, float]:
    """Seconds, CPU seconds and peak memory in bytes of one command."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True, check=True)
    code, seconds, cpu, peak = done.stdout.split("RESULT ")[1].split()
    assert code == "0", done.stderr
    return {"seconds": float(seconds), "cpu": float(cpu), "peak": float(peak)}


def copy_plainly(source: Path, target: Path) -> dict[str, float]:
    """Read all bytes and write them, in pieces, and wait for the disk as the tools do."""
    start, cpu = time.perf_counter(), time.process_time()
    with source.open("rb") as reader, target.open("wb") as writer:
        shutil.copyfileobj(reader, writer, 16 << 20)
        writer.flush()
        import os

        os.fsync(writer.fileno())
    seconds = time.perf_counter() - start
    target.unlink()
    return {"seconds": seconds, "cpu": time.process_time() - cpu, "peak": 0.0}


def measure(folder: Path) -> dict[str, dict[str, float]]:
    model, adapter, merged = (folder / f"{name}.safetensors" for name in ("model", "adapter", "merged"))
    write_model(model)
    write_adapter(adapter)
    results = {"plain copy": copy_plainly(model, folder / "copy")}
    small = str(folder / "small.safetensors")
    results["help"] = run_tool(["lora", "merge", "--help"])
    results["merge"] = run_tool(["lora", "merge", str(adapter), "--model", str(model), "--save_to", str(merged)])
    extract = ["lora", "extract", "--model_org", str(model), "--model_tuned", str(merged), "--dim", str(RANK)]
    results["extract"] = run_tool([*extract, "--save_to", small])
    results["resize"] = run_tool(["lora", "resize", str(adapter), "--new_rank", "8", "--save_to", small])
    quantized = str(folder / "quantized.safetensors")
    results["quantize"] = run_tool(["model", "quantize", str(model), "--bits", "int8_rotated", "--save_to", quantized])
    results["inspect"] = run_tool(["lora", "inspect", str(adapter)])
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=None, help="where the files are for a while; 8 GB")
    parser.add_argument("--json", type=Path, default=None, help="also write the numbers there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        results = measure(Path(folder))
    plain = results["plain copy"]["seconds"]
    print(f"{'tool':<12}{'seconds':>9}{'CPU s':>9}{'of a copy':>11}{'peak GB':>9}")
    for name, found in results.items():
        ratio, peak = found["seconds"] / plain, found["peak"] / 1e9
        print(f"{name:<12}{found['seconds']:>9.2f}{found['cpu']:>9.2f}{ratio:>11.2f}{peak:>9.2f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
