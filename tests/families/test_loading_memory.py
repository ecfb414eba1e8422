"""What loading takes beyond the weights themselves: less than the largest of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from keys import on_meta
from sfumato.families import _chroma_keys, _flux_keys, _gemma2, _lumina_keys, _sd3_keys, _t5
from sfumato.formats.checkpoint_writer import write_safetensors
from sfumato.formats.keymap import KeyMap
from warm_python import run_script

WIDTH = 1024
TEXT_WIDTH = 2048  # the largest weight of a text encoder shall be larger than the noise of the peak, 5 MiB
HEADS = {"attention_head_dim": 128, "num_attention_heads": WIDTH // 128, "joint_attention_dim": 128}
BLOCKS = {"num_layers": 2, "num_single_layers": 4}


@dataclass(frozen=True)
class Kind:
    """A network of some 100 million weights, and the lines that read it from a `source`."""

    build: Callable[[dict[str, Any]], Any]
    config: dict[str, Any]
    keys: KeyMap
    lines: str


KINDS = {
    "flux": Kind(
        _flux_keys.build, {**HEADS, **BLOCKS, "pooled_projection_dim": 64}, _flux_keys.FLUX_KEYS,
        "from sfumato.families._flux_keys import FLUX_TRANSFORMER, build; network = FLUX_TRANSFORMER.read(source)",
    ),
    "chroma": Kind(
        _chroma_keys.build, {**HEADS, **BLOCKS, "approximator_hidden_dim": 64, "approximator_layers": 1},
        _chroma_keys.CHROMA_KEYS,
        "from sfumato.families._chroma_keys import CHROMA_TRANSFORMER, build; "
        "network = CHROMA_TRANSFORMER.read(source)",
    ),
    "sd3": Kind(
        _sd3_keys.build,
        {
            "num_layers": 4, "attention_head_dim": 64, "num_attention_heads": WIDTH // 64, "in_channels": 16,
            "joint_attention_dim": 128, "caption_projection_dim": WIDTH, "pooled_projection_dim": 64,
            "pos_embed_max_size": 32, "patch_size": 2, "out_channels": 16, "dual_attention_layers": [0, 1],
            "qk_norm": "rms_norm",
        },
        _sd3_keys.key_map(4),
        "from sfumato.families._sd3_keys import build, read_sd3_transformer as read; "
        "network = read(source)",
    ),
    "lumina": Kind(
        _lumina_keys.build,
        {
            "in_channels": 16, "hidden_size": 1152, "num_layers": 6, "num_refiner_layers": 1, "num_attention_heads": 12,
            "num_kv_heads": 4, "cap_feat_dim": 128, "axes_dim_rope": [32, 32, 32],
        },
        _lumina_keys.LUMINA_KEYS,
        "from sfumato.families._lumina_keys import build, read_lumina_transformer as read; "
        "network = read(source)",
    ),
    "t5": Kind(
        _t5.build,
        {
            "vocab_size": 128, "d_model": TEXT_WIDTH, "d_kv": 64, "d_ff": 2 * TEXT_WIDTH, "num_layers": 5,
            "num_heads": 16, "feed_forward_proj": "gated-gelu",
        },
        _t5.key_map(),
        "from sfumato.families._flux_files import read_t5; from sfumato.families._t5 import build, spec; "
        "network = read_t5(source, SimpleNamespace(config={'joint_attention_dim': 2048}), spec)",
    ),
    "gemma2": Kind(
        _gemma2.build,
        {
            "vocab_size": 128, "hidden_size": TEXT_WIDTH, "intermediate_size": 2 * TEXT_WIDTH, "num_hidden_layers": 5,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 256, "query_pre_attn_scalar": 256,
        },
        _gemma2.GEMMA2_FILE_KEYS,
        "from sfumato.families._gemma2 import build, read_gemma2; "
        "network = read_gemma2(source, 'text.', width=2048)",
    ),
}  # fmt: skip
PROGRAM = """
import json, sys
import torch
from pathlib import Path
from types import SimpleNamespace
from sfumato.families.part import Part
from sfumato.families.source import Source

def memory(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])

source = Source(Path(sys.argv[1]))
{lines}
build(small(network.config))  # imports and warms up
torch.aminmax(torch.zeros(1 << 20, dtype=getattr(torch, sys.argv[2])))
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
part = Part(network, build, dtype=getattr(torch, sys.argv[2]), device=torch.device("cpu"))
part.load()
module = part.module
weights = sum(parameter.nbytes for parameter in module.parameters())
print(json.dumps(dict(extra=memory("VmHWM") - before - weights, weights=weights)))
"""
SMALL = """
def small(config):
    return {name: 1 if name in ("num_layers", "num_single_layers", "num_hidden_layers", "num_refiner_layers")
            else [0] if name == "dual_attention_layers" else value for name, value in config.items()}
"""
CASES = [  # network, type in the file, in memory
    ("flux", torch.bfloat16, "float32"), ("chroma", torch.bfloat16, "bfloat16"),
    ("sd3", torch.float16, "bfloat16"), ("lumina", torch.bfloat16, "float32"),
    ("t5", torch.float8_e4m3fn, "bfloat16"), ("gemma2", torch.bfloat16, "float16"),
]  # fmt: skip


@pytest.mark.full
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read where Linux tells it")
@pytest.mark.parametrize(("name", "stored", "dtype"), CASES, ids=[case[0] for case in CASES])
def test_the_peak_is_the_weights_and_less_than_one_more(
    name: str, stored: torch.dtype, dtype: str, tmp_path: Path
) -> None:
    """From a file of one type into the same and into another."""
    kind = KINDS[name]
    network = on_meta(lambda: kind.build(kind.config))
    shapes = {key: tensor.shape for key, tensor in kind.keys.to_original(network.state_dict()).items()}
    state = {key: torch.ones(shape).to(stored) for key, shape in shapes.items()}
    largest = max(tensor.numel() for tensor in state.values()) * getattr(torch, dtype).itemsize
    write_safetensors(tmp_path / "model.safetensors", state, {})
    program = tmp_path / "program.py"
    program.write_text(SMALL + PROGRAM.replace("{lines}", kind.lines))
    codes, output = run_script(program, [str(tmp_path / "model.safetensors"), dtype], folder=tmp_path)
    assert codes == [0], output
    found = json.loads(output.splitlines()[-1])
    assert found["weights"] > 8 * largest
    assert found["extra"] < largest, f"{found['extra'] / 2**20:.1f} MiB beside {largest / 2**20:.1f}"
