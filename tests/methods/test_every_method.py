"""Every method on every family, each with one training run at toy size; docs/methods.md lists the cells."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from families.toys import ToyShelf
from methods.method_cells import FAMILIES, NOES, OPTIONS, build_cell, list_every_cell, list_model_options
from methods.saved_elsewhere import CAPTION, READERS, Outputs, Saved
from pages import page_maker
from sfumato.cli.generate import ALIASES, COMMAND_THEMES
from sfumato.cli.generate_job import prepare_job
from sfumato.config.command import NO_TRIALS, read_command
from sfumato.data.batch import CONTROL, INPAINT, Extras, ImageInput, Images, Sizes, name_reference
from sfumato.data.loader import Step
from sfumato.errors import SeveralErrors, UserError
from sfumato.families.base import FAMILIES as REGISTRY
from sfumato.families.base import Family
from sfumato.families.control_net import CONTROL_NET
from sfumato.families.encoding import encode_with_grad
from sfumato.families.foreign_keys import V_MARK, ZERO_SNR_MARK
from sfumato.sampling.denoise import Predictor
from sfumato.tools.generate_setup import load_requested_model, make_adapters
from sfumato.training.run import Run
from sfumato.training.saving import collect_state, save_output, state_folder, write_state_folder
from toy_runs import equal_tensors, take_steps

UNREACHED = {  # names of what trains in vain in the toys, and is zero, so that it does not decay either
    # In the middle one token attends to itself alone.
    "sd": r"mid(dle)?_block_(attentions_0|1)_transformer_blocks_0_attn1_to_[qk]\.(lora_up|up\.|cond_to|depth_embed)",
    # The layer after the one that is read.
    "sdxl": r"(lora_te1_text_model_|^clip_l\.)(encoder[._]layers[._]1|final_layer_norm)",
    "lumina": r"(lora_te_|^gemma2\.)(layers[._]2|norm)[._]",
    "sd3": r"^transformer_blocks\.0\.(ff_context|attn\.to_add_out)",  # of a ControlNet: what becomes of the text
    "sd35": r"^transformer_blocks\.0\.(ff_context|attn\.to_add_out)",
    "flux": r"^transformer_blocks\.1\.(ff_context|attn\.to_add_out)",
}
CONTINUES = {  # method -> the option that training goes on with from its file
    **dict.fromkeys(
        ("adapter", "leco", "inpainting", "lllite", "lllite_version_2", "lllite_latents"), "network_weights"
    ),
    **dict.fromkeys(("textual_inversion", "inpainting_words"), "weights"),
    "control_net": "controlnet_model_name_or_path",
}
FAST = ("[control_net-sdxl]", "[textual_inversion-sd]", "[lllite-chroma]", "[full_text-chroma]")


@pytest.mark.fast_for(*FAST)
@pytest.mark.parametrize("cell", list_every_cell())
def test_trains_resumes_and_is_taken_everywhere(cell: str, toy_shelf: ToyShelf, tmp_path: Path) -> None:
    """Exactly what trains changes, the loss falls, resume is bitwise; the file gives what training had, bit for bit
    where training goes on from it and in `generate`, and in other programs.
    """
    method = cell.split("-")[0]
    given = list_model_options(cell, toy_shelf, tmp_path)
    run = build_cell(cell, given, tmp_path, "straight")
    steps = list(islice(run.loader.steps(), 2))
    train_and_check(cell, run, steps[0])
    file = run.output_path("lora")
    save_output(run, file, 2)
    resumed = build_cell(cell, given, tmp_path, "resumed", resume=state_folder(run, 1))
    following = next(resumed.loader.steps(resumed.start.step))
    assert [batch.ids.tolist() for batch in following.batches] == [batch.ids.tolist() for batch in steps[1].batches]
    take_steps(resumed, steps[0], (1,))
    again = resumed.output_path("lora")
    save_output(resumed, again, 2)
    assert equal_tensors(load_file(file), load_file(again))
    assert equal_tensors(resumed.method.state_dict(), run.method.state_dict())

    trained = compute(run.model, run.method)
    of_file = run.method.list_generate_options(str(file), run.model.blueprint)
    if "full" in method:
        assert all(list_entries(of_file[name]) == list_entries(given[name]) for name in of_file)
    goes_on = build_cell(cell, given, tmp_path, "on", **continue_from(method, file, of_file))
    assert equal_tensors(goes_on.method.state_dict(), run.method.state_dict())
    assert equal_tensors(compute(goes_on.model, goes_on.method), trained)
    assert equal_tensors(compute(*load_as_generate(given, of_file)), trained)
    check_elsewhere(cell, given, file, trained, toy_shelf)


def train_and_check(cell: str, run: Run, step: Step) -> None:
    """Two steps of the same samples, timesteps and noise; the state after the first is saved."""
    method, column = cell.split("-")
    own = {"control_net": {CONTROL_NET}, "full_text": {"denoiser", *run.model.text_parts}}
    is_whole = method in ("full", "inpainting_full")
    assert set(run.method.full_precision_parts(run.model.blueprint)) == own.get(
        method, {"denoiser"} if is_whole else set()
    )
    frozen = copy_weights(run)
    before = {name: tensor.clone() for name, tensor in run.method.state_dict().items()}
    losses = take_steps(run, step, (0,))
    write_state_folder(run, collect_state(run, 1), state_folder(run, 1))
    losses += take_steps(run, step, (1,))
    assert losses[1] < losses[0]
    assert not run.method.report()
    after = run.method.state_dict()
    trained = {tensor.data_ptr() for tensor in after.values()}
    for part, weights in frozen.items():
        for name, tensor in run.model.parts[part].module.state_dict().items():
            assert tensor.data_ptr() in trained or torch.equal(tensor, weights[name]), name
    numbers = [tensor.numel() for name, tensor in after.items() if not name.endswith("alpha")]
    assert sum(numbers) == sum(part.parameters for part in run.plan.parts)
    assert after.keys() == before.keys()
    same = {name for name, tensor in after.items() if torch.equal(tensor, before[name])}
    unreached = re.compile(UNREACHED.get(column, "nothing"))
    assert same == {name for name in after if name.endswith("alpha") or unreached.search(name)}
    if "token_string" in OPTIONS[method]:
        assert all((tensor != before[name]).any(1).all() for name, tensor in after.items()), "every row, the first too"
    assert all(tensor.isfinite().all() for tensor in after.values())


def copy_weights(run: Run) -> dict[str, dict[str, Tensor]]:
    """Part -> its loaded network's weights."""
    loaded = {name: part for name, part in run.model.parts.items() if part.is_loaded}
    return {
        name: {key: tensor.clone() for key, tensor in part.module.state_dict().items()} for name, part in loaded.items()
    }


def list_entries(file: str) -> dict[str, tuple[torch.dtype, torch.Size]]:
    """The names, dtypes and shapes of a checkpoint, without the EMA of its weights and marks of what options said."""
    entries = {name: (tensor.dtype, tensor.shape) for name, tensor in load_file(file).items()}
    unlike = ("model_ema.", V_MARK, ZERO_SNR_MARK)
    return {name: entry for name, entry in entries.items() if not name.startswith(unlike)}


def continue_from(method: str, file: Path, of_file: Mapping[str, Any]) -> dict[str, Any]:
    """Options of training that go on from a file, without those of what is in it. of_file: those of `generate`."""
    if method not in CONTINUES:  # whole models, perhaps with files of text encoders
        return dict(of_file)
    known = ("network_dim",) if "lllite" in method else ("num_vectors_per_token",)
    return {**dict.fromkeys(known), CONTINUES[method]: file}


def load_as_generate(given: Mapping[str, Any], options: Mapping[str, Any]) -> tuple[Family, Predictor]:
    """The model and what is attached to it by a command line of `sfumato generate`."""
    line = ["--prompt", "a cat"]
    for name, value in {**given, **options}.items():
        values = [] if value is True else value if isinstance(value, list) else [value]
        line += [f"--{name}", *map(str, values)]
    request = prepare_job(read_command(line, *COMMAND_THEMES, aliases=ALIASES, absent=NO_TRIALS), {}, {}, None).request
    model = load_requested_model(request)
    model.load()
    return model, make_adapters(request, model)


def draw(channels: int, side: int) -> Tensor:
    return torch.rand(1, channels, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


def draw_control(model: Family) -> ImageInput:
    """A control image as pixels and as latents."""
    return ImageInput(pixels=draw(3, 64), latents=draw(model.latents.channels, 8))


def draw_images(model: Family) -> Images:
    """What a model may see beside the noisy image."""
    control = draw_control(model)
    images = {CONTROL: replace(control, **{"pixels" if model.takes_control_latents else "latents": None})}
    if model.num_references:
        images[name_reference(0)] = ImageInput(latents=control.latents)
    if model.blueprint.inpaints:
        mask = (draw(1, 64) > 0).float()
        images[INPAINT] = ImageInput(latents=torch.cat([model.shrink_mask(mask), draw(model.latents.channels, 8)], 1))
    return images


@torch.no_grad()
def compute(model: Family, method: Predictor, *, is_steered: bool = True) -> Outputs:
    """The prediction for a fixed input, and the text that it was made for. is_steered: by a control image."""
    model.load()
    for part in model.parts.values():
        part.module.eval()
    images = draw_images(model)
    extras = Extras(images=images if is_steered else {role: images[role] for role in images.keys() - {CONTROL}})
    method.set_batch(model, extras)
    text = {part: encode_with_grad(model, part, [method.rewrite_caption(CAPTION)]) for part in model.text_parts}
    conditioning = model.condition(text, Sizes.from_size(1, 64, 64), None)
    x = torch.randn(1, model.latents.channels, 8, 8, generator=torch.Generator().manual_seed(0))
    prediction = method.predict(model, x, torch.tensor([600.0]), conditioning, extras)
    return {"prediction": prediction, **conditioning}


def check_elsewhere(cell: str, given: Mapping[str, Any], file: Path, trained: Outputs, toy_shelf: ToyShelf) -> None:
    """Another program that reads the file computes the same; the model alone does not."""
    method, column = cell.split("-")
    family, variant = FAMILIES[column]
    more = {"controlnet_model_name_or_path": file} if method == "control_net" else {}
    model, alone = load_as_generate(given, more)
    plain = compute(model, alone, is_steered=False)
    assert (plain["prediction"] - trained["prediction"]).abs().max() > 1e-5
    folder = toy_shelf.paths(family, "diffusers", variant)["pretrained_model_name_or_path"]
    found = READERS[method](Saved(file, model, folder, lambda: compute(model, alone), draw_control(model)))
    for name, tensor in found.items():
        limit = 2e-5 * float(trained[name].float().abs().max().clamp(min=1))
        torch.testing.assert_close(tensor.float(), trained[name].float(), rtol=0, atol=limit)


@pytest.mark.full
@pytest.mark.parametrize(("row", "family"), NOES)
def test_the_others_are_refused(row: str, family: str, toy_shelf: ToyShelf, tmp_path: Path) -> None:
    cell = f"{row}-{family}"
    with pytest.raises(UserError) as raised:
        build_cell(cell, list_model_options(cell, toy_shelf, tmp_path), tmp_path, "out")
    errors = raised.value.errors if isinstance(raised.value, SeveralErrors) else [raised.value]
    code, why = NOES[row, family]
    assert code in [error.code for error in errors]
    assert row != "control_net" or REGISTRY.get(family).no_control_net == why


def test_the_page_lists_these_cells() -> None:
    maker = page_maker("make_methods")
    assert maker.PAGE.read_text(encoding="utf-8") == maker.page(), "docs/methods.md is out of date: run `make pages`"
