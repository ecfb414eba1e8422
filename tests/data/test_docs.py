"""The page about datasets names every key where it is valid, and its examples are dataset files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sfumato.config.dataset_toml import DatasetTable, GeneralTable, SubsetTable, read_dataset_config
from sfumato.errors import Problems

PAGE = (Path(__file__).parents[2] / "docs" / "datasets.md").read_text(encoding="utf-8")


def named(start: str) -> list[str]:
    """The keys in a row of the table of keys."""
    (row,) = [line for line in PAGE.splitlines() if line.startswith(f"| {start} |")]
    return re.findall(r"`(\w+)`", row.removeprefix(f"| {start} |"))


def test_every_key_is_named_once_and_where_it_is_valid():
    upper = named("`[general]`, `[[datasets]]`")
    everywhere = named("these, and `[[datasets.subsets]]`")
    lower = named("`[[datasets.subsets]]`")
    assert len({*upper, *everywhere, *lower}) == len(upper) + len(everywhere) + len(lower)
    assert {*upper, *everywhere} == set(GeneralTable.model_fields) == set(DatasetTable.model_fields) - {"subsets"}
    assert {*lower, *everywhere} == set(SubsetTable.model_fields)


@pytest.mark.parametrize("example", re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL))
def test_examples_are_dataset_files(example, tmp_path):
    (tmp_path / "set.toml").write_text(example, encoding="utf-8")
    problems = Problems()
    assert read_dataset_config(tmp_path / "set.toml", problems)
    assert not problems.found
