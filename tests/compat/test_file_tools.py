"""sd-scripts' tools for files: their options with the same defaults, and what has no effect is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from compat.helpers import GOLDENS, ROOT
from sfumato.common.names import SCRIPT_ALIASES
from sfumato.compat.caption_tools import BLIP_WEIGHTS, find_blip
from sfumato.compat.file_tools import FILE_TOOLS, find_file_tool
from sfumato.errors import UserError

THEIRS = json.loads((GOLDENS / "file_tool_options.json").read_text())


@pytest.mark.parametrize("name", FILE_TOOLS)
def test_options_and_defaults(name: str) -> None:
    fields = FILE_TOOLS[name].options.model_fields
    assert set(THEIRS[name]) <= set(fields)
    ours = {option: fields[option].default for option in THEIRS[name]}
    ours = {option: str(value) if isinstance(value, Path) else value for option, value in ours.items()}
    differing = {option: value for option, value in THEIRS[name].items() if (ours[option] or None) != (value or None)}
    assert not differing
    assert set(FILE_TOOLS[name].no_effect) <= set(fields)


def test_every_tool_is_found_by_all_its_names() -> None:
    for alias, name in SCRIPT_ALIASES.items():
        if name in FILE_TOOLS:
            assert find_file_tool(f"{alias}.py") is FILE_TOOLS[name]
            assert (ROOT / "launchers" / f"{alias}.py").is_file()
    assert find_file_tool("train_network") is None


@pytest.mark.parametrize(
    ("weights", "model"),
    [
        (BLIP_WEIGHTS, "Salesforce/blip-image-captioning-large"),
        ("owner/blip", "owner/blip"),
        ("other.pth", None),
    ],
)
def test_the_weights_of_blip(weights: str, model: str | None) -> None:
    if model is not None:
        assert find_blip(weights) == model
        return
    with pytest.raises(UserError) as raised:
        find_blip(weights)
    assert raised.value.code == "blip-weights-unreadable"
