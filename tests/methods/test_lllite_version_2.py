"""The second version of LLLite in every family: against its structure written out, generated with."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from families.loading import load_model
from families.toys import ToyShelf
from methods.lllite_files import read_layers, write_drawn_file
from methods.lllite_written_out import TRUNK, VersionTwo
from sfumato.cli.generate import main as generate_command
from sfumato.common.layer_kinds import parse_layer_kinds
from sfumato.data.batch import CONTROL, Extras, ImageInput, Sizes, pad_stack
from sfumato.errors import UserError
from sfumato.families.encoding import encode_text
from sfumato.methods.inference_adapters import InferenceAdapters
from toy_runs import equal_tensors, make_controlled_images, read_metrics, read_weights, train_toy

FAMILIES = ("flux", "sd", "sdxl", "sd3", "chroma", "lumina", "flux_kontext")
EVERY_LAYER = "self_attn_q_pre,self_attn_kv_pre,cross_attn_q_pre,mlp_fc1_pre"
OPTIONS: dict[str, Any] = {
    "method": "lllite", "network_dim": 8, "cond_emb_dim": 4, "lllite_cond_dim": 6, "learning_rate": "1e-2",
    "lllite_version": 2, "cache_latents": True, "lllite_target_layers": EVERY_LAYER, "lllite_use_aspp": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_controlled_images(tmp_path_factory.mktemp("data"))


def train_it(toy: Mapping[str, Path], data: tuple[Path, Path], output: Path, **options: Any) -> Path:
    return train_toy(toy, data[0], output, **{**OPTIONS, "conditioning_data_dir": data[1], **options})


def watch_inputs(network: nn.Module, paths: list[str], seen: dict[str, Tensor]) -> None:
    for path in paths:

        def note(module: nn.Module, args: tuple[Tensor, ...], path: str = path) -> None:
            seen[path] = args[0].detach().clone()

        network.get_submodule(path).register_forward_pre_hook(note)


@pytest.mark.fast_for("lumina")
@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_of_layers_change_as_written_out(family: str, toy_shelf: ToyShelf, tmp_path: Path) -> None:
    """Two captions of different lengths: only tokens of the image change, wherever the network puts them."""
    model = load_model(toy_shelf.options(family))
    file = write_drawn_file(model, tmp_path / "drawn.safetensors")
    made = read_layers(model, file)
    before: dict[str, Tensor] = {}
    after: dict[str, Tensor] = {}
    paths = [layer.path for layer in made.layers.values()]
    watch_inputs(model.denoiser, paths, before)
    made.attach(model.denoiser)
    watch_inputs(model.denoiser, paths, after)
    image = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1)) * 2 - 1
    made.set_image(image)

    rows = {part: encode_text(model, part, ["a cat", "a red dog on a wooden table"], weighted=False)
            for part in model.text_parts}  # fmt: skip
    features = {part: {n: pad_stack([row[n] for row in each]) for n in each[0]} for part, each in rows.items()}
    text = model.condition(features, Sizes.from_size(2, 64, 96), None)
    latents = torch.randn(2, model.latents.channels, 8, 12, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        changed = model.predict(latents, torch.tensor([500.0, 200.0]), text)
        made.set_image(None)
        plain = model.predict(latents, torch.tensor([500.0, 200.0]), text)
        made.set_image(image)
        model.predict(latents, torch.tensor([500.0, 200.0]), text)
    assert (changed - plain).abs().max() > 1e-3

    written = VersionTwo(load_file(file))
    grid = written.read_image(image)
    for layer in made.layers.values():
        side, x, found = layer.token_side, before[layer.path], after[layer.path]
        size = (-(-64 // side), -(-96 // side))
        seen = written.resize(grid, size)
        for row in range(2):
            start = 0
            if layer.follows_text:
                mask = text.get("encoder_attention_mask")
                start = text["encoder_hidden_states"].shape[1] if mask is None else int(mask[row].sum())
            own = slice(start, start + seen.shape[1])
            expected = x[row].clone()
            expected[own] += written.change(layer.name, x[row : row + 1, own], seen[row : row + 1])[0]
            torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-4)
            assert (found[row][own] - x[row][own]).abs().max() > 1e-3
    kinds = {layer.layer_kind for layer in made.layers.values()}
    wanted = set(parse_layer_kinds(EVERY_LAYER))
    assert kinds == (wanted if family in ("sd", "sdxl") else wanted - {"cross_attn_q_pre"})


@pytest.mark.full
@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_generate_makes_the_preview_again(
    family: str, toy_shelf: ToyShelf, data: tuple[Path, Path], tmp_path: Path
) -> None:
    toy, control = toy_shelf.paths(family), data[1] / "2_cat" / "0.png"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"a cat --w 64 --h 64 --s 2 --d 1 --l 1 --cn {control}\n")
    output = train_it(toy, data, tmp_path / "straight", sample_prompts=prompts, sample_every_n_steps=4)
    with safe_open(output / "lora.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.architecture"].endswith("/control-net-lllite")
    assert {name: metadata[f"lllite.{name}"] for name in ("version", "cond_emb_dim", "cond_dim", "mlp_dim")} == {
        "version": "2", "cond_emb_dim": "4", "cond_dim": "6", "mlp_dim": "8"
    }  # fmt: skip
    assert (metadata["lllite.use_aspp"], metadata["lllite.aspp_dilations"]) == ("true", "1,2,4,8")

    given = toy_shelf.options(family).model_dump(exclude_defaults=True)
    line = [word for name, value in given.items() if not isinstance(value, tuple)
            for word in ([f"--{name}"] if value is True else [f"--{name}", str(value)])]  # fmt: skip
    line += ["--prompt", "a cat", "--W", "64", "--H", "64", "--steps", "2", "--seed", "1", "--scale", "1"]
    line += ["--outdir", str(tmp_path / "made"), "--control_net_lllite_models", str(output / "lora.safetensors")]
    assert generate_command([*line, "--control_net_image", str(control)]) == 0
    (made,) = (tmp_path / "made").glob("*.png")
    (preview,) = (output / "sample").glob("*.png")
    assert Image.open(made).tobytes() == Image.open(preview).tobytes()
    made.unlink()
    assert generate_command(line) == 0
    (plain,) = (tmp_path / "made").glob("*.png")
    assert Image.open(plain).tobytes() != Image.open(preview).tobytes()


@pytest.mark.full
@pytest.mark.parametrize("family", ["flux", "sdxl"])
def test_the_loss_falls(family: str, toy_shelf: ToyShelf, data: tuple[Path, Path], tmp_path: Path) -> None:
    fixed = {"min_timestep": 400, "max_timestep": 401, "lllite_target_layers": "self_attn_qkv", "max_train_steps": 24}
    losses = [row["loss/current"] for row in read_metrics(train_it(toy_shelf.paths(family), data, tmp_path, **fixed))]
    assert sum(losses[-4:]) < 0.95 * sum(losses[:4])


@pytest.mark.parametrize("hides", [False, True])
def test_a_mask_is_a_fourth_channel(hides: bool, toy_shelf: ToyShelf, tmp_path: Path) -> None:
    """As ComfyUI-Anima-LLLite reads such files: 1 to be filled in, -1 to stay; the image gray there, if it was so."""
    model = load_model(toy_shelf.options("flux"))
    drawn = load_file(write_drawn_file(model, tmp_path / "drawn.safetensors"))
    wide = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(5))
    metadata = {"lllite.inpaint_masked_input": str(hides).lower(), "lllite.aspp_dilations": "1,2,4,8"}
    save_file({**drawn, f"{TRUNK}.conv1.weight": wide}, tmp_path / "mask.safetensors", metadata)
    made = read_layers(model, tmp_path / "mask.safetensors")
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 16:40, 8:48] = 1
    made.set_image(image, mask=mask)
    seen = image.clone()
    if hides:
        seen[..., 16:40, 8:48] = 0
    assert made.image is not None
    written = VersionTwo(load_file(tmp_path / "mask.safetensors"))
    expected = written.read_image(torch.cat([seen, torch.where(mask > 0, 1.0, -1.0)], dim=1))
    torch.testing.assert_close(made.parts[TRUNK](made.image), expected, rtol=1e-4, atol=1e-4)
    assert {name: made.file_metadata()[f"lllite.{name}"] for name in ("cond_in_channels", "inpaint_masked_input")} == {
        "cond_in_channels": 4, "inpaint_masked_input": str(hides).lower()
    }  # fmt: skip
    made.set_image(image)
    assert not made.is_active
    save_file(drawn, tmp_path / "other.safetensors", {"lllite.aspp_dilations": "1,3,6,9"})
    other, same = (read_layers(model, tmp_path / f"{name}.safetensors") for name in ("other", "drawn"))
    assert not torch.equal(other.parts[TRUNK](image), same.parts[TRUNK](image))


@pytest.mark.full
@pytest.mark.parametrize("family", ["sd", "lumina"])
def test_training_with_masks(family: str, toy_shelf: ToyShelf, data: tuple[Path, Path], tmp_path: Path) -> None:
    """Another mask for each sample, the same in a resumed run; previews read --mk, and generate makes them again."""
    toy, control = toy_shelf.paths(family), data[1] / "2_cat" / "0.png"
    Image.new("L", (64, 64), 255).save(tmp_path / "mask.png")
    line = f"a cat --w 64 --h 64 --s 2 --d 1 --l 1 --cn {control}"
    (tmp_path / "prompts.txt").write_text(f"{line} --mk {tmp_path / 'mask.png'}\n{line}\n")
    own = {"lllite_cond_in_channels": 4, "lllite_inpaint_masked_input": True, "lllite_multiplier": 0.5}
    own |= {"lllite_version": None, "save_state": True, "lllite_use_aspp": None}
    more = {"sample_prompts": tmp_path / "prompts.txt", "sample_every_n_steps": 4, "save_every_n_steps": 2}
    output = train_it(toy, data, tmp_path / "straight", **own, **more)
    resumed = train_it(toy, data, tmp_path / "resumed", **own, resume=output / "lora-step00000002-state")
    assert equal_tensors(read_weights(resumed), read_weights(output))
    masked, plain = (Image.open(path) for path in sorted((output / "sample").glob("*.png")))
    assert masked.tobytes() != plain.tobytes()
    given = toy_shelf.options(family).model_dump(exclude_defaults=True)
    line = [word for name, value in given.items() if not isinstance(value, tuple)
            for word in ([f"--{name}"] if value is True else [f"--{name}", str(value)])]  # fmt: skip
    line += ["--prompt", "a cat", "--W", "64", "--H", "64", "--steps", "2", "--seed", "1", "--scale", "1"]
    line += ["--outdir", str(tmp_path / "made"), "--control_net_lllite_models", str(output / "lora.safetensors")]
    line += ["--control_net_multipliers", "0.5", "--control_net_image", str(control)]
    assert {"--control_net_multipliers 0.5", "--mask_path mask.png"} <= {
        " ".join(pair) for pair in pairwise(masked.info["command"].split())
    }
    assert generate_command([*line, "--mask_path", str(tmp_path / "mask.png")]) == 0
    (made,) = (tmp_path / "made").glob("*.png")
    assert Image.open(made).tobytes() == masked.tobytes()


@pytest.mark.full
def test_recomputed_blocks_give_the_same(toy_shelf: ToyShelf, data: tuple[Path, Path], tmp_path: Path) -> None:
    toy = toy_shelf.paths("flux")
    plain = read_weights(train_it(toy, data, tmp_path / "plain", max_train_steps=2))
    again = read_weights(train_it(toy, data, tmp_path / "again", max_train_steps=2, gradient_checkpointing=True))
    for name, tensor in plain.items():
        torch.testing.assert_close(again[name], tensor, rtol=0, atol=1e-5)


def test_strength_and_images(toy_shelf: ToyShelf, tmp_path: Path) -> None:
    """Without an image nothing changes, and an image of another size than the tokens is refused by torch, not read."""
    model = load_model(toy_shelf.options("flux"))
    file = write_drawn_file(model, tmp_path / "drawn.safetensors")
    adapters = InferenceAdapters(model, [], lllite=[file])
    (made,) = adapters.controlled
    assert set(made.parts.state_dict()) == set(load_file(file))
    adapters.set_batch(model, Extras(images={CONTROL: ImageInput(pixels=torch.zeros(1, 3, 64, 64))}))
    assert made.is_active
    made.strength = 0.0
    assert not made.is_active
    adapters.set_batch(model, Extras())
    made.strength = 1.0
    assert not made.is_active


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ("no trunk", "lllite-trunk-incomplete"),
        ("five channels", "lllite-variant-unsupported"),
        ("other model", "lllite-layers-unknown"),
        ("shape", "lllite-shapes-mismatch"),
    ],
)
def test_files_that_are_refused(change: str, code: str, toy_shelf: ToyShelf, tmp_path: Path) -> None:
    model = load_model(toy_shelf.options("flux"))
    state = load_file(write_drawn_file(model, tmp_path / "drawn.safetensors"))
    if change == "no trunk":
        state.pop(f"{TRUNK}.out_norm.weight")
    elif change == "five channels":
        state[f"{TRUNK}.conv1.weight"] = torch.zeros(3, 5, 4, 4)
    elif change == "shape":
        state[f"{TRUNK}.proj.bias"] = torch.zeros(9)
    save_file(state, tmp_path / "changed.safetensors")
    if change == "other model":
        model = load_model(toy_shelf.options("sd"))
    with pytest.raises(UserError) as raised:
        read_layers(model, tmp_path / "changed.safetensors")
    assert raised.value.code == code


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"lllite_cond_dim": 7}, "lllite-cond-dim-odd"),
        ({"lllite_target_layers": "cross_attn_q_pre"}, "lllite-no-layers"),
        ({"lllite_version": 1, "lllite_cond_in_channels": 4, "family": "sd"}, "lllite-version-without-mask"),
    ],
)
def test_options_that_are_refused(
    options: dict[str, Any], code: str, toy_shelf: ToyShelf, data: tuple[Path, Path], tmp_path: Path
) -> None:
    family = options.pop("family", "flux")
    with pytest.raises(UserError) as raised:
        train_it(toy_shelf.paths(family), data, tmp_path / "out", **options)
    assert raised.value.code == code


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("self_attn_qkv", ("self_attn_q_pre", "self_attn_kv_pre")),
        ("mlp_fc1_pre, self_attn_q_pre", ("self_attn_q_pre", "mlp_fc1_pre")),
        ("self_attn", None),
        ("", None),
    ],
)
def test_names_of_layers(text: str, kinds: tuple[str, ...] | None) -> None:
    if kinds is None:
        with pytest.raises(ValueError, match="names no layers"):
            parse_layer_kinds(text)
    else:
        assert parse_layer_kinds(text) == kinds
