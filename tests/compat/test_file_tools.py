"""sd-scripts' tools for files: their options with the same defaults, and what has no effect is said."""

from __future__ import annotations

import json

import pytest

from compat.helpers import GOLDENS, ROOT
from sfumato.common.names import SCRIPT_ALIASES
from sfumato.compat.file_tools import FILE_TOOLS, find_file_tool

THEIRS = json.loads((GOLDENS / "file_tool_options.json").read_text())


@pytest.mark.parametrize("name", FILE_TOOLS)
def test_options_and_defaults(name: str) -> None:
    fields = FILE_TOOLS[name].options.model_fields
    assert set(THEIRS[name]) <= set(fields)
    ours = {option: fields[option].default for option in THEIRS[name]}
    differing = {option: value for option, value in THEIRS[name].items() if (ours[option] or None) != (value or None)}
    assert not differing
    assert set(FILE_TOOLS[name].no_effect) <= set(fields)


def test_every_tool_is_found_by_all_its_names() -> None:
    for alias, name in SCRIPT_ALIASES.items():
        if name in FILE_TOOLS:
            assert find_file_tool(f"{alias}.py") is FILE_TOOLS[name]
            assert (ROOT / "launchers" / f"{alias}.py").is_file()
    assert find_file_tool("train_network") is None
