"""Training with compiled blocks, for every family: the losses of training without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from families.toys import ToyShelf
from toy_runs import SEVERAL_TOKENS, equal_tensors, make_images, read_metrics, read_weights, train_toy

FAMILIES = ("sd", "sd3", "flux", "chroma", "lumina")  # SDXL has the blocks of SD
COMPILED: dict[str, Any] = {"compile": True, "compile_backend": "aot_eager"}
pytestmark = [pytest.mark.full, pytest.mark.usefixtures("graphs")]


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_those_of_the_plain_run(family: str, toy_shelf: ToyShelf, tmp_path: Path) -> None:
    """To within what other kernels of the same operations round; with recomputation, which is wrapped around."""
    images, toy = make_images(tmp_path / "images", 1), toy_shelf.paths(family)
    options = {"network_train_unet_only": True, "max_train_steps": 3, "learning_rate": "1e-2", **SEVERAL_TOKENS}
    plain = read_metrics(train_toy(toy, images, tmp_path / "plain", **options))
    found = read_metrics(train_toy(toy, images, tmp_path / "out", **options, **COMPILED, gradient_checkpointing=True))
    for mine, other in zip(found, plain, strict=True):
        assert mine["loss/current"] == pytest.approx(other["loss/current"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def read_sample(output: Path) -> np.ndarray:
    (path,) = (output / "sample").glob("*.png")
    with Image.open(path) as image:
        return np.asarray(image, dtype=np.int64)


def test_previews_validation_and_a_resume_go_through_the_same_blocks(toy_shelf: ToyShelf, tmp_path: Path) -> None:
    """Images of two sizes; a resumed run has the losses of the straight one to the last bit."""
    images, toy = make_images(tmp_path / "images", 6), toy_shelf.paths("flux")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 2 --d 1")
    options: dict[str, Any] = {"network_train_unet_only": True, "max_train_steps": 4, "learning_rate": "1e-2"}
    options |= {"validation_split": 0.4, "validate_every_n_steps": 2, "max_validation_steps": 1}
    options |= {"sample_prompts": prompts, "sample_every_n_steps": 4}
    plain = train_toy(toy, images, tmp_path / "plain", **options)
    saves = {"save_state": True, "save_every_n_steps": 2}
    straight = train_toy(toy, images, tmp_path / "straight", **options, **saves, **COMPILED)
    torch._dynamo.reset()  # as in a new process
    state = straight / "lora-step00000002-state"
    resumed = train_toy(toy, images, tmp_path / "resumed", **options, **COMPILED, resume=state)
    assert read_metrics(resumed) == [row for row in read_metrics(straight) if row["step"] > 2]
    assert equal_tensors(read_weights(resumed), read_weights(straight))
    for mine, other in zip(read_metrics(straight), read_metrics(plain), strict=True):
        assert mine.keys() == other.keys()
        for name in mine.keys() & {"loss/current", "loss/validation/step_average"}:
            assert mine[name] == pytest.approx(other[name], rel=1e-4)
    assert sum("loss/validation/step_average" in row for row in read_metrics(straight)) == 3  # steps 0, 2 and 4
    assert np.abs(read_sample(straight) - read_sample(plain)).max() <= 1
