"""Training FLUX.1 and Chroma: which parts train with which learning rate, and what may be cached."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from families.toys import ToyShelf
from sfumato.adapters.split_lora import SplitLoRA
from sfumato.errors import UserError
from sfumato.train import train_step
from toy_runs import build_toy_run, equal_tensors, make_images, read_metrics, read_weights, train_toy

T5 = {"network_args": ["train_t5xxl=True"]}
DENOISER, TEXT = {"network_train_unet_only": True}, {"network_train_text_encoder_only": True}
UNET, CLIP, TE3 = "lora_unet", "lora_te1", "lora_te3"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"), 2)


def test_t5_trains_only_on_request(toy_shelf: ToyShelf, images: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--network_args train_t5xxl=True") as error:
        build_toy_run(toy_shelf.paths("chroma"), images, tmp_path, **TEXT)
    assert error.value.code == "only-opt-in-parts"


@pytest.mark.parametrize(
    ("given", "rates"), [(None, (1e-3, 1e-3)), (["2e-5"], (2e-5, 2e-5)), (["2e-5", "3e-6"], (2e-5, 3e-6))]
)
def test_learning_rates_of_text_encoders(
    given: list[str] | None, rates: tuple[float, float], toy_shelf: ToyShelf, images: Path, tmp_path: Path
) -> None:
    """First CLIP-L's, then T5's; one for both; none: --learning_rate."""
    found = build_toy_run(toy_shelf.paths("flux"), images, tmp_path, text_encoder_lr=given, unet_lr="4e-4", **T5)
    groups = {group["name"]: group["lr"] for group in found.optimizer.param_groups}
    assert groups == {"denoiser": 4e-4, "clip_l": rates[0], "t5": rates[1]}


@pytest.mark.full
def test_one_encoder_cached_is_both_live(toy_shelf: ToyShelf, images: Path, tmp_path: Path) -> None:
    """CLIP-L learns, T5's features come from the cache."""
    toy = toy_shelf.paths("flux")
    for masked in (False, True):
        options = {"apply_t5_attn_mask": masked, "max_train_steps": 3, "train_batch_size": 2}
        live = train_toy(toy, images, tmp_path / f"live{masked}", **options)
        kept = train_toy(toy, images, tmp_path / f"kept{masked}", cache_text_encoder_outputs=True, **options)
        assert equal_tensors(read_weights(live), read_weights(kept))


@pytest.mark.full
@pytest.mark.parametrize(("family", "args"), [("flux", ["train_blocks=single"]), ("chroma", ["single_dim=0"])])
def test_split_qkv_in_a_run(family: str, args: list[str], toy_shelf: ToyShelf, images: Path, tmp_path: Path) -> None:
    """The file holds one LoRA of the fused layer; training goes on from it, with split_qkv and without."""
    toy = toy_shelf.paths(family)
    options = {"network_train_unet_only": True, "network_alpha": 3, "max_train_steps": 2}
    first = train_toy(toy, images, tmp_path / "1", network_args=["split_qkv=True", *args], **options)
    file = read_weights(first)
    fused = {"flux": ("single_blocks_0_linear1", 4), "chroma": ("double_blocks_0_img_attn_qkv", 3)}[family]
    name, layers = f"lora_unet_{fused[0]}", fused[1]
    assert len(file[f"{name}.lora_down.weight"]) == 2 * layers
    assert float(file[f"{name}.alpha"]) == 3 * layers
    alone = next(key for key in file if key.endswith("alpha") and "linear1" not in key and "qkv" not in key)
    assert float(file[alone]) == 3
    assert ("lora_unet_double_blocks_0_img_attn_qkv.alpha" in file) == (family == "chroma")

    more = {**options, "network_weights": first / "lora.safetensors", "learning_rate": "1e-12"}
    again = train_toy(toy, images, tmp_path / "2", network_args=["split_qkv=True", *args], **more)
    plain = train_toy(toy, images, tmp_path / "3", dim_from_weights=True, **more)
    for other in (read_weights(again), read_weights(plain)):
        assert set(other) == set(file)
        assert all(torch.allclose(other[key], file[key], atol=1e-7) for key in file)


@pytest.mark.full
def test_split_qkv_resumes_exactly(toy_shelf: ToyShelf, images: Path, tmp_path: Path) -> None:
    toy = toy_shelf.paths("flux")
    options = {"network_args": ["split_qkv=True", "rank_dropout=0.2", "loraplus_lr_ratio=4"], "max_train_steps": 4}
    straight = train_toy(toy, images, tmp_path / "straight", **options)
    train_toy(toy, images, tmp_path / "parts", **{**options, "max_train_steps": 2}, save_state=True)
    train_toy(toy, images, tmp_path / "parts", **options, resume=tmp_path / "parts")
    assert equal_tensors(read_weights(straight), read_weights(tmp_path / "parts"))
    rates = read_metrics(straight)[0]
    assert rates["lr/denoiser+"] == pytest.approx(4 * rates["lr/denoiser"])


def test_split_qkv_learns_what_one_lora_cannot(toy_shelf: ToyShelf, images: Path, tmp_path: Path) -> None:
    """At rank 1 the change of q and that of k may have different inputs."""
    found = build_toy_run(toy_shelf.paths("flux"), images, tmp_path, network_args=["split_qkv=True"], network_dim=1)
    train_step(found, next(iter(found.loader.steps(0))))
    train_step(found, next(iter(found.loader.steps(1))))
    adapters: Any = found.method.modules["adapters"]
    adapter = adapters["lora_unet_double_blocks_0_img_attn_qkv"]
    assert isinstance(adapter, SplitLoRA)
    rank = torch.linalg.matrix_rank(torch.cat([adapter.delta(i).detach() for i in range(3)]), rtol=1e-4)
    assert int(rank) == 3


def test_verbose_lists_the_rank_of_every_layer(
    toy_shelf: ToyShelf, images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    args = ["img_attn_dim=4", "img_mlp_dim=8", "txt_attn_dim=2", "txt_mlp_dim=2", "img_mod_dim=2", "txt_mod_dim=0"]
    options = {"console_log_level": "INFO", "console_log_simple": True, "network_train_unet_only": True}
    args += ["single_dim=3", "single_mod_dim=5", "in_dims=[1,0,6,0,7]", "verbose=True"]
    build_toy_run(toy_shelf.paths("flux"), images, tmp_path, network_args=args, **options)
    output = " ".join(capfd.readouterr().err.split())
    expected = {
        "double_blocks_0_img_attn_qkv": 4, "double_blocks_1_img_mlp_2": 8, "double_blocks_0_txt_attn_proj": 2,
        "double_blocks_0_img_mod_lin": 2, "single_blocks_1_linear2": 3, "single_blocks_0_modulation_lin": 5,
        "img_in": 1, "vector_in_in_layer": 6, "txt_in": 7,
    }  # fmt: skip
    for name, rank in expected.items():
        assert f"lora_unet_{name}: LoRA, rank {rank}, alpha 1, learning rate 0.001 (denoiser)" in output, name
    for name in ("txt_mod_lin", "time_in", "guidance_in"):
        assert name not in output


@pytest.mark.parametrize(("family", "guidance"), [("flux", 3.5), ("chroma", 0.0)])
def test_the_file_says_how_it_was_trained(
    family: str, guidance: float, toy_shelf: ToyShelf, images: Path, tmp_path: Path
) -> None:
    """The keys that only these models' files have in sd-scripts."""
    golden = json.loads((Path(__file__).parents[1] / "goldens" / "metadata_keys.json").read_text())
    options = {"network_train_unet_only": True, "max_train_steps": 1, "timestep_sampling": "sigmoid"}
    output = train_toy(toy_shelf.paths(family), images, tmp_path, model_type=family, **options)
    with safe_open(output / "lora.safetensors", "pt") as file:
        metadata = file.metadata()
    wanted = golden["extra_keys_by_family"]["flux/chroma"]
    found = {name: metadata.get(name) for name in wanted}
    assert found == {
        "ss_model_type": family, "ss_apply_t5_attn_mask": str(family == "chroma"), "ss_weighting_scheme": "uniform",
        "ss_logit_mean": "0.0", "ss_logit_std": "1.0", "ss_mode_scale": "1.29", "ss_guidance_scale": str(guidance),
        "ss_timestep_sampling": "sigmoid", "ss_sigmoid_scale": "1.0", "ss_model_prediction_type": "sigma_scaled",
        "ss_discrete_flow_shift": "3.0",
    }  # fmt: skip
    assert metadata["ss_base_model_version"] == golden["base_model_version_by_family"][family]
