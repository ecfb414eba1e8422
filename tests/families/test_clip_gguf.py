"""CLIP in GGUF files written by the `gguf` package: transformers encodes the same with the weights that they mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from families.loading import load_model
from families.toys import ToyShelf
from sfumato.families import _clip, _open_clip
from sfumato.families.base import Family
from sfumato.families.encoding import encode_with_grad
from sfumato.quantization.weight import QuantizedWeight

PREFIXES = {"clip_l": "text_encoders.clip_l.transformer.", "clip_g": "text_encoders.clip_g.transformer."}
CAPTIONS = ["a photo of a cat", "a red cup"]
BLOCKS = gguf.GGMLQuantizationType.Q8_0


def write_encoder(path: Path, tensors: dict[str, Tensor], architecture: str) -> dict[str, Tensor]:
    """The tensors under their own names, as programs that convert CLIP for ComfyUI keep them; what they mean.

    architecture: what the file says it holds; empty: nothing, as stable-diffusion.cpp's.
    """
    writer, meant = gguf.GGUFWriter(path, architecture), dict[str, Tensor]()
    for name, tensor in tensors.items():
        numbers = tensor.float().numpy() if tensor.is_floating_point() else tensor.numpy()
        if tensor.ndim == 2 and tensor.is_floating_point() and tensor.shape[1] % 32 == 0:
            blocks = gguf.quants.quantize(numbers, BLOCKS)
            writer.add_tensor(name, blocks, raw_dtype=BLOCKS)
            meant[name] = torch.from_numpy(gguf.quants.dequantize(blocks, BLOCKS).astype(np.float32))
        else:
            writer.add_tensor(name, numbers)
            meant[name] = tensor
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


def take_reference(model: Family, part: str, meant: dict[str, Tensor], *, projected: bool) -> Any:
    """transformers' encoder with the weights that the file means."""
    build = _open_clip.build_projected if projected else _clip.build
    encoder = build(model.blueprint.networks[part].config).eval()
    state = {name: tensor for name, tensor in meant.items() if tensor.is_floating_point()}
    plain = state if projected else {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    encoder.load_state_dict(plain)
    return encoder


@pytest.mark.fast_for("flux")
@pytest.mark.parametrize(
    ("family", "part", "architecture", "prefixed"),
    [("flux", "clip_l", "pig", False), ("sd3", "clip_l", "clip", False), ("sd3", "clip_g", "", True)],
)
def test_encodes_as_transformers_does(
    toy_shelf: ToyShelf, tmp_path: Path, family: str, part: str, architecture: str, prefixed: bool
) -> None:
    """Positions of whole numbers, which older files hold, are passed over; layers stay in their blocks."""
    toy, prefix = toy_shelf.paths(family), PREFIXES[part]
    if part in toy:
        tensors = load_file(toy[part]) | {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    else:
        whole = load_file(toy["pretrained_model_name_or_path"])
        tensors = {name.removeprefix(prefix): each for name, each in whole.items() if name.startswith(prefix)}
    written = {(prefix if prefixed else "") + name: tensor for name, tensor in tensors.items()}
    meant = write_encoder(tmp_path / "clip.gguf", written, architecture)
    meant = {name.removeprefix(prefix): tensor for name, tensor in meant.items()}
    model = load_model(toy_shelf.options(family, **{part: str(tmp_path / "clip.gguf")}))
    kept = [each for each in model.parts[part].module.parameters() if isinstance(each, QuantizedWeight)]
    assert len(kept) == 6 * model.blueprint.networks[part].config["num_hidden_layers"]
    encoder = take_reference(model, part, meant, projected="text_projection.weight" in meant)
    tokenizer = model.tokenizers[part]
    with torch.no_grad():
        ours = encode_with_grad(model, part, CAPTIONS)
        tokens = tokenizer(CAPTIONS, padding="max_length", max_length=77, return_tensors="pt")
        theirs = encoder(input_ids=tokens.input_ids, output_hidden_states=True)
    pooled = theirs.text_embeds if "text_projection.weight" in meant else theirs.pooler_output
    torch.testing.assert_close(ours["pooled"], pooled, rtol=1e-4, atol=1e-4)
    if "hidden" in ours:
        length = ours["hidden"].shape[1]
        torch.testing.assert_close(ours["hidden"], theirs.hidden_states[-2][:, :length], rtol=1e-4, atol=1e-4)
