"""Every kind of adapter on every family, each with one training run at toy size; docs/adapters.md lists the cells."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adapters.cells import KINDS, REFUSED, VARIANTS, goes_to_diffusers, list_cells, make_options, parse_options
from families.toys import ToyShelf
from others.models import attached_by_diffusers, compute_output, compute_with_file, find_text_parts
from pages import page_maker
from sfumato.adapters.kinds import list_kinds, read_adapter_file
from sfumato.config import load_config
from sfumato.data.batch import Extras
from sfumato.errors import UserError
from sfumato.families.base import Family
from sfumato.methods.adapter import AdapterMethod
from sfumato.methods.inference_adapters import InferenceAdapters
from sfumato.plan import make_run_plan
from sfumato.tools.export_lora import export_lora
from sfumato.training.run import Run
from sfumato.training.saving import collect_state, save_output, state_folder, write_state_folder
from toy_runs import build_toy_run, equal_tensors, make_arguments, make_images, take_steps

IN_FILES_OF_OTHERS = ("trained_scalar",)  # its factor is multiplied into a matrix
REFUSES_EXPORTS = ("flux", "lumina")  # families on which kinds without a counterpart in diffusers are tried
FAST = ("[lokr-chroma]",)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"), 1)


@pytest.mark.fast_for(*FAST)
@pytest.mark.parametrize(("kind", "family"), list_cells())
def test_trains_resumes_and_is_taken_everywhere(
    kind: str, family: str, toy_shelf: ToyShelf, images: Path, tmp_path: Path
) -> None:
    """Of one batch the loss falls, resume is bitwise; hooked, merged, trained on and in diffusers it is what it was."""
    toy, options = toy_shelf.paths(family, variant=VARIANTS.get((kind, family), "")), make_options(kind, family)
    options |= {"max_train_steps": 3}
    run = build_toy_run(toy, images, tmp_path / "straight", **options)
    step = next(run.loader.steps())
    losses = take_steps(run, step, (0, 1))
    state = state_folder(run, 2)
    write_state_folder(run, collect_state(run, 2), state)
    losses += take_steps(run, step, (2,))
    assert losses[-1] < losses[0] * 0.999, losses
    assert not run.method.report()

    resumed = build_toy_run(toy, images, tmp_path / "resumed", **options, resume=state)
    assert take_steps(resumed, step, (2,)) == losses[2:]
    file = save(run)
    assert equal_tensors(load_file(file), find_method(resumed).engine.export_tensors())

    assert kind in IN_FILES_OF_OTHERS or is_in_file(kind, file)
    check_trained_on(run, file, make_arguments(toy, images, tmp_path / "on", **options | {"network_weights": file}))
    check_use(run, file, exported=goes_to_diffusers(kind, family))
    if family in REFUSES_EXPORTS and not goes_to_diffusers(kind, family):
        assert_not_exported(run.model, file)


def is_in_file(kind: str, file: Path) -> bool:
    """Whether a reader finds the kind, or the one that it is saved as."""
    own = list_kinds()[kind]
    saved = list_kinds()[own.files_of] if own.files_of else own
    return any(saved in kinds for kinds in read_adapter_file(file).kinds.values())


def save(run: Run) -> Path:
    path = run.output_path("lora")
    save_output(run, path, run.step)
    return path


def find_method(run: Run) -> AdapterMethod:
    assert isinstance(run.method, AdapterMethod)
    return run.method


def check_trained_on(run: Run, file: Path, line: list[str]) -> None:
    """What --network_weights makes of the file has the same tensors."""
    method = AdapterMethod(load_config(line))
    method.prepare(run.model)
    method.engine.detach()
    found, saved = method.engine.export_tensors(), load_file(file)
    assert found.keys() == saved.keys()
    for name, tensor in found.items():  # PiSSA's file has a sum of two of its tensors
        torch.testing.assert_close(tensor, saved[name], rtol=0, atol=1e-7)


def check_use(run: Run, file: Path, *, exported: bool) -> None:
    """As trained, hooked, merged and in diffusers it changes the model alike."""
    model, method = run.model, find_method(run)
    method.set_batch(model, Extras())
    method.modules.eval()
    trained = compute_output(model)
    method.engine.detach()
    plain = compute_output(model)
    assert (trained - plain).abs().max() > 1e-5
    limit = 2e-5 * float(trained.abs().max().clamp(min=1))
    torch.testing.assert_close(compute_with_file(model, file), trained, rtol=0, atol=limit)
    if exported:
        with attached_by_diffusers(model, file, file.with_name("exported.safetensors")):
            found = compute_output(model)
        torch.testing.assert_close(found, trained, rtol=0, atol=limit)
    InferenceAdapters(model, (), base=[(file, 1.0)])
    torch.testing.assert_close(compute_output(model), trained, rtol=0, atol=limit)


def assert_not_exported(model: Family, file: Path) -> None:
    target = file.with_name("exported.safetensors")
    with pytest.raises(UserError) as error:
        export_lora(file, target, program="diffusers", without=find_text_parts(model, load_file(file)))
    assert error.value.code == "export-kind-unknown"
    assert not target.exists()


@pytest.mark.full
@pytest.mark.parametrize(("kind", "family"), [(kind, family) for kind, cells in REFUSED.items() for family in cells])
def test_what_a_family_cannot_have_is_said(
    kind: str, family: str, toy_shelf: ToyShelf, images: Path, tmp_path: Path
) -> None:
    text, _, said = REFUSED[kind][family]
    config = load_config(make_arguments(toy_shelf.paths(family), images, tmp_path, **parse_options(text)))
    if said.startswith("--"):
        assert said in make_run_plan(config, processes=1).notes
        return
    with pytest.raises(UserError) as error:
        make_run_plan(config, processes=1)
    assert error.value.code == said


def test_no_kind_is_left_out() -> None:
    assert {*KINDS} == {*list_kinds()}


@pytest.mark.full
def test_the_page_is_up_to_date() -> None:
    maker = page_maker("make_adapters")
    assert maker.PAGE.read_text(encoding="utf-8") == maker.page(), "run `make pages`"
    assert {*maker.WHEN} == {*KINDS}
