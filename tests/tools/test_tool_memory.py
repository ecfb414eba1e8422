"""What the tools hold of a checkpoint: with many tensors in it, never more than a few of them, at any width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpu.device_runs import load_benchmark
from sfumato.cli.main import main

WIDTH, RANK = 256, 2


class LiveBytes(TorchDispatchMode):
    """Counts the memory of all tensors that operations give, as long as any tensor looks into it."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                self._live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._live = {key: (known, size) for key, (known, size) in self._live.items() if not known.expired()}
        self.peak = max(self.peak, sum(size for _, size in self._live.values()))
        return result


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """A narrow FLUX.1 of twelve blocks in bfloat16, a LoRA, and the model with it."""
    folder, benchmark = tmp_path_factory.mktemp("memory"), load_benchmark("tools")
    shapes = benchmark.list_shapes(WIDTH, 4, 8)
    paths = {name: folder / f"{name}.safetensors" for name in ("model", "adapter", "merged")}
    benchmark.write_weights(paths["model"], {key: (torch.bfloat16, shape) for key, shape in shapes.items()})
    state: dict[str, Tensor] = {}
    for key, shape in shapes.items():
        if "single_blocks" in key and len(shape) == 2:
            name = f"lora_unet_{key.removesuffix('.weight').replace('.', '_')}"
            state |= {f"{name}.lora_down.weight": torch.randn(RANK, shape[1])}
            state |= {f"{name}.lora_up.weight": torch.randn(shape[0], RANK)}
    save_file(state, paths["adapter"])
    words = [str(paths["adapter"]), "--model", str(paths["model"]), "--save_to", str(paths["merged"])]
    assert main(["lora", "merge", *words]) == 0
    return paths


TOOLS = {  # command -> the largest tensors that it may hold, in float32; never more than two beside what it writes
    "lora merge {adapter} --model {model}": 1.0,
    "lora extract --model_org {model} --model_tuned {merged} --dim 2": 1.5,
    "model merge {model} {merged}": 2.5,
    "model quantize {model} --bits int8_rotated": 2.0,
    "model quantize {model} --bits fp8": 2.0,
}


@pytest.mark.full
@pytest.mark.parametrize("command", TOOLS)
def test_few_tensors_are_in_memory(command: str, files: Mapping[str, Path], tmp_path: Path) -> None:
    words = [word.format(**files) for word in command.split()]
    adapter = files["adapter"].stat().st_size
    numbers = [tensor.numel() for tensor in load_file(files["model"]).values()]
    largest = 4 * max(numbers)
    assert 4 * sum(numbers) > 15 * largest
    with LiveBytes() as live:
        assert main([*words, "--save_to", str(tmp_path / "out.safetensors")]) == 0
    held = (live.peak - adapter) / largest  # adapters are in memory as a whole
    assert held < TOOLS[command], held
    assert held > 0.4, "the count sees what a tool holds"
