"""Text encoders in the layouts that other programs write give the features that transformers' own classes give."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, T5EncoderModel

from families.loading import load_model, read_model
from families.toys import ToyShelf
from sfumato.families.base import Family
from sfumato.families.detection import describe_unused_keys
from sfumato.families.encoding import encode_with_grad

CAPTIONS = ["a cat", "a red box"]
TEXT = "text_encoders.clip_l.transformer."
OLD_TEXT = "cond_stage_model.transformer."
TABLE = "text_model.embeddings.position_ids"
State = dict[str, Tensor]


def features(model: Family, part: str) -> dict[str, Tensor]:
    with torch.no_grad():
        return encode_with_grad(model, part, CAPTIONS)


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture(scope="module")
def clip_folder(toy_shelf: ToyShelf) -> Path:
    return toy_shelf.paths("flux", "diffusers")["pretrained_model_name_or_path"] / "text_encoder"


@pytest.fixture(scope="module")
def whole_clip(clip_folder: Path) -> CLIPModel:
    """Both towers, as OpenAI published them."""
    tower: Any = CLIPTextModel.from_pretrained(clip_folder)
    text = {key: value for key, value in tower.config.to_dict().items() if key not in ("dtype", "torch_dtype")}
    vision = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "image_size": 8, "patch_size": 4}
    whole: Any = CLIPModel(CLIPConfig(text_config=text, vision_config={**vision, "num_attention_heads": 1}))
    found = {name.removeprefix("text_model."): tensor for name, tensor in tower.state_dict().items()}
    whole.text_model.load_state_dict(found)
    return whole


@pytest.fixture(scope="module")
def pooled(clip_folder: Path, toy_shelf: ToyShelf) -> dict[str, Tensor]:
    return features(load_model(toy_shelf.options("flux")), "clip_l")


@pytest.mark.full
def test_the_whole_of_clip(whole_clip: Any, pooled: dict[str, Tensor], toy_shelf: ToyShelf, tmp_path: Path) -> None:
    """As transformers saves it: a folder, and its file alone."""
    whole_clip.save_pretrained(tmp_path / "clip")
    keys = load_file(tmp_path / "clip" / "model.safetensors").keys()
    assert any(key.startswith("vision_model.") for key in keys)
    for place in (tmp_path / "clip" / "model.safetensors", tmp_path / "clip"):
        options = toy_shelf.options("flux", clip_l=str(place))
        assert same(features(load_model(options), "clip_l"), pooled)
        (line,) = describe_unused_keys(read_model(options))
        assert "vision_model.*" in line
        assert "visual_projection.weight" in line


def numbered(state: State, table: Tensor, name: str = TABLE) -> State:
    return state | {name: table}


POSITIONS = torch.arange(77)[None]
CLIP_LAYOUTS: dict[str, Callable[[State], State]] = {
    "without a level": lambda state: {key.removeprefix("text_model."): tensor for key, tensor in state.items()},
    "int64 positions": lambda state: numbered(state, POSITIONS),
    "float positions": lambda state: numbered(state, POSITIONS.float()),
    "spoiled positions": lambda state: numbered(state, POSITIONS.half() + 0.5),
    "positions elsewhere": lambda state: numbered(state, POSITIONS, "text_model.position_ids"),
    "projection": lambda state: state | {"text_projection.weight": torch.ones(2, 2), "logit_scale": torch.ones(())},
    "embeddings": lambda state: state | {"bundle_emb.style.string_to_param.*": torch.ones(1, 64)},
    "one file for all": lambda state: {TEXT + key: t for key, t in state.items()} | {
        "text_encoders.clip_l.logit_scale": torch.ones(()), TEXT + "text_projection.weight": torch.ones(2, 2),
        "vae.decoder.conv_in.weight": torch.ones(1),
    },
}  # fmt: skip


@pytest.mark.parametrize("layout", CLIP_LAYOUTS)
def test_layouts_of_clip(layout: str, pooled: dict[str, Tensor], toy_shelf: ToyShelf, tmp_path: Path) -> None:
    state = load_file(toy_shelf.paths("flux")["clip_l"])
    save_file(CLIP_LAYOUTS[layout](state), tmp_path / "clip.safetensors")
    model = load_model(toy_shelf.options("flux", clip_l=str(tmp_path / "clip.safetensors")))
    assert same(features(model, "clip_l"), pooled)


CHECKPOINT_LAYOUTS: dict[str, Callable[[State], State]] = {
    "without a level": lambda state: {key.replace(OLD_TEXT + "text_model.", OLD_TEXT): t for key, t in state.items()},
    "no positions": lambda state: {key: t for key, t in state.items() if "position_ids" not in key},
    "float positions": lambda state: numbered(state, POSITIONS.float(), OLD_TEXT + TABLE),
    "tables and counters": lambda state: state | {"betas": torch.ones(3), "model_ema.decay": torch.ones(())},
    "averaged weights": lambda state: state | {
        "model_ema." + key.removeprefix("model.").replace(".", ""): torch.full_like(t, 7)
        for key, t in state.items() if key.startswith("model.diffusion_model.")
    },
    "embeddings": lambda state: state | {"bundle_emb.style.string_to_param.*": torch.ones(1, 64)},
}  # fmt: skip


@pytest.mark.parametrize("layout", CHECKPOINT_LAYOUTS)
def test_layouts_of_whole_checkpoints(layout: str, toy_shelf: ToyShelf, tmp_path: Path) -> None:
    """The trained weights are loaded, whatever lies beside them."""
    toy = toy_shelf.paths("sd")
    state = CHECKPOINT_LAYOUTS[layout](load_file(toy["pretrained_model_name_or_path"]))
    save_file(state, tmp_path / "m.safetensors")
    options = toy_shelf.options("sd", tokenizer=(str(toy["tokenizer"]),))
    expected, model = load_model(options), load_model(
        options.model_copy(update={"pretrained_model_name_or_path": str(tmp_path / "m.safetensors")})
    )  # fmt: skip
    assert same(features(model, "clip"), features(expected, "clip"))
    assert same(dict(model.denoiser.state_dict()), dict(expected.denoiser.state_dict()))
    named = list(describe_unused_keys(model.blueprint))
    assert len(named) == (layout in ("averaged weights", "embeddings"))
    if layout == "averaged weights":
        assert "averaged weights" in named[0]


@pytest.mark.parametrize("name", [
    "cond_stage_model.model.transformer.text_model.embeddings.position_ids", "cond_stage_model.model.position_ids",
])  # fmt: skip
def test_a_position_table_of_its_own_name(name: str, toy_shelf: ToyShelf, tmp_path: Path) -> None:
    toy = toy_shelf.paths("sd", variant="2")
    save_file(load_file(toy["pretrained_model_name_or_path"]) | {name: POSITIONS}, tmp_path / "m.safetensors")
    options = toy_shelf.options("sd", variant="2", tokenizer=(str(toy["tokenizer"]),))
    other = options.model_copy(update={"pretrained_model_name_or_path": str(tmp_path / "m.safetensors")})
    assert same(features(load_model(other), "clip"), features(load_model(options), "clip"))


def test_t5_with_everything_beside_it(toy_shelf: ToyShelf, tmp_path: Path) -> None:
    """The decoder, the tied table, the tokenizer's bytes."""
    state = load_file(toy_shelf.paths("flux")["t5xxl"])
    more = {
        "encoder.embed_tokens.weight": state["shared.weight"].clone(), "lm_head.weight": torch.ones(2, 2),
        "decoder.block.0.layer.0.SelfAttention.q.weight": torch.ones(2, 2),
        "spiece_model": torch.ones(9).to(torch.uint8),
    }  # fmt: skip
    save_file(state | more, tmp_path / "t5.safetensors")
    options = toy_shelf.options("flux", t5xxl=str(tmp_path / "t5.safetensors"))
    model = load_model(options)
    assert same(features(model, "t5"), features(load_model(toy_shelf.options("flux")), "t5"))
    theirs = T5EncoderModel.from_pretrained(
        toy_shelf.paths("flux", "diffusers")["pretrained_model_name_or_path"] / "text_encoder_2"
    )
    ids = torch.arange(3, 9)[None]
    encoder: Any = model.parts["t5"].module
    with torch.no_grad():
        assert torch.equal(encoder(input_ids=ids).last_hidden_state, theirs(input_ids=ids).last_hidden_state)
