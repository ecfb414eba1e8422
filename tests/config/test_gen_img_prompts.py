"""Prompts of gen_img: line options and variants, against what sd-scripts makes of the same lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sfumato.config.prompts import parse_line
from sfumato.config.wildcards import expand_variants, has_every, has_variants
from sfumato.errors import UserError

GOLDEN = json.loads((Path(__file__).parents[1] / "goldens" / "prompts.json").read_text())
NAMES = {  # theirs -> ours
    "steps": "sample_steps", "network_muls": "network_mul", "filename": "file_name",
    "gl_timesteps": "gradual_latent_timesteps", "gl_ratio": "gradual_latent_ratio",
    "gl_every_n_steps": "gradual_latent_every_n_steps", "gl_ratio_step": "gradual_latent_ratio_step",
    "gl_s_noise": "gradual_latent_s_noise", "gl_unsharp_params": "gradual_latent_unsharp_params",
}  # fmt: skip
ROWS = GOLDEN["gen_img_line_options"]["rows"]
DEFAULTS = ROWS[0]["parsed"]
SWITCHED_ON = -1  # there a depth or timestep that a further option of the kind turns on without giving it


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["line"])
def test_line_options(row: dict[str, Any]) -> None:
    """One multiplier counts for both networks there; a value equal to the default is no difference."""
    found = parse_line(row["line"], where="here")
    for name, value in (DEFAULTS | row["parsed"]).items():
        ours = vars(found)[NAMES.get(name) or name]
        if value is None or value == DEFAULTS[name]:
            assert ours in (None, "", (), DEFAULTS[name]), name
        elif name == "network_muls":
            assert [*ours, *ours[-1:] * (len(value) - len(ours))] == value
        elif value != SWITCHED_ON:
            assert ours == (tuple(value) if isinstance(value, list) else value), name


@pytest.mark.parametrize("name", [".", "..", "/", "a/..", "x" * 300])
def test_what_no_image_can_be_named(name: str) -> None:
    found = parse_line(f"a cat --f {name}", where="here")
    assert found.file_name is None
    assert f"--f {name!r} is not a valid value" in found.notes[0]


def test_none_takes_precedence_over_a_default() -> None:
    defaults = {"negative_scale": 2.0, "strength": 0.5}
    given = [parse_line(f"a --nl {value}", where="here").apply_defaults(defaults) for value in ("none", "3", "x")]
    assert [prompt.negative_scale for prompt in given] == [None, 3.0, 2.0]
    assert [prompt.strength for prompt in given] == [0.5] * 3


@pytest.mark.parametrize(
    "row",
    GOLDEN["gen_img_dynamic_prompts"],
    ids=lambda row: f"{row['prompt']}-{row['seeds_given']}-{row['repeat_count']}",
)
def test_variants(row: dict[str, Any]) -> None:
    """Each repetition has its seed; where every combination is wanted all images have the first."""
    prompt, result = row["prompt"], row["result"]
    if isinstance(result, str):
        with pytest.raises(UserError) as raised:
            expand_variants(prompt, 11)
        assert raised.value.code == "prompt-variants-too-few"
        return
    seeds = row["seeds_given"] or [3626764237, 1806341205]
    found = [text for seed in seeds[: row["repeat_count"]] for text in expand_variants(prompt, seed)]
    if not has_variants(prompt):
        assert set(found) == {prompt}
        return
    assert found == result["prompts"]
    assert has_every(prompt) == (len(set(result["seeds"])) < len(result["seeds"]))


def test_braces_nest_and_combinations_are_limited() -> None:
    assert expand_variants("{e$$a|{e$$b|c}} x", 1) == ["a x", "b x", "a x", "c x"]
    assert expand_variants(r"\{a|b\}", 1) == ["{a|b}"]
    many = " ".join("{e$$a|b|c|d|e|f|g|h|i|j}" for _ in range(5))
    with pytest.raises(UserError) as raised:
        expand_variants(many, 1)
    assert raised.value.code == "prompt-variants-too-many"
