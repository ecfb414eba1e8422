"""Learning rates of parts, blocks, names and LoRA+, against sd-scripts' rules in closed form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
from torch import nn

from sfumato.adapters.lora import LoRA
from sfumato.config import NetworkOptions, OptimOptions
from sfumato.errors import UserError
from sfumato.families.part import PartSpec
from sfumato.formats.groups import find_layers, group_layers
from sfumato.formats.keymap import make_identity_map
from sfumato.methods.adapter_args import read_args
from sfumato.methods.adapter_learning_rates import (
    AdapterLearningRates,
    parse_block_factors,
    read_adapter_learning_rates,
)
from sfumato.methods.trained_parts import describe_text_encoder_lr, read_text_encoder_lr

PLAIN: dict[str, Any] = {
    "key_map": make_identity_map(),
    "key_prefix": "",
    "adapter_map": make_identity_map(),
    "targets": ("{*}",),
}
SPECS = {
    "denoiser": PartSpec(
        name="denoiser",
        adapter_prefix="lora_unet",
        lr_blocks=tuple(f"{i}.{{*}}|{i}" for i in range(5)),
        lr_block_ranges={"down_lr_weight": range(2), "mid_lr_weight": range(2, 3), "up_lr_weight": range(3, 5)},
        **PLAIN,
    ),
    "words": PartSpec(name="words", adapter_prefix="lora_te", **PLAIN),
    "more": PartSpec(name="more", adapter_prefix="lora_te2", opt_in="train_more", **PLAIN),
}
TEXT = ("words", "more")


def read_rates(arguments: dict[str, Any], only: str = "", **optim: Any) -> AdapterLearningRates:
    network = NetworkOptions(**({f"network_train_{only}_only": True} if only else {}))
    options = OptimOptions(**{"learning_rate": 1.0, **optim})
    return read_adapter_learning_rates(network, options, read_args(arguments, SPECS.values()), SPECS, TEXT)


def adapters(part: str = "denoiser", count: int = 5) -> list[LoRA]:
    module = nn.Sequential(*(nn.Linear(2, 2) for _ in range(count)))
    spec = SPECS[part]
    groups = group_layers(
        find_layers(module), ("{*}",), part=part, prefix=spec.adapter_prefix, adapter_map=spec.adapter_map
    )
    return [LoRA(group, rank=1, alpha=1) for group in groups]


def test_parts() -> None:
    assert read_rates({}).parts == {"denoiser": 1, "words": 1}
    assert read_rates({"train_more": False}).parts == {"denoiser": 1, "words": 1}
    assert read_rates({"train_more": True}).parts == {"denoiser": 1, "words": 1, "more": 1}
    assert read_rates({}, unet_lr=0.0, text_encoder_lr=(3.0, 4.0)).parts == {"words": 3}
    assert read_rates({"train_more": True}, text_encoder_lr=(0.0, 4.0)).parts == {"denoiser": 1, "more": 4}
    assert read_rates({}, only="unet").parts == {"denoiser": 1}
    assert read_rates({"train_more": True}, only="text_encoder").parts == {"words": 1, "more": 1}


def test_more_or_fewer_learning_rates_than_encoders() -> None:
    assert read_rates({"train_more": True}, text_encoder_lr=(3.0, 4.0, 5.0)).parts == {
        "denoiser": 1,
        "words": 3,
        "more": 4,
    }
    three, order = OptimOptions(text_encoder_lr=(3.0, 4.0)), ("first", "words", "more")
    assert read_text_encoder_lr(three, order) == {"first": 3, "words": 4, "more": 4}
    assert read_text_encoder_lr(OptimOptions(learning_rate=2.0), order) == dict.fromkeys(order, 2)
    arguments = read_args({"train_more": True}, SPECS.values())
    lacking = read_adapter_learning_rates(NetworkOptions(), three, arguments, SPECS, TEXT, lr_order=order)
    assert (lacking.parts["words"], lacking.parts["more"]) == (4, 4)


@pytest.mark.parametrize(
    ("values", "parts", "lines"),
    [
        ((1.0,), TEXT, 0),
        ((1.0, 2.0), TEXT, 0),
        ((1.0, 2.0, 3.0), TEXT, 1),
        ((1.0, 2.0, 3.0), ("denoiser",), 0),
        ((1.0, 2.0, 3.0), ("words",), 1),
    ],
)
def test_the_line_about_their_number(values: tuple[float, ...], parts: Sequence[str], lines: int) -> None:
    assert len(describe_text_encoder_lr(OptimOptions(text_encoder_lr=values), TEXT, parts)) == lines


def test_the_line_about_a_learning_rate_for_two_encoders() -> None:
    optim, order = OptimOptions(text_encoder_lr=(1.0, 2.0)), ("first", "words", "more")
    assert len(describe_text_encoder_lr(optim, order, order)) == 1
    assert not describe_text_encoder_lr(optim, order, ("first", "words"))


def test_encoders_that_do_not_train_because_they_are_cached() -> None:
    arguments = read_args({}, SPECS.values())
    optim = OptimOptions(learning_rate=1.0)
    both = read_adapter_learning_rates(NetworkOptions(), optim, arguments, SPECS, TEXT, cached=("words",))
    assert both.parts == {"denoiser": 1}
    text = NetworkOptions(network_train_text_encoder_only=True)
    only = read_adapter_learning_rates(text, optim, arguments, SPECS, TEXT, cached=("words",))
    assert only.parts == {"words": 1}  # refused by the check of the cache


@pytest.mark.parametrize(
    ("arguments", "only", "optim", "code", "detail"),
    [
        ({"train_more": True}, "unet", {}, "opt-in-of-frozen-part", "'more'"),
        ({"train_more": True}, "", {"text_encoder_lr": (1.0, 0.0)}, "opt-in-of-frozen-part", "'more'"),
        ({}, "", {"learning_rate": 0.0}, "learning-rates-all-zero", ""),
        ({"loraplus_unet_lr_ratio": 4}, "text_encoder", {}, "network-arg-of-frozen-part", "loraplus_unet_lr_ratio"),
        (
            {"loraplus_text_encoder_lr_ratio": 4},
            "unet",
            {},
            "network-arg-of-frozen-part",
            "loraplus_text_encoder_lr_ratio",
        ),
        ({"down_lr_weight": "sine"}, "text_encoder", {}, "block-args-of-frozen-part", ""),
        ({"block_dims": (1, 2, 3, 4, 5)}, "text_encoder", {}, "block-args-of-frozen-part", ""),
        ({"block_lr_zero_threshold": 0.1}, "", {}, "lr-threshold-without-blocks", "block_lr_zero_threshold"),
        ({"loraplus_lr_ratio": 0}, "", {}, "network-arg-invalid", "loraplus_lr_ratio=0"),
        ({"down_lr_weight": (1, 1, 1)}, "", {}, "block-factors-too-many", "3 numbers for 2 blocks"),
        ({"down_lr_weight": "cosinus"}, "", {}, "block-factors-invalid", "sine, cosine"),
        ({"down_lr_weight": (-1,)}, "", {}, "block-factor-invalid", "'-1'"),
    ],
)
def test_options_that_do_not_match(arguments: dict, only: str, optim: dict, code: str, detail: str) -> None:
    with pytest.raises(UserError) as error:
        read_rates(arguments, only, **optim)
    assert error.value.code == code
    assert detail in str(error.value)


def test_parts_that_train_on_request_alone() -> None:
    with pytest.raises(UserError) as error:
        read_rates({}, unet_lr=0.0, text_encoder_lr=(0.0, 1.0))
    assert error.value.code == "only-opt-in-parts"
    assert error.value.fix == "--network_args train_more=True"


def test_shapes() -> None:
    """Over twelve blocks, as many as the first model of sd-scripts has down; sine starts at 0 and ends at 1."""
    quarter = [math.sin(math.pi * (i / 11) / 2) for i in range(12)]
    assert parse_block_factors("x", "sine", 12) == pytest.approx(quarter)
    assert parse_block_factors("x", "cosine", 12) == pytest.approx(quarter[::-1])
    assert parse_block_factors("x", "linear+0.25", 9) == pytest.approx([i / 8 + 0.25 for i in range(9)])
    assert parse_block_factors("x", "reverse_linear", 9) == pytest.approx([1 - i / 8 for i in range(9)])
    assert parse_block_factors("x", "zeros+.5", 3) == [0.5] * 3
    assert parse_block_factors("x", (0.5, 1), 12) == [0.5, 1]
    assert parse_block_factors("x", "0.5,,1", 12) == [0.5, 0, 1]
    assert parse_block_factors("x", 0.5, 1) == [0.5]


def test_block_factors() -> None:
    """With a short list the rest is 1; at or below the threshold a block does not train."""
    arguments = {"down_lr_weight": (0.5,), "up_lr_weight": (0.25, 0.1), "block_lr_zero_threshold": 0.1}
    rates = read_rates(arguments, unet_lr=2.0)
    found = [rates.find_learning_rate(adapter.group) for adapter in adapters()]
    assert [rate.value for rate in found] == [1, 2, 2, 0.5, 0]
    assert [rate.label for rate in found] == [
        "denoiser.block00", "denoiser", "denoiser", "denoiser.block03", "denoiser.block04",
    ]  # fmt: skip
    assert rates.find_learning_rate(adapters("words")[0].group).value == 1


def test_the_last_expression_that_matches_sets_the_rate() -> None:
    rates = read_rates({"network_reg_lrs": "unet=3,_[12]$=5,_2$=7e-1", "down_lr_weight": (0.5,)})
    assert [rates.find_learning_rate(adapter.group).value for adapter in adapters()] == pytest.approx([3, 5, 0.7, 3, 3])
    assert rates.find_learning_rate(adapters("words")[2].group).value == 0.7
    assert rates.find_learning_rate(adapters("words")[0].group).label == "words"


@pytest.mark.parametrize(
    ("ratios", "denoiser", "words"),
    [
        ({"loraplus_lr_ratio": 16}, 32, 48),
        ({"loraplus_lr_ratio": 16, "loraplus_unet_lr_ratio": 4}, 8, 48),
        ({"loraplus_text_encoder_lr_ratio": 2.5}, None, 7.5),
    ],
)
def test_lora_plus(ratios: dict[str, float], denoiser: float | None, words: float) -> None:
    """Up matrices learn faster, down matrices as before; each in one parameter group."""
    rates = read_rates(ratios, unet_lr=2.0, text_encoder_lr=(3.0,))
    made = [*adapters(), *adapters("words")]
    groups = {group.name: group for group in rates.make_parameter_groups(made)}
    expected = {"denoiser": 2, "denoiser+": denoiser, "words": 3, "words+": words}
    assert {name: group.learning_rate for name, group in groups.items()} == {n: r for n, r in expected.items() if r}
    ups = {id(adapter.lora_up) for adapter in made if adapter.group.part == "words"}
    assert {id(parameter) for parameter in groups["words+"].parameters} == ups
    every = [id(parameter) for group in groups.values() for parameter in group.parameters]
    assert sorted(every) == sorted(id(parameter) for adapter in made for parameter in adapter.parameters())
