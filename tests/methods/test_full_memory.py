"""Saving a whole model takes less memory beyond the model itself than two of its largest tensors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from keys import on_meta
from sfumato.families import _flux_keys
from sfumato.formats.checkpoint_writer import write_safetensors
from warm_python import run_script

WIDTH = 1024
CONFIG = {
    "attention_head_dim": 128, "num_attention_heads": WIDTH // 128, "joint_attention_dim": 128,
    "pooled_projection_dim": 64, "num_layers": 2, "num_single_layers": 4,
}  # fmt: skip
PROGRAM = """
import json, sys
from pathlib import Path
from types import SimpleNamespace
import torch
from sfumato.families import _flux_keys as keys
from sfumato.families.checkpoint_saving import save_single_file
from sfumato.families.source import Source
from sfumato.families.blueprint import Blueprint
from sfumato.families.part import Part

def memory(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])

source, target = Source(Path(sys.argv[1])), Path(sys.argv[2])
network = keys.FLUX_TRANSFORMER.read(source)
part = Part(network, keys.build, dtype=torch.float32, device=torch.device("cpu"))
part.load()
module = part.module
facts = dict(title="", base_model_version="", architecture="", text_parts=(), objective=None, latents=None)
blueprint = Blueprint(source=source, networks={"denoiser": network}, **facts)
model = SimpleNamespace(blueprint=blueprint, parts={"denoiser": part}, objective=None)
names = [name for name, _ in module.named_parameters()]
save_single_file(model, target, {}, torch.float16, changed={"denoiser": names[:1]})  # warms up
extra = []
for _ in range(3):  # libraries' pages come and go where memory is short, and can only add
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    save_single_file(model, target, {}, {dtype}, changed={"denoiser": names})
    extra.append(memory("VmHWM") - before)
print(json.dumps(dict(extra=min(extra), weights=sum(p.nbytes for p in module.parameters()))))
"""


@pytest.mark.full
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux")
@pytest.mark.parametrize("dtype", ["None", "torch.float16"])
def test_saving_takes_less_than_two_tensors(dtype: str, tmp_path: Path) -> None:
    network = on_meta(lambda: _flux_keys.build(CONFIG))
    shapes = {name: tensor.shape for name, tensor in _flux_keys.FLUX_KEYS.to_original(network.state_dict()).items()}
    state = {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    largest = max(tensor.numel() for tensor in state.values()) * 4
    write_safetensors(tmp_path / "model.safetensors", state, {})
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.replace("{dtype}", dtype))
    words = [str(tmp_path / "model.safetensors"), str(tmp_path / "saved.safetensors")]
    codes, output = run_script(program, words, folder=tmp_path)
    assert codes == [0], output
    measured = json.loads(output.splitlines()[-1])
    assert measured["weights"] > 8 * largest
    assert measured["extra"] < 2 * largest, f"{measured['extra'] / 2**20:.1f} MiB beside {largest / 2**20:.1f}"
