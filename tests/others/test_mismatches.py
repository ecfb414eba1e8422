"""Files that do not belong to a model, notes about files that other programs do not read, and what those say of us."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from families.toys import ToyShelf
from others import writers
from others.models import draw_changes, load_toy
from sfumato.adapters.kinds import read_adapter_file
from sfumato.config import NoiseOptions, load_config
from sfumato.errors import UserError
from sfumato.families.adapter_names import match_adapter_file
from sfumato.families.base import Family, find_family
from sfumato.families.source import open_source
from sfumato.plan import make_run_plan
from toy_runs import make_arguments, make_images, train_toy

QKV = [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"]


@pytest.fixture(scope="module")
def flux(toy_shelf: ToyShelf) -> Family:
    return load_toy(toy_shelf, "flux")


def match(model: Family, path: Path) -> set[str]:
    parts = {name: part for name, part in model.parts.items() if part.spec.targets}
    groups = {name: part.groups(every=True) for name, part in parts.items()}
    return set(match_adapter_file(read_adapter_file(path), {name: part.spec for name, part in parts.items()}, groups))


def get_error(model: Family, state: dict[str, torch.Tensor], path: Path) -> UserError:
    file = writers.write(path / "a.safetensors", state, {"ss_base_model_version": "toy9"})
    with pytest.raises(UserError) as error:
        match(model, file)
    assert str(file) in error.value.what
    return error.value


def test_a_layer_under_two_names(flux: Family, tmp_path: Path) -> None:
    changes = draw_changes(flux.denoiser, QKV[:1])
    state = writers.write_ai_toolkit(changes, "transformer") | writers.write_diffusion_pipe(changes)
    assert get_error(flux, state, tmp_path).code == "adapter-layer-twice"


def test_a_file_for_another_family(flux: Family, toy_shelf: ToyShelf, tmp_path: Path) -> None:
    """The error names families that have these layers, up to five of the names, and what the metadata says."""
    other = load_toy(toy_shelf, "lumina")
    paths = [path for group in other.parts["denoiser"].groups() for path in group.paths]
    error = get_error(flux, writers.write_onetrainer(draw_changes(other.denoiser, paths)), tmp_path)
    assert error.code == "adapter-names-unmatched"
    assert "lumina" in error.fix
    assert error.what.count("lora_transformer_") == 5
    assert "toy9" in error.what


def test_a_file_for_another_size(flux: Family, tmp_path: Path) -> None:
    state = writers.write_ai_toolkit(draw_changes(flux.denoiser, QKV[:1]), "transformer")
    state = {key: tensor.repeat(2, 1) if ".lora_B" in key else tensor for key, tensor in state.items()}
    assert get_error(flux, state, tmp_path).code == "adapter-shape-mismatch"


def test_a_name_that_two_encoders_share(toy_shelf: ToyShelf, tmp_path: Path) -> None:
    """Where their sizes differ, these decide; where they are equal, nothing does."""
    model = load_toy(toy_shelf, "sdxl")
    layer = "text_model.encoder.layers.0.self_attn.q_proj"
    changes = draw_changes(model.parts["clip_g"].module, [layer])
    file = writers.write(tmp_path / "a.safetensors", writers.write_peft(changes))
    widths = {name: model.parts[name].module.get_input_embeddings().embedding_dim for name in ("clip_l", "clip_g")}
    assert widths["clip_l"] != widths["clip_g"]
    assert match(model, file) == {f"lora_te2_{layer.replace('.', '_')}"}
    model.parts["clip_l"] = model.parts["clip_g"]
    assert get_error(model, writers.write_peft(changes), tmp_path).code == "adapter-part-ambiguous"


def test_whole_weights_without_a_prefix(flux: Family, tmp_path: Path) -> None:
    state = writers.write_bare(draw_changes(flux.denoiser, QKV)) | {"x_embedder.weight": torch.ones(2)}
    assert get_error(flux, state, tmp_path).code == "adapter-with-whole-weights"


def test_one_down_matrix_for_all_keeps_the_rank(flux: Family, tmp_path: Path) -> None:
    """As our own export writes a fused layer: three names with the same first matrix."""
    changes = draw_changes(flux.denoiser, QKV)
    shared = {path: type(change)(changes[QKV[0]].down, change.up, 1.5) for path, change in changes.items()}
    parts = {"denoiser": flux.parts["denoiser"]}
    groups = {"denoiser": flux.parts["denoiser"].groups(every=True)}
    for drawn, rank in ((shared, 3), (changes, 9)):
        file = writers.write(tmp_path / "a.safetensors", writers.write_simpletuner(drawn, "transformer"))
        specs = {name: part.spec for name, part in parts.items()}
        (adapter,) = match_adapter_file(read_adapter_file(file), specs, groups).values()
        tensors = adapter.make_tensors()
        assert len(tensors["lora_down.weight"]) == rank
        product = tensors["lora_up.weight"].float() @ tensors["lora_down.weight"].float()
        expected = torch.cat([drawn[path].compute_delta(torch.empty(len(drawn[path].up), 64)) for path in QKV])
        torch.testing.assert_close(product * tensors["alpha"] / rank, expected)


@pytest.mark.parametrize(("options", "word"), [
    ({"network_args": ["train_t5xxl=True"]}, "T5"),
    ({"network_args": ["in_dims=[2,0,0,0,0]"], "network_train_unet_only": True}, "in_dims"),
    ({"network_train_unet_only": True}, ""),
])  # fmt: skip
def test_saving_says_what_other_programs_do_not_read(
    options: dict[str, object], word: str, toy_shelf: ToyShelf, tmp_path: Path
) -> None:
    options |= {"max_train_steps": 2, "save_every_n_steps": 1}
    options |= {"console_log_level": "INFO", "console_log_file": tmp_path / "log.txt"}
    train_toy(toy_shelf.paths("flux"), make_images(tmp_path / "images"), tmp_path / "out", **options)
    said = [line for line in (tmp_path / "log.txt").read_text().splitlines() if "InvokeAI" in line]
    assert len(said) == bool(word)
    assert word in "".join(said)


IMPLEMENTATIONS = {  # of LoRA, as sd-scripts writes them
    "sd": "diffusers",
    "sdxl": "https://github.com/Stability-AI/generative-models",
    "sd3": "diffusers",
    "flux": "https://github.com/black-forest-labs/flux",
    "chroma": "https://huggingface.co/lodestones/Chroma",
    "lumina": "https://github.com/Alpha-VLLM/Lumina-Image-2.0",
}
OF_CHECKPOINTS = {"sd": IMPLEMENTATIONS["sdxl"], "sd3": IMPLEMENTATIONS["sdxl"]}


@pytest.mark.parametrize("family", IMPLEMENTATIONS)
def test_implementations(family: str, toy_shelf: ToyShelf) -> None:
    options = toy_shelf.options(family)
    source = open_source(options)
    blueprint = find_family(None, source).read(source, options, NoiseOptions())
    assert blueprint.implementation == IMPLEMENTATIONS[family]
    assert blueprint.checkpoint_implementation == OF_CHECKPOINTS.get(family, "")


def test_the_implementation_in_a_file(toy_shelf: ToyShelf, tmp_path: Path) -> None:
    images = make_images(tmp_path / "images")
    out = train_toy(toy_shelf.paths("flux"), images, tmp_path / "out", network_train_unet_only=True, max_train_steps=1)
    with safe_open(out / "lora.safetensors", "pt") as file:
        assert file.metadata()["modelspec.implementation"] == IMPLEMENTATIONS["flux"]


@pytest.mark.full
def test_ranks_of_a_file_for_one_part(toy_shelf: ToyShelf, tmp_path: Path) -> None:
    """--dim_from_weights with a file for the denoiser alone, while the encoder would train, too."""
    model = load_toy(toy_shelf, "sd")
    paths = [path for group in model.parts["denoiser"].groups() for path in group.paths]
    state = writers.write_kohya(draw_changes(model.denoiser, paths))
    file = writers.write(tmp_path / "a.safetensors", state)
    images = make_images(tmp_path / "images")
    options = {"network_weights": file, "dim_from_weights": True}
    with pytest.raises(UserError) as error:
        make_run_plan(
            load_config(make_arguments(toy_shelf.paths("sd"), images, tmp_path / "out", **options)), processes=1
        )
    assert error.value.code == "part-without-adapters"
    assert "--network_train_unet_only" in error.value.fix
    options["network_train_unet_only"] = True
    plan = make_run_plan(
        load_config(make_arguments(toy_shelf.paths("sd"), images, tmp_path / "out", **options)), processes=1
    )
    (line,) = [note for note in plan.notes if str(file) in note]
    assert f"{len(state) // 3} of {len(state) // 3} adapters start from it" in line
