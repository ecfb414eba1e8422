"""Which layers get an adapter, and its rank and alpha: from the options and the layer's position in the model."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sfumato.adapters.base import ADAPTERS
from sfumato.adapters.kinds import choose_kinds, list_related
from sfumato.common.names import DEFAULT_KIND, DEFAULT_RANK, LycorisPreset
from sfumato.common.text import plural
from sfumato.config import NetworkOptions
from sfumato.config.base import Options
from sfumato.errors import UserError
from sfumato.families.part import PartSpec
from sfumato.formats.groups import LayerGroup, is_pointwise
from sfumato.formats.keymap import compile_alternatives, matches
from sfumato.methods.adapter_args import AdapterArgs, make_frozen_part_error


@dataclass(frozen=True, kw_only=True)
class AdapterRanks:
    """The ranks of one run; `specs` by part name."""

    network: NetworkOptions
    args: AdapterArgs
    specs: Mapping[str, PartSpec]
    adapter_kind: str = DEFAULT_KIND
    preset: LycorisPreset | None = None

    def is_target(self, group: LayerGroup) -> bool:
        """Whether the layer is adapted by default, or is one that the arguments add."""
        if not self._is_included(group):
            return False
        if group.is_norm or ADAPTERS.get(self.adapter_kind).of_norms:
            return group.is_norm and self._trains_norms and self._is_in_adapted_block(group)
        return self._is_in_targets(group)

    @property
    def _trains_norms(self) -> bool:
        related = list_related(self.adapter_kind)
        wanted = [kind.is_wanted(self.args.options[name], None) for name, kind in related.items() if kind.of_norms]
        return any(wanted) or ADAPTERS.get(self.adapter_kind).of_norms

    def _is_in_adapted_block(self, group: LayerGroup) -> bool:
        """Whether it lies in a block of the denoiser that has targets, as LyCORIS takes norm layers."""
        spec, path = self.specs[group.part], group.paths[0]
        if not matches("|".join(spec.norm_targets), path):
            return False
        targets, preset = list(spec.targets), self.preset
        if self.args.has_convolutions:
            targets += spec.conv_targets
        if preset is not None and not preset.has_transformers:
            targets = list(spec.conv_targets)
        blocks = [block for block in spec.blocks if any(target.startswith(f"{block}.") for target in targets)]
        in_layers = preset is None or not preset.layers or re.search(preset.layers, path) is not None
        return in_layers and matches("|".join(f"{block}.{{*}}" for block in blocks), path)

    def _is_in_targets(self, group: LayerGroup) -> bool:
        spec, path = self.specs[group.part], group.paths[0]
        targets = [*spec.targets]
        for option in self.args.extra_targets:
            targets += spec.extra_targets.get(option, ())
        if self.args.has_convolutions:
            targets += spec.conv_targets
        if self.preset is not None:
            return self._is_in_preset(self.preset, group, targets)
        return matches("|".join(targets), path)

    def _is_included(self, group: LayerGroup) -> bool:
        """What include_patterns name alone, all that exclude_patterns do not name, or with both all but exceptions."""
        name, args = self.find_name(group), self.args
        if any(pattern.fullmatch(name) for pattern in args.include_patterns):
            return True
        excluded = any(pattern.fullmatch(name) for pattern in args.exclude_patterns)
        return not excluded and (bool(args.exclude_patterns) or not args.include_patterns)

    def _is_in_preset(self, preset: LycorisPreset, group: LayerGroup, targets: list[str]) -> bool:
        spec = self.specs[group.part]
        if preset.has_pointwise and is_pointwise(group.layers[0]):
            targets = [*targets, *spec.conv_targets]
        if not preset.has_transformers:
            targets = [*spec.conv_targets]
        is_target = any(matches(target, group.paths[0]) for target in targets)
        if preset.layers and not (self.args.has_convolutions and matches("|".join(spec.conv_targets), group.paths[0])):
            is_target = is_target and all(re.search(preset.layers, path) for path in group.paths)
        return is_target or bool(preset.more_layers and re.fullmatch(preset.more_layers, self.find_name(group)))

    def find_options(self, group: LayerGroup) -> Mapping[str, Options]:
        """Kind of adapter -> its own arguments for this group: those given, or others where the preset says so."""
        options = self.args.options
        own = options.get(self.adapter_kind)
        for layers, name, value in self.preset.arguments if self.preset else ():
            if own is not None and name in type(own).model_fields and re.search(layers, group.paths[0]):
                own = own.model_copy(update={name: value})
                options = {**options, self.adapter_kind: own}
        return options

    def check(self, groups: Sequence[LayerGroup]) -> None:
        """Raise UserError for arguments that have no effect on `groups`, those of the parts that train."""
        check_lengths(self.args, tuple(self.specs.values()))
        every, groups = groups, [group for group in groups if self.is_target(group)]
        if self.args.has_convolutions and all(is_pointwise(group.layers[0]) for group in groups):
            raise UserError(
                "--network_args conv_dim has no effect: no convolution trains",
                code="conv-dim-without-convolution",
                fix="remove conv_dim",
            )
        self._check_patterns(every, groups)
        adapted = [group for group in groups if self.find_rank(group)]
        for name, kind in list_related(self.adapter_kind).items():
            kind.check(self.args.options[name], [group for group in adapted if group.is_norm == kind.of_norms])
        plain = [group for group in adapted if not group.is_norm]
        self._check_sizes(plain)
        if not self.network.dim_from_weights:
            self._check_dims(plain)
        parts = {group.part for group in groups}
        specs = [self.specs[part] for part in parts]
        self._check_parts(specs)
        self._check_indices(groups)
        self._check_extra_targets(groups, specs)
        self._check_rank_kinds(groups)

    def _check_patterns(self, every: Sequence[LayerGroup], adapted: Sequence[LayerGroup]) -> None:
        """Every expression matches a layer: one that is adapted, or of all for those that say which are."""
        args, names = self.args, [self.find_name(group) for group in every]
        pairs = (*args.network_reg_dims, *args.network_reg_lrs, *args.network_reg_alphas)
        unmatched = [each for each, _ in pairs if not any(self.matches_name(each, group) for group in adapted)]
        for pattern in (*args.include_patterns, *args.exclude_patterns):
            if not any(map(pattern.fullmatch, names)):
                unmatched.append(pattern)
        if unmatched:
            raise UserError(
                f"--network_args: the expression {unmatched[0].pattern!r} matches no layer that has an adapter",
                code="network-arg-expression-unmatched",
                fix=f"names of layers are, e.g. {', '.join(list(dict.fromkeys(names))[:2])}" if names else "",
            )

    def matches_name(self, expression: re.Pattern[str], group: LayerGroup) -> bool:
        """Whether it is found in the layer's name in adapter files, or fits all of that with dots and no prefix."""
        return bool(expression.search(group.name) or expression.fullmatch(self.find_name(group)))

    def _check_parts(self, specs: Sequence[PartSpec]) -> None:
        """Each argument must belong to a part that trains."""
        offered: set[str] = set()
        for spec in specs:
            offered.update(spec.rank_kinds, spec.extra_targets, spec.block_choices, spec.block_indices)
        args = self.args
        for option in (*args.rank_kinds, *args.extra_targets, *args.block_choices, *args.block_indices):
            if option not in offered:
                raise make_frozen_part_error(option)

    def _check_indices(self, groups: Sequence[LayerGroup]) -> None:
        for option, indices in self.args.block_indices.items():
            blocks = [self._find_block(option, group) for group in groups]
            highest = max((block for block in blocks if block is not None), default=-1)
            if indices and max(indices) > highest:
                raise UserError(
                    f"--network_args {option}: there is no block {max(indices)}",
                    code="block-index-too-high",
                    fix=f"the blocks are counted from 0 to {highest}",
                )

    def _check_extra_targets(self, groups: Sequence[LayerGroup], specs: Sequence[PartSpec]) -> None:
        paths = [group.paths[0] for group in groups]
        for option, ranks in self.args.extra_targets.items():
            for i, rank in enumerate(ranks):
                targets = "|".join(spec.extra_targets[option][i] for spec in specs if option in spec.extra_targets)
                if rank and not any(matches(targets, path) for path in paths):
                    raise UserError(
                        f"--network_args {option}: number {i + 1} is for a layer that this model does not have",
                        code="rank-for-missing-layer",
                        fix="write 0 instead",
                    )

    def _check_rank_kinds(self, groups: Sequence[LayerGroup]) -> None:
        for option in self.args.rank_kinds:
            if not any(matches(self.specs[g.part].rank_kinds.get(option, ""), self.find_name(g)) for g in groups):
                raise UserError(
                    f"--network_args {option} has no effect: this model has no such layer",
                    code="rank-kind-without-layer",
                )

    def _check_sizes(self, groups: Sequence[LayerGroup]) -> None:
        """No rank above that with which an adapter of the largest layer can do everything."""
        limits = [
            choose_kinds(self.adapter_kind, self.args.options, group)[-1].find_rank_limit(group) for group in groups
        ]
        limit = max((limit for limit in limits if limit is not None), default=0)
        for group in groups:
            rank, _ = self.find_rank(group) or (0, 0.0)
            if 0 < limit < rank:
                raise UserError(
                    f"the rank {rank} is above {limit}, with which an adapter can change every weight in any way",
                    code="adapter-rank-beyond-layers",
                    fix=f"give a rank of {limit} or less; 4 to 128 are usual",
                )

    def _check_dims(self, groups: Sequence[LayerGroup]) -> None:
        """Every group can have an adapter with its --network_dim; which are possible, the kind knows."""
        kind = ADAPTERS.get(self.adapter_kind)
        options = [self.find_options(group)[self.adapter_kind] for group in groups]
        chosen = [(self.find_rank(group) or (0, 0.0))[0] for group in groups]
        each = list(zip(groups, options, strict=True))
        wrong = [i for i, (group, own) in enumerate(each) if not kind.allows_dim(group, chosen[i], own)]
        if not wrong:
            return
        first, dim = groups[wrong[0]], chosen[wrong[0]]
        possible = [
            other for other in range(1, 2 * dim + 65) if all(kind.allows_dim(group, other, own) for group, own in each)
        ]
        near = sorted(sorted(possible, key=lambda other: abs(other - dim))[:4])
        raise UserError(
            f"--network_dim is {kind.dim_meaning}: with {dim}, {len(wrong)} of {plural(len(groups), 'layer')} can "
            "have no "
            f"{kind.label}, e.g. {first.name} with a weight of {plural(first.num_rows, 'row')}",
            code="network-dim-impossible",
            fix=f"a --network_dim that works for all of them, e.g. {', '.join(map(str, near))}"
            if near
            else f"no small --network_dim works for all of them; skip layers with network_reg_dims={first.name}=0",
        )

    def find_rank(self, group: LayerGroup) -> tuple[int, float] | None:
        """Rank and alpha of a group's adapter; None where it gets none.

        With rank_stabilized (Kalajdzievski 2023, thm. 3.2) the change is scaled by alpha / sqrt(rank): by a larger
        alpha here and in files, as every program divides it by the rank.
        """
        rank, alpha = self._choose_rank(group) if self.is_target(group) else (0, 0.0)
        if not rank:
            return None
        for expression, own in self.args.network_reg_alphas:
            alpha = own if self.matches_name(expression, group) else alpha
        return rank, (alpha or rank) * (math.sqrt(rank) if self.args.rank_stabilized else 1)

    def _choose_rank(self, group: LayerGroup) -> tuple[int, float]:
        """From the last expression that matches, else block selection, extra targets, kinds, blocks, the plain rank."""
        alpha = self.network.network_alpha
        matching = [rank for expression, rank in self.args.network_reg_dims if self.matches_name(expression, group)]
        if matching:
            return matching[-1], alpha
        if not self._is_selected(group):
            return 0, alpha
        spec, name = self.specs[group.part], self.find_name(group)
        for option, ranks in self.args.extra_targets.items():
            for target, rank in zip(spec.extra_targets.get(option, ()), ranks, strict=False):  # lengths are checked
                if matches(target, group.paths[0]):
                    return rank, alpha
        for option, layers in spec.rank_kinds.items():  # where they overlap, in the part's order
            if option in self.args.rank_kinds and matches(layers, name):
                return self.args.rank_kinds[option], alpha
        block = find_lr_block(spec, group) if spec.lr_blocks else None
        return self._linear_rank(block) if is_pointwise(group.layers[0]) else self._convolution_rank(block)

    def _linear_rank(self, block: int | None) -> tuple[int, float]:
        rank, alpha = self.network.network_dim or DEFAULT_RANK, self.network.network_alpha
        if block is None:
            return rank, alpha
        dims, alphas = self.args.block_dims, self.args.block_alphas
        return rank if dims is None else dims[block], alpha if alphas is None else alphas[block]

    def _convolution_rank(self, block: int | None) -> tuple[int, float]:
        rank = self.args.conv_dim or 0
        alpha = 1.0 if self.args.conv_alpha is None else self.args.conv_alpha
        if block is None:
            return rank, alpha
        dims, alphas = self.args.conv_block_dims, self.args.conv_block_alphas
        return rank if dims is None else dims[block], alpha if alphas is None else alphas[block]

    def _is_selected(self, group: LayerGroup) -> bool:
        """Whether the block arguments select the group.

        A choice skips what only its other values select; a list of indices skips the other blocks.
        """
        spec, name = self.specs[group.part], self.find_name(group)
        for option, value in self.args.block_choices.items():
            choices = spec.block_choices.get(option, {})
            is_other = any(matches(patterns, name) for patterns in choices.values())
            if value in choices and is_other and not matches(choices[value], name):
                return False
        for option, indices in self.args.block_indices.items():
            block = self._find_block(option, group)
            if indices is not None and block is not None and block not in indices:
                return False
        return True

    def _find_block(self, option: str, group: LayerGroup) -> int | None:
        """The index of the group's block among those that the option counts."""
        name = self.find_name(group)
        for pattern in compile_alternatives(self.specs[group.part].block_indices.get(option, "")):
            match = pattern.fullmatch(name)
            if match:
                return int(match[1])
        return None

    def find_name(self, group: LayerGroup) -> str:
        """The group's name in adapter files with dots and without the part's prefix."""
        return self.specs[group.part].adapter_map.locate(group.paths[0]).original


def find_lr_block(spec: PartSpec, group: LayerGroup) -> int | None:
    """The index of a group's layers among the part's blocks for learning rates."""
    return spec.lr_block_index(group.paths[0])


def check_lengths(args: AdapterArgs, specs: Sequence[PartSpec]) -> None:
    """Raise UserError for lists of another length than the model needs."""
    blocks = max(len(spec.lr_blocks) for spec in specs)
    check_length("block_dims", args.block_dims, blocks)
    check_length("block_alphas", args.block_alphas, blocks)
    check_length("conv_block_dims", args.conv_block_dims, blocks)
    check_length("conv_block_alphas", args.conv_block_alphas, blocks)
    for spec in specs:
        for option, targets in spec.extra_targets.items():
            check_length(option, args.extra_targets.get(option), len(targets))


def check_length(option: str, values: Sequence[float] | None, count: int) -> None:
    if values is not None and len(values) != count:
        raise UserError(
            f"--network_args {option} has {plural(len(values), 'number')}, this model needs {count}",
            code="network-arg-wrong-length",
        )
