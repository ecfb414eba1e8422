"""What is particular to FLUX.1: masks, guidance, files in several layouts, LoRA at the real width."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file, save_file

from families.built_part import BuiltPart
from families.loading import load_model
from families.toys import ToyShelf
from sfumato.adapters.base import AdapterEngine
from sfumato.adapters.lora import LoRA
from sfumato.adapters.split_lora import SplitLoRA
from sfumato.config import ModelOptions
from sfumato.data.batch import Sizes
from sfumato.errors import UserError
from sfumato.families import _flux_keys, _tokenizers
from sfumato.families.base import Family
from sfumato.families.encoding import encode_with_grad

CAPTIONS = ["a cat", "a red cup of coffee on a wooden table with a cat and a dog"]


@pytest.fixture(scope="module")
def toy(toy_shelf: ToyShelf) -> dict[str, str]:
    paths = toy_shelf.paths("flux")
    return {name: str(path) for name, path in paths.items() if not name.startswith("tokenizer")}


def load(**options: Any) -> Family:
    return load_model(ModelOptions(**options), family="flux")


def prediction(model: Family, captions: list[str], spoil: float = 0.0) -> torch.Tensor:
    """With `spoil`, text beyond the mask is replaced by that value."""
    features = {part: encode_with_grad(model, part, captions) for part in model.text_parts}
    if "mask" in features["t5"]:
        features["t5"]["hidden"] = features["t5"]["hidden"].masked_fill(~features["t5"]["mask"][..., None], spoil)
    conditioning = model.condition(features, Sizes.from_size(len(captions), 64, 64), None)
    x = torch.randn(len(captions), 16, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.predict(x, torch.full((len(captions),), 500.0), conditioning)


def test_text_beyond_the_mask_changes_nothing(toy: dict[str, str]) -> None:
    model = load(**toy, apply_t5_attn_mask=True)
    assert encode_with_grad(model, "t5", CAPTIONS)["mask"].sum(1).unique().numel() == 2
    clean, spoilt = prediction(model, CAPTIONS), prediction(model, CAPTIONS, spoil=1000.0)
    assert torch.equal(clean, spoilt)
    torch.testing.assert_close(prediction(model, CAPTIONS[:1]), clean[:1], rtol=0, atol=1e-5)


def test_without_the_mask_every_position_is_kept(toy: dict[str, str]) -> None:
    features = encode_with_grad(load(**toy), "t5", CAPTIONS)
    assert features["hidden"].shape[:2] == (2, 512)
    assert "mask" not in features
    assert encode_with_grad(load(**toy, t5xxl_max_token_length=32), "t5", CAPTIONS)["hidden"].shape[1] == 32


def test_schnell_has_no_guidance_and_shorter_text(toy_shelf: ToyShelf) -> None:
    paths = toy_shelf.paths("flux", variant="schnell")
    model = load(**{name: str(path) for name, path in paths.items() if not name.startswith("tokenizer")})
    assert model.blueprint.title == "FLUX.1 schnell"
    assert encode_with_grad(model, "t5", CAPTIONS)["hidden"].shape[1] == 256
    assert prediction(model, CAPTIONS).isfinite().all()


def test_layouts_of_other_programs(toy: dict[str, str], tmp_path: Path) -> None:
    """A prefixed transformer, CLIP without its `text_model.` level, T5 with the embedding twice: the same model."""
    expected = prediction(load(**toy), CAPTIONS)
    state = load_file(toy["pretrained_model_name_or_path"])
    save_file({"model.diffusion_model." + key: tensor for key, tensor in state.items()}, tmp_path / "dit.safetensors")
    clip = {key.removeprefix("text_model."): tensor for key, tensor in load_file(toy["clip_l"]).items()}
    save_file(clip, tmp_path / "clip.safetensors")
    t5 = load_file(toy["t5xxl"])
    save_file(t5 | {"encoder.embed_tokens.weight": t5["shared.weight"].clone()}, tmp_path / "t5.safetensors")
    folder = Path(toy["clip_l"]).parent
    tokenizers = (str(folder / "tokenizer"), str(folder / "tokenizer_2"))
    other = load(
        pretrained_model_name_or_path=str(tmp_path / "dit.safetensors"), clip_l=str(tmp_path / "clip.safetensors"),
        t5xxl=str(tmp_path / "t5.safetensors"), ae=toy["ae"], tokenizer=tokenizers,
    )  # fmt: skip
    assert torch.equal(prediction(other, CAPTIONS), expected)


def test_missing_components_are_named(toy: dict[str, str]) -> None:
    with pytest.raises(UserError, match="--t5xxl") as error:
        load(**{name: path for name, path in toy.items() if name != "t5xxl"})
    assert error.value.code == "network-file-missing"


def test_a_missing_t5_tokenizer_says_which_files_to_put_where(toy: dict[str, str], tmp_path: Path) -> None:
    alone = tmp_path / "dit.safetensors"
    alone.write_bytes(Path(toy["pretrained_model_name_or_path"]).read_bytes())
    clip = str(Path(toy["clip_l"]).parent / "tokenizer")
    with pytest.raises(UserError, match="T5") as error:
        load(**(toy | {"pretrained_model_name_or_path": str(alone)}), tokenizer=(clip,))
    assert error.value.code == "t5-tokenizer-missing"
    assert "--tokenizer" in error.value.fix


def test_the_t5_tokenizer_is_found_in_the_hub_cache(
    toy: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the hub lays it out: snapshots of a commit that a reference names."""
    repository = tmp_path / "models--black-forest-labs--FLUX.1-dev"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    snapshot = repository / "snapshots" / "abc" / "tokenizer_2"
    shutil.copytree(Path(toy["clip_l"]).parent / "tokenizer_2", snapshot)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert _tokenizers.find_in_hub_cache(_tokenizers.T5_ON_HUB) == snapshot


@pytest.mark.full
@pytest.mark.parametrize("kind", [LoRA, SplitLoRA])
def test_a_lora_at_real_width_gives_the_same_in_diffusers(tmp_path: Path, kind: type[LoRA | SplitLoRA]) -> None:
    """diffusers reads FLUX LoRA files only at the width of the real model: one block of each kind."""
    from diffusers import FluxPipeline
    from diffusers.schedulers import FlowMatchEulerDiscreteScheduler

    with init_empty_weights(include_buffers=False):
        module = _flux_keys.build({"num_layers": 1, "num_single_layers": 1, "guidance_embeds": True})
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(t.shape, generator=generator).mul_(0.02) for name, t in module.state_dict().items()}
    module.load_state_dict(state, assign=True)
    module.requires_grad_(False)
    engine = AdapterEngine()
    engine.attach(
        BuiltPart(spec=_flux_keys.spec(""), module=module).groups(),
        lambda group: (kind if len(group.layers) > 1 else LoRA)(group, rank=4, alpha=2.0),
    )
    for parameter in engine.parameters():
        torch.nn.init.normal_(parameter, std=0.02, generator=generator)
    grid = torch.meshgrid(torch.zeros(1), torch.arange(4.0), torch.arange(4.0), indexing="ij")
    positions = torch.stack(grid, -1).reshape(-1, 3)
    arguments = {
        "hidden_states": torch.randn(1, 16, 64, generator=generator), "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.5]), "pooled_projections": torch.randn(1, 768, generator=generator),
        "encoder_hidden_states": torch.randn(1, 8, 4096, generator=generator), "txt_ids": torch.zeros(8, 3),
        "img_ids": positions,
    }  # fmt: skip
    with torch.no_grad():
        ours = module(**arguments, return_dict=False)[0]
        with engine.use_multiplier(0.0):
            base = module(**arguments, return_dict=False)[0]
    save_file(
        {name: tensor.contiguous() for name, tensor in engine.export_tensors().items()}, tmp_path / "lora.safetensors"
    )
    engine.multiplier = 0.0
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), transformer=module, vae=None, text_encoder=None, tokenizer=None,
        text_encoder_2=None, tokenizer_2=None,
    )  # fmt: skip
    pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    loaded = [name for name, each in module.named_modules() if hasattr(each, "lora_A") and len(each.lora_A)]
    assert len(loaded) == sum(len(adapter.group.layers) for adapter in engine)
    with torch.no_grad():
        theirs = module(**arguments, return_dict=False)[0]
    assert (ours - base).abs().max() > 1e-3
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
