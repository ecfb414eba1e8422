"""What a LoRA of rank 16 costs on one frozen layer, forward and backward: ours, and the plain formula of sd-scripts.

One thread, the three interleaved, medians of many rounds; "plain" is output + up(down(x)) * multiplier * scale.
    python benchmarks/lora_cost.py [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # before torch reads them
    os.environ[variable] = "1"
sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import torch
from torch import Tensor, nn

from sfumato.adapters.base import AdapterEngine
from sfumato.adapters.lora import LoRA
from sfumato.formats.groups import find_layers, group_layers
from sfumato.formats.keymap import make_identity_map

RANK, ALPHA = 16, 8.0
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LAYERS = (  # name, layer, shape of its input
    ("linear 320", lambda: nn.Linear(320, 320), (1, 1024, 320)),
    ("linear 1280", lambda: nn.Linear(1280, 1280), (1, 256, 1280)),
    ("linear 3072", lambda: nn.Linear(3072, 3072), (1, 768, 3072)),
    ("conv 1x1 320", lambda: nn.Conv2d(320, 320, 1), (1, 320, 32, 32)),
    ("conv 3x3 320", lambda: nn.Conv2d(320, 320, 3, padding=1), (1, 320, 32, 32)),
)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--seconds", type=float, default=4.0, help="for each row")
    arguments.add_argument("--dtype", choices=DTYPES, default="float32")
    arguments.add_argument("--json", type=Path, help="write the table as JSON, too")
    args = arguments.parse_args()
    torch.set_num_threads(1)
    print(f"{args.dtype}: {'frozen ms':>15} {'ours':>18} {'plain':>18}   (more than frozen, quartiles)")
    table = [row(name, make, shape, DTYPES[args.dtype], args.seconds) for name, make, shape in LAYERS]
    if args.json:
        args.json.write_text(json.dumps({"dtype": args.dtype, "rank": RANK, "rows": table}, indent=1))


def row(
    name: str, make: Callable[[], nn.Module], shape: tuple[int, ...], dtype: torch.dtype, seconds: float
) -> dict[str, float | str]:
    torch.manual_seed(0)
    frozen, adapted, plain = make().to(dtype), make().to(dtype), make().to(dtype)
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    trained = [*attach_ours(adapted), *attach_plain(plain)]
    trained_ids = {id(parameter) for parameter in trained}
    modules = (frozen, adapted, plain)
    for module in modules:
        for parameter in module.parameters():
            parameter.requires_grad_(id(parameter) in trained_ids)
    seed = torch.randn_like(frozen(x))
    times: list[list[float]] = [[], [], []]
    until, rounds = time.perf_counter() + seconds, 0
    while time.perf_counter() < until or rounds < 10:
        for module, seconds_of_module in zip(modules, times, strict=True):
            seconds_of_module.append(time_step(module, x, seed, trained))
        rounds += 1
    base, ours, theirs = (statistics.median(measured[2:]) for measured in times)
    spread = [compare(times[0][2:], measured[2:]) for measured in times[1:]]
    shown = [
        f"{100 * (t / base - 1):+6.1f} % ({q[0]:+.0f}..{q[2]:+.0f})"
        for t, q in zip((ours, theirs), spread, strict=True)
    ]
    print(f"{name:<14} {1e3 * base:9.2f} {shown[0]:>18} {shown[1]:>18}   {rounds} rounds", flush=True)
    return {"layer": name, "frozen_ms": 1e3 * base, "ours_percent": 100 * (ours / base - 1),
            "plain_percent": 100 * (theirs / base - 1), "rounds": rounds}  # fmt: skip


def compare(base: list[float], measured: list[float]) -> list[float]:
    """Quartiles of how much longer each measurement is than its base, in percent."""
    percent = [100 * (seconds / base_seconds - 1) for base_seconds, seconds in zip(base, measured, strict=True)]
    return statistics.quantiles(percent, n=4)


def time_step(module: nn.Module, x: Tensor, seed: Tensor, trained: list[nn.Parameter]) -> float:
    """Seconds of one forward and backward."""
    x.grad = None
    for parameter in trained:
        parameter.grad = None
    start = time.perf_counter()
    module(x).backward(seed)
    return time.perf_counter() - start


def attach_ours(layer: nn.Module) -> list[nn.Parameter]:
    engine = AdapterEngine()
    groups = group_layers(
        find_layers(nn.Sequential(layer)),
        ("{*}",),
        part="denoiser",
        prefix="lora_unet",
        adapter_map=make_identity_map(),
    )
    engine.attach(groups, lambda group: LoRA(group, rank=RANK, alpha=ALPHA))
    for parameter in engine.parameters():
        nn.init.normal_(parameter, std=0.02)
    return list(engine.parameters())


def attach_plain(layer: nn.Module) -> list[nn.Parameter]:
    """Two small layers beside the frozen one, each with its casts, as adapters are often written."""
    if isinstance(layer, nn.Linear):
        down: nn.Module = nn.Linear(layer.in_features, RANK, bias=False)
        up: nn.Module = nn.Linear(RANK, layer.out_features, bias=False)
    else:
        assert isinstance(layer, nn.Conv2d)
        kernel, padding = layer.kernel_size, layer.padding
        down = nn.Conv2d(layer.in_channels, RANK, kernel, padding=padding, bias=False)  # pyright: ignore
        up = nn.Conv2d(RANK, layer.out_channels, 1, bias=False)
    for each in (down, up):
        each.to(layer.weight.dtype)
    inner = layer.forward
    layer.forward = lambda x: inner(x) + up(down(x)) * 1.0 * (ALPHA / RANK)  # pyright: ignore
    return [*down.parameters(), *up.parameters()]


if __name__ == "__main__":
    main()
