"""Which layers get an adapter, and of which rank and alpha: from the options and each layer's place in the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sfumato.config import NetworkOptions
from sfumato.errors import UserError
from sfumato.families.base import PartSpec
from sfumato.formats.groups import LayerGroup, is_pointwise
from sfumato.formats.keymap import compiled, matches
from sfumato.methods.adapter_args import AdapterArgs

DEFAULT_RANK = 4


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """The rule of one run; `specs` by part name."""

    network: NetworkOptions
    args: AdapterArgs
    specs: Mapping[str, PartSpec]

    def considered(self, group: LayerGroup) -> bool:
        """Whether the layer is of the usual ones, or of those that the arguments add."""
        spec, path = self.specs[group.part], group.paths[0]
        added = [target for option in self.args.extra_targets for target in spec.extra_targets.get(option, ())]
        added += spec.conv_targets if self.args.convolutions else ()
        return any(matches(target, path) for target in (*spec.targets, *added))

    def check(self, groups: Sequence[LayerGroup]) -> None:
        """Refuse lists of the wrong length, and what has no effect on these layers, those of the parts that train."""
        check_lengths(self.args, tuple(self.specs.values()))
        groups = [group for group in groups if self.considered(group)]
        if self.args.convolutions and all(is_pointwise(group.layers[0]) for group in groups):
            raise UserError("--network_args conv_dim has no effect: no convolution trains", fix="leave it out")
        if self.args.split_qkv and not any(len(group.layers) > 1 and self.of(group) for group in groups):
            raise UserError("--network_args split_qkv has no effect: no fused layer trains", fix="leave it out")
        for expression, _ in (*self.args.network_reg_dims, *self.args.network_reg_lrs):
            if not any(expression.search(group.name) for group in groups):
                raise UserError(f"--network_args: the expression {expression.pattern!r} matches no adapter name")
        parts = [self.specs[part] for part in {group.part for group in groups}]
        for table in ("kinds", "extra_targets", "choices", "counted"):
            for option in vars(self.args)[table]:
                if not any(option in vars(spec)[table] for spec in parts):
                    raise UserError(
                        f"--network_args {option} has no effect: its part does not train", fix="leave it out"
                    )
        for option, wanted in self.args.counted.items():
            highest = max((n for group in groups if (n := self._number(option, group)) is not None), default=-1)
            if wanted and max(wanted) > highest:
                raise UserError(
                    f"--network_args {option}: there is no block {max(wanted)}",
                    fix=f"they are counted from 0 to {highest}",
                )
        for option, ranks in self.args.extra_targets.items():
            for place, rank in enumerate(ranks):
                targets = [spec.extra_targets[option][place] for spec in parts if option in spec.extra_targets]
                if rank and not any(matches(target, group.paths[0]) for target in targets for group in groups):
                    raise UserError(
                        f"--network_args {option}: number {place + 1} is for a layer that this model does not have",
                        fix="write 0 in its place",
                    )
        for option in self.args.kinds:
            if not any(matches(self.specs[g.part].kinds.get(option, ""), self.name(g)) for g in groups):
                raise UserError(f"--network_args {option} has no effect: this model has no layer of the kind")

    def of(self, group: LayerGroup) -> tuple[int, float] | None:
        """Rank and alpha of a group's adapter, or None where it gets none."""
        rank, alpha = self._rank(group) if self.considered(group) else (0, 0.0)
        return (rank, alpha or rank) if rank else None

    def _rank(self, group: LayerGroup) -> tuple[int, float]:
        """The last expression that matches, else the block selection, further layers, kinds, stages, the plain rank."""
        alpha = self.network.network_alpha
        expressions = [rank for expression, rank in self.args.network_reg_dims if expression.search(group.name)]
        if expressions:
            return expressions[-1], alpha
        if not self._selected(group):
            return 0, alpha
        spec, name = self.specs[group.part], self.name(group)
        for option, ranks in self.args.extra_targets.items():
            for target, rank in zip(spec.extra_targets.get(option, ()), ranks, strict=False):  # lengths are checked
                if matches(target, group.paths[0]):
                    return rank, alpha
        for option, layers in spec.kinds.items():  # where they overlap, in the part's order
            if option in self.args.kinds and matches(layers, name):
                return self.args.kinds[option], alpha
        stage = stage_of(spec, group) if spec.stages else None
        return self._pointwise(stage) if is_pointwise(group.layers[0]) else self._convolution(stage)

    def _pointwise(self, stage: int | None) -> tuple[int, float]:
        rank, alpha = self.network.network_dim or DEFAULT_RANK, self.network.network_alpha
        if stage is None:
            return rank, alpha
        dims, alphas = self.args.block_dims, self.args.block_alphas
        return rank if dims is None else dims[stage], alpha if alphas is None else alphas[stage]

    def _convolution(self, stage: int | None) -> tuple[int, float]:
        rank = self.args.conv_dim or 0
        alpha = 1.0 if self.args.conv_alpha is None else self.args.conv_alpha
        if stage is None:
            return rank, alpha
        dims, alphas = self.args.conv_block_dims, self.args.conv_block_alphas
        return rank if dims is None else dims[stage], alpha if alphas is None else alphas[stage]

    def _selected(self, group: LayerGroup) -> bool:
        """A choice leaves out what only its other values stand for; a list of numbers leaves out the other blocks."""
        spec, name = self.specs[group.part], self.name(group)
        for option, value in self.args.choices.items():
            known = spec.choices.get(option, {})
            if value in known and not matches(known[value], name) and any(matches(p, name) for p in known.values()):
                return False
        for option, wanted in self.args.counted.items():
            number = self._number(option, group)
            if wanted is not None and number is not None and number not in wanted:
                return False
        return True

    def _number(self, option: str, group: LayerGroup) -> int | None:
        """Which of the blocks that the option counts holds the group."""
        blocks = compiled(self.specs[group.part].counted.get(option, ""))
        return next((int(found[1]) for each in blocks if (found := each.fullmatch(self.name(group)))), None)

    def name(self, group: LayerGroup) -> str:
        """The group's name in adapter files with dots and without the part's prefix."""
        return self.specs[group.part].adapter_map.locate(group.paths[0]).original


def stage_of(spec: PartSpec, group: LayerGroup) -> int | None:
    """The place of a group's layers among the part's stages."""
    return spec.stage(group.paths[0])


def check_lengths(args: AdapterArgs, specs: Sequence[PartSpec]) -> None:
    stages = max(len(spec.stages) for spec in specs)
    lists = {"block_dims": args.block_dims, "block_alphas": args.block_alphas}
    lists |= {"conv_block_dims": args.conv_block_dims, "conv_block_alphas": args.conv_block_alphas}
    wanted = {name: (values, stages) for name, values in lists.items() if values is not None}
    for spec in specs:
        given = args.extra_targets.items()
        wanted |= {name: (ranks, len(spec.extra_targets[name])) for name, ranks in given if name in spec.extra_targets}
    for name, (values, count) in wanted.items():
        if len(values) != count:
            raise UserError(f"--network_args {name} has {len(values)} numbers, this model needs {count}")
