"""How far layers whose weights are in fewer bits are from the file's own weights, in outputs and in gradients."""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.families.part import Part
from sfumato.formats.groups import Layer, find_layers
from sfumato.quantization.weight import QuantizedWeight
from sfumato.tools.rehearsal_step import take_step
from sfumato.training.run import Run


@dataclass(kw_only=True)
class LayerError:
    """Root mean square errors of one layer, as shares of the exact numbers' size. None: it has not run, or no gradient
    of its input was needed."""

    path: str
    output: float | None = None
    gradient: float | None = None


def measure_layer_errors(run: Run, index: int) -> list[LayerError]:
    """Take another step; none where no weight is in fewer bits, or where blocks are compiled whole."""
    if run.config.memory.compile:
        return []
    with watch_layers(run.model.parts["denoiser"]) as errors:
        if errors:
            take_step(run, index, nullcontext())
    return errors


@contextmanager
def watch_layers(part: Part) -> Iterator[list[LayerError]]:
    """A context in which each such layer is compared the first time that it runs; its weight is read again for it."""
    errors: list[LayerError] = []
    handles: list[Any] = []
    for path, layer in find_layers(part.module).items():
        if isinstance(layer.weight, QuantizedWeight):
            errors.append(LayerError(path=path))
            watch = LayerWatch(part, layer, errors[-1])
            handles.append(layer.register_forward_hook(watch.compare_output, prepend=True))  # before adapters add
    try:
        yield errors
    finally:
        for handle in handles:
            handle.remove()
        part.network.weights.file.close()


@dataclass
class LayerWatch:
    """Compares one layer's output and gradient, once."""

    part: Part
    layer: Layer
    error: LayerError

    def compare_output(self, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0].detach()
        if self.error.output is None:
            with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                exact = run_layer(self.layer, x.float(), self.read_exact())
                self.error.output = compare(output, exact)
        if output.requires_grad and self.error.gradient is None:
            output.register_hook(lambda gradient: self.compare_gradient(x, gradient))

    def compare_gradient(self, x: Tensor, gradient: Tensor) -> None:
        if self.error.gradient is not None:
            return
        assert isinstance(self.layer.weight, QuantizedWeight)
        found = find_input_gradient(self.layer, x.to(gradient.dtype), self.layer.weight, gradient)
        exact = find_input_gradient(self.layer, x.float(), self.read_exact(), gradient.float())
        self.error.gradient = compare(found, exact)

    def read_exact(self) -> Tensor:
        """The weight as the file has it, in float32 on the layer's device."""
        weight = self.part.network.weights.read(f"{self.error.path}.weight", dtype=torch.float32)
        return weight.reshape(self.layer.weight.shape).to(self.layer.weight.device)


def run_layer(layer: Layer, x: Tensor, weight: Tensor) -> Tensor:
    bias = None if layer.bias is None else layer.bias.detach().to(x.dtype)
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias)
    return layer._conv_forward(x, weight, bias)


def find_input_gradient(layer: Layer, x: Tensor, weight: Tensor, gradient: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(run_layer(layer, x, weight.detach()), x, gradient)[0]


def compare(found: Tensor, exact: Tensor) -> float:
    """The size of the difference as a share of the exact numbers' size; waits for the device."""
    size = exact.norm()
    return float((found.detach().float() - exact).norm() / size) if size > 0 else 0.0


def describe_layer_errors(errors: Sequence[LayerError]) -> Iterator[str]:
    """A line for each kind of layer, i.e. the layers whose paths differ in numbers alone; those with most first."""
    kinds: dict[str, list[LayerError]] = defaultdict(list)
    for error in errors:
        if error.output is not None:
            kinds[re.sub(r"(?<=\.)\d+(?=\.)", "N", error.path)].append(error)
    if not kinds:
        return
    yield "errors of layers against the file's weights: median, worst"
    for kind, members in sorted(kinds.items(), key=lambda item: -max(error.output or 0.0 for error in item[1])):
        outputs = [error.output for error in members if error.output is not None]
        gradients = [error.gradient for error in members if error.gradient is not None]
        worst = max(members, key=lambda error: error.output or 0.0).path
        line = f"  {kind}: output {show_median_and_worst(outputs)}"
        line += f", gradient {show_median_and_worst(gradients)}" if gradients else ""
        yield f"{line}{f'; worst in {worst}' if len(members) > 1 else ''}"


def show_median_and_worst(errors: Sequence[float]) -> str:
    return f"{statistics.median(errors):.2%} {max(errors):.2%}"
