"""The prompt files of concept training: sd-scripts' forms in TOML, YAML and JSON, and their faults."""

from __future__ import annotations

from pathlib import Path

import pytest

from sfumato.config.concepts import Concept, read_concepts
from sfumato.errors import UserError

PROMPTS = """
guidance_scale = 2
[[prompts]]
target = "van gogh"
[[prompts]]
target = "a street"
positive = "snow"
unconditional = "rain"
neutral = "street"
action = "enhance"
guidance_scale = 1.5
resolution = [512, 768]
batch_size = 3
multiplier = -2
weight = 0.5
"""
SLIDER = """
resolution = 256
neutrals = ["", "photo"]
[[targets]]
target_class = "person"
positive = "old person"
negative = "young person"
multiplier = 2
[[targets]]
target_class = "tree"
positive = "green tree"
neutral = "wood"
"""
SLIDER_YAML = """
slider:
  resolution: 256
  neutrals: ["", photo]
  targets:
    - target_class: person
      positive: old person
      negative: young person
      multiplier: 2
    - target_class: tree
      positive: green tree
      neutral: wood
"""
LIST_YAML = "- target: van gogh\n  action: erase\n  positive:\n  guidance_scale: 2\n"


def read(folder: Path, text: str, name: str = "prompts.toml") -> list[Concept]:
    file = folder / name
    file.write_text(text)
    return read_concepts(file)


def test_defaults_and_every_key(tmp_path: Path) -> None:
    first, second = read(tmp_path, PROMPTS)
    assert first.prompts == ("van gogh", "van gogh", "", "")
    assert (first.direction, first.resolution, first.batch_size, first.multiplier) == (-2, (512, 512), 1, 1)
    assert second.prompts == ("a street", "snow", "rain", "street")
    assert (second.direction, second.resolution) == (1.5, (768, 512))
    assert (second.batch_size, second.multiplier, second.weight) == (3, -2, 0.5)


@pytest.mark.parametrize("name", ["prompts.toml", "prompts.yaml"])
def test_a_slider_is_both_directions_at_both_signs(tmp_path: Path, name: str) -> None:
    found = read(tmp_path, SLIDER if name.endswith("toml") else SLIDER_YAML, name)
    old, young = "old person", "young person"
    pairs = [
        (young, old, "erase", 2),
        (old, young, "enhance", 2),
        (old, young, "erase", -2),
        (young, old, "enhance", -2),
    ]
    wanted = [("person", neutral, *pair) for neutral in ("", "photo") for pair in pairs]
    wanted += [("tree", "wood", "green tree", "", "enhance", 1), ("tree", "wood", "green tree", "", "erase", -1)]
    assert [(c.target, c.neutral, c.positive, c.unconditional, c.action, c.multiplier) for c in found] == wanted
    assert {c.resolution for c in found} == {(256, 256)}


def test_lists_files_and_resolutions(tmp_path: Path) -> None:
    assert read(tmp_path, LIST_YAML, "a.yml")[0].direction == -2
    (tmp_path / "neutrals.txt").write_text("one\n\ntwo\n")
    text = '{"targets": [{"target_class": "a", "negative": "b", "neutral_prompt_file": "neutrals.txt", %s}]}'
    found = read(tmp_path, text % '"resolutions": [64, [64, 128]]', "a.json")
    assert [(c.neutral, c.resolution, c.action) for c in found] == [
        (neutral, size, action)
        for neutral in ("one", "two")
        for size in ((64, 64), (128, 64))
        for action in ("erase", "enhance")
    ]


@pytest.mark.parametrize(
    ("text", "name", "code"),
    [
        ("", "a.toml", "concept-file-empty"),
        ("prompts = []", "a.toml", "concept-file-empty"),
        ("a = 1", "a.toml", "concept-file-empty"),
        ("- a\n- b", "a.yaml", "concept-file-empty"),
        ("a = ", "a.toml", "concept-file-invalid"),
        ("a: [", "a.yaml", "concept-file-invalid"),
        ("!!python/object/apply:os.getcwd []", "a.yaml", "concept-file-invalid"),
        ("{", "a.json", "concept-file-invalid"),
        ("x", "a.txt", "concept-file-suffix"),
        ('[[prompts]]\ntarget = "a"\nactoin = "erase"', "a.toml", "concept-key-unknown"),
        ('[[prompts]]\npositive = "a"', "a.toml", "concept-key-missing"),
        ('[[prompts]]\ntarget = "a"\naction = "remove"', "a.toml", "concept-value-invalid"),
        ('[[prompts]]\ntarget = "a"\nmultiplier = 0', "a.toml", "concept-value-invalid"),
        ('[[prompts]]\ntarget = "a"\nresolution = 32', "a.toml", "concept-value-invalid"),
        ('[[prompts]]\ntarget = "a"\nresolution = [64, 64, 64]', "a.toml", "concept-value-invalid"),
        ('[[prompts]]\ntarget = "a"\nguidance_scale = nan', "a.toml", "concept-value-invalid"),
        ('[[targets]]\ntarget_class = "a"', "a.toml", "concept-slider-without-prompts"),
        ('[[targets]]\ntarget_class = ""\npositive = "b"\nprompt_file = "c"', "a.toml", "concept-neutrals-unreadable"),
    ],
)  # fmt: skip
def test_faults(tmp_path: Path, text: str, name: str, code: str) -> None:
    with pytest.raises(UserError) as error:
        read(tmp_path, text, name)
    assert error.value.code == code
    with pytest.raises(UserError) as error:
        read_concepts(tmp_path / "missing.toml")
    assert error.value.code == "concept-file-unreadable"
