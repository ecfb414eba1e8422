"""The types of values: what they accept and what they make of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfumato.config.values import (
    MAX_NAME_BYTES,
    check_file_name,
    check_seed,
    format_arguments,
    parse_arguments,
    parse_literal,
    parse_precision,
    parse_range,
    parse_resolution,
    parse_steps,
    resolve_steps,
)


@pytest.mark.parametrize(
    ("given", "size"),
    [
        ("512", (512, 512)),
        ("512,768", (512, 768)),
        ("512, 768", (512, 768)),
        (512, (512, 512)),
        ([512, 768], (512, 768)),
    ],
)
def test_size(given, size):
    assert parse_resolution(given) == size


@pytest.mark.parametrize(
    "wrong", ["", "512x768", "512,768,1", "a,b", "0", "-64", "1.5", True, 1.5, [], [512, True], 10**400, "1e999"]
)
def test_what_is_no_size(wrong):
    with pytest.raises(ValueError, match="not a size"):
        parse_resolution(wrong)


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ("100", 100), (100, 100), ("100.0", 100), (100.0, 100), ("0", 0), (0.0, 0), ("0%", 0),
        ("10%", 0.1), ("0.1", 0.1), (0.1, 0.1), ("100%", 1.0), ("1", 1), ("1.0", 1),
    ],
)  # fmt: skip
def test_steps(given, steps):
    assert parse_steps(given) == steps
    assert type(parse_steps(given)) is type(steps)


@pytest.mark.parametrize("wrong", ["", "1.5", "-1", "-10%", "101%", "ten", "nan", True, None])
def test_what_is_no_number_of_steps(wrong):
    with pytest.raises(ValueError, match="number of steps"):
        parse_steps(wrong)


def test_step_count_of_a_share_rounds_down():
    assert resolve_steps(0.1, 1005) == 100
    assert resolve_steps(1.0, 7) == 7
    assert resolve_steps(3, 2) == 3


def test_precision():
    precisions = {parse_precision(name) for name in ("bf16", "bfloat16", "BF16")}
    assert precisions == {"bfloat16"}
    assert [parse_precision(name) for name in ("fp32", "float", "half")] == ["float32", "float32", "float16"]
    with pytest.raises(ValueError, match="not a precision"):
        parse_precision("int8")


def test_range():
    assert parse_range("2.0,4.0") == parse_range([2, 4]) == (2.0, 4.0)
    for wrong in ("4,2", "2", "a,b", "1,2,3", "", None):
        with pytest.raises(ValueError, match="not a range"):
            parse_range(wrong)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4", 4), ("1e-4", 1e-4), ("True", True), ("true", True), ("FALSE", False), ("none", None),
        ("0.9,0.999", (0.9, 0.999)), ("[1, 2]", [1, 2]), ("sine", "sine"), ("0,1,8-12", "0,1,8-12"),
        (r"['.*\.x']", [r".*\.x"]), ("'4'", "4"), ("", ""), ("a=b", "a=b"), ("__import__('os')", "__import__('os')"),
    ],
)  # fmt: skip
def test_literal(text, value):
    assert parse_literal(text) == value
    assert type(parse_literal(text)) is type(value)


def test_arguments():
    assert parse_arguments(["conv_dim=4", "betas=0.9,0.99", "regex=a=1"]) == {
        "conv_dim": 4,
        "betas": (0.9, 0.99),
        "regex": "a=1",
    }
    assert parse_arguments(()) == {}


@pytest.mark.parametrize("wrong", [["conv_dim"], ["=4"], ["a=1 b=2"], ["1a=2"], [3]])
def test_what_is_no_list_of_arguments(wrong):
    with pytest.raises(ValueError, match="has "):
        parse_arguments(wrong)


plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
names = st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True)


@given(st.dictionaries(names, plain | st.tuples(plain, plain) | st.lists(plain)))
def test_format_arguments_is_the_inverse_of_parse_arguments(arguments):
    for item in format_arguments(arguments):
        name, _, text = item.partition("=")
        assert parse_literal(text) == arguments[name]


@given(st.text() | st.floats() | st.lists(st.integers()))
@pytest.mark.parametrize("parse", [parse_resolution, parse_steps, parse_range])
def test_whatever_is_given_is_a_value_or_a_fault(parse: Callable[[object], object], thing):
    with contextlib.suppress(ValueError):
        assert parse(thing) is not None


@pytest.mark.parametrize(
    "words",
    [
        ["weight_decay=0.01,eps=1e-08"],
        ["weight_decay=0.01, eps=1e-08"],
        ["betas=0.9,0.99,weight_decay=0.1"],
        ["a=1 b=2"],
        ["a=1;b=2"],
        ["preset=full,algo=lora"],
    ],
)
def test_several_arguments_in_one_are_refused(words):
    with pytest.raises(ValueError, match="several arguments in one"):
        parse_arguments(words)


def test_commas_that_separate_nothing():
    assert parse_arguments(["a=0.01,", "b=0.9,0.99, ", "c=x,"]) == {"a": 0.01, "b": (0.9, 0.99), "c": "x"}
    assert parse_arguments(["a='x, b=1'", 'b="c=1,"']) == {"a": "x, b=1", "b": "c=1,"}
    assert parse_arguments(["network_reg_dims=blocks_1_=4,blocks_2_=8"]) == {
        "network_reg_dims": "blocks_1_=4,blocks_2_=8"
    }


@pytest.mark.parametrize("value", ["x, b=1", "x,", "b=1", ",", "a b=2", "c "])
def test_texts_with_commas_are_written_so_that_they_are_read_again(value):
    assert parse_arguments(format_arguments({"a": value})) == {"a": value}


@pytest.mark.parametrize("seed", [0, 1, -1, 2**32, 2**63, 2**64 - 1, -(2**63)])
def test_a_seed_of_64_bits(seed):
    assert check_seed(seed) == seed


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, 10**22])
def test_a_seed_beyond_64_bits(seed):
    with pytest.raises(ValueError, match="64 bits"):
        check_seed(seed)


@pytest.mark.parametrize("name", ["last", "my LoRA v1.2", "名前", "a[1]*", ".hidden", "x" * MAX_NAME_BYTES])
def test_a_file_name(name):
    assert check_file_name(name) == name


@pytest.mark.parametrize("name", [".", "..", "a/..", "a\0b", "a\nb", "\udcff", "x" * 300, "名" * 60])
def test_what_is_no_file_name(name):
    with pytest.raises(ValueError, match=r"file name|longer"):
        check_file_name(name)
