"""The contract of every kind of adapter, at toy size: it learns, is saved and loaded, resumes, and is merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from families.toys import ToyShelf
from others.models import compute_output, compute_with_file, load_toy
from sfumato.adapters.kinds import read_adapter_file
from sfumato.cli.main import main
from sfumato.errors import UserError
from sfumato.families.base import Family
from sfumato.formats.adapter_kind import describe_kinds
from sfumato.methods.inference_adapters import InferenceAdapters
from sfumato.train import train_step
from toy_runs import build_toy_run, equal_tensors, make_images, read_metrics, read_weights, train_toy

LYCORIS = "lycoris.kohya"
BUTTERFLY: dict[str, Any] = {"network_args": ["algo=boft"], "network_dim": 64}
NORMS_ALONE = {"network_module": "norm_difference", "network_args": [], "network_train_unet_only": True}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {  # -> family, options
    "LoKr": ("flux", {"network_module": "networks.lokr", "network_args": ["factor=4", "rank_dropout=0.1"]}),
    "LoKr with convolutions": (
        "sd", {"network_module": "networks.lokr", "network_args": ["conv_dim=1", "use_tucker=True"]},
    ),
    "DoRA of LoRA": ("sd", {"network_module": LYCORIS, "network_args": ["algo=locon", "dora_wd=True", "conv_dim=1"]}),
    "DoRA of LoRA, columns": (
        "flux", {"network_args": ["dora_wd=True", "wd_on_output=False"], "network_train_unet_only": True},
    ),
    "DoRA of split LoRA": (
        "flux", {"network_args": ["dora_wd=True", "split_qkv=True"], "network_train_unet_only": True},
    ),
    "DoRA of LoKr": (
        "sdxl", {"network_module": LYCORIS, "network_args": ["algo=lokr", "dora_wd=True", "preset=attn-mlp"]},
    ),
    "DoRA of LoKr, SD3": (
        "sd3", {"network_module": LYCORIS, "network_args": ["algo=lokr", "dora_wd=True", "factor=8"]},
    ),
    "LoRA, FA": ("sd", {"network_module": "networks.lora_fa", "network_args": ["conv_dim=2"]}),
    "LoRA, FA, FLUX": ("flux", {"network_module": "networks.lora_fa", "network_args": ["rank_dropout=0.1"]}),
    "Tucker LoRA with convolutions": (
        "sd", {"network_args": ["conv_dim=2", "use_tucker=True", "rank_dropout=0.1"], "network_train_unet_only": True},
    ),
    "Tucker LoRA with convolutions, SDXL": (
        "sdxl", {"network_module": LYCORIS, "network_args": ["algo=locon", "use_tucker=True", "conv_dim=2"]},
    ),
    "norm difference": ("sd", {"network_args": ["train_norm=True", "rank_dropout=0.1", "conv_dim=1"]}),
    "norm difference, SDXL": (
        "sdxl", {"network_module": LYCORIS, "network_args": ["algo=locon", "train_norm=True", "preset=attn-mlp"]},
    ),
    "norm difference, FLUX": ("flux", {"network_args": ["train_norm=True"], "scale_weight_norms": 1}),
    "norm difference, SD3": ("sd3:3.5-medium", NORMS_ALONE),
    "norm difference, Lumina": ("lumina", NORMS_ALONE),
    "norm difference, Chroma": ("chroma", {"network_args": ["train_norm=True"]}),
    "LoHa with convolutions": (
        "sd", {"network_module": LYCORIS, "network_args": ["algo=loha", "conv_dim=2", "use_tucker=True"]},
    ),
    "full difference with convolutions": (
        "sd", {"network_module": LYCORIS, "network_args": ["algo=full"], "learning_rate": "1e-3"},
    ),
    "full difference": ("flux", {"network_module": LYCORIS, "network_args": ["algo=full", "preset=attn-mlp"]}),
    "full difference, SDXL": ("sdxl", {"network_module": LYCORIS, "network_args": ["algo=full", "preset=attn-only"]}),
    "full difference, SD3": ("sd3", {"network_module": "full_difference", "network_args": []}),
    "full difference, Lumina": ("lumina", {"network_module": LYCORIS, "network_args": ["algo=full"]}),
    "full difference, Chroma": ("chroma", {"network_module": LYCORIS, "network_args": ["algo=full"]}),
    "(IA)3 with convolutions": ("sd", {"network_module": LYCORIS, "network_args": ["algo=ia3"]}),
    "(IA)3": ("flux", {"network_module": "ia3", "network_args": ["train_on_input=True"]}),
    "(IA)3, SDXL": ("sdxl", {"network_module": LYCORIS, "network_args": ["algo=ia3", "preset=ia3"]}),
    "(IA)3, SD3": ("sd3", {"network_module": "ia3", "network_args": []}),
    "(IA)3, Lumina": ("lumina", {"network_module": LYCORIS, "network_args": ["algo=ia3", "train_on_input=True"]}),
    "(IA)3, Chroma": ("chroma", {"network_module": LYCORIS, "network_args": ["algo=ia3"]}),
    "GLoRA with convolutions": ("sd", {"network_module": LYCORIS, "network_args": ["algo=glora"]}),
    "GLoRA": ("flux", {"network_module": "glora", "network_args": ["module_dropout=0.1"]}),
    "GLoRA, SDXL": ("sdxl", {"network_module": LYCORIS, "network_args": ["algo=glora", "preset=attn-mlp"]}),
    "GLoRA, SD3": ("sd3", {"network_module": "glora", "network_args": []}),
    "GLoRA, Lumina": ("lumina", {"network_module": LYCORIS, "network_args": ["algo=glora"]}),
    "GLoRA, Chroma": ("chroma", {"network_module": LYCORIS, "network_args": ["algo=glora"]}),
    "LoHa, FLUX": ("flux", {"network_module": "networks.loha", "network_args": ["rank_dropout=0.1"]}),
    "LoHa, SDXL": ("sdxl", {"network_module": LYCORIS, "network_args": ["algo=loha", "preset=attn-mlp"]}),
    "LoHa, SD3": ("sd3", {"network_module": "networks.loha", "network_args": []}),
    "LoHa, Lumina": ("lumina", {"network_module": LYCORIS, "network_args": ["algo=loha"]}),
    "LoHa, Chroma": ("chroma", {"network_module": LYCORIS, "network_args": ["algo=loha", "preset=attn-only"]}),
    "DoRA of LoHa": ("sd", {"network_module": LYCORIS, "network_args": ["algo=loha", "dora_wd=True"]}),
    "LoRA, scalar": ("sd", {"network_module": LYCORIS, "network_args": ["algo=locon", "use_scalar=True"]}),
    "DoRA of LoKr, scalar": (
        "flux", {"network_module": "networks.lokr", "network_args": ["use_scalar=True", "dora_wd=True"]},
    ),
    "LoRA, PiSSA": ("flux", {"network_args": ["pissa=True"], "learning_rate": "1e-3"}),
    "LoRA, PiSSA, SD": ("sd", {"network_args": ["pissa=True", "conv_dim=2"], "learning_rate": "1e-3"}),
    "LoRA, DyLoRA": (
        "sdxl", {"network_module": "networks.dylora", "network_dim": 4, "network_args": ["unit=2", "conv_dim=4"]},
    ),
    "LoRA, DyLoRA, FLUX": ("flux", {"network_module": LYCORIS, "network_args": ["algo=dylora", "block_size=1"]}),
    "Diag-OFT with convolutions": (
        "sd", {"network_module": LYCORIS, "network_args": ["algo=diag-oft", "constraint=1e-2", "rescaled=True"]},
    ),
    "Diag-OFT": ("flux", {"network_module": LYCORIS, "network_args": ["algo=diag-oft", "rank_dropout=0.1"]}),
    "Diag-OFT, SDXL": ("sdxl", {"network_module": LYCORIS, "network_args": ["algo=diag-oft", "preset=attn-mlp"]}),
    "Diag-OFT, SD3": ("sd3", {"network_module": "diag_oft", "network_args": []}),
    "Diag-OFT, Lumina": ("lumina", {"network_module": LYCORIS, "network_args": ["algo=diag-oft"]}),
    "Diag-OFT, Chroma": ("chroma", {"network_module": LYCORIS, "network_args": ["algo=diag-oft"]}),
    "Diag-OFT, OFT with convolutions": (
        "sd", {"network_module": "networks.oft", "network_args": ["enable_all_linear=True", "enable_conv=True"]},
    ),
    "Diag-OFT, OFT": ("flux", {"network_module": "networks.oft_flux", "network_args": []}),
    "Diag-OFT, OFT, SDXL": ("sdxl", {"network_module": "networks.oft", "network_args": []}),
    "Diag-OFT, OFT, SD3": ("sd3", {"network_module": "oft", "network_args": ["divided=True"]}),
    "Diag-OFT, OFT, Lumina": ("lumina", {"network_module": "oft", "network_args": []}),
    "Diag-OFT, OFT, Chroma": ("chroma", {"network_module": "networks.oft_flux", "network_args": []}),
    "BOFT with convolutions": ("sd", {"network_module": LYCORIS, **BUTTERFLY}),
    "BOFT": ("flux", {"network_module": LYCORIS, **BUTTERFLY}),
    "BOFT, SDXL": ("sdxl", {"network_module": LYCORIS, **BUTTERFLY}),
    "BOFT, SD3": ("sd3", {"network_module": LYCORIS, **BUTTERFLY}),
    "BOFT, Lumina": ("lumina", {"network_module": LYCORIS, **BUTTERFLY}),
    "BOFT, Chroma": ("chroma", {"network_module": LYCORIS, **BUTTERFLY}),
    "OFTv2 with convolutions": (
        "sd", {"network_module": "networks.oft_v2", "network_args": ["oft_block_size=4", "enable_conv=True"]},
    ),
    "OFTv2": (
        "flux",
        {"network_module": "networks.oft_v2", "network_args": ["coft=True", "coft_eps=0.1"], "network_dropout": 0.1},
    ),
    "OFTv2, SDXL": ("sdxl", {"network_module": "networks.oft_v2", "network_args": ["block_share=True"]}),
    "OFTv2, SD3": ("sd3", {"network_module": "networks.oft_v2", "network_args": []}),
    "OFTv2, Lumina": ("lumina", {"network_module": "networks.oft_v2", "network_args": []}),
    "OFTv2, Chroma": ("chroma", {"network_module": "networks.oft_v2", "network_args": []}),
    "BOFT of PEFT with convolutions": (
        "sd", {"network_module": "networks.boft", "network_args": ["boft_block_size=4", "enable_conv=True"]},
    ),
    "BOFT of PEFT": (
        "flux", {"network_module": "networks.boft", "network_args": ["boft_n_butterfly_factor=2"]},
    ),
    "BOFT of PEFT, SDXL": ("sdxl", {"network_module": "networks.boft", "network_args": ["module_dropout=0.1"]}),
    "BOFT of PEFT, SD3": ("sd3", {"network_module": "networks.boft", "network_args": []}),
    "BOFT of PEFT, Lumina": ("lumina", {"network_module": "networks.boft", "network_args": []}),
    "BOFT of PEFT, Chroma": ("chroma", {"network_module": "networks.boft", "network_args": []}),
    "LoKr, Lumina": ("lumina", {"network_module": LYCORIS, "network_args": ["algo=lokr", "full_matrix=True"]}),
    "LoKr, Chroma": ("chroma", {"network_module": LYCORIS, "network_args": ["algo=lokr", "preset=attn-only"]}),
}  # fmt: skip
FAST = {"LoKr", "DoRA of LoRA", "LoHa with convolutions"}
OTHER_FAMILIES = [name for name in KINDS if "OFT" in name and name.endswith(("SDXL", "SD3", "Lumina", "Chroma"))]
each_kind = pytest.mark.parametrize(
    "name",
    [
        name if name in FAST else pytest.param(name, marks=pytest.mark.full)
        for name in KINDS
        if name not in OTHER_FAMILIES
    ],
)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"), 3)


def find_toy(toy_shelf: ToyShelf, family: str) -> dict[str, Path]:
    """family: with its variant after a colon, where it is not the first."""
    name, _, variant = family.partition(":")
    return toy_shelf.paths(name, variant=variant)


@pytest.mark.full
@each_kind
def test_the_loss_of_a_fixed_batch_falls(name: str, toy_shelf: ToyShelf, images: Path, tmp_path: Path) -> None:
    family, options = KINDS[name]
    run = build_toy_run(find_toy(toy_shelf, family), images, tmp_path, **{"learning_rate": "3e-3"} | options)
    step = next(run.loader.steps())
    losses = [float(train_step(run, step).loss) for _ in range(8)]
    assert losses[-1] < losses[0] * 0.999, losses
    assert not run.method.report()


@pytest.mark.full
@each_kind
def test_saved_loaded_and_resumed(name: str, toy_shelf: ToyShelf, images: Path, tmp_path: Path) -> None:
    """Resume is bitwise, `generate` and --base_weights change the model alike, training goes on from the file."""
    family, options = KINDS[name]
    toy, common = (
        find_toy(toy_shelf, family),
        {"learning_rate": "1e-2"} | options | {"max_train_steps": 4, "save_state": True},
    )
    straight = train_toy(toy, images, tmp_path / "straight", **common)
    parts = train_toy(toy, images, tmp_path / "parts", **common, save_every_n_steps=2)
    train_toy(toy, images, parts, **common, resume=parts / "lora-step00000002-state")
    assert equal_tensors(read_weights(straight), read_weights(parts))
    assert read_metrics(straight) == read_metrics(parts)

    file = straight / "lora.safetensors"
    check_file(name, family, toy_shelf, file)
    on = {name: value for name, value in options.items() if name not in ("network_args", "network_dim")}
    kept = [each for each in options["network_args"] if not each.startswith(("conv_dim", "enable_", "rank_dropout"))]
    again = build_toy_run(
        toy, images, tmp_path / "again", network_weights=file, **on | {"network_args": kept},
        dim_from_weights=True, network_dim=None,
    )  # fmt: skip
    exported, saved = dict(again.method.engine.export_tensors()), read_weights(straight)  # pyright: ignore
    if "PiSSA" in name:  # whose file has a sum of two of its tensors
        assert exported.keys() == saved.keys()
        assert all(torch.allclose(tensor, saved[key], atol=1e-7) for key, tensor in exported.items())
    else:
        assert equal_tensors(exported, saved)


def check_file(name: str, family: str, toy_shelf: ToyShelf, file: Path) -> None:
    """It is of the kind; hooked and merged, it changes the model alike."""
    read = read_adapter_file(file)
    label = name.partition(",")[0].partition(" with")[0].replace("split ", "")
    labels = {describe_kinds(kinds) for kinds in read.kinds.values()}
    assert labels - ({"LoRA"} if label in ("Tucker LoRA", "norm difference") else set()) == {label}
    plain, model = compute_output(load_toy(toy_shelf, *family.split(":"))), load_toy(toy_shelf, *family.split(":"))
    found = compute_with_file(model, file)
    assert (found - plain).abs().max() > 1e-5
    merged = load_toy(toy_shelf, *family.split(":"))
    InferenceAdapters(merged, (), base=[(file, 1.0)])
    torch.testing.assert_close(compute_output(merged), found, rtol=0, atol=2e-5 * float(found.abs().max()))


@pytest.mark.full
@pytest.mark.parametrize("name", OTHER_FAMILIES)
def test_further_families_train_save_and_load(name: str, toy_shelf: ToyShelf, images: Path, tmp_path: Path) -> None:
    family, options = KINDS[name]
    train_toy(
        find_toy(toy_shelf, family), images, tmp_path, **options | {"max_train_steps": 3, "learning_rate": "1e-2"}
    )
    check_file(name, family, toy_shelf, tmp_path / "lora.safetensors")


def test_a_file_of_another_kind_is_named(toy_shelf: ToyShelf, images: Path, tmp_path: Path) -> None:
    toy = toy_shelf.paths("flux")
    train_toy(toy, images, tmp_path / "a", max_train_steps=1, **KINDS["LoKr"][1])
    file = tmp_path / "a" / "lora.safetensors"
    with pytest.raises(UserError) as error:
        build_toy_run(toy, images, tmp_path / "b", network_weights=file)
    assert error.value.code == "network-weights-of-other-kind"
    assert "--network_module lokr" in error.value.fix


@pytest.mark.full
def test_lora_convert(toy_shelf: ToyShelf, images: Path, tmp_path: Path, codes: list[str]) -> None:
    """diffusers loads DoRA with the same output, PEFT's kinds alone; what it does not know is refused."""
    from diffusers import DiffusionPipeline

    toy = toy_shelf.paths("flux")
    options = {"network_train_unet_only": True, "max_train_steps": 2, "learning_rate": "1e-2"}
    train_toy(toy, images, tmp_path / "dora", network_args=["dora_wd=True"], **options)
    source, target = tmp_path / "dora" / "lora.safetensors", tmp_path / "theirs.safetensors"
    assert main(["lora", "convert", str(source), str(target), "--to", "diffusers"]) == 0
    model = load_toy(toy_shelf, "flux")
    plain, ours = compute_output(model), compute_with_file(model, source)
    pipe: Any = DiffusionPipeline.from_pretrained(toy_shelf.paths("flux", "diffusers")["pretrained_model_name_or_path"])
    pipe.load_lora_weights(tmp_path, weight_name="theirs.safetensors")
    with other_denoiser(model, pipe.transformer):
        torch.testing.assert_close(compute_output(model), ours, rtol=0, atol=1e-5 * float(ours.abs().max()))
    assert (ours - plain).abs().max() > 1e-4
    train_toy(toy, images, tmp_path / "lokr", **KINDS["LoKr"][1] | options)
    source = tmp_path / "lokr" / "lora.safetensors"
    assert main(["lora", "convert", str(source), str(tmp_path / "no.safetensors"), "--to", "diffusers"]) == 2
    assert codes == ["export-kind-unknown"]
    assert not (tmp_path / "no.safetensors").exists()


def other_denoiser(model: Family, network: Any) -> Any:
    from others.test_libraries import other_network

    return other_network(model, "denoiser", network)


def test_the_metadata_name_module_and_arguments(toy_shelf: ToyShelf, images: Path, tmp_path: Path) -> None:
    _, options = KINDS["DoRA of LoRA"]
    train_toy(toy_shelf.paths("sd"), images, tmp_path, max_train_steps=1, **options)
    with safe_open(tmp_path / "lora.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_network_module"] == LYCORIS
    assert '"dora_wd": "True"' in metadata["ss_network_args"]
