"""--extract_lora_at_end: the LoRA is the difference of the trained model from its base."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from families.toys import ToyShelf
from sfumato.cli.main import main
from toy_runs import make_arguments, make_images

UNET = "model.diffusion_model."


@pytest.mark.full
def test_the_base_with_the_lora_is_the_trained_model(
    toy_shelf: ToyShelf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """At a rank that is enough; layers that no LoRA changes stay those of the base."""
    toy, images = toy_shelf.paths("sd"), make_images(tmp_path / "images")
    options = {"method": "full", "network_dim": None, "max_train_steps": 2, "extract_lora_at_end": 500}
    assert main(["train", *make_arguments(toy, images, tmp_path / "out", **options)]) == 0
    assert "lora_lora.safetensors" in capsys.readouterr().out
    base = toy["pretrained_model_name_or_path"]
    command = ["lora", "merge", str(tmp_path / "out" / "lora_lora.safetensors"), "--model", str(base)]
    assert main([*command, "--save_to", str(tmp_path / "merged.safetensors")]) == 0
    before, trained = load_file(base), load_file(tmp_path / "out" / "lora.safetensors")
    merged = load_file(tmp_path / "merged.safetensors")
    attention = [key for key in trained if key.startswith(UNET) and ".attn1.to_" in key and key.endswith("weight")]
    assert len(attention) > 20
    assert max(float((trained[key] - before[key]).abs().max()) for key in attention) > 1e-3
    for key in attention:
        change = trained[key] - before[key]
        torch.testing.assert_close(
            merged[key] - before[key], change, rtol=0, atol=2e-3 * float(change.abs().max()) + 1e-7
        )


@pytest.mark.full
def test_a_run_that_is_complete_says_what_failed(toy_shelf: ToyShelf, tmp_path: Path, codes: list[str]) -> None:
    """At a learning rate of 0 nothing differs: the model is there, and the error says so."""
    toy, images = toy_shelf.paths("sd"), make_images(tmp_path / "images")
    options = {"method": "full", "network_dim": None, "max_train_steps": 1, "extract_lora_at_end": 2}
    words = make_arguments(toy, images, tmp_path / "out", **options, learning_rate="1e-30")
    assert main(["train", *words]) == 2
    assert codes == ["extract-nothing-differs"]
    assert (tmp_path / "out" / "lora.safetensors").is_file()
    assert not (tmp_path / "out" / "lora_lora.safetensors").exists()
