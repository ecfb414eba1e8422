"""What accelerate's launcher puts into the environment is named where it has no effect."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "--compile and --compile_backend"),
        ("DYNAMO_BACKEND", "eager", "--compile and --compile_backend"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "--fsdp and --deepspeed"),
        ("ACCELERATE_GRADIENT_CLIPPING", "0.5", "--max_grad_norm counts, which is 1.0"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "--mixed_precision counts, which is no"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "--gradient_accumulation_steps counts, which is 1"),
    ],
)
def test_what_has_no_effect_is_named(load, monkeypatch, name, value, words):
    monkeypatch.setenv(name, value)
    (note,) = (note for note in load().notes if name in note)
    assert f"{name}={value}" in note
    assert words in note


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ACCELERATE_DYNAMO_BACKEND", "NO"),
        ("ACCELERATE_DYNAMO_BACKEND", ""),
        ("ACCELERATE_USE_FSDP", "false"),
        ("ACCELERATE_MIXED_PRECISION", "no"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1"),
    ],
)
def test_what_is_off_is_not_named(load, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert not any(name in note for note in load().notes)


def test_what_the_options_say_too_is_not_named(load, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert not any("ACCELERATE" in note for note in load("--mixed_precision bf16").notes)
