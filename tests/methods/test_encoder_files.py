"""Full training of text encoders that have files of their own: each is saved beside the model, as its file was."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from families.sd3_toys import part_of, separate
from families.toys import ToyShelf
from methods.full_training import Toy, before, changed, full, make_command
from sfumato.cli.main import main
from sfumato.errors import UserError
from sfumato.families._sd3_text import ENCODER_LOCATIONS
from sfumato.families._vae import VAE_PREFIX
from sfumato.formats.state import load_state
from sfumato.methods.full import FullMethod
from toy_runs import equal_tensors, read_metrics, read_weights

TRAINED = {
    "train_text_encoder": True, "train_t5xxl": True, "learning_rate_te1": "2e-4", "learning_rate_te2": "3e-4",
    "learning_rate_te3": "4e-4",
}  # fmt: skip
OPTIONS = tuple(location.option for location in ENCODER_LOCATIONS.values())
TIED = "encoder.embed_tokens.weight"


@pytest.fixture(scope="module")
def apart(toy_shelf: ToyShelf, tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """The toy of Stable Diffusion 3 with a file for each network; T5-XXL's has its tied table twice, as some have."""
    toy, folder = toy_shelf.paths("sd3"), tmp_path_factory.mktemp("apart")
    files = {name: Path(path) for name, path in separate(before(toy), folder).items()}
    t5 = load_file(files["t5xxl"])
    save_file({**t5, TIED: t5["shared.weight"].clone()}, files["t5xxl"])
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        shutil.copytree(toy[name], folder / name)
    return files


def read_encoders(output: Path, name: str = "lora") -> dict[str, dict[str, torch.Tensor]]:
    return {option: read_weights(output, f"{name}_{option}") for option in OPTIONS}


def list_models(output: Path) -> set[str]:
    return {path.name for path in output.glob("*.safetensors")}


@pytest.mark.full
def test_they_learn_what_they_learn_inside_the_checkpoint(
    apart: Toy, toy_shelf: ToyShelf, images: Path, tmp_path: Path
) -> None:
    """To the bit; the file of the model has only the model."""
    inside = full(toy_shelf.paths("sd3"), images, tmp_path / "inside", max_train_steps=2, **TRAINED)
    outside = full(apart, images, tmp_path / "outside", max_train_steps=2, **TRAINED)
    assert list_models(outside) == {"lora.safetensors", *(f"lora_{option}.safetensors" for option in OPTIONS)}
    assert read_metrics(inside) == read_metrics(outside)
    rates = {
        name.removeprefix("lr/"): rate for name, rate in read_metrics(outside)[0].items() if name.startswith("lr/")
    }
    assert rates == {"denoiser": 1e-4, "clip_l": 2e-4, "clip_g": 3e-4, "t5": 4e-4}
    whole, found = read_weights(inside), read_encoders(outside)
    assert torch.equal(found["t5xxl"].pop(TIED), found["t5xxl"]["shared.weight"])
    for location in ENCODER_LOCATIONS.values():
        assert equal_tensors(found[location.option], part_of(whole, location.prefix))
    own = load_file(apart["pretrained_model_name_or_path"]).keys()
    assert {name for name in read_weights(outside) if not name.startswith(VAE_PREFIX)} == own
    for option in OPTIONS:
        old, new = load_file(apart[option]), read_weights(outside, f"lora_{option}")
        assert {name: (t.dtype, t.shape) for name, t in new.items()} == {n: (t.dtype, t.shape) for n, t in old.items()}
        assert changed(old, new)
        with safe_open(outside / f"lora_{option}.safetensors", "pt") as file:
            assert file.metadata() == {"format": "pt"}


@pytest.mark.full
def test_transformers_reads_the_files(apart: Toy, images: Path, tmp_path: Path) -> None:
    """Its own classes take every tensor; what each computes has moved."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    output = full(apart, images, tmp_path, max_train_steps=1, **TRAINED)
    for option in OPTIONS:
        states = [load_file(apart[option]), read_weights(output, f"lora_{option}")]
        build: Any = T5EncoderModel if option == "t5xxl" else CLIPTextModelWithProjection
        config = read_config(option, T5Config if option == "t5xxl" else CLIPTextConfig, states[0])
        outputs: list[torch.Tensor] = []
        for state in states:
            module = build(config).eval()
            missing, unexpected = module.load_state_dict(state, strict=False)
            assert not [name for name in missing if name != TIED]
            assert not [name for name in unexpected if not name.endswith(("position_ids", "logit_scale"))]
            outputs.append(module(torch.tensor([[1, 2, 3]])).last_hidden_state)
        assert not torch.equal(*outputs)


def read_config(option: str, kind: Any, state: Mapping[str, torch.Tensor]) -> Any:
    if option == "t5xxl":
        heads = state["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"].shape[1]
        inner = state["encoder.block.0.layer.0.SelfAttention.q.weight"].shape[0]
        feed = state["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"].shape[0]
        layers = len({name.split(".")[2] for name in state if name.startswith("encoder.block.")})
        words, width = state["shared.weight"].shape
        return kind(vocab_size=words, d_model=width, d_kv=inner // heads, d_ff=feed, num_layers=layers, num_heads=heads,
                    feed_forward_proj="gated-gelu")  # fmt: skip
    words, width = state["text_model.embeddings.token_embedding.weight"].shape
    layers = len({name.split(".")[3] for name in state if name.startswith("text_model.encoder.layers.")})
    return kind(vocab_size=words, hidden_size=width, num_hidden_layers=layers, num_attention_heads=1,
                intermediate_size=state["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
                projection_dim=state["text_projection.weight"].shape[0])  # fmt: skip


@pytest.mark.full
def test_saves_between_go_with_the_models_and_resume_is_exact(apart: Toy, images: Path, tmp_path: Path) -> None:
    """The files of an EMA, and those that --save_last_n_steps removes, too."""
    common = {"max_train_steps": 4, "save_every_n_steps": 1, "save_last_n_steps": 1, **TRAINED}
    straight = full(apart, images, tmp_path / "straight", **common, save_state=True, ema_decay=[0.5])
    names = [name + ema for name in ("lora", "lora-step00000002", "lora-step00000003") for ema in ("", "-ema")]
    wanted = {f"{name}{end}.safetensors" for name in names for end in ("", *(f"_{option}" for option in OPTIONS))}
    assert list_models(straight) == wanted
    raw, average = read_encoders(straight), read_encoders(straight, "lora-ema")
    assert all(not equal_tensors(raw[option], average[option]) for option in OPTIONS)
    state = straight / "lora-step00000003-state"
    tables = [name for name in load_state(state)[0]["weights"] if name.endswith(("shared.weight", TIED))]
    assert tables == ["t5.shared.weight"]  # one parameter, as tied as in the file
    again = full(apart, images, tmp_path / "again", **common, ema_decay=[0.5], resume=state)
    for name in ("lora", "lora-ema"):
        assert equal_tensors(read_weights(straight, name), read_weights(again, name))
        first, second = read_encoders(straight, name), read_encoders(again, name)
        assert all(equal_tensors(first[option], second[option]) for option in OPTIONS)


@pytest.mark.full
@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"save_precision": "fp16"}, torch.float16),
        ({"mixed_precision": "bf16", "full_bf16": True}, torch.bfloat16),
    ],
)
def test_their_precision_is_the_models(
    apart: Toy, images: Path, tmp_path: Path, options: dict[str, Any], dtype: torch.dtype
) -> None:
    output = full(apart, images, tmp_path, max_train_steps=1, save_model_as="ckpt", **options, **TRAINED)
    assert not list_models(output)
    for option in OPTIONS:
        tensors = torch.load(output / f"lora_{option}.ckpt", weights_only=True)["state_dict"]
        trained = [t for name, t in tensors.items() if t.is_floating_point() and not name.endswith("logit_scale")]
        assert {tensor.dtype for tensor in trained} == {dtype}


@pytest.mark.full
def test_every_other_family_has_them(toy_shelf: ToyShelf, images: Path, tmp_path: Path) -> None:
    for family, options in (("flux", ("clip_l",)), ("chroma", ("t5xxl",)), ("lumina", ("gemma2",))):
        toy = toy_shelf.paths(family)
        own = {"train_text_encoder": True, "train_t5xxl": family == "chroma", "max_train_steps": 1}
        output = full(toy, images, tmp_path / family, **own)
        assert list_models(output) == {"lora.safetensors", *(f"lora_{option}.safetensors" for option in options)}
        for option in options:
            assert changed(load_file(toy[option]), read_weights(output, f"lora_{option}"))


@pytest.mark.full
def test_those_of_a_folder_become_files(toy_shelf: ToyShelf, images: Path, tmp_path: Path) -> None:
    """Since the model does."""
    toy = toy_shelf.paths("sd3", "diffusers")
    output = full(toy, images, tmp_path, train_text_encoder=True, train_t5xxl=True, max_train_steps=1)
    assert list_models(output) == {"lora.safetensors", *(f"lora_{option}.safetensors" for option in OPTIONS)}
    for location in ENCODER_LOCATIONS.values():
        old = load_file(toy["pretrained_model_name_or_path"] / location.folder / "model.safetensors")
        assert changed(old, read_weights(output, f"lora_{location.option}"))


@pytest.mark.full
def test_a_lost_file_does_not_cost_the_run(
    apart: Toy, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file of T5-XXL is deleted while training runs; the others are saved as ever."""
    copy = tmp_path / "t5.safetensors"
    shutil.copy(apart["t5xxl"], copy)
    safe = full(apart, images, tmp_path / "safe", max_train_steps=1, **TRAINED)
    step = FullMethod.before_step

    def lose(method: FullMethod, number: int) -> None:
        copy.unlink()
        step(method, number)

    monkeypatch.setattr(FullMethod, "before_step", lose)
    lost = full({**apart, "t5xxl": copy}, images, tmp_path / "lost", max_train_steps=1, **TRAINED)
    for name in ("lora", *(f"lora_{option}" for option in OPTIONS)):
        assert equal_tensors(read_weights(safe, name), read_weights(lost, name))


@pytest.mark.full
def test_the_adapter_of_the_difference_has_them(apart: Toy, images: Path, tmp_path: Path) -> None:
    options = {"train_text_encoder": True, "extract_lora_at_end": 2, "max_train_steps": 1}
    assert main(["train", *make_command(apart, images, tmp_path / "out", **options)]) == 0
    names = load_file(tmp_path / "out" / "lora_lora.safetensors")
    assert {name.split("_")[1] for name in names} == {"unet", "te1", "te2"}


@pytest.mark.full
def test_a_preview_names_the_files(apart: Toy, images: Path, tmp_path: Path) -> None:
    from PIL import Image

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 1\n")
    options = {"sample_prompts": prompts, "sample_every_n_steps": 1, "max_train_steps": 1}
    output = full(apart, images, tmp_path / "out", train_text_encoder=True, **options)
    (image,) = (output / "sample").iterdir()
    command = Image.open(image).info["command"]
    assert "--clip_l lora_clip_l.safetensors --clip_g lora_clip_g.safetensors" in command
    assert "--t5xxl t5xxl.safetensors" in command


def test_a_file_that_training_reads_is_never_replaced(apart: Toy, images: Path, tmp_path: Path) -> None:
    copy = tmp_path / "lora-step00000001_clip_l.safetensors"
    shutil.copy(apart["clip_l"], copy)
    with pytest.raises(UserError, match="lora-step00000001_clip_l") as error:
        full({**apart, "clip_l": copy}, images, tmp_path, train_text_encoder=True)
    assert error.value.code == "output-replaces-source"
