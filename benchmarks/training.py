"""Training a LoRA on a toy and on a full-size random Stable Diffusion 1.5: start, step time, peak memory, data rate.

    python benchmarks/training.py [--steps 6] [--cases toy fp32 bf16 checkpointing] [--json FILE]
    python benchmarks/training.py --reference DIR [--reference_python PYTHON] [--repeat 3]

Each case runs in a process of its own; the numbers are medians over the steps after the first, with their spread, i.e.
largest minus smallest. Tokens are positions of the image in the denoiser's first attention.

--reference DIR runs train_network.py of a checkout of sd-scripts beside ours, with the same arguments, the same files
and the same Python unless another is named: by turns, so that a machine that is busy is busy for both. Of each a short
and a long run give CPU seconds of a step and of everything before it. Ratios are of pairs: median, smallest, largest.
Without it, numbers that sd-scripts once had on two cores of the same kind stand beside ours.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

SIZE, TOY_SIZE = 256, 64
SHORT_RUN = 1  # steps
REFERENCE = {  # of sd-scripts on two cores of the same kind
    "help_s": 4.3,
    "first_step_s": 30.8,
    "load_s": 6.6,
    "fp32": 3.50,
    "bf16": 1.93,
    "checkpointing": 5.2,
    "peak_gb": 6.5,
}
CASES: dict[str, list[str]] = {
    "toy": [],
    "fp32": [],
    "bf16": ["--mixed_precision", "bf16"],
    "checkpointing": ["--gradient_checkpointing"],
}


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What a run took, from start to end."""

    cpu_s: float
    wall_s: float
    peak_gb: float


@dataclass(frozen=True, kw_only=True)
class Speed:
    """A run's speed by the difference of a short and a long one, in CPU seconds."""

    step_s: float
    start_s: float  # everything but the steps
    peak_gb: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "sfumato-benchmark")
    parser.add_argument("--reference", type=Path, help="a checkout of sd-scripts")
    parser.add_argument("--reference_python", default=sys.executable, help="the Python with what it needs")
    parser.add_argument("--repeat", type=int, default=3, help="pairs of runs beside the reference")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        run_child(args.child)
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"help_s": time_help()}
    for case in args.cases:
        command = make_arguments(case, args.folder)
        if args.reference is None:
            results[case] = measure(command, args.steps)
        elif case != "toy":  # whose files have sizes that sd-scripts does not know
            theirs = [args.reference_python, str(args.reference / "train_network.py")]
            results[case] = compare(theirs, command, args.steps, args.repeat)
    print(format_table(results) if args.reference is None else format_comparison(results))
    if args.json:
        args.json.write_text(json.dumps(results, indent=2))


def make_arguments(case: str, folder: Path) -> list[str]:
    """Of one case, but for the number of steps; both programs take them."""
    checkpoint = make_toy(folder) if case == "toy" else make_full_size_checkpoint(folder)
    size = TOY_SIZE if case == "toy" else SIZE
    arguments = [
        *checkpoint, "--train_data_dir", copy_images(folder / "images"), "--output_dir", folder / "out",
        "--resolution", size, "--network_module", "networks.lora", "--network_dim", 16, "--learning_rate", "1e-4",
        "--cache_latents", "--network_train_unet_only", "--seed", 1, "--caption_extension", ".txt", "--no_metadata",
        "--sdpa", "--max_data_loader_n_workers", 0, *CASES[case],
    ]  # fmt: skip
    return list(map(str, arguments))


def make_toy(folder: Path) -> list[Any]:
    from sfumato.demo.toy import write_toy

    paths = write_toy("flux", folder / "toy")
    tokenizers = [path for option, path in paths.items() if option.startswith("tokenizer")]
    options = [(f"--{option}", path) for option, path in paths.items() if not option.startswith("tokenizer")]
    return ["--tokenizer", *tokenizers, *(word for option in options for word in option)]


def make_full_size_checkpoint(folder: Path) -> list[Any]:
    """2.13 GB of random half-precision weights under the real names; made once."""
    path = folder / "sd15.safetensors"
    option: list[Any] = ["--pretrained_model_name_or_path", path]
    if path.is_file():
        return option
    import torch

    from sfumato.families import _clip, _unet, _vae
    from sfumato.families.weights import on_meta
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
    return option


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


def measure(command: Sequence[str], steps: int) -> dict[str, float]:
    """Of our own run, from inside."""
    start = time.time()
    own = ["--max_train_steps", str(steps), "--console_log_level", "WARNING"]
    arguments = [sys.executable, __file__, "--child", str(start), *command, *own]
    done = subprocess.run(arguments, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def run_child(argv: list[str]) -> None:
    """Train with the program's own parts and print times as JSON."""
    start = float(argv[0])
    from sfumato.config import load_config

    config = load_config(argv[1:])
    from sfumato.parallel.start import start_parallel
    from sfumato.train import train_step
    from sfumato.training.prefetch import prefetch
    from sfumato.training.setup_run import build_run

    imported = time.time()
    run = build_run(config, start_parallel())
    assert run is not None
    prepared = time.time()
    times, waits, ends = [], [], []
    steps = prefetch(run, 0)
    for _ in range(run.plan.total_steps):
        before = time.perf_counter()
        step = next(steps)
        waits.append(time.perf_counter() - before)
        train_step(run, step)
        times.append(time.perf_counter() - before)
        ends.append(time.time())
    resolution = config.buckets.resolution
    assert resolution is not None
    width, height = resolution
    tokens = run.model.latents.tokens((height // run.model.latents.downscale, width // run.model.latents.downscale))
    median = statistics.median(times[1:])
    result = {
        "imports_s": imported - start, "open_s": prepared - imported, "first_step_s": ends[0] - start,
        "step_s": median, "step_spread_s": max(times[1:]) - min(times[1:]),
        "data_wait_s": statistics.median(waits[1:]),
        "images_per_s": config.buckets.train_batch_size / median,
        "tokens_per_s": config.buckets.train_batch_size * tokens / median,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }  # fmt: skip
    print(json.dumps(result))


def compare(theirs: Sequence[str], command: Sequence[str], steps: int, repeat: int) -> dict[str, Any]:
    """Our speed and theirs, in pairs. theirs: Python and script of the reference."""
    ours = [sys.executable, str(ROOT / "launchers" / "train_network.py")]
    pairs = [[time_steps([*program, *command], steps) for program in (ours, theirs)] for _ in range(repeat)]
    ratios = {
        name: summarize([getattr(mine, name) / getattr(other, name) for mine, other in pairs])
        for name in ("step_s", "start_s", "peak_gb")
    }
    return {"ratios": ratios, "pairs": [[asdict(speed) for speed in pair] for pair in pairs]}


def time_steps(command: Sequence[str], steps: int) -> Speed:
    """From a run of one step and another of `steps` more."""
    short, long = (run_whole([*command, "--max_train_steps", str(SHORT_RUN + more)]) for more in (0, steps))
    step = (long.cpu_s - short.cpu_s) / steps
    return Speed(step_s=step, start_s=short.cpu_s - SHORT_RUN * step, peak_gb=max(short.peak_gb, long.peak_gb))


def run_whole(command: Sequence[str]) -> Usage:
    """Run a program to its end. Raises CalledProcessError with its output where it fails."""
    with tempfile.TemporaryFile("w+") as output:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=Path(command[1]).parent)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - start
        if process.returncode:
            output.seek(0)
            print(output.read()[-2000:], file=sys.stderr)
            raise subprocess.CalledProcessError(process.returncode, command)
    return Usage(cpu_s=used.ru_utime + used.ru_stime, wall_s=seconds, peak_gb=used.ru_maxrss / 1e6)


def summarize(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "smallest": min(values), "largest": max(values)}


def format_table(results: Mapping[str, Any]) -> str:
    lines = [f"{'':<16}{'ours':>10}{'spread':>8}{'tokens/s':>10}{'reference':>12}{'ratio':>8}"]
    once = REFERENCE["help_s"]
    lines.append(f"{'--help, s':<16}{results['help_s']:>10.2f}{'':18}{once:>12.2f}{results['help_s'] / once:>8.2f}")
    for case in CASES:
        if case not in results:
            continue
        row = results[case]
        line = f"{f'{case}, s/step':<16}{row['step_s']:>10.3f}{row['step_spread_s']:>8.3f}{row['tokens_per_s']:>10.0f}"
        if case in REFERENCE:
            line += f"{REFERENCE[case]:>12.2f}{row['step_s'] / REFERENCE[case]:>8.2f}"
        lines.append(line)
        lines.append(
            f"  first step after {row['first_step_s']:.1f} s (imports {row['imports_s']:.1f}, model and caches "
            f"{row['open_s']:.1f}), {row['images_per_s']:.2f} images/s, of a step {row['data_wait_s'] * 1000:.1f} ms "
            f"wait for data, peak {row['peak_gb']:.2f} GB"
        )
    return "\n".join(lines)


def format_comparison(results: Mapping[str, Any]) -> str:
    lines = [f"{'CPU seconds':<16}{'':8}{'ours':>10}{'reference':>12}  ratio: median (smallest to largest)"]
    for case in CASES:
        if case not in results:
            continue
        for name, ratio in results[case]["ratios"].items():
            mine, other = (statistics.median(pair[i][name] for pair in results[case]["pairs"]) for i in (0, 1))
            spread = f"{ratio['median']:.2f} ({ratio['smallest']:.2f} to {ratio['largest']:.2f})"
            lines.append(f"{case:<16}{name:8}{mine:>10.2f}{other:>12.2f}  {spread}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
