"""Training a LoRA on a full-size random Stable Diffusion 1.5: start, step time, peak memory, model load.

Each case runs in a process of its own on one thread per core; the numbers are medians over the steps after the first.
    python benchmarks/training.py [--steps 6] [--cases start fp32 bf16 checkpointing] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SIZE = 256
REFERENCE = {  # of sd-scripts on two cores of the same kind, for comparison
    "help_s": 4.3,
    "first_step_s": 30.8,
    "load_s": 6.6,
    "fp32": 3.50,
    "bf16": 1.93,
    "checkpointing": 5.2,
    "peak_gb": 6.5,
}
CASES: dict[str, list[str]] = {
    "fp32": [],
    "bf16": ["--mixed_precision", "bf16"],
    "checkpointing": ["--gradient_checkpointing"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "sfumato-benchmark")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        run_child(args.child)
        return
    checkpoint = make_full_size_checkpoint(args.folder)
    images = copy_images(args.folder / "images")
    results: dict[str, Any] = {"help_s": time_help()}
    for case in args.cases:
        results[case] = measure(checkpoint, images, args.folder / "out", args.steps, CASES[case])
    print(format_table(results))
    if args.json:
        args.json.write_text(json.dumps(results, indent=2))


def make_full_size_checkpoint(folder: Path) -> Path:
    """2.13 GB of random half-precision weights under the real names; made once."""
    path = folder / "sd15.safetensors"
    if path.is_file():
        return path
    import torch

    from sfumato.families import _clip, _unet, _vae
    from sfumato.families.source import on_meta
    from sfumato.formats.checkpoint_writer import write_stream

    levels = [320, 640, 1280, 1280]
    unet = {
        "block_out_channels": levels, "layers_per_block": 2, "cross_attention_dim": 768, "attention_head_dim": 8,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    }  # fmt: skip
    vae = {
        "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4,
        "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    }  # fmt: skip
    clip = {
        "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
        "num_attention_heads": 12, "max_position_embeddings": 77, "hidden_act": "quick_gelu", "projection_dim": 768,
    }  # fmt: skip
    networks = {
        "model.diffusion_model.": (on_meta(lambda: _unet.build(unet)), _unet.key_map(unet)),
        "first_stage_model.": (on_meta(lambda: _vae.build(vae)), _vae.key_map(4)),
        "cond_stage_model.transformer.": (on_meta(lambda: _clip.build(clip)), _clip.key_map()),
    }
    specs = {}
    for prefix, (module, key_map) in networks.items():
        for name, tensor in key_map.to_original(module.state_dict()).items():
            specs[prefix + name] = (torch.float16, tuple(tensor.shape))
    generator = torch.Generator().manual_seed(0)

    def make(name: str) -> torch.Tensor:
        shape = specs[name][1]
        scale = 1.0 if len(shape) == 1 else (shape[1] * (shape[2] * shape[3] if len(shape) == 4 else 1)) ** -0.5
        drawn = torch.randn(shape, generator=generator) * 0.5 * scale
        return (drawn.abs().clamp(0.5, 1) if name.endswith("norm.weight") else drawn).half()

    write_stream(path, specs, make)
    return path


def copy_images(folder: Path) -> Path:
    from sfumato.demo.photos import find_example_photos

    source = next(path for path in sorted(find_example_photos().iterdir()) if path.is_dir())
    if not folder.is_dir():
        import shutil

        shutil.copytree(source, folder / "1_photo")
    return folder


def time_help() -> float:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        command = [sys.executable, str(ROOT / "launchers" / "train_network.py"), "--help"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(checkpoint: Path, images: Path, output: Path, steps: int, options: list[str]) -> dict[str, float]:
    command = [
        "--pretrained_model_name_or_path", checkpoint, "--train_data_dir", images, "--output_dir", output,
        "--resolution", SIZE, "--network_dim", 16, "--learning_rate", "1e-4", "--max_train_steps", steps,
        "--cache_latents", "--network_train_unet_only", "--seed", 1, "--caption_extension", ".txt",
        "--console_log_level", "WARNING", "--no_metadata", *options,
    ]  # fmt: skip
    start = time.time()
    arguments = [sys.executable, __file__, "--child", str(start), *map(str, command)]
    done = subprocess.run(arguments, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def run_child(argv: list[str]) -> None:
    """Train with the program's own parts and print times as JSON."""
    start = float(argv[0])
    from sfumato.config import load_config

    config = load_config(argv[1:])
    from sfumato.parallel.start import start_parallel
    from sfumato.train import train_step
    from sfumato.training.setup_run import build_run

    imported = time.time()
    run = build_run(config, start_parallel())
    assert run is not None
    prepared = time.time()
    times = []
    for step in run.loader.steps():
        before = time.perf_counter()
        train_step(run, step)
        times.append(time.perf_counter() - before)
        if step.index == 0:
            first = time.time()
        if step.index + 1 == run.plan.total_steps:
            break
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    result = {
        "imports_s": imported - start, "open_s": prepared - imported, "first_step_s": first - start,
        "step_s": statistics.median(times[1:]), "step_spread_s": max(times[1:]) - min(times[1:]), "peak_gb": peak,
    }  # fmt: skip
    print(json.dumps(result))


def format_table(results: dict[str, Any]) -> str:
    lines = [f"{'':<16}{'ours':>10}{'reference':>12}{'ratio':>8}"]

    def row(name: str, ours: float, reference: float) -> None:
        lines.append(f"{name:<16}{ours:>10.2f}{reference:>12.2f}{ours / reference:>8.2f}")

    row("--help, s", results["help_s"], REFERENCE["help_s"])
    for case in CASES:
        if case in results:
            row(f"{case}, s/step", results[case]["step_s"], REFERENCE[case])
            lines.append(
                f"  first step after {results[case]['first_step_s']:.1f} s (imports {results[case]['imports_s']:.1f},"
                f" model and caches {results[case]['open_s']:.1f}), peak {results[case]['peak_gb']:.2f} GB"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
