"""The arguments of --network_args: names and values are checked, and those without effect are errors."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pydantic import ValidationError

from sfumato.adapters.base import Adapter
from sfumato.adapters.kinds import list_related
from sfumato.common.names import DEFAULT_KIND
from sfumato.common.registry import did_you_mean
from sfumato.config.base import Options
from sfumato.config.values import parse_whole_number, to_tuple
from sfumato.errors import Problems, UserError
from sfumato.families.part import PartSpec

Reader = Callable[[Any], Any]  # raises ValueError
Indices = frozenset[int] | None  # None: all
OWN = "of "  # before the name of a kind of adapter, in the table of its own arguments
PAIR = re.compile(r"(.+?)=([^=,]+)(?:,|$)")  # a comma that follows no value belongs to the expression


@dataclass(frozen=True, kw_only=True)
class AdapterArgs:
    """The parsed values of --network_args; None and empty: not given."""

    conv_dim: int | None = None
    conv_alpha: float | None = None
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    rank_dropout_scale: bool = False
    block_dims: tuple[int, ...] | None = None
    block_alphas: tuple[float, ...] | None = None
    conv_block_dims: tuple[int, ...] | None = None
    conv_block_alphas: tuple[float, ...] | None = None
    block_lr_zero_threshold: float | None = None
    network_reg_dims: tuple[tuple[re.Pattern[str], int], ...] = ()
    network_reg_lrs: tuple[tuple[re.Pattern[str], float], ...] = ()
    network_reg_alphas: tuple[tuple[re.Pattern[str], float], ...] = ()
    include_patterns: tuple[re.Pattern[str], ...] = ()
    exclude_patterns: tuple[re.Pattern[str], ...] = ()
    rank_stabilized: bool = False
    loraplus_lr_ratio: float | None = None
    loraplus_unet_lr_ratio: float | None = None
    loraplus_text_encoder_lr_ratio: float | None = None
    ggpo_sigma: float | None = None
    ggpo_beta: float | None = None
    verbose: bool = False
    options: Mapping[str, Options] = field(default_factory=dict)  # kind of adapter -> its own arguments
    # The names of the rest come from the model's parts.
    rank_kinds: Mapping[str, int] = field(default_factory=dict)
    extra_targets: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    block_choices: Mapping[str, str] = field(default_factory=dict)
    block_indices: Mapping[str, Indices] = field(default_factory=dict)
    lr_block_factors: Mapping[str, Any] = field(default_factory=dict)
    opted_in: Mapping[str, bool] = field(default_factory=dict)

    @property
    def has_convolutions(self) -> bool:
        """Whether the convolutions that only conv_dim adapts are adapted."""
        return self.conv_dim is not None or self.conv_block_dims is not None

    @property
    def rank_arguments(self) -> tuple[str, ...]:
        """The given arguments that set ranks, which --dim_from_weights takes from the file instead."""
        plain = ("conv_dim", "conv_alpha", "block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas")
        given = [
            name for name in (*plain, "network_reg_dims", "network_reg_alphas") if vars(self)[name] not in (None, ())
        ]
        return (*given, *self.rank_kinds, *self.extra_targets, *self.block_choices, *self.block_indices)


def read_args(given: Mapping[str, Any], specs: Iterable[PartSpec], *, kind: str = DEFAULT_KIND) -> AdapterArgs:
    """Check --network_args against what the parts of a model and the kind of adapter offer; all faults at once."""
    related = list_related(kind)
    known = list_readers(tuple(specs)) | list_own_readers(related)
    problems = Problems()
    fields: dict[str, Any] = {}
    for name, value in given.items():
        with problems.catch():
            if name not in known:
                raise make_unknown_argument_error(name, known)
            table, reader = known[name]
            values = fields.setdefault(table, {}) if table else fields
            values[name] = read_argument(name, reader, value)
    problems.raise_all()
    options = {name: each.options_class(**fields.pop(OWN + name, {})) for name, each in related.items()}
    args = AdapterArgs(**fields, options=options)
    check_partners(args)
    return args


def list_readers(specs: Sequence[PartSpec]) -> dict[str, tuple[str, Reader]]:
    """Name -> the table of AdapterArgs that holds it ("" for a field of its own), and the reader of its value."""
    common = dict(COMMON_ARGS)
    if any(spec.conv_targets for spec in specs):
        common |= CONVOLUTION_ARGS
    if any(spec.lr_blocks and spec.lr_block_ranges for spec in specs):
        common |= BLOCK_ARGS
    known: dict[str, tuple[str, Reader]] = {name: ("", reader) for name, reader in common.items()}
    for spec in specs:
        known |= dict.fromkeys(spec.rank_kinds, ("rank_kinds", read_rank))
        known |= dict.fromkeys(spec.extra_targets, ("extra_targets", read_ranks))
        for name, choices in spec.block_choices.items():
            known[name] = ("block_choices", partial(read_choice, known=("all", *choices)))
        known |= dict.fromkeys(spec.block_indices, ("block_indices", read_indices))
        known |= dict.fromkeys(spec.lr_block_ranges, ("lr_block_factors", keep_value))
        if spec.opt_in:
            known[spec.opt_in] = ("opted_in", read_flag)
    return known


def list_own_readers(kinds: Mapping[str, type[Adapter]]) -> dict[str, tuple[str, Reader]]:
    """The same for the own arguments of kinds of adapters."""
    known: dict[str, tuple[str, Reader]] = {}
    for name, kind in kinds.items():
        for argument in kind.options_class.model_fields:
            known[argument] = (OWN + name, partial(read_own_option, kind.options_class, argument))
    return known


def read_own_option(options: type[Options], name: str, value: Any) -> Any:
    try:
        return vars(options(**{name: value}))[name]
    except ValidationError as error:
        raise ValueError(error.errors()[0]["msg"].removeprefix("Value error, ")) from error


def make_unknown_argument_error(name: str, known: Iterable[str]) -> UserError:
    if name in {**COMMON_ARGS, **CONVOLUTION_ARGS, **BLOCK_ARGS}:
        return UserError(
            f"--network_args {name} has no effect: this model has no layers or blocks for it",
            code="network-arg-without-effect",
            fix=f"remove {name}",
        )
    return UserError(
        f"--network_args: this model's adapters have no argument {name!r}",
        code="network-arg-unknown",
        fix=did_you_mean(name, known),
    )


def make_frozen_part_error(name: str) -> UserError:
    return UserError(
        f"--network_args {name} has no effect: its part does not train",
        code="network-arg-of-frozen-part",
        fix=f"remove {name}",
    )


def read_argument(name: str, reader: Reader, value: Any) -> Any:
    try:
        return reader(value)
    except ValueError as error:
        raise UserError(f"--network_args {name}={value}: {error}", code="network-arg-invalid") from error


def check_partners(args: AdapterArgs) -> None:
    """Raise UserError for arguments that only say more about another one, where that is missing."""
    problems = Problems()
    if args.conv_alpha is not None and not args.has_convolutions:
        problems.add(
            "--network_args conv_alpha has no effect without conv_dim",
            code="conv-alpha-without-dim",
            fix="give conv_dim, or remove conv_alpha",
        )
    if args.conv_block_alphas is not None and not args.has_convolutions:
        problems.add(
            "--network_args conv_block_alphas has no effect without conv_block_dims or conv_dim",
            code="conv-block-alphas-without-dims",
        )
    if args.block_lr_zero_threshold is not None and not args.lr_block_factors:
        problems.add(
            "--network_args block_lr_zero_threshold has no effect: no block has a learning rate of its own",
            code="lr-threshold-without-blocks",
        )
    if (args.ggpo_sigma is None) != (args.ggpo_beta is None):
        given, other = ("ggpo_sigma", "ggpo_beta") if args.ggpo_beta is None else ("ggpo_beta", "ggpo_sigma")
        problems.add(
            f"--network_args {given} has no effect without {other}",
            code="ggpo-incomplete",
            fix="give both, e.g. ggpo_sigma=0.03 ggpo_beta=0.01, or none",
        )
    problems.raise_all()


def read_rank(value: Any) -> int:
    rank = parse_whole_number(value)
    if rank is None or rank < 0:
        raise ValueError("a rank is a whole number, 0 for no adapter")
    return rank


def read_ranks(value: Any) -> tuple[int, ...]:
    return tuple(read_rank(item) for item in to_tuple(value))


def read_numbers(value: Any) -> tuple[float, ...]:
    return tuple(read_number(item) for item in to_tuple(value))


def read_number(value: Any) -> float:
    """0 or more."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < MAX_VALUE:
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


MAX_VALUE = 1e30  # of an argument
MAX_INDEX_DIGITS = 4  # blocks have two; a longer index names no block, however it is cut


def read_indices(value: Any) -> Indices:
    """Indices from 0,2,5-7, a number, all or none; the configuration has already turned none into None."""
    if value is None or value == "all":
        return frozenset() if value is None else None
    indices: set[int] = set()
    for item in value.split(",") if isinstance(value, str) else to_tuple(value):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", str(item))
        if not match:
            raise ValueError("numbers and ranges are expected, e.g. 0,2,5-7, or all or none")
        first, last = (int(text[:MAX_INDEX_DIGITS]) for text in (match[1], match[2] or match[1]))
        indices |= set(range(first, last + 1))
    return frozenset(indices)


def read_pairs(value: Any, reader: Reader) -> tuple[tuple[re.Pattern[str], Any], ...]:
    """Pairs from expression=value,expression=value: regular expressions for names of layers (`matches_name`)."""
    text = str(value).strip()
    matches = list(PAIR.finditer(text))
    if "".join(match[0] for match in matches) != text:
        raise ValueError("pairs are expected, e.g. blocks_1_=4,blocks_2_=8")
    pairs: list[tuple[re.Pattern[str], Any]] = []
    for match in matches:
        pairs.append((read_pattern(match[1].strip()), reader(float(match[2]))))
    return tuple(pairs)


def read_patterns(value: Any) -> tuple[re.Pattern[str], ...]:
    """One regular expression, or a list of them."""
    return tuple(read_pattern(each) for each in ([value] if isinstance(value, str) else to_tuple(value)))


def read_pattern(text: Any) -> re.Pattern[str]:
    try:
        return re.compile(str(text))
    except re.error as error:
        raise ValueError(f"{text!r} is not a regular expression ({error})") from error


def keep_value(value: Any) -> Any:
    return value


COMMON_ARGS: dict[str, Reader] = {
    "rank_dropout": read_chance,
    "module_dropout": read_chance,
    "rank_dropout_scale": read_flag,
    "network_reg_dims": partial(read_pairs, reader=read_rank),
    "network_reg_lrs": partial(read_pairs, reader=read_number),
    "network_reg_alphas": partial(read_pairs, reader=read_number),
    "include_patterns": read_patterns,
    "exclude_patterns": read_patterns,
    "loraplus_lr_ratio": read_ratio,
    "loraplus_unet_lr_ratio": read_ratio,
    "loraplus_text_encoder_lr_ratio": read_ratio,
    "rank_stabilized": read_flag,
    "ggpo_sigma": read_number,
    "ggpo_beta": read_number,
    "verbose": read_flag,
}
CONVOLUTION_ARGS: dict[str, Reader] = {"conv_dim": read_rank, "conv_alpha": read_number}
BLOCK_ARGS: dict[str, Reader] = {
    "block_dims": read_ranks,
    "block_alphas": read_numbers,
    "conv_block_dims": read_ranks,
    "conv_block_alphas": read_numbers,
    "block_lr_zero_threshold": read_number,
}
