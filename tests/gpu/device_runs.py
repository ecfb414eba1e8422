"""What the GPU tests run, on any device: the same code is tried on the CPU, where it is compared with itself."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from sfumato.parallel import start
from sfumato.train import train_step
from sfumato.training.follow import follow_step
from sfumato.training.prefetch import prefetch
from sfumato.training.run import Run
from toy_runs import SEVERAL_TOKENS, build_toy_run, train_toy

FAMILIES = ("sd", "sdxl", "sd3", "flux", "chroma", "lumina")
CACHED: dict[str, Any] = {"cache_latents": True, "cache_text_encoder_outputs": True, "network_train_unet_only": True}
BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "gpu.py"
CPU = torch.device("cpu")
Toy = Mapping[str, Path]


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """How far two devices may be apart: of the loss, and of all gradients together, relative to their size."""

    loss: float
    gradient: float


# In float32 two devices differ by the order of their sums. bfloat16 has 8 bits: each product rounds by up to 0.4 %,
# and what a dozen layers make of that differs between kernels as much as between bfloat16 and float32 on one device.
BOUNDS = {"no": Bounds(loss=1e-5, gradient=1e-3), "bf16": Bounds(loss=1e-2, gradient=0.1)}


@dataclass(frozen=True, kw_only=True)
class StepFacts:
    """The loss of a step and the gradients that it has made, on the CPU in float32."""

    loss: float
    gradients: Mapping[str, Tensor]

    def compare(self, other: StepFacts) -> Bounds:
        """The distances, as `Bounds` has them."""
        assert self.gradients.keys() == other.gradients.keys()
        distance = sum((self.gradients[name] - other.gradients[name]).square().sum() for name in self.gradients)
        size = sum(gradient.square().sum() for gradient in other.gradients.values())
        loss = abs(self.loss - other.loss) / abs(other.loss)
        return Bounds(loss=loss, gradient=float(torch.as_tensor(distance / size).sqrt()))


@contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    """A context in which runs compute on the device, in float32 with all its bits."""
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        with patch.object(start, "choose_device", lambda *_: device):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32


def build_run_on(device: torch.device, toy: Toy, images: Path, output: Path, **options: Any) -> Run:
    with on_device(device):
        return build_toy_run(toy, images, output, **{**SEVERAL_TOKENS, **options})


def train_on(device: torch.device, toy: Toy, images: Path, output: Path, **options: Any) -> Path:
    with on_device(device):
        return train_toy(toy, images, output, **{**SEVERAL_TOKENS, **options})


def take_first_step(device: torch.device, toy: Toy, images: Path, output: Path, **options: Any) -> StepFacts:
    """The first step, with adapters that change something: zeros of a new one keep half of the gradients at zero."""
    run = build_run_on(device, toy, images, output, **CACHED, max_grad_norm=0, **options)
    generator = torch.Generator().manual_seed(0)
    for parameter in run.parameters:
        if not parameter.any():
            values = torch.randn(parameter.shape, generator=generator) * 0.05
            parameter.data.copy_(values.to(parameter))
    with on_device(device), run.output_lock:
        result = train_step(run, next(prefetch(run, 0)))
    names = {id(parameter): name for name, parameter in run.method.modules.named_parameters()}
    gradients = {
        names[id(parameter)]: parameter.grad.detach().cpu().float()
        for parameter in run.parameters
        if parameter.grad is not None
    }
    assert len(gradients) == len(run.parameters)
    return StepFacts(loss=float(result.loss), gradients=gradients)


def take_steps(run: Run, count: int, first_step: int = 0) -> None:
    """Steps of a run's loop with all that comes at every step; at the end nothing is waited for."""
    for step in islice(prefetch(run, first_step), count):
        result = train_step(run, step)
        curves = run.method.after_step()
        run.ema.update()
        run.complete_step(step.index + 1)
        follow_step(run, step, result, curves)


@contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """A context in which waiting for the GPU is an error; nothing on the CPU."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def load_benchmark(name: str = "gpu") -> Any:
    """A module of benchmarks/."""
    spec = importlib.util.spec_from_file_location(f"{name}_benchmark", BENCHMARK.with_stem(name))
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look for their types
    spec.loader.exec_module(module)
    return module
