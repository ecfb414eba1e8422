"""LLLite 2.1, which reads the control image's latents: its structure written out, trained, resumed, generated with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from families.loading import load_model
from families.toys import ToyShelf
from methods.lllite_files import read_layers, write_drawn_file
from methods.lllite_written_out import TRUNK, VersionTwo
from sfumato.cli.generate import main as generate_command
from sfumato.errors import UserError
from toy_runs import equal_tensors, make_controlled_images, read_metrics, read_weights, train_toy

OPTIONS = {
    "method": "lllite", "network_dim": 8, "cond_emb_dim": 4, "lllite_cond_dim": 6, "learning_rate": "1e-2",
    "lllite_cond_input": "latent",
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_controlled_images(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("reads_mask", [False, True])
def test_the_trunk_is_as_written_out(reads_mask: bool, toy_shelf: ToyShelf, tmp_path: Path) -> None:
    """From a file with sd-scripts' keys; one that reads a mask changes nothing without it."""
    model = load_model(toy_shelf.options("flux"))
    sizes = {"latent_channels": model.latents.channels, "image_channels": 3 + reads_mask}
    file = write_drawn_file(model, tmp_path / "drawn.safetensors", **sizes)
    assert load_file(file)[f"{TRUNK}.lat_conv1.weight"].shape[1] == 16 * (1 + reads_mask)
    made = read_layers(model, file)
    assert made.reads_latents
    latents = torch.randn(1, 16, 8, 12, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(1, 1, 64, 96)
    mask[..., 16:40, 8:48] = 1
    made.set_image(latents, mask=mask if reads_mask else None)
    seen: list[torch.Tensor] = []
    made.parts[TRUNK].register_forward_hook(lambda module, inputs, output: seen.append(output))
    made.begin_forward({})
    expected = VersionTwo(load_file(file)).read_latents(latents, 2 * mask - 1 if reads_mask else None)
    torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-4)
    facts = made.file_metadata()
    assert (facts["lllite.cond_input_space"], facts["lllite.version"]) == ("latent", 2)
    assert facts["lllite.cond_in_channels"] == 3 + reads_mask
    made.set_image(latents)
    assert made.is_active is not reads_mask


@pytest.mark.full
@pytest.mark.parametrize("family", ["flux", "sdxl"])
def test_it_trains_resumes_exactly_and_generates_its_preview(
    family: str, toy_shelf: ToyShelf, data: tuple[Path, Path], tmp_path: Path
) -> None:
    """Latents that are cached are those of each step; the control image decides; and training goes on from a file."""
    toy, control = toy_shelf.paths(family), data[1] / "2_cat" / "0.png"
    (tmp_path / "prompts.txt").write_text(f"a cat --w 64 --h 64 --s 2 --d 1 --l 1 --cn {control}\n")
    more = {"sample_prompts": tmp_path / "prompts.txt", "sample_every_n_steps": 4, "save_every_n_steps": 2}
    options = {**OPTIONS, "conditioning_data_dir": data[1], "save_state": True}
    output = train_toy(toy, data[0], tmp_path / "straight", **options, **more, cache_latents=True)
    live = train_toy(toy, data[0], tmp_path / "live", **options, resume=output / "lora-step00000002-state")
    assert equal_tensors(read_weights(live), read_weights(output))
    other = train_toy(toy, data[0], tmp_path / "other", **{**options, "conditioning_data_dir": data[0]})
    assert not equal_tensors(read_weights(other), read_weights(output))
    with safe_open(output / "lora.safetensors", "pt") as file:
        assert file.metadata()["lllite.cond_input_space"] == "latent"
    again = train_toy(
        toy, data[0], tmp_path / "again", method="lllite", network_dim=None, learning_rate="1e-12", max_train_steps=1,
        network_weights=output / "lora.safetensors", conditioning_data_dir=data[1],
    )  # fmt: skip
    for name, tensor in read_weights(output).items():
        torch.testing.assert_close(read_weights(again)[name], tensor, rtol=0, atol=1e-6)

    given = toy_shelf.options(family).model_dump(exclude_defaults=True)
    line = [word for name, value in given.items() if not isinstance(value, tuple)
            for word in ([f"--{name}"] if value is True else [f"--{name}", str(value)])]  # fmt: skip
    line += ["--prompt", "a cat", "--W", "64", "--H", "64", "--steps", "2", "--seed", "1", "--scale", "1"]
    line += ["--outdir", str(tmp_path / "made"), "--control_net_lllite_models", str(output / "lora.safetensors")]
    assert generate_command([*line, "--control_net_image", str(control)]) == 0
    (made,) = (tmp_path / "made").glob("*.png")
    (preview,) = (output / "sample").glob("*.png")
    assert Image.open(made).tobytes() == Image.open(preview).tobytes()


@pytest.mark.full
def test_a_drawn_mask_is_read_beside_the_latents(toy_shelf: ToyShelf, data: tuple[Path, Path], tmp_path: Path) -> None:
    """Every tensor learns; the loss falls at one timestep."""
    fixed = {"min_timestep": 400, "max_timestep": 401, "max_train_steps": 24, "lllite_cond_in_channels": 4}
    options = {**OPTIONS, "conditioning_data_dir": data[1], "cache_latents": True, **fixed}
    output = train_toy(toy_shelf.paths("sd3"), data[0], tmp_path, **options)
    assert read_weights(output)[f"{TRUNK}.mask_conv1.weight"].shape == (4, 1, 2, 2)
    losses = [row["loss/current"] for row in read_metrics(output)]
    assert sum(losses[-4:]) < 0.95 * sum(losses[:4])


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ("other latents", "lllite-latents-mismatch"),
        ("hidden", "lllite-latents-hidden"),
        ("version 3", "lllite-version-3"),
    ],
)
def test_files_that_cannot_be_read(change: str, code: str, toy_shelf: ToyShelf, tmp_path: Path) -> None:
    model = load_model(toy_shelf.options("flux"))
    channels = 4 if change == "other latents" else 16
    sizes = {"latent_channels": channels, "image_channels": 4 if change == "hidden" else 3}
    tensors = load_file(write_drawn_file(model, tmp_path / "drawn.safetensors", **sizes))
    facts = {"hidden": {"lllite.inpaint_masked_input": "true"}, "version 3": {"lllite.trunk": "semantic"}}
    save_file(tensors, tmp_path / "file.safetensors", facts.get(change))
    with pytest.raises(UserError) as error:
        read_layers(model, tmp_path / "file.safetensors")
    assert error.value.code == code
