"""The fused backward pass in whole runs: the weights of a run without it, also of blocks in main memory; resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from families.toys import ToyShelf
from sfumato.cli.main import main
from sfumato.config import load_config
from sfumato.errors import SeveralErrors, UserError
from sfumato.plan import make_run_plan
from toy_runs import equal_tensors, make_arguments, make_images, read_metrics, read_weights, train_toy

CACHED = {"cache_latents": True, "cache_text_encoder_outputs": True}
FULL = {"method": "full", "network_dim": None, "learning_rate": "1e-4", **CACHED}
STEPS = {"max_train_steps": 3, "max_bucket_reso": 64, "max_grad_norm": 0}
FUSED = {
    "parameters": {"fused_backward_pass": True},
    "groups": {"fused_optimizer_groups": 5},
    "blocks": {"blockwise_fused_optimizers": True},
    "in main memory": {"fused_backward_pass": True, "blocks_to_swap": 2},
    "all in main memory": {"blockwise_fused_optimizers": True, "blocks_to_swap": 99},
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("data"), 2)


@pytest.mark.full
@pytest.mark.parametrize("method", ["full", "adapter"])
def test_resume(method: str, toy_shelf: ToyShelf, images: Path, tmp_path: Path) -> None:
    """As if it had never stopped, clipping included."""
    options = {**CACHED, **STEPS, **FUSED["in main memory"], "max_grad_norm": 0.5}
    options |= {**FULL, "max_grad_norm": 0.5} if method == "full" else {"network_train_unet_only": True}
    toy = toy_shelf.paths("flux")
    whole = train_toy(toy, images, tmp_path / "whole", **options, save_state=True, save_every_n_steps=2)
    state = tmp_path / "whole" / "lora-step00000002-state"
    resumed = train_toy(toy, images, tmp_path / "resumed", **options, resume=state)
    assert equal_tensors(read_weights(resumed), read_weights(whole))


@pytest.mark.full
@pytest.mark.parametrize("hosted", [{}, {"blocks_to_swap": 99}], ids=["device", "main memory"])
def test_accumulated_gradients_make_the_same_steps(
    hosted: dict[str, Any], toy_shelf: ToyShelf, images: Path, tmp_path: Path
) -> None:
    toy, options = toy_shelf.paths("flux"), {**FULL, **STEPS, "gradient_accumulation_steps": 2}
    plain = train_toy(toy, images, tmp_path / "plain", **options)
    fused = train_toy(toy, images, tmp_path / "fused", **options, **hosted, fused_backward_pass=True)
    assert equal_tensors(read_weights(fused), read_weights(plain))
    losses = [[row["loss/current"] for row in read_metrics(run)] for run in (plain, fused)]
    assert losses[0] == losses[1]


@pytest.mark.full
def test_a_state_of_a_run_without_it(toy_shelf: ToyShelf, images: Path, tmp_path: Path) -> None:
    """The optimizer is the same, so that either goes on from the other's state."""
    toy, options = toy_shelf.paths("sdxl"), {**FULL, **STEPS}
    whole = train_toy(toy, images, tmp_path / "whole", **options, save_state=True, save_every_n_steps=2)
    state = tmp_path / "whole" / "lora-step00000002-state"
    for name, fused in FUSED.items():
        resumed = train_toy(toy, images, tmp_path / name, **options, **fused, resume=state)
        assert equal_tensors(read_weights(resumed), read_weights(whole)), name


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"mixed_precision": "fp16"}, "fused-backward-fp16"),
        ({"fused_optimizer_groups": 3}, "fused-backward-given-twice"),
        ({"optimizer_type": "Prodigy"}, "fused-backward-optimizer"),
        ({"optimizer_type": "AdamWScheduleFree"}, "fused-backward-optimizer"),
        (
            {"fused_backward_pass": False, "blocks_to_swap": 3, **FULL},
            "full-training-swap-without-fused-backward",
        ),
    ],
)
def test_what_does_not_go_together(
    options: dict[str, Any], code: str, toy_shelf: ToyShelf, images: Path, tmp_path: Path, codes: list[str]
) -> None:
    given: dict[str, Any] = {"fused_backward_pass": True, **options}
    argv = make_arguments(toy_shelf.paths("flux"), images, tmp_path / "out", **given)
    assert main(["plan", *argv]) == 2
    assert codes == [code]


def test_several_processes(toy_shelf: ToyShelf, images: Path, tmp_path: Path) -> None:
    argv = make_arguments(toy_shelf.paths("flux"), images, tmp_path / "out", fused_backward_pass=True)
    with pytest.raises((UserError, SeveralErrors)) as error:
        make_run_plan(load_config(argv), processes=2)
    assert isinstance(error.value, UserError)
    assert error.value.code == "fused-backward-processes"
