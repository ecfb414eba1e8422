"""Learning rates of parts, blocks, names and LoRA+, against the field's rules in closed form."""

from __future__ import annotations

import math
from typing import Any

import pytest
from torch import nn

from sfumato.adapters.lora import LoRA
from sfumato.config import NetworkOptions, OptimOptions
from sfumato.errors import UserError
from sfumato.families.base import PartSpec
from sfumato.formats.groups import layer_groups, layers_of
from sfumato.formats.keymap import identity
from sfumato.methods.adapter_args import read_args
from sfumato.methods.adapter_rates import AdapterRates, adapter_rates, section_weights

PLAIN: dict[str, Any] = {"key_map": identity(), "key_prefix": "", "adapter_map": identity(), "targets": ("{*}",)}
SPECS = {
    "denoiser": PartSpec(
        name="denoiser",
        adapter_prefix="lora_unet",
        stages=tuple(f"{i}.{{*}}|{i}" for i in range(5)),
        sections={"down_lr_weight": range(2), "mid_lr_weight": range(2, 3), "up_lr_weight": range(3, 5)},
        **PLAIN,
    ),
    "words": PartSpec(name="words", adapter_prefix="lora_te", **PLAIN),
    "more": PartSpec(name="more", adapter_prefix="lora_te2", opt_in="train_more", **PLAIN),
}
TEXT = ("words", "more")


def rates_of(arguments: dict[str, Any], only: str = "", **optim: Any) -> AdapterRates:
    network = NetworkOptions(**({f"network_train_{only}_only": True} if only else {}))
    options = OptimOptions(**{"learning_rate": 1.0, **optim})
    return adapter_rates(network, options, read_args(arguments, SPECS.values()), SPECS, TEXT)


def adapters(part: str = "denoiser", count: int = 5) -> list[LoRA]:
    module = nn.Sequential(*(nn.Linear(2, 2) for _ in range(count)))
    spec = SPECS[part]
    groups = layer_groups(
        layers_of(module), ("{*}",), part=part, prefix=spec.adapter_prefix, adapter_map=spec.adapter_map
    )
    return [LoRA(group, rank=1, alpha=1) for group in groups]


def test_parts() -> None:
    assert rates_of({}).parts == {"denoiser": 1, "words": 1}
    assert rates_of({"train_more": False}).parts == {"denoiser": 1, "words": 1}
    assert rates_of({"train_more": True}).parts == {"denoiser": 1, "words": 1, "more": 1}
    assert rates_of({}, unet_lr=0.0, text_encoder_lr=(3.0, 4.0)).parts == {"words": 3}
    assert rates_of({"train_more": True}, text_encoder_lr=(0.0, 4.0)).parts == {"denoiser": 1, "more": 4}
    assert rates_of({}, only="unet").parts == {"denoiser": 1}
    assert rates_of({"train_more": True}, only="text_encoder").parts == {"words": 1, "more": 1}


@pytest.mark.parametrize(
    ("arguments", "only", "optim", "message"),
    [
        ({"train_more": True}, "unet", {}, "the part 'more' does not train"),
        ({"train_more": True}, "", {"text_encoder_lr": (1.0, 0.0)}, "the part 'more' does not train"),
        ({}, "", {"learning_rate": 0.0}, "every learning rate is 0"),
        ({}, "", {"text_encoder_lr": (1.0, 1.0, 1.0)}, "3 values, this model has 2"),
        ({"loraplus_unet_lr_ratio": 4}, "text_encoder", {}, "loraplus_unet_lr_ratio has no effect"),
        ({"loraplus_text_encoder_lr_ratio": 4}, "unet", {}, "loraplus_text_encoder_lr_ratio has no effect"),
        ({"down_lr_weight": "sine"}, "text_encoder", {}, "the part with blocks does not train"),
        ({"block_dims": (1, 2, 3, 4, 5)}, "text_encoder", {}, "the part with blocks does not train"),
        ({"block_lr_zero_threshold": 0.1}, "", {}, "no block has a rate of its own"),
        ({"loraplus_lr_ratio": 0}, "", {}, "ratio above 0"),
        ({"down_lr_weight": (1, 1, 1)}, "", {}, "3 numbers for 2 blocks"),
        ({"down_lr_weight": "cosinus"}, "", {}, "neither numbers nor one of sine, cosine"),
        ({"down_lr_weight": (-1,)}, "", {}, "no factor of a learning rate"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: dict, only: str, optim: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        rates_of(arguments, only, **optim)


def test_shapes() -> None:
    """Over twelve blocks, as the field's first one has down; sine starts at 0 and ends at 1."""
    quarter = [math.sin(math.pi * (i / 11) / 2) for i in range(12)]
    assert section_weights("x", "sine", 12) == pytest.approx(quarter)
    assert section_weights("x", "cosine", 12) == pytest.approx(quarter[::-1])
    assert section_weights("x", "linear+0.25", 9) == pytest.approx([i / 8 + 0.25 for i in range(9)])
    assert section_weights("x", "reverse_linear", 9) == pytest.approx([1 - i / 8 for i in range(9)])
    assert section_weights("x", "zeros+.5", 3) == [0.5] * 3
    assert section_weights("x", (0.5, 1), 12) == [0.5, 1]
    assert section_weights("x", "0.5,,1", 12) == [0.5, 0, 1]
    assert section_weights("x", 0.5, 1) == [0.5]


def test_block_weights() -> None:
    """Short lists leave the rest at 1; at or below the threshold a block does not train."""
    arguments = {"down_lr_weight": (0.5,), "up_lr_weight": (0.25, 0.1), "block_lr_zero_threshold": 0.1}
    rates = rates_of(arguments, unet_lr=2.0)
    found = [rates.of(adapter.group) for adapter in adapters()]
    assert [rate.value for rate in found] == [1, 2, 2, 0.5, 0]
    assert [rate.label for rate in found] == [
        "denoiser.block00", "denoiser", "denoiser", "denoiser.block03", "denoiser.block04",
    ]  # fmt: skip
    assert rates.of(adapters("words")[0].group).value == 1


def test_the_last_expression_that_matches_sets_the_rate() -> None:
    rates = rates_of({"network_reg_lrs": "unet=3,_[12]$=5,_2$=7e-1", "down_lr_weight": (0.5,)})
    assert [rates.of(adapter.group).value for adapter in adapters()] == pytest.approx([3, 5, 0.7, 3, 3])
    assert rates.of(adapters("words")[2].group).value == 0.7
    assert rates.of(adapters("words")[0].group).label == "words"


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
    rates = rates_of(ratios, unet_lr=2.0, text_encoder_lr=(3.0,))
    made = [*adapters(), *adapters("words")]
    groups = {group.name: group for group in rates.groups(made)}
    wanted = {"denoiser": 2, "denoiser+": denoiser, "words": 3, "words+": words}
    assert {name: group.learning_rate for name, group in groups.items()} == {n: r for n, r in wanted.items() if r}
    ups = {id(adapter.lora_up) for adapter in made if adapter.group.part == "words"}
    assert {id(parameter) for parameter in groups["words+"].parameters} == ups
    every = [id(parameter) for group in groups.values() for parameter in group.parameters]
    assert sorted(every) == sorted(id(parameter) for adapter in made for parameter in adapter.parameters())
