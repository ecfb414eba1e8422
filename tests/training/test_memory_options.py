"""Memory options of a step in pairs, for every family: the same weights as without any of them, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from covering import make_covering_array
from families.toys import ToyShelf, write_fill_toy
from toy_runs import equal_tensors, make_images, read_weights, train_toy

AXES: dict[str, dict[str, dict[str, Any]]] = {
    "family": {
        **{name: {} for name in ("sd", "sdxl", "sd3", "flux", "chroma", "lumina")},
        "flux_kontext": {"model_type": "flux_kontext"},
        "flux fill": {"train_inpainting": True, "masked_loss": True},
    },
    "method": {
        "adapter": {"network_train_unet_only": True},
        "full": {"method": "full", "network_dim": None, "learning_rate": "1e-4", "ema_decay": 0.9},
        "full in bfloat16": {
            "method": "full", "network_dim": None, "learning_rate": "1e-4", "full_bf16": True,
            "mixed_precision": "bf16",
            "optimizer_type": "AdaFactor", "optimizer_args": ["relative_step=False", "scale_parameter=False"],
        },
        "textual inversion": {
            "method": "textual_inversion", "network_dim": None, "learning_rate": "1e-2", "token_string": "zwx",
            "use_object_template": True, "cache_text_encoder_outputs": False,
        },
        "control net": {"method": "control_net", "network_dim": None, "learning_rate": "1e-3"},
        "lllite": {"method": "lllite", "network_dim": 8, "cond_emb_dim": 4},
    },
    "attention": {"default": {}, "math": {"attention": "math"}},
    "weights": {"as read": {}, "fp8": {"fp8_scaled": True}, "nf4": {"nf4_base": True}},
    "blocks": {
        "device": {}, "some": {"blocks_to_swap": 2}, "all": {"blocks_to_swap": 99},
        "in the file": {"blocks_to_swap": 99, "stream_blocks": True},
    },
    "recomputed": {
        "none": {},
        "every second": {"checkpoint_every": 2},
        "all": {"gradient_checkpointing": True},
        "inputs in main memory": {"cpu_offload_checkpointing": True},
    },
    "step": {
        "after": {},
        "parameters": {"fused_backward_pass": True},
        "groups": {"fused_optimizer_groups": 4},
        "blocks": {"blockwise_fused_optimizers": True},
    },
    "end": {"whole": {}, "resumed": {"save_state": True, "save_every_n_steps": 1}},
}  # fmt: skip
METHOD_FAMILIES = {"control net": ("sd", "sdxl", "sd3", "flux"), "lllite": ("sdxl",)}
REFERENCES = "flux_kontext"  # the family whose images have reference images
FILL = "flux fill"  # the model whose images have masks
WHAT_TRAINS = ("family", "method", "attention", "weights")  # and what computes otherwise
SHARED = {"max_train_steps": 2, "max_bucket_reso": 64, "max_grad_norm": 0}
SHARED |= {"cache_latents": True, "cache_text_encoder_outputs": True}


def is_possible(row: Mapping[str, str]) -> bool:
    """A whole model's blocks in main memory step within backward, and its weights have all their bits."""
    method = row.get("method", "adapter")
    if row.get("family") == REFERENCES and method != "adapter":  # otherwise its network is that of another family
        return False
    if row.get("family", "sdxl") not in METHOD_FAMILIES.get(method, AXES["family"]):
        return False
    trains_whole = method.startswith("full")
    has_all_bits = row.get("weights", "as read") == "as read"
    if (trains_whole and not has_all_bits) or (
        row.get("blocks") == "in the file" and (trains_whole or not has_all_bits)
    ):
        return False
    return not (trains_whole and row.get("blocks", "device") != "device" and row.get("step") == "after")


ROWS = make_covering_array({name: list(values) for name, values in AXES.items()}, is_possible)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("data"), 2)


@pytest.fixture(scope="module")
def fill(toy_shelf: ToyShelf, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_fill_toy(toy_shelf, tmp_path_factory.mktemp("fill") / "model")


@pytest.fixture(scope="module")
def plain() -> dict[tuple[str, ...], dict[str, Tensor]]:
    """What runs without memory options have trained, by what they train."""
    return {}


def collect_options(row: Mapping[str, str], images: Path) -> dict[str, Any]:
    options: dict[str, Any] = dict(SHARED)
    for axis, value in row.items():
        options |= AXES[axis][value]
    if row["method"] in METHOD_FAMILIES:
        options["conditioning_data_dir"] = images / "2_cat"  # each image is its own control image
    if row["family"] == REFERENCES:
        options["reference_data_dirs"] = images / "2_cat"
    if row["family"] == FILL:
        options["conditioning_data_dir"] = images / "2_cat"  # each image is its own mask
    return options


@pytest.mark.full
@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(row.values()).replace(" ", "_"))
def test_weights_are_the_same(
    row: dict[str, str], toy_shelf: ToyShelf, fill: dict[str, Path], images: Path, plain: Any, tmp_path: Path
) -> None:
    toy = fill if row["family"] == FILL else toy_shelf.paths(row["family"])
    trained = {axis: row[axis] for axis in WHAT_TRAINS}
    key = tuple(trained.values())
    if key not in plain:
        plain[key] = read_weights(train_toy(toy, images, tmp_path / "plain", **collect_options(trained, images)))
    options = collect_options(row, images)
    output = train_toy(toy, images, tmp_path / "out", **options)
    assert equal_tensors(read_weights(output), plain[key])
    if row["end"] == "resumed":
        state = tmp_path / "out" / "lora-step00000001-state"
        resumed = train_toy(toy, images, tmp_path / "resumed", **options, resume=state)
        assert equal_tensors(read_weights(resumed), plain[key])
