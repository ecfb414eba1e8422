"""The names and values of --network_args: each is checked, and one that would have no effect is refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from sfumato.config.values import as_tuple, whole
from sfumato.errors import Problems, UserError
from sfumato.families.base import PartSpec
from sfumato.registry import did_you_mean

Indices = frozenset[int] | None  # None: all
PAIR = re.compile(r"(.+?)=([^=,]+)(?:,|$)")  # a comma that does not follow a value belongs to the expression


@dataclass(frozen=True, kw_only=True)
class AdapterArgs:
    """What --network_args asks for, each value of its right type; None and empty: not given."""

    conv_dim: int | None = None
    conv_alpha: float | None = None
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    block_dims: tuple[int, ...] | None = None
    block_alphas: tuple[float, ...] | None = None
    conv_block_dims: tuple[int, ...] | None = None
    conv_block_alphas: tuple[float, ...] | None = None
    block_lr_zero_threshold: float | None = None
    network_reg_dims: tuple[tuple[re.Pattern[str], int], ...] = ()
    network_reg_lrs: tuple[tuple[re.Pattern[str], float], ...] = ()
    loraplus_lr_ratio: float | None = None
    loraplus_unet_lr_ratio: float | None = None
    loraplus_text_encoder_lr_ratio: float | None = None
    verbose: bool = False
    kinds: Mapping[str, int] = field(default_factory=dict)  # the rest by the names that the model's parts give them
    extra_targets: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    choices: Mapping[str, str] = field(default_factory=dict)
    counted: Mapping[str, Indices] = field(default_factory=dict)
    sections: Mapping[str, Any] = field(default_factory=dict)
    opted_in: frozenset[str] = frozenset()

    @property
    def convolutions(self) -> bool:
        """Whether the layers that only convolution ranks reach are adapted, too."""
        return self.conv_dim is not None or self.conv_block_dims is not None

    @property
    def sets_ranks(self) -> tuple[str, ...]:
        """The arguments given that decide about ranks, which --dim_from_weights takes from the file."""
        plain = ("conv_dim", "conv_alpha", "block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas")
        given = [name for name in (*plain, "network_reg_dims") if vars(self)[name] not in (None, ())]
        return (*given, *self.kinds, *self.extra_targets, *self.choices, *self.counted)


def read_args(given: Mapping[str, Any], specs: Iterable[PartSpec]) -> AdapterArgs:
    """Check --network_args against what the parts of a model offer; every fault is raised at once."""
    specs = tuple(specs)
    readers = {name: ("", reader) for name, reader in plain_readers(specs).items()}
    for spec in specs:
        readers |= {name: ("kinds", read_rank) for name in spec.kinds}
        readers |= {name: ("extra_targets", read_ranks) for name in spec.extra_targets}
        readers |= {
            name: ("choices", partial(read_choice, known=("all", *spec.choices[name]))) for name in spec.choices
        }
        readers |= {name: ("counted", read_indices) for name in spec.counted}
        readers |= {name: ("sections", as_it_is) for name in spec.sections}
        readers |= {spec.opt_in: ("opted_in", read_flag)} if spec.opt_in else {}
    problems = Problems()
    found: dict[str, Any] = {"kinds": {}, "extra_targets": {}, "choices": {}, "counted": {}, "sections": {}}
    opted_in: set[str] = set()
    for name, value in given.items():
        with problems.catch():
            if name not in readers:
                refuse(name, readers)
            place, reader = readers[name]
            checked = told(name, reader, value)
            if place == "opted_in":
                opted_in |= {name} if checked else set()
            elif place:
                found[place][name] = checked
            else:
                found[name] = checked
    problems.raise_all()
    args = AdapterArgs(**found, opted_in=frozenset(opted_in))
    check_partners(args)
    return args


def plain_readers(specs: Iterable[PartSpec]) -> dict[str, Callable[[Any], Any]]:
    """What every model takes, and what models with convolutions or counted stages take."""
    specs = tuple(specs)
    readers = dict(EVERYWHERE)
    if any(spec.conv_targets for spec in specs):
        readers |= CONVOLUTIONS
    if any(spec.stages and spec.sections for spec in specs):
        readers |= STAGES
    return readers


def refuse(name: str, known: Iterable[str]) -> None:
    if name in {**EVERYWHERE, **CONVOLUTIONS, **STAGES}:
        raise UserError(f"--network_args {name} has no effect: this model has nothing of the kind", fix="leave it out")
    raise UserError(f"--network_args: this model's adapters do not take {name!r}", fix=did_you_mean(name, known))


def told(name: str, reader: Callable[[Any], Any], value: Any) -> Any:
    try:
        return reader(value)
    except ValueError as error:
        raise UserError(f"--network_args {name}={value}: {error}") from error


def check_partners(args: AdapterArgs) -> None:
    """Arguments that only say more about another one."""
    problems = Problems()
    if args.conv_alpha is not None and not args.convolutions:
        problems.add("--network_args conv_alpha has no effect without conv_dim", fix="give conv_dim, or leave it out")
    if args.conv_block_alphas is not None and not args.convolutions:
        problems.add("--network_args conv_block_alphas has no effect without conv_block_dims or conv_dim")
    if args.block_lr_zero_threshold is not None and not args.sections:
        problems.add("--network_args block_lr_zero_threshold has no effect: no block has a rate of its own")
    problems.raise_all()


def read_rank(value: Any) -> int:
    rank = whole(value)
    if rank is None or rank < 0:
        raise ValueError("a rank is a whole number, 0 for no adapter")
    return rank


def read_ranks(value: Any) -> tuple[int, ...]:
    return tuple(read_rank(each) for each in as_tuple(value))


def read_numbers(value: Any) -> tuple[float, ...]:
    return tuple(read_number(each) for each in as_tuple(value))


def read_number(value: Any) -> float:
    """0 or more."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise ValueError("a number of 0 or more is expected")
    return float(value)


def read_ratio(value: Any) -> float:
    if read_number(value) == 0:
        raise ValueError("a ratio above 0 is expected")
    return float(value)


def read_chance(value: Any) -> float:
    if read_number(value) >= 1:
        raise ValueError("a chance below 1 is expected")
    return float(value)


def read_flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("True or False is expected")
    return value


def read_choice(value: Any, known: Iterable[str]) -> str:
    if value not in known:
        raise ValueError(f"one of {', '.join(known)} is expected")
    return value


def read_indices(value: Any) -> Indices:
    """ "0,2,5-7", a number, "all" or "none"."""
    if value in ("all", "none"):
        return None if value == "all" else frozenset()
    found: set[int] = set()
    for each in str(value).split(",") if isinstance(value, str) else as_tuple(value):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", str(each))
        if not match:
            raise ValueError("numbers and ranges are expected, as 0,2,5-7, or all or none")
        found |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
    return frozenset(found)


def read_pairs(value: Any, kind: Callable[[Any], Any]) -> tuple[tuple[re.Pattern[str], Any], ...]:
    """ "expression=value,expression=value": regular expressions that are searched in adapter names."""
    text = str(value).strip()
    found = list(PAIR.finditer(text))
    if "".join(match[0] for match in found) != text:
        raise ValueError("pairs are expected, as blocks_1_=4,blocks_2_=8")
    pairs = []
    for match in found:
        try:
            pairs.append((re.compile(match[1].strip()), kind(float(match[2]))))
        except re.error as error:
            raise ValueError(f"{match[1]!r} is no regular expression ({error})") from error
    return tuple(pairs)


def as_it_is(value: Any) -> Any:
    return value


EVERYWHERE: dict[str, Callable[[Any], Any]] = {
    "rank_dropout": read_chance,
    "module_dropout": read_chance,
    "network_reg_dims": partial(read_pairs, kind=read_rank),
    "network_reg_lrs": partial(read_pairs, kind=read_number),
    "loraplus_lr_ratio": read_ratio,
    "loraplus_unet_lr_ratio": read_ratio,
    "loraplus_text_encoder_lr_ratio": read_ratio,
    "verbose": read_flag,
}
CONVOLUTIONS: dict[str, Callable[[Any], Any]] = {"conv_dim": read_rank, "conv_alpha": read_number}
STAGES: dict[str, Callable[[Any], Any]] = {
    "block_dims": read_ranks,
    "block_alphas": read_numbers,
    "conv_block_dims": read_ranks,
    "conv_block_alphas": read_numbers,
    "block_lr_zero_threshold": read_number,
}
