"""Image encoders of `sfumato compare`: the vectors are those of transformers; wrong folders are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.errors import UserError
from sfumato.tools.compare.encoder import load_image_encoder

CPU = torch.device("cpu")


def write_clip(folder: Path) -> Path:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 32, "patch_size": 16}
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    CLIPModel(
        CLIPConfig(text_config=text | {"vocab_size": 50}, vision_config=vision, projection_dim=16)
    ).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def write_dino(folder: Path) -> Path:
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    torch.manual_seed(0)
    Dinov2Model(config).save_pretrained(folder)
    BitImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder


def make_pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    sizes = [(64, 64, 3)] * 17 + [(96, 48, 3)]  # more than one batch
    return [Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)) for size in sizes]


@torch.no_grad()
def test_clip(tmp_path: Path) -> None:
    from transformers import CLIPImageProcessor, CLIPModel

    folder = write_clip(tmp_path / "clip")
    found = load_image_encoder(str(folder), CPU).encode(make_pictures())
    model = CLIPModel.from_pretrained(folder).eval()
    inputs = CLIPImageProcessor.from_pretrained(folder)(images=make_pictures(), return_tensors="pt")
    expected = model.visual_projection(model.vision_model(**inputs).pooler_output)
    torch.testing.assert_close(found, expected / expected.norm(dim=1, keepdim=True), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_dino(tmp_path: Path) -> None:
    from transformers import BitImageProcessor, Dinov2Model

    folder = write_dino(tmp_path / "dino")
    found = load_image_encoder(str(folder), CPU).encode(make_pictures())
    model = Dinov2Model.from_pretrained(folder).eval()
    inputs = BitImageProcessor.from_pretrained(folder)(images=make_pictures(), return_tensors="pt")
    expected = model(**inputs).last_hidden_state[:, 0]  # the class token after the last norm
    torch.testing.assert_close(found, expected / expected.norm(dim=1, keepdim=True), atol=1e-5, rtol=1e-4)


def test_what_is_no_encoder_is_refused(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    with pytest.raises(UserError, match="is no folder") as missing:
        load_image_encoder(str(tmp_path / "clpi"), CPU)
    assert missing.value.code == "image-model-missing"
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as empty:
        load_image_encoder(str(tmp_path / "empty"), CPU)
    assert empty.value.code == "image-model-unavailable"
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=30)
    BertModel(config).save_pretrained(write_clip(tmp_path / "text"))
    with pytest.raises(UserError) as text:
        load_image_encoder(str(tmp_path / "text"), CPU)
    assert text.value.code == "image-encoder-without-vectors"


def test_of_pickled_weights_only_tensors_are_read(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = write_dino(tmp_path / "dino")
    safe = load_image_encoder(str(folder), CPU)
    weights, pickled = load_file(folder / "model.safetensors"), folder / "pytorch_model.bin"
    (folder / "model.safetensors").unlink()
    torch.save(weights, pickled)
    found = load_image_encoder(str(folder), CPU).model.state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in safe.model.state_dict().items())
    torch.save({**weights, "more": Path("x")}, pickled)
    with pytest.raises(UserError) as error:
        load_image_encoder(str(folder), CPU)
    assert error.value.code == "image-model-unavailable"
