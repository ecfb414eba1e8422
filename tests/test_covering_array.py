"""Every pair of different options in one run: trained, resumed, and the same as without the interruption."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from covering import list_pairs, list_possible_pairs, make_covering_array
from families.toys import ToyShelf
from toy_runs import equal_tensors, make_images, read_metrics, read_weights, train_toy

FLOWS = ("flux", "chroma", "sd3", "lumina")
FULL = {"method": "full", "network_dim": None}
AXES: dict[str, dict[str, dict[str, Any]]] = {  # axis -> value -> its options
    "family": {"sd": {}, "sdxl": {}, **{family: {} for family in FLOWS}},
    "optimizer": {
        "AdamW": {},
        "Lion": {"optimizer_type": "Lion"},
        "SGDNesterov": {"optimizer_type": "SGDNesterov"},
        "AdaFactor": {"optimizer_type": "AdaFactor", "optimizer_args": ["relative_step=False"]},
        "Prodigy": {"optimizer_type": "Prodigy", "learning_rate": 1},
        "schedule-free": {"optimizer_type": "AdamWScheduleFree"},
    },
    "schedule": {
        "constant": {},
        "cosine": {"lr_scheduler": "cosine", "lr_warmup_steps": 1},
        "restarts": {"lr_scheduler": "cosine_with_restarts", "lr_scheduler_num_cycles": 2},
        "stable": {"lr_scheduler": "warmup_stable_decay", "lr_warmup_steps": 1, "lr_decay_steps": "40%"},
        "inverse_sqrt": {"lr_scheduler": "inverse_sqrt", "lr_scheduler_timescale": 2},
        "class": {"lr_scheduler_type": "StepLR", "lr_scheduler_args": ["step_size=1", "gamma=0.5"]},
    },
    "loss": {
        "l2": {},
        "l1": {"loss_type": "l1"},
        "huber": {"loss_type": "huber"},
        "smooth_l1": {"loss_type": "smooth_l1", "huber_schedule": "exponential"},
    },
    "weighting": {
        "none": {},
        "min_snr": {"min_snr_gamma": 5},
        "soft_min_snr": {"soft_min_snr_gamma": 5},
        "p2": {"p2_gamma": 1},
        "debiased": {"debiased_estimation_loss": True},
        "cosmap": {"weighting_scheme": "cosmap"},
        "learned": {"uncertainty_weighting": True},
    },
    "trains": {
        "denoiser": {"network_train_unet_only": True},
        "text": {"network_train_text_encoder_only": True},
        "both": {"network_args": ["rank_dropout=0.2"]},
        "whole denoiser": FULL,
        "whole model": {**FULL, "train_text_encoder": True},
    },
    "noise": {
        "plain": {},
        "offset": {"noise_offset": 0.1, "noise_offset_random_strength": True},
        "pyramid": {"multires_noise_iterations": 3},
        "perturbed": {"ip_noise_gamma": 0.1, "timestep_stratified": True},
    },
    "precision": {
        "float32": {},
        "bf16": {"mixed_precision": "bf16"},
        "fp16": {"mixed_precision": "fp16"},
        "weights too": {"mixed_precision": "bf16", "full_bf16": True},
    },
    "average": {"none": {}, "kept": {"ema_decay": 0.9, "ema_sigma_rel": [0.1]}},
    "data": {
        "live": {},
        "latents": {"cache_latents": True},
        "cached": {"cache_latents": True, "cache_text_encoder_outputs": True},
        "disk": {"cache_latents_to_disk": True, "cache_text_encoder_outputs_to_disk": True},
    },
    "loop": {
        "plain": {},
        "accumulated": {"gradient_accumulation_steps": 2, "train_batch_size": 2, "max_data_loader_n_workers": 2},
        "checkpointed": {"gradient_checkpointing": True, "max_grad_norm": 0},
        "validated": {"validation_split": 0.3, "validate_every_n_steps": 1},
    },
}
EXCLUSIVE = (
    {"weighting": "learned", "optimizer": "Prodigy"},
    {"precision": "weights too", "optimizer": "schedule-free"},
    {"average": "kept", "optimizer": "schedule-free"},
)
TRAINS_TEXT = ("text", "both", "whole model")


def allowed(row: Mapping[str, str]) -> bool:
    """Whether the program accepts the options of a row, or of a part of one; other tests cover the errors."""
    family, trains = row.get("family", ""), row.get("trains", "")
    if trains in TRAINS_TEXT and row.get("data") in ("cached", "disk"):
        return False
    if trains == "whole model" and family in FLOWS:
        return False
    if any(pair.items() <= row.items() for pair in EXCLUSIVE):
        return False
    return not (row.get("weighting") == "cosmap" and family in ("sd", "sdxl"))


VALUES = {axis: list(values) for axis, values in AXES.items()}
ROWS = make_covering_array(VALUES, allowed)


def test_every_pair_is_covered_by_few_rows() -> None:
    pairs = set().union(*(list_pairs(row) for row in ROWS))
    assert pairs == list_possible_pairs(VALUES, allowed)
    assert all(allowed(row) for row in ROWS)
    assert len(ROWS) <= 60


def test_covering_arrays_of_known_size() -> None:
    """The pairs of two axes of three values are nine rows; eight would be every row of three axes of two values."""
    bits = {name: ["0", "1"] for name in "abc"}
    assert 4 <= len(make_covering_array(bits)) <= 6
    assert set().union(*(list_pairs(row) for row in make_covering_array(bits))) == list_possible_pairs(
        bits, lambda row: True
    )
    assert len(make_covering_array({"a": ["1", "2", "3"], "b": ["4", "5", "6"]})) == 9
    rows = make_covering_array(bits, lambda row: (row.get("a"), row.get("b")) != ("1", "1"))
    assert not [row for row in rows if row["a"] == row["b"] == "1"]
    assert {(row["b"], row["c"]) for row in rows} == {("0", "0"), ("0", "1"), ("1", "0"), ("1", "1")}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"), 3)


@pytest.mark.full
@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(row.values()).replace(" ", "_"))
def test_a_resumed_run_is_the_straight_one(
    row: Mapping[str, str], toy_shelf: ToyShelf, tmp_path: Path, images: Path
) -> None:
    """Every loss is finite, the weights move, and steps 2 and 3 are the same after a resume, bit for bit."""
    options: dict[str, Any] = {"max_train_steps": 3, "cache_dir": tmp_path / "cache"}
    for axis, value in row.items():
        options |= AXES[axis][value]
    if row["family"] == "chroma" and row["trains"] in TRAINS_TEXT:  # its only encoder trains on request
        options["network_args"] = [*options.get("network_args", []), "train_t5xxl=True"]
    toy = toy_shelf.paths(row["family"])
    straight = train_toy(toy, images, tmp_path / "straight", **options, save_every_n_steps=1, save_state=True)
    resumed = train_toy(toy, images, tmp_path / "resumed", **options, resume=straight / "lora-step00000001-state")
    assert [math.isfinite(line["loss/current"]) for line in read_steps(straight)] == [True] * 3
    assert not equal_tensors(read_weights(straight), read_weights(straight, "lora-step00000001"))
    assert equal_tensors(read_weights(straight), read_weights(resumed))
    assert read_steps(straight)[1:] == read_steps(resumed)


def read_steps(output: Path) -> list[dict[str, float]]:
    """The lines of the steps, without the validation before the first."""
    return [line for line in read_metrics(output) if "loss/current" in line]
