"""Every method on every family: all that trains changes, and nothing else; the loss falls; what is saved is whole.

docs/methods.md lists the pairs of this file. Resuming, learning, other programs' readers and previews are in each
method's own tests.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from families.toys import ToyShelf
from pages import page_maker
from sfumato.errors import SeveralErrors, UserError
from sfumato.families.base import FAMILIES as REGISTRY
from sfumato.families.control_net import CONTROL_NET
from sfumato.train import train_step
from sfumato.training.run import Run
from toy_runs import build_toy_run, make_images

FAMILIES = ("sd", "sdxl", "sd3", "flux", "flux_kontext", "chroma", "lumina")
OPTIONS: dict[str, dict[str, Any]] = {  # method -> what asks for it
    "adapter": {},
    "full": {"method": "full", "network_dim": None, "learning_rate": "1e-4"},
    "textual_inversion": {"method": "textual_inversion", "network_dim": None, "token_string": "zwx",
                          "learning_rate": "1e-4", "use_object_template": True, "num_vectors_per_token": 2},
    "control_net": {"method": "control_net", "network_dim": None},
    "lllite": {"method": "lllite", "network_dim": 4},
    "leco": {"method": "leco", "max_denoising_steps": 4},
    "inpainting": {"train_inpainting": True},
}  # fmt: skip
STEPS = 2
CONTROLLED = ("control_net", "lllite")
FIRST_LAYERS = {  # of models for inpainting: the layer whose inputs are more, how many
    "sd": ("model.diffusion_model.input_blocks.0.0.weight", 9),
    "sdxl": ("model.diffusion_model.input_blocks.0.0.weight", 9),
    "flux": ("img_in.weight", 384),
}
NOES: dict[tuple[str, str], tuple[str, str]] = {  # method, family -> the error's code, and why
    **{
        ("control_net", name): ("control-net-unsupported", "diffusers has no class for them")
        for name in ("chroma", "lumina")
    },
    ("control_net", "flux_kontext"): (
        "control-net-unsupported", "diffusers has no pipeline that joins a reference image and a ControlNet"
    ),
    **{
        ("inpainting", name): ("inpainting-model-missing", "no such checkpoint is published")
        for name in ("sd3", "flux_kontext", "chroma", "lumina")
    },
}  # fmt: skip
UNREACHED = {  # names of what trains in vain in the toys
    # In the middle one token attends to itself alone.
    "sd": r"mid(dle)?_block_(attentions_0|1)_transformer_blocks_0_attn1_to_[qk]\.(lora_up|up\.0\.)",
    "sdxl": r"lora_te1_text_model_encoder_layers_1_",  # the layer after the one that is read
    "lumina": r"lora_te_layers_2_",
    "sd3": r"^transformer_blocks\.0\.(ff_context|attn\.to_add_out)",  # of a ControlNet: what becomes of the text
    "flux": r"^transformer_blocks\.1\.(ff_context|attn\.to_add_out)",
}
YES = [f"{method}-{family}" for method in OPTIONS for family in FAMILIES if (method, family) not in NOES]
CONCEPTS = '[[prompts]]\ntarget = "a cat"\npositive = "a dog"\nresolution = 64\n'
NO_IMAGES = ("train_data_dir", "caption_extension", "resolution", "enable_bucket", "min_bucket_reso", "max_bucket_reso")


def widen(toy: Mapping[str, Path], family: str, folder: Path) -> dict[str, Path]:
    """The same model for inpainting."""
    name, channels = FIRST_LAYERS[family]
    tensors = load_file(toy["pretrained_model_name_or_path"])
    shape = (tensors[name].shape[0], channels, *tensors[name].shape[2:])
    tensors[name] = torch.randn(shape, generator=torch.Generator().manual_seed(0)) / channels
    save_file(tensors, folder / "inpainting.safetensors")
    return {**toy, "pretrained_model_name_or_path": folder / "inpainting.safetensors"}


def build(method: str, family: str, toy_shelf: ToyShelf, folder: Path) -> Run:
    toy, images = toy_shelf.paths(family), make_images(folder / "images", 2)
    options: dict[str, Any] = {"learning_rate": "1e-2", **OPTIONS[method]}
    tokenizers = [str(path) for name, path in toy.items() if name.startswith("tokenizer")]
    if method == "inpainting" and family in FIRST_LAYERS:
        toy, options["tokenizer"] = widen(toy, family, folder), tokenizers
    if family == "flux_kontext":
        options |= {"model_type": family, "reference_data_dirs": [images]}
    if method in CONTROLLED:
        options["conditioning_data_dir"] = images
    if method == "leco":
        (folder / "concepts.toml").write_text(CONCEPTS)
        options |= {**dict.fromkeys(NO_IMAGES), "reference_data_dirs": None, "prompts_file": folder / "concepts.toml"}
    return build_toy_run(toy, images, folder / "out", max_train_steps=STEPS, **options)


def copy_weights(run: Run) -> dict[str, dict[str, Tensor]]:
    """Part -> its loaded network's weights."""
    loaded = {name: part for name, part in run.model.parts.items() if part.is_loaded}
    return {
        name: {key: tensor.clone() for key, tensor in part.module.state_dict().items()} for name, part in loaded.items()
    }


@pytest.mark.full
@pytest.mark.parametrize("cell", YES)
def test_exactly_what_trains_changes(cell: str, toy_shelf: ToyShelf, tmp_path: Path) -> None:
    method, family = cell.split("-")
    run = build(method, family, toy_shelf, tmp_path)
    own = set(run.method.full_precision_parts(run.model.blueprint))
    assert own == {"full": {"denoiser"}, "control_net": {CONTROL_NET}}.get(method, set())
    frozen = copy_weights(run)
    before = {name: tensor.clone() for name, tensor in run.method.state_dict().items()}
    step = next(run.loader.steps())  # both times the same samples, timesteps and noise
    losses = [float(train_step(run, step).loss) for _ in range(STEPS)]
    assert losses[-1] < losses[0]
    assert not run.method.report()
    for part, weights in frozen.items():
        if part not in own:
            found = run.model.parts[part].module.state_dict()
            assert all(torch.equal(found[name], weights[name]) for name in weights), part
    after = run.method.state_dict()
    assert after.keys() == before.keys()
    same = {name for name, tensor in after.items() if torch.equal(tensor, before[name])}
    unreached = re.compile(UNREACHED.get(family, "nothing"))
    assert same == {name for name in after if name.endswith("alpha") or unreached.search(name)}
    if method == "textual_inversion":
        assert all((tensor != before[name]).any(1).all() for name, tensor in after.items()), "every row, the first too"
    assert all(tensor.isfinite().all() for tensor in after.values())

    path = tmp_path / "saved.safetensors"
    run.method.write(run.model, path, {}, None)
    saved = load_file(path)
    if method == "full":
        original = load_file(str(run.model.blueprint.source.path))
        assert {name: (t.dtype, t.shape) for name, t in saved.items() if t.ndim} == {
            name: (t.dtype, t.shape) for name, t in original.items() if t.ndim
        }
    else:
        assert saved
        assert len(saved) < 2 * len(after) + 2


@pytest.mark.full
@pytest.mark.parametrize(("method", "family"), NOES)
def test_the_others_are_refused(method: str, family: str, toy_shelf: ToyShelf, tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        build(method, family, toy_shelf, tmp_path)
    errors = raised.value.errors if isinstance(raised.value, SeveralErrors) else [raised.value]
    code, why = NOES[method, family]
    assert code in [error.code for error in errors]
    assert method != "control_net" or REGISTRY.get(family).no_control_net == why


def test_the_page_lists_these_pairs() -> None:
    maker = page_maker("make_methods")
    assert maker.PAGE.read_text(encoding="utf-8") == maker.page(), "docs/methods.md is out of date: run `make pages`"
