"""The names and values of --network_args: each is checked, and one that would have no effect is refused."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from sfumato.common.names import PLANNED_NETWORK_ARGS
from sfumato.common.registry import did_you_mean
from sfumato.config.values import as_tuple, whole
from sfumato.errors import Problems, UserError
from sfumato.families.base import PartSpec

Reader = Callable[[Any], Any]  # raises ValueError
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
    split_qkv: bool = False  # each layer behind a name has matrices of its own
    kinds: Mapping[str, int] = field(default_factory=dict)  # the rest by the names that the model's parts give them
    extra_targets: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    choices: Mapping[str, str] = field(default_factory=dict)
    counted: Mapping[str, Indices] = field(default_factory=dict)
    sections: Mapping[str, Any] = field(default_factory=dict)
    opted_in: Mapping[str, bool] = field(default_factory=dict)

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
    known = readers(tuple(specs))
    problems = Problems()
    found: dict[str, Any] = {}
    for name, value in given.items():
        with problems.catch():
            if name not in known:
                raise unknown(name, known)
            table, reader = known[name]
            place = found.setdefault(table, {}) if table else found
            place[name] = told(name, reader, value)
    problems.raise_all()
    args = AdapterArgs(**found)
    check_partners(args)
    return args


def readers(specs: Sequence[PartSpec]) -> dict[str, tuple[str, Reader]]:
    """Name -> the table of AdapterArgs that holds it ("" for a field of its own), and how its value is read."""
    plain = dict(EVERYWHERE)
    if any(spec.conv_targets for spec in specs):
        plain |= CONVOLUTIONS
    if any(spec.stages and spec.sections for spec in specs):
        plain |= STAGES
    if any(len(rule.ours) > 1 for spec in specs for rule in spec.adapter_map.rules):
        plain |= FUSED
    found: dict[str, tuple[str, Reader]] = {name: ("", reader) for name, reader in plain.items()}
    for spec in specs:
        found |= dict.fromkeys(spec.kinds, ("kinds", read_rank))
        found |= dict.fromkeys(spec.extra_targets, ("extra_targets", read_ranks))
        found |= {name: ("choices", partial(read_choice, known=("all", *of))) for name, of in spec.choices.items()}
        found |= dict.fromkeys(spec.counted, ("counted", read_indices))
        found |= dict.fromkeys(spec.sections, ("sections", as_it_is))
        found |= {spec.opt_in: ("opted_in", read_flag)} if spec.opt_in else {}
    return found


def unknown(name: str, known: Iterable[str]) -> UserError:
    if name in PLANNED_NETWORK_ARGS:
        return UserError(f"--network_args {name} is not available yet (comes with {PLANNED_NETWORK_ARGS[name]})")
    if name in {**EVERYWHERE, **CONVOLUTIONS, **STAGES, **FUSED}:
        return UserError(f"--network_args {name} has no effect: this model has nothing of the kind", fix="leave it out")
    return UserError(f"--network_args: this model's adapters do not take {name!r}", fix=did_you_mean(name, known))


def told(name: str, reader: Reader, value: Any) -> Any:
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
    """Of 0,2,5-7, a number, all or none; the configuration has already made None of none."""
    if value is None or value == "all":
        return frozenset() if value is None else None
    found: set[int] = set()
    for each in str(value).split(",") if isinstance(value, str) else as_tuple(value):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", str(each))
        if not match:
            raise ValueError("numbers and ranges are expected, as 0,2,5-7, or all or none")
        found |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
    return frozenset(found)


def read_pairs(value: Any, kind: Reader) -> tuple[tuple[re.Pattern[str], Any], ...]:
    """Of expression=value,expression=value: regular expressions that are searched in adapter names."""
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


EVERYWHERE: dict[str, Reader] = {
    "rank_dropout": read_chance,
    "module_dropout": read_chance,
    "network_reg_dims": partial(read_pairs, kind=read_rank),
    "network_reg_lrs": partial(read_pairs, kind=read_number),
    "loraplus_lr_ratio": read_ratio,
    "loraplus_unet_lr_ratio": read_ratio,
    "loraplus_text_encoder_lr_ratio": read_ratio,
    "verbose": read_flag,
}
CONVOLUTIONS: dict[str, Reader] = {"conv_dim": read_rank, "conv_alpha": read_number}
FUSED: dict[str, Reader] = {"split_qkv": read_flag}
STAGES: dict[str, Reader] = {
    "block_dims": read_ranks,
    "block_alphas": read_numbers,
    "conv_block_dims": read_ranks,
    "conv_block_alphas": read_numbers,
    "block_lr_zero_threshold": read_number,
}
