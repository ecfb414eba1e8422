"""--blocks_to_swap in whole runs of every family: the same weights are trained, and less is on the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from families.toys import ToyShelf
from rehearsing import needs_rehearsal
from sfumato.config import load_config
from sfumato.config.memory import MemoryOptions
from sfumato.errors import Problems
from sfumato.methods.model_plan import plan_model
from sfumato.plan import make_run_plan
from sfumato.tools.memory_bound import count_weight_bytes
from sfumato.tools.rehearsal_stages import STEP, Stage
from sfumato.tools.rehearse import rehearse_plan
from sfumato.training.model_setup import make_model
from toy_runs import equal_tensors, make_arguments, make_images, read_metrics, read_weights, train_toy

CACHED = {"cache_latents": True, "cache_text_encoder_outputs": True, "network_train_unet_only": True}
STEPS = {"max_train_steps": 2, "max_bucket_reso": 64}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("data"), 2)


def test_an_adapter_is_the_same(toy_shelf: ToyShelf, images: Path, tmp_path: Path) -> None:
    """Bit for bit, with text features from encoders whose blocks were in main memory, too."""
    toy = toy_shelf.paths("flux")
    options: dict[str, Any] = {"blocks_to_swap": 2, "text_encoder_blocks_to_swap": 1, "cache_dir": tmp_path / "cache"}
    plain = train_toy(toy, images, tmp_path / "plain", **CACHED, **STEPS)
    output = train_toy(toy, images, tmp_path / "out", **CACHED, **STEPS, **options)
    assert equal_tensors(read_weights(output), read_weights(plain))
    assert read_metrics(output) == read_metrics(plain)


def rehearse(toy_shelf: ToyShelf, family: str, images: Path, output: Path, **options: Any) -> dict[str, Stage]:
    argv = make_arguments(toy_shelf.paths(family), images, output, mixed_precision="bf16", **CACHED, **options)
    return {stage.name: stage for stage in rehearse_plan(make_run_plan(load_config(argv), processes=1), saves=False)}


@needs_rehearsal
@pytest.mark.full
@pytest.mark.parametrize("family", ["sd", "lumina"])
def test_the_device_holds_less(family: str, toy_shelf: ToyShelf, images: Path, tmp_path: Path) -> None:
    """Of the denoiser nothing but what is outside of its blocks, and nothing waits."""
    before = rehearse(toy_shelf, family, images, tmp_path / "out", gradient_checkpointing=True)
    after = rehearse(toy_shelf, family, images, tmp_path / "out", blocks_to_swap=99, text_encoder_blocks_to_swap=99)
    assert not after[STEP].waits
    assert after[STEP].resident["denoiser"] < before[STEP].resident["denoiser"] / 2
    for name, stage in before.items():
        for part, size in stage.resident.items():
            if name == f"caching of {part}" and part != "vae":
                assert after[name].resident[part] < size


def test_the_bound_knows(toy_shelf: ToyShelf, images: Path, tmp_path: Path) -> None:
    """From file headers alone it counts what is outside of the blocks in main memory."""
    argv = make_arguments(toy_shelf.paths("flux"), images, tmp_path / "out", **CACHED, blocks_to_swap=2)
    problems = Problems()
    part = make_model(plan_model(load_config(argv), problems), torch.device("meta")).parts["denoiser"]
    problems.raise_all()
    assert len(part.hosted_blocks) >= 2
    blocks = [part.module.get_submodule(path) for path in part.hosted_blocks]
    hosted = sum(parameter.numel() for block in blocks for parameter in block.parameters())
    everything = sum(parameter.numel() for parameter in part.module.parameters())
    assert count_weight_bytes(part) == 4 * (everything - hosted)


@pytest.mark.parametrize(
    ("given", "blocks"),
    [
        ({}, 0),
        ({"blocks_to_swap": 7, "split_mode": True}, 7),
        ({"split_mode": True}, 18),
        ({"double_blocks_to_swap": 4, "single_blocks_to_swap": 6}, 7),
        ({"single_blocks_to_swap": 1}, 1),
    ],
)
def test_older_options(given: dict[str, Any], blocks: int) -> None:
    """A single block of sd-scripts is half of a double one."""
    assert MemoryOptions(**given).swapped_blocks == blocks
