"""--stream_blocks: frozen weights that look into the checkpoint train what weights in memory train."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from families.toys import ToyShelf
from rehearsing import needs_rehearsal
from sfumato.config import load_config
from sfumato.errors import UserError
from sfumato.formats.checkpoint import TensorFile
from sfumato.plan import make_run_plan
from sfumato.tools.rehearsal_stages import STEP
from sfumato.tools.rehearse import rehearse_plan
from sfumato.training.model_setup import make_model
from toy_runs import equal_tensors, make_arguments, make_images, read_weights, train_toy

STREAMED: dict[str, Any] = {"blocks_to_swap": 99, "stream_blocks": True}
SHORT = {"max_train_steps": 2, "network_train_unet_only": True}


def read_bytes(toy: dict[str, Path]) -> bytes:
    return toy["pretrained_model_name_or_path"].read_bytes()


@pytest.mark.full
@pytest.mark.parametrize("family", ["flux", "sdxl"])
def test_the_same_is_trained_and_the_file_stays_as_it_is(family: str, toy_shelf: ToyShelf, tmp_path: Path) -> None:
    """Also with weights that are merged into it, which stay in memory."""
    images, toy = make_images(tmp_path / "images", 2), toy_shelf.paths(family)
    before = read_bytes(toy)
    first = train_toy(toy, images, tmp_path / "first", **SHORT)
    options = {**SHORT, "base_weights": first / "lora.safetensors"}
    plain = train_toy(toy, images, tmp_path / "plain", **options)
    streamed = train_toy(toy, images, tmp_path / "streamed", **options, **STREAMED)
    assert equal_tensors(read_weights(streamed), read_weights(plain))
    assert not equal_tensors(read_weights(plain), read_weights(first))
    assert read_bytes(toy) == before


@pytest.mark.full
def test_weights_of_the_blocks_are_the_files_own_pages(toy_shelf: ToyShelf, tmp_path: Path) -> None:
    images, toy = make_images(tmp_path / "images", 1), toy_shelf.paths("flux")
    config = load_config(make_arguments(toy, images, tmp_path / "out", **STREAMED))
    part = make_model(make_run_plan(config, processes=1), torch.device("cpu")).parts["denoiser"]
    file = part.network.weights.file
    assert isinstance(file, TensorFile)
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        pytest.skip("this system does not list what a process has mapped")
    before = maps.read_text().count(str(file.header.path))  # by other tests of this process
    part.load()
    ranges = [line.split() for line in maps.read_text().splitlines() if str(file.header.path) in line]
    spans = [[int(end, 16) for end in words[0].split("-")] for words in ranges]
    in_file = {
        name: any(start <= parameter.data_ptr() < end for start, end in spans)
        for name, parameter in part.module.named_parameters()
    }
    in_blocks = {name for name in in_file if "transformer_blocks." in name}
    assert all(in_file[name] for name in in_blocks)
    assert not any(found for name, found in in_file.items() if name not in in_blocks)
    part.unload()
    gc.collect()
    assert maps.read_text().count(str(file.header.path)) <= before


@pytest.mark.full
def test_a_file_in_another_precision_is_refused(toy_shelf: ToyShelf, tmp_path: Path) -> None:
    images, toy = make_images(tmp_path / "images", 1), toy_shelf.paths("flux")
    for options in ({"mixed_precision": "bf16"}, {"fp8_base": True}):
        with pytest.raises(UserError) as refused:
            train_toy(toy, images, tmp_path / "out", **SHORT, **STREAMED, **options)
        assert refused.value.code == "blocks-not-streamable"


def test_a_mapped_tensor_is_the_one_that_is_read(toy_shelf: ToyShelf) -> None:
    with TensorFile(toy_shelf.paths("flux")["pretrained_model_name_or_path"]) as file:
        names = list(file.keys())[:40]
        assert all(torch.equal(file.map_tensor(name), file.read(name)) for name in names)
        with pytest.raises(UserError):
            file.map_tensor("none")


@pytest.mark.full
@needs_rehearsal
def test_the_rehearsal_takes_it(toy_shelf: ToyShelf, tmp_path: Path) -> None:
    """With the peak of blocks that are copied."""
    images, toy = make_images(tmp_path / "images", 1), toy_shelf.paths("flux")
    peaks = []
    for options in ({"blocks_to_swap": 99}, STREAMED):
        config = load_config(make_arguments(toy, images, tmp_path / "out", **SHORT, **options, mixed_precision="no"))
        stages = rehearse_plan(make_run_plan(config, processes=1), saves=False)
        peaks.append(next(stage.peak for stage in stages if stage.name == STEP))
    assert peaks[0] == peaks[1] > 0
