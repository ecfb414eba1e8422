"""What is particular to Chroma: how it is recognized and chosen, text and mask, files in several layouts, time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from safetensors.torch import load_file, save_file
from torch import Tensor

from families.built_part import BuiltPart
from families.loading import load_family, load_model
from families.toys import ToyShelf
from sfumato.adapters.base import AdapterEngine
from sfumato.adapters.lora import LoRA
from sfumato.config import ModelOptions, NoiseOptions, load_config
from sfumato.data.batch import Sizes
from sfumato.errors import SeveralErrors, UserError
from sfumato.families import _chroma_keys, register_families
from sfumato.families.base import Family, find_family
from sfumato.families.encoding import encode_with_grad
from sfumato.families.source import open_source
from sfumato.plan import make_run_plan
from toy_runs import make_arguments, make_images

CAPTIONS = ["a cat", "a red cup of coffee on a wooden table with a cat and a dog"]
register_families()


def load(model: ModelOptions, dtype: torch.dtype = torch.float32) -> Family:
    return load_model(model, dtype, family="chroma")


def prediction(model: Family, captions: list[str], spoil: float = 0.0, t: float = 500.0) -> Tensor:
    """With `spoil`, text beyond the mask is replaced by that value."""
    features = encode_with_grad(model, "t5", captions)
    hidden = features["hidden"].masked_fill(~features["mask"][..., None], spoil)
    conditioning = model.condition({"t5": features | {"hidden": hidden}}, Sizes.from_size(len(captions), 64, 64), None)
    x = torch.randn(len(captions), 16, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.predict(x, torch.full((len(captions),), t), conditioning)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"), 2)


def seen(toy_shelf: ToyShelf, toy: str, images: Path, tmp_path: Path, **options: Any) -> str:
    """The family that a command line trains; the script's own comes as its preset."""
    preset = {"family": options.pop("script")} if "script" in options else {}
    line = make_arguments(toy_shelf.paths(toy), images, tmp_path, **options)
    return make_run_plan(load_config(line, defaults=preset), processes=1).family.name


def test_the_checkpoint_or_the_user_says_it(toy_shelf: ToyShelf, images: Path, tmp_path: Path) -> None:
    assert seen(toy_shelf, "chroma", images, tmp_path) == "chroma"
    assert seen(toy_shelf, "flux", images, tmp_path) == "flux"
    assert seen(toy_shelf, "chroma", images, tmp_path, family="chroma") == "chroma"
    assert seen(toy_shelf, "chroma", images, tmp_path, model_type="chroma", script="flux") == "chroma"


def test_the_other_models_files_are_refused_with_the_way_out(toy_shelf: ToyShelf, images: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'chroma'.*'flux' — --model_type chroma"):
        seen(toy_shelf, "chroma", images, tmp_path, script="flux")
    with pytest.raises(UserError, match=r"'flux'.*'chroma'"):
        seen(toy_shelf, "flux", images, tmp_path, model_type="chroma")


def test_what_it_cannot_do_without(toy_shelf: ToyShelf) -> None:
    with pytest.raises(SeveralErrors) as error:
        load(toy_shelf.options("chroma", apply_t5_attn_mask=False, guidance_scale=1.0))
    assert error.value.codes == ["chroma-attention-mask-missing", "chroma-guidance-scale"]
    load(toy_shelf.options("chroma", guidance_scale=0.0))


def test_text_is_read_as_diffusers_reads_it(toy_shelf: ToyShelf) -> None:
    """The words and the first token of padding; what its mask leaves out is left out."""
    from diffusers import ChromaPipeline

    pipe: Any = ChromaPipeline.from_pretrained(toy_shelf.paths("chroma", "diffusers")["pretrained_model_name_or_path"])
    hidden, _, mask, *_ = pipe.encode_prompt(CAPTIONS, do_classifier_free_guidance=False)
    ours = load(toy_shelf.options("chroma")).encode_text("t5", CAPTIONS)
    assert [len(each["hidden"]) for each in ours] == mask.sum(1).int().tolist()
    for each, theirs in zip(ours, hidden, strict=True):
        torch.testing.assert_close(each["hidden"], theirs[: len(each["hidden"])], rtol=0, atol=1e-5)
        assert each["mask"].all()


def test_a_caption_that_fills_every_place_has_no_padding(toy_shelf: ToyShelf) -> None:
    model = load(toy_shelf.options("chroma", t5xxl_max_token_length=6))
    assert [len(each["hidden"]) for each in model.encode_text("t5", ["a cat", "cat " * 20])] == [4, 6]


def test_text_beyond_the_mask_changes_nothing(toy_shelf: ToyShelf) -> None:
    model = load(toy_shelf.options("chroma"))
    assert encode_with_grad(model, "t5", CAPTIONS)["mask"].sum(1).unique().numel() == 2
    clean, spoilt = prediction(model, CAPTIONS), prediction(model, CAPTIONS, spoil=1000.0)
    assert torch.equal(clean, spoilt)
    for i, caption in enumerate(CAPTIONS):
        x = prediction(model, [caption, caption])  # the noise of both places, and no padding at all
        torch.testing.assert_close(clean[i], x[i], rtol=0, atol=1e-5)


def test_no_row_of_attention_is_empty(toy_shelf: ToyShelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some attention kernels give nan where a token may see nothing, and its gradient spreads."""
    masks: list[Tensor] = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def spy(*args: Any, attn_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        masks.append(attn_mask if attn_mask is not None else torch.ones(1, dtype=torch.bool))
        return attention(*args, attn_mask=attn_mask, **kwargs)

    model = load(toy_shelf.options("chroma"))
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    prediction(model, CAPTIONS)
    seen = [mask for mask in masks if mask.ndim == 4 and mask.shape[0] == 2]
    assert len([mask for mask in seen if not mask.all()]) >= 4  # every block
    assert all(mask.any(-1).all() for mask in seen)


@pytest.mark.full
def test_files_of_other_programs(toy_shelf: ToyShelf, tmp_path: Path) -> None:
    """With a prefix, in diffusers' names, in pieces, or a folder of the transformer alone: the same model."""
    paths = toy_shelf.paths("chroma")
    expected = prediction(load(toy_shelf.options("chroma")), CAPTIONS)
    tokenizer = str(paths["tokenizer_2"])
    original = load_file(paths["pretrained_model_name_or_path"])
    whole = toy_shelf.paths("chroma", "diffusers")["pretrained_model_name_or_path"]
    renamed = load_file(whole / "transformer" / "diffusion_pytorch_model.safetensors")

    save_file({"model.diffusion_model." + key: tensor for key, tensor in original.items()}, tmp_path / "p.safetensors")
    save_file(renamed, tmp_path / "r.safetensors")
    keys = sorted(renamed)
    for i in range(2):
        some = {key: renamed[key] for key in keys[i::2]}
        save_file(some, tmp_path / f"s-{i + 1:05d}-of-00002.safetensors")
    for place in ("p.safetensors", "r.safetensors", "s-00001-of-00002.safetensors", str(whole / "transformer")):
        options = toy_shelf.options("chroma", tokenizer=(tokenizer,))
        found = load(options.model_copy(update={"pretrained_model_name_or_path": str(tmp_path / place)}))
        assert torch.equal(prediction(found, CAPTIONS), expected), place


def test_weights_stored_in_float8(toy_shelf: ToyShelf, tmp_path: Path) -> None:
    """They are what they were rounded to, in whatever dtype the model runs."""
    original = load_file(toy_shelf.paths("chroma")["pretrained_model_name_or_path"])
    small = {key: tensor.to(torch.float8_e4m3fn) for key, tensor in original.items()}
    save_file(small, tmp_path / "fp8.safetensors")
    save_file({key: tensor.float() for key, tensor in small.items()}, tmp_path / "rounded.safetensors")
    tokenizer = str(toy_shelf.paths("chroma")["tokenizer_2"])
    options = toy_shelf.options("chroma", tokenizer=(tokenizer,))
    found = [
        prediction(load(options.model_copy(update={"pretrained_model_name_or_path": str(tmp_path / name)})), CAPTIONS)
        for name in ("fp8.safetensors", "rounded.safetensors")
    ]
    assert torch.equal(*found)


def embedded_time(family: str, toy_shelf: ToyShelf, dtype: torch.dtype) -> Tensor:
    """What the network sees of the time 601, as it trains with this dtype."""
    options = toy_shelf.options(family)
    source = open_source(options)
    found = find_family(family, source)
    blueprint = found.read(source, options, NoiseOptions())
    model = load_family(found, blueprint, options, dtype)
    outputs: list[Tensor] = []
    projection = model.denoiser.get_submodule("time_text_embed.time_proj")
    projection.register_forward_hook(lambda module, args, output: outputs.append(output))
    features = {part: encode_with_grad(model, part, ["a cat"]) for part in model.text_parts}
    conditioning = model.condition(features, Sizes.from_size(1, 64, 64), None)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        model.predict(torch.zeros(1, 16, 8, 8), torch.tensor([601.0]), conditioning)
    return outputs[0]


@pytest.mark.parametrize("family", ["flux", "chroma"])
def test_time_is_not_rounded_to_bfloat16(family: str, toy_shelf: ToyShelf) -> None:
    """601 is no number of bfloat16, whose neighbours there are 600 and 604."""
    exact = embedded_time(family, toy_shelf, torch.float32)
    torch.testing.assert_close(embedded_time(family, toy_shelf, torch.bfloat16).float(), exact, rtol=0, atol=1e-3)
    assert float(exact[0].abs().max()) > 0.5


@pytest.mark.full
def test_a_lora_at_real_width_gives_the_same_in_diffusers(tmp_path: Path) -> None:
    from diffusers import ChromaPipeline
    from diffusers.schedulers import FlowMatchEulerDiscreteScheduler

    config = {"num_layers": 1, "num_single_layers": 1, "approximator_hidden_dim": 64, "approximator_layers": 1}
    with init_empty_weights(include_buffers=False):
        module = _chroma_keys.build(config)
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(t.shape, generator=generator).mul_(0.02) for name, t in module.state_dict().items()}
    module.load_state_dict(state, assign=True)
    module.requires_grad_(False)
    engine = AdapterEngine()
    groups = BuiltPart(spec=_chroma_keys.spec(""), module=module).groups()
    engine.attach(groups, lambda group: LoRA(group, rank=4, alpha=2.0))
    for parameter in engine.parameters():
        torch.nn.init.normal_(parameter, std=0.02, generator=generator)
    grid = torch.meshgrid(torch.zeros(1), torch.arange(4.0), torch.arange(4.0), indexing="ij")
    inputs = {
        "hidden_states": torch.randn(1, 16, 64, generator=generator), "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": torch.randn(1, 8, 4096, generator=generator), "txt_ids": torch.zeros(8, 3),
        "img_ids": torch.stack(grid, -1).reshape(-1, 3),
    }  # fmt: skip
    with torch.no_grad():
        ours = module(**inputs, return_dict=False)[0]
        with engine.use_multiplier(0.0):
            base = module(**inputs, return_dict=False)[0]
    save_file(
        {name: tensor.contiguous() for name, tensor in engine.export_tensors().items()}, tmp_path / "lora.safetensors"
    )
    engine.multiplier = 0.0
    pipe = ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), transformer=module, vae=None, text_encoder=None, tokenizer=None
    )
    pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    loaded = [name for name, each in module.named_modules() if hasattr(each, "lora_A") and len(each.lora_A)]
    assert len(loaded) == sum(len(adapter.group.layers) for adapter in engine)
    with torch.no_grad():
        theirs = module(**inputs, return_dict=False)[0]
    assert (ours - base).abs().max() > 1e-3
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
