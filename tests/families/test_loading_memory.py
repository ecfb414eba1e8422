"""What loading takes beyond the weights themselves: less than the largest of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from keys import on_meta
from sfumato.families import _chroma_keys, _flux_keys
from sfumato.formats.checkpoint import write_safetensors

SOURCE = Path(__file__).parents[2] / "src"
WIDTH = 1024
SMALL = {"attention_head_dim": 128, "num_attention_heads": WIDTH // 128, "joint_attention_dim": 128}
BLOCKS = {"num_layers": 2, "num_single_layers": 4}
KINDS = {
    "flux": (_flux_keys, {"pooled_projection_dim": 64}),
    "chroma": (_chroma_keys, {"approximator_hidden_dim": 64, "approximator_layers": 1}),
}
PROGRAM = """
import json, sys
import torch
from sfumato.families import {module} as keys
from sfumato.families._source import Source
from pathlib import Path

def memory(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])

source = Source(Path(sys.argv[1]))
network = keys.TRANSFORMER.network(source)
keys.build(dict(network.config, num_layers=0, num_single_layers=0))  # imports and warms up
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
module = network.load(keys.build, dtype=getattr(torch, sys.argv[2]), device=torch.device("cpu"))
weights = sum(parameter.nbytes for parameter in module.parameters())
print(json.dumps(dict(extra=memory("VmHWM") - before - weights, weights=weights)))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read where Linux tells it")
@pytest.mark.parametrize(("kind", "dtype"), [("flux", "float32"), ("chroma", "bfloat16")])
def test_the_peak_is_the_weights_and_less_than_one_more(kind: str, dtype: str, tmp_path: Path) -> None:
    """From a file in bfloat16, into the same and into another type."""
    keys, more = KINDS[kind]
    network = on_meta(lambda: keys.build(SMALL | BLOCKS | more))
    shapes = {name: tensor.shape for name, tensor in keys.KEYS.to_original(network.state_dict()).items()}
    state = {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    largest = max(tensor.numel() for tensor in state.values()) * getattr(torch, dtype).itemsize
    write_safetensors(tmp_path / "model.safetensors", state, {})
    program = PROGRAM.format(module=keys.__name__.rpartition(".")[2])
    words = [sys.executable, "-c", program, str(tmp_path / "model.safetensors"), dtype]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["weights"] > 8 * largest
    assert found["extra"] < largest, f"{found['extra'] / 2**20:.1f} MiB beside {largest / 2**20:.1f}"
