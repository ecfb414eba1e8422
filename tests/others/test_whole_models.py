"""Whole models as other programs pass them around: in one file, in eight bits, in shards; they predict the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from families.loading import load_model, read_model
from families.toys import ToyShelf, in_pieces
from sfumato.config import ModelOptions, NoiseOptions
from sfumato.data.batch import Sizes
from sfumato.diffusion.objective import VariancePreserving
from sfumato.errors import UserError
from sfumato.families.base import Family
from sfumato.families.checkpoint_saving import list_all_weights, list_saved_networks, save_single_file
from sfumato.families.diffusers_folder import save_folder
from sfumato.families.encoding import encode_with_grad
from sfumato.formats.scaled import ScaledFile

BASE = "pretrained_model_name_or_path"
DENOISER, CLIP_L, T5, VAE = (
    "model.diffusion_model.", "text_encoders.clip_l.transformer.", "text_encoders.t5xxl.transformer.", "vae.",
)  # fmt: skip
State = dict[str, Tensor]


def prediction(model: Family, channels: int) -> Tensor:
    with torch.no_grad():
        text = {part: encode_with_grad(model, part, ["a red box"]) for part in model.text_parts}
        given = model.condition(text, Sizes.from_size(1, 64, 64), None)
        x = torch.randn(1, channels, 8, 8, generator=torch.Generator().manual_seed(0))
        return model.predict(x, torch.full((1,), 500.0), given)


def pixels(model: Family, channels: int) -> Tensor:
    with torch.no_grad():
        return model.decode(torch.randn(1, channels, 8, 8, generator=torch.Generator().manual_seed(0)))


@pytest.fixture(scope="module")
def flux(toy_shelf: ToyShelf) -> ModelOptions:
    toy = toy_shelf.paths("flux")
    return toy_shelf.options("flux", tokenizer=(str(toy["tokenizer"]), str(toy["tokenizer_2"])))


@pytest.fixture(scope="module")
def expected(flux: ModelOptions) -> Tensor:
    return prediction(load_model(flux), 16)


def with_prefix(prefix: str, path: str | None) -> State:
    assert path is not None
    return {prefix + key: tensor for key, tensor in load_file(path).items()}


def write_one_file(flux: ModelOptions, path: Path) -> Path:
    """As ComfyUI saves a checkpoint."""
    state = with_prefix(DENOISER, flux.pretrained_model_name_or_path) | with_prefix(CLIP_L, flux.clip_l)
    state |= with_prefix(T5, flux.t5xxl) | with_prefix(VAE, flux.ae)
    save_file(state | {"text_encoders.clip_l.logit_scale": torch.ones(())}, path)
    return path


@pytest.mark.parametrize("family", [None, "flux"])
def test_one_file_with_everything(family: str | None, flux: ModelOptions, expected: Tensor, tmp_path: Path) -> None:
    path = write_one_file(flux, tmp_path / "flux1-dev.safetensors")
    model = load_model(ModelOptions(pretrained_model_name_or_path=str(path), tokenizer=flux.tokenizer), family=family)
    assert torch.equal(prediction(model, 16), expected)
    assert torch.equal(pixels(model, 16), pixels(load_model(flux), 16))
    assert all(model.blueprint.in_file(name) for name in model.blueprint.networks)


@pytest.mark.parametrize("option", ["clip_l", "t5xxl", "ae"])
def test_one_file_for_one_of_its_networks(option: str, flux: ModelOptions, expected: Tensor, tmp_path: Path) -> None:
    path = write_one_file(flux, tmp_path / "flux1-dev.safetensors")
    model = load_model(flux.model_copy(update={option: str(path)}))
    assert torch.equal(prediction(model, 16), expected)
    assert torch.equal(pixels(model, 16), pixels(load_model(flux), 16))


def test_saving_keeps_the_one_file_whole(flux: ModelOptions, tmp_path: Path) -> None:
    path = write_one_file(flux, tmp_path / "flux1-dev.safetensors")
    model = load_model(ModelOptions(pretrained_model_name_or_path=str(path), tokenizer=flux.tokenizer))
    with torch.no_grad():
        model.denoiser.get_parameter("proj_out.weight").add_(1)
    save_single_file(model, tmp_path / "out.safetensors", {}, changed={"denoiser": ["proj_out.weight"]})
    before, after = load_file(path), load_file(tmp_path / "out.safetensors")
    assert before.keys() == after.keys()
    assert [key for key in before if not torch.equal(before[key], after[key])] == [
        DENOISER + "final_layer.linear.weight"
    ]


def in_eight_bits(state: Mapping[str, Tensor], name: str, *, by_row: bool = False) -> tuple[State, State]:
    """The file, and the weights that it means."""
    stored: State = {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)} if name == "scale_weight" else {}
    meant: State = {}
    for key, weight in state.items():
        if weight.ndim != 2 or not key.endswith(".weight"):
            stored[key] = meant[key] = weight
            continue
        largest = weight.abs().amax(1, keepdim=True) if by_row else weight.abs().max()
        scale = (largest.float() / 448).clamp(min=1e-12)
        stored[key] = (weight.float() / scale).to(torch.float8_e4m3fn)
        stored[key.removesuffix("weight") + name] = scale
        if name == "scale_weight":
            stored[key.removesuffix("weight") + "scale_input"] = torch.ones(())
        meant[key] = stored[key].float() * scale
    return stored, meant


@pytest.mark.parametrize(("option", "name", "by_row"), [
    (BASE, "scale_weight", False), (BASE, "weight_scale", True), ("t5xxl", "scale_weight", False),
    ("t5xxl", "weight_scale", True), ("clip_l", "scale_weight", False),
])  # fmt: skip
def test_weights_with_scales(option: str, name: str, by_row: bool, flux: ModelOptions, tmp_path: Path) -> None:
    """They compute what the products of weights and scales do."""
    stored, meant = in_eight_bits(load_file(vars(flux)[option]), name, by_row=by_row)
    save_file(stored, tmp_path / "scaled.safetensors")
    save_file(meant, tmp_path / "meant.safetensors")
    scaled, plain = (
        load_model(flux.model_copy(update={option: str(tmp_path / f"{kind}.safetensors")}))
        for kind in ("scaled", "meant")
    )  # fmt: skip
    assert torch.equal(prediction(scaled, 16), prediction(plain, 16))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_plain_eight_bits(dtype: torch.dtype, flux: ModelOptions, tmp_path: Path) -> None:
    state = load_file(flux.pretrained_model_name_or_path or "")
    stored = {key: tensor.to(dtype) for key, tensor in state.items()}
    save_file(stored, tmp_path / "fp8.safetensors")
    save_file({key: tensor.float() for key, tensor in stored.items()}, tmp_path / "meant.safetensors")
    left, right = (
        load_model(flux.model_copy(update={BASE: str(tmp_path / f"{kind}.safetensors")})) for kind in ("fp8", "meant")
    )
    assert torch.equal(prediction(left, 16), prediction(right, 16))


def test_a_saved_model_has_the_products(flux: ModelOptions, tmp_path: Path) -> None:
    stored, meant = in_eight_bits(load_file(flux.pretrained_model_name_or_path or ""), "scale_weight")
    save_file(stored, tmp_path / "scaled.safetensors")
    model = load_model(flux.model_copy(update={BASE: str(tmp_path / "scaled.safetensors")}))
    assert isinstance(model.blueprint.source.file, ScaledFile)
    save_single_file(model, tmp_path / "out.safetensors", {}, changed={})
    saved = load_file(tmp_path / "out.safetensors")
    assert saved.keys() == meant.keys()
    for key, weight in meant.items():
        assert torch.equal(saved[key], weight.bfloat16() if stored[key].dtype.itemsize == 1 else weight), key


def write_bin(network: Any, folder: Path, name: str) -> None:
    torch.save(network.state_dict(), folder / f"{name}.bin")


def write_sharded(network: Any, folder: Path, name: str, *, variant: str = "", pickled: bool = False) -> None:
    index = in_pieces(dict(network.state_dict()), folder / "pieces", name + variant)
    places = json.loads(index.read_text())["weight_map"]
    ending = "bin" if pickled else "safetensors"
    for shard in sorted(set(places.values())):
        path = index.parent / shard
        if pickled:
            torch.save(load_file(path), folder / shard.replace(".safetensors", ".bin"))
        else:
            shutil.copy(path, folder / shard)
    shutil.rmtree(index.parent)
    places = {key: shard.replace(".safetensors", f".{ending}") for key, shard in places.items()}
    (folder / f"{name}.{ending}.index{variant}.json").write_text(json.dumps({"weight_map": places}))


def save_pretrained(network: Any, folder: Path, **options: Any) -> None:
    network.save_pretrained(folder, **options)


FOLDERS: dict[str, Callable[[Any, Path], None]] = {
    "bin": lambda net, folder: write_bin(net, folder, "diffusion_pytorch_model"),
    "bin by diffusers": lambda net, folder: save_pretrained(net, folder, safe_serialization=False),
    "variant": lambda net, folder: save_pretrained(net, folder, variant="fp16"),
    "bin variant": lambda net, folder: save_pretrained(net, folder, variant="fp16", safe_serialization=False),
    "shards": lambda net, folder: save_pretrained(net, folder, max_shard_size="200KB"),
    "variant in shards": lambda net, folder: save_pretrained(net, folder, variant="fp16", max_shard_size="200KB"),
    "bin in shards": lambda net, folder: write_sharded(net, folder, "diffusion_pytorch_model", pickled=True),
    "variant before the number": lambda net, folder: write_sharded(
        net, folder, "diffusion_pytorch_model", variant=".fp16"
    ),
}


@pytest.fixture(scope="module")
def sd_folder(toy_shelf: ToyShelf) -> Path:
    return toy_shelf.paths("sd", "diffusers")[BASE]


@pytest.mark.parametrize("layout", FOLDERS)
def test_folders_of_diffusers(layout: str, sd_folder: Path, tmp_path: Path) -> None:
    """The denoiser in one layout, all else in safetensors; written by diffusers, and saved again by us."""
    shutil.copytree(sd_folder, tmp_path / "m", ignore=shutil.ignore_patterns("diffusion_pytorch_model*"))
    shutil.copytree(sd_folder / "vae", tmp_path / "m" / "vae", dirs_exist_ok=True)
    theirs = diffusers.UNet2DConditionModel.from_pretrained(sd_folder / "unet")
    FOLDERS[layout](theirs, tmp_path / "m" / "unet")
    model = load_model(ModelOptions(pretrained_model_name_or_path=str(tmp_path / "m")))
    assert len(list((tmp_path / "m" / "unet").glob("*.safetensors"))) == 0 or "bin" not in layout
    assert len(model.blueprint.networks["denoiser"].weights.file.paths()) > 1 or "shards" not in layout
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 77, theirs.config["cross_attention_dim"])
    with torch.no_grad():
        ours: Any = model.denoiser
        torch.testing.assert_close(ours(x, 500, text).sample, theirs(x, 500, text).sample, rtol=1e-4, atol=1e-4)


@pytest.mark.full
@pytest.mark.parametrize("layout", ["variant in shards", "bin in shards"])
def test_a_folder_saved_again_is_whole(layout: str, sd_folder: Path, tmp_path: Path) -> None:
    """One file of weights, without the old index."""
    shutil.copytree(sd_folder, tmp_path / "m", ignore=shutil.ignore_patterns("diffusion_pytorch_model*"))
    shutil.copytree(sd_folder / "vae", tmp_path / "m" / "vae", dirs_exist_ok=True)
    theirs = diffusers.UNet2DConditionModel.from_pretrained(sd_folder / "unet")
    FOLDERS[layout](theirs, tmp_path / "m" / "unet")
    model = load_model(ModelOptions(pretrained_model_name_or_path=str(tmp_path / "m")))
    save_folder(model, tmp_path / "out", {}, changed={"denoiser": ["conv_out.bias"]})
    names = {"config.json", "diffusion_pytorch_model.safetensors"}
    assert {path.name for path in (tmp_path / "out" / "unet").iterdir()} == names
    again = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "out" / "unet")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in theirs.state_dict().items())


@pytest.mark.parametrize(("value", "dtype"), [
    (float("nan"), torch.float32), (float("inf"), torch.float16), (-float("inf"), torch.bfloat16),
])  # fmt: skip
def test_weights_that_are_not_finite(value: float, dtype: torch.dtype, flux: ModelOptions, tmp_path: Path) -> None:
    state = {key: tensor.to(dtype) for key, tensor in load_file(flux.pretrained_model_name_or_path or "").items()}
    state["single_blocks.0.linear2.weight"][1, 2] = value
    save_file(state, tmp_path / "m.safetensors")
    with pytest.raises(UserError, match=r"m\.safetensors: single_blocks\.0\.linear2\.weight") as error:
        load_model(flux.model_copy(update={BASE: str(tmp_path / "m.safetensors")}))
    assert error.value.code == "weights-not-finite"


@pytest.mark.full
def test_weights_that_a_smaller_type_cannot_hold(flux: ModelOptions, tmp_path: Path) -> None:
    state = load_file(flux.pretrained_model_name_or_path or "")
    state["img_in.bias"] = torch.full_like(state["img_in.bias"], 1e5)
    save_file(state, tmp_path / "m.safetensors")
    options = flux.model_copy(update={BASE: str(tmp_path / "m.safetensors")})
    with pytest.raises(UserError, match=r"img_in\.bias.*float16") as error:
        load_model(options, torch.float16)
    assert error.value.code == "weights-overflow"
    assert (
        load_model(options, torch.bfloat16).denoiser.get_parameter("x_embedder.bias")[0] == torch.tensor(1e5).bfloat16()
    )


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_model_turned_into_v_says_so(family: str, toy_shelf: ToyShelf, tmp_path: Path) -> None:
    """In the keys that other programs look for; turned back, it has them no more."""
    options = toy_shelf.options(family)
    model = load_model(
        options.model_copy(update={"v_parameterization": True}), noise=NoiseOptions(zero_terminal_snr=True)
    )
    assert isinstance(model.objective, VariancePreserving)
    changed = list_all_weights(model, list_saved_networks(model.blueprint))
    save_single_file(model, tmp_path / "v.safetensors", {}, changed=changed)
    saved = load_file(tmp_path / "v.safetensors")
    assert saved["v_pred"].numel() == saved["ztsnr"].numel() == 0
    again = options.model_copy(update={BASE: str(tmp_path / "v.safetensors")})
    read = read_model(again).objective
    assert isinstance(read, VariancePreserving)
    assert (read.predicts, read.zero_terminal_snr) == ("v", True)
    plain = ModelOptions(pretrained_model_name_or_path=str(tmp_path / "v.safetensors"), v_parameterization=False)
    plain_noise = NoiseOptions(zero_terminal_snr=False)
    tokenizers = tuple(str(path) for name, path in toy_shelf.paths(family).items() if name.startswith("tokenizer"))
    back = load_model(plain.model_copy(update={"tokenizer": tokenizers}), noise=plain_noise)
    save_single_file(back, tmp_path / "e.safetensors", {}, changed={})
    assert not {"v_pred", "ztsnr"} & load_file(tmp_path / "e.safetensors").keys()


@pytest.mark.parametrize("key", ["edm_mean", "edm_vpred.sigma_max"])
def test_a_model_by_the_rules_of_edm(key: str, toy_shelf: ToyShelf, tmp_path: Path) -> None:
    state = load_file(toy_shelf.paths("sdxl")[BASE]) | {key: torch.zeros(4)}
    save_file(state, tmp_path / "m.safetensors")
    with pytest.raises(UserError, match="EDM") as error:
        read_model(ModelOptions(pretrained_model_name_or_path=str(tmp_path / "m.safetensors")))
    assert error.value.code == "edm-checkpoint-unsupported"


@pytest.mark.parametrize("times", [2, 3])
def test_further_input_channels(times: int, flux: ModelOptions, tmp_path: Path) -> None:
    state = load_file(flux.pretrained_model_name_or_path or "")
    state["img_in.weight"] = torch.cat([state["img_in.weight"]] * times, 1)
    save_file(state, tmp_path / "m.safetensors")
    with pytest.raises(UserError, match={2: "Canny or Depth", 3: "another kind"}[times]) as error:
        read_model(flux.model_copy(update={BASE: str(tmp_path / "m.safetensors")}))
    assert error.value.code == "denoiser-variant-unsupported"


@pytest.mark.parametrize(("family", "dropped", "named"), [
    ("sd", ("cond_stage_model.",), "CLIP"), ("sdxl", ("conditioner.",), "CLIP-L and CLIP-G"),
    ("sdxl", ("conditioner.embedders.0.",), "CLIP-L"), ("sdxl", ("conditioner.embedders.1.",), "CLIP-G"),
])  # fmt: skip
def test_a_missing_text_encoder(
    family: str, dropped: tuple[str, ...], named: str, toy_shelf: ToyShelf, tmp_path: Path
) -> None:
    state = load_file(toy_shelf.paths(family)[BASE])
    save_file({key: t for key, t in state.items() if not key.startswith(dropped)}, tmp_path / "m.safetensors")
    for name in (None, family):
        with pytest.raises(UserError, match=rf"\({named}\)") as error:
            read_model(ModelOptions(pretrained_model_name_or_path=str(tmp_path / "m.safetensors")), family=name)
        assert error.value.code == "text-encoder-missing"


def test_a_folder_without_its_text_encoder(sd_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(sd_folder, tmp_path / "m", ignore=shutil.ignore_patterns("text_encoder"))
    with pytest.raises(UserError) as error:
        read_model(ModelOptions(pretrained_model_name_or_path=str(tmp_path / "m")))
    assert error.value.code == "text-encoder-missing"
