"""Adapter files that were trained here, loaded by diffusers: every layer arrives, and the networks give the same."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from families.loading import load_family
from sfumato.adapters.base import AdapterEngine
from sfumato.adapters.kinds import read_adapter_file
from sfumato.adapters.lora import LoRA
from sfumato.config import ModelOptions, NoiseOptions
from sfumato.demo.toy import write_toy
from sfumato.families import register_families
from sfumato.families.base import Family, find_family
from sfumato.families.encoding import encode_with_grad
from sfumato.families.source import open_source
from toy_runs import make_images, train_toy

PROMPT = "a red cup of coffee"


@dataclass(frozen=True)
class Case:
    """One toy, and how diffusers calls its networks."""

    family: str
    variant: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    encoders: dict[str, str] = field(default_factory=lambda: {"clip": "text_encoder"})  # part -> component


CASES = {
    "sd": Case("sd"),
    "sd2": Case("sd", "2-v", {"v_parameterization": True}),
    "sdxl": Case("sdxl", encoders={"clip_l": "text_encoder", "clip_g": "text_encoder_2"}),
}


def attach_file(model: Family, file: Path) -> dict[str, int]:
    """Hook the file's adapters onto the model; the number of layers of each part."""
    entries = read_adapter_file(file).layers
    engine = AdapterEngine()
    counts: dict[str, int] = {}
    for name, part in model.parts.items():
        if not part.spec.targets:
            continue
        groups = [group for group in part.groups() if group.name in entries]
        engine.attach(groups, lambda group: LoRA.from_tensors(group, entries[group.name]))
        counts[name] = len(groups)
    assert sum(counts.values()) == len(entries)
    return counts


def count_lora_layers(module: nn.Module) -> int:
    """How many layers of a diffusers network carry an active adapter."""
    return sum(isinstance(getattr(layer, "lora_A", None), nn.ModuleDict) for layer in module.modules())


def encode_with_pipeline(pipe: Any, case: Case) -> dict[str, dict[str, Tensor]]:
    """Part -> features, by the pipeline's own tokenizers and encoders."""
    features: dict[str, dict[str, Tensor]] = {}
    for number, (part, name) in enumerate(case.encoders.items()):
        tokenizer = pipe.tokenizer_2 if number else pipe.tokenizer
        ids = tokenizer([PROMPT], padding="max_length", max_length=77, return_tensors="pt").input_ids
        output = getattr(pipe, name)(ids, output_hidden_states=True)
        read = output.hidden_states[-2] if len(case.encoders) > 1 else output.last_hidden_state
        features[part] = {"hidden": read} | ({"pooled": output.text_embeds} if number else {})
    return features


@pytest.mark.full
@pytest.mark.parametrize("name", sorted(CASES))
@torch.no_grad()
def test_a_trained_lora_gives_the_same_in_diffusers(name: str, tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    case = CASES[name]
    toy = write_toy(case.family, tmp_path / "toy", variant=case.variant)
    write_toy(case.family, tmp_path / "folder", variant=case.variant, layout="diffusers")
    with torch.enable_grad():
        output = train_toy(
            toy,
            make_images(tmp_path / "images"),
            tmp_path / "out",
            learning_rate="3e-2",
            network_alpha=1,
            **case.options,
        )
    register_families()
    options = ModelOptions(pretrained_model_name_or_path=str(toy["pretrained_model_name_or_path"]), **case.options)
    source = open_source(options)
    family = find_family(None, source)
    model = load_family(family, family.read(source, options, NoiseOptions()), options)
    before = {part: encode_with_grad(model, part, [PROMPT]) for part in model.text_parts}
    counts = attach_file(model, output / "lora.safetensors")

    pipe: Any = DiffusionPipeline.from_pretrained(tmp_path / "folder", safety_checker=None)
    pipe.load_lora_weights(output, weight_name="lora.safetensors")
    names = {"denoiser": "unet", **case.encoders}
    assert {part: count_lora_layers(getattr(pipe, theirs)) for part, theirs in names.items()} == counts
    assert all(counts.values())

    features = encode_with_pipeline(pipe, case)
    for part in model.text_parts:
        ours = encode_with_grad(model, part, [PROMPT])
        for what, tensor in ours.items():
            assert (tensor - before[part][what]).abs().max() > 1e-3, "the adapter must matter"
            torch.testing.assert_close(features[part][what], tensor, rtol=0, atol=1e-5)

    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    text = torch.cat([encoded["hidden"] for encoded in features.values()], dim=-1)
    added = {}
    if "clip_g" in features:
        sizes = torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]])
        added = {"added_cond_kwargs": {"text_embeds": features["clip_g"]["pooled"], "time_ids": sizes}}
    theirs = pipe.unet(x, torch.tensor([600]), encoder_hidden_states=text, **added).sample
    conditioning = {"encoder_hidden_states": text} | added.get("added_cond_kwargs", {})
    ours = model.predict(x, torch.tensor([600.0]), conditioning)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    pipe.unload_lora_weights()
    plain = pipe.unet(x, torch.tensor([600]), encoder_hidden_states=text, **added).sample
    assert (plain - theirs).abs().max() > 1e-2, "the adapter must matter"
