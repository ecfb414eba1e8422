"""JSON and TOML without end: nesting, digits. What the standard library reads is read the same."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfumato.common.json_toml import TOO_DEEP, TOO_MANY_DIGITS, decode_json, decode_json_value, decode_toml

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
)


@given(VALUES)
def test_json_is_read_as_by_the_standard_library(value: object) -> None:
    text = json.dumps(value)
    assert decode_json(text) == value
    assert decode_json_value(f" {text} ", 1) == (value, 1 + len(text))


@pytest.mark.parametrize("bracket", ["[", '{"a":', '[{"a":['])
def test_nesting_without_end(bracket: str) -> None:
    with pytest.raises(ValueError, match=TOO_DEEP):
        decode_json(bracket * 100_000)
    with pytest.raises(json.JSONDecodeError, match=TOO_DEEP):
        decode_json_value(bracket * 100_000, 0)


@pytest.mark.parametrize("text", ["a = " + "[" * 101 + "]" * 101, "a = " + "[" * 100_000, "a = " + "{b=" * 100_000])
def test_nesting_without_end_in_toml(text: str) -> None:
    with pytest.raises(ValueError, match=TOO_DEEP):
        decode_toml(text)


def test_digits_without_end() -> None:
    with pytest.raises(ValueError, match=TOO_MANY_DIGITS):
        decode_json('{"a": ' + "9" * 5000 + "}")
    with pytest.raises(json.JSONDecodeError, match=TOO_MANY_DIGITS):
        decode_json_value("9" * 5000, 0)
    with pytest.raises(ValueError, match=TOO_MANY_DIGITS):
        decode_toml("a = " + "9" * 5000)
    with pytest.raises(ValueError, match=TOO_MANY_DIGITS):
        decode_toml("a = [{b = 0x" + "f" * 5000 + "}]")  # Python reads it, and cannot write it


def test_faults_with_a_place_keep_it() -> None:
    with pytest.raises(json.JSONDecodeError) as error:
        decode_json('{"a": 1,\n b}')
    assert error.value.lineno == 2
    with pytest.raises(UnicodeDecodeError):
        decode_json(b'{"a": "\xff"}')
