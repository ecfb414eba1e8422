"""GGPO in a run: an option of every family's LoRA, exact on resume, in no file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from families.toys import ToyShelf
from sfumato.config import load_config
from sfumato.errors import UserError
from sfumato.plan import make_run_plan
from toy_runs import SEVERAL_TOKENS, equal_tensors, make_arguments, make_images, read_metrics, read_weights, train_toy

GGPO = ["ggpo_sigma=0.03", "ggpo_beta=0.01"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"), 2)


@pytest.mark.full
@pytest.mark.fast_for("sd3")
@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux", "chroma", "lumina"])
def test_it_trains_and_resumes_exactly(toy_shelf: ToyShelf, images: Path, tmp_path: Path, family: str) -> None:
    toy = toy_shelf.paths(family)
    options: dict[str, Any] = {"network_train_unet_only": True, "max_train_steps": 4, **SEVERAL_TOKENS}
    train_toy(toy, images, tmp_path / "plain", **options)
    options["network_args"] = GGPO
    whole = train_toy(toy, images, tmp_path / "whole", **options)
    train_toy(toy, images, tmp_path / "part", **(options | {"max_train_steps": 2, "save_state": True}))
    rest = train_toy(toy, images, tmp_path / "rest", **options, resume=tmp_path / "part" / "lora-state")
    assert equal_tensors(read_weights(whole), read_weights(rest))
    plain = read_weights(tmp_path / "plain")
    assert plain.keys() == read_weights(whole).keys()
    assert not equal_tensors(plain, read_weights(whole))
    row = read_metrics(whole)[-1]
    assert row["norm/avg_grad_norm"] > 0
    assert row["norm/avg_combined_norm"] > 0


@pytest.mark.parametrize(
    ("arguments", "module", "code"),
    [
        (GGPO[:1], None, "ggpo-incomplete"),
        (GGPO[1:], None, "ggpo-incomplete"),
        (GGPO, "networks.loha", "ggpo-unsupported"),
        ([*GGPO, "dora_wd=True"], None, "ggpo-unsupported"),
        (["ggpo_sigma=-1", "ggpo_beta=0"], None, "network-arg-invalid"),
    ],
)
def test_what_does_not_work_is_refused(
    toy_shelf: ToyShelf, images: Path, tmp_path: Path, arguments: list[str], module: str | None, code: str
) -> None:
    options = {"network_args": arguments, "network_module": module}
    with pytest.raises(UserError) as error:
        make_run_plan(load_config(make_arguments(toy_shelf.paths("sd"), images, tmp_path, **options)), processes=1)
    assert error.value.code == code
