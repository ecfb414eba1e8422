"""Adapter construction: new adapters, and those of --network_weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

from sfumato.adapters.base import Adapter, is_trainable
from sfumato.adapters.lora import LoRA, LoraDropout
from sfumato.adapters.split_lora import SplitLoRA
from sfumato.common.text import list_some
from sfumato.config import Config
from sfumato.diffusion.randomness import Randomness
from sfumato.errors import UserError
from sfumato.families.part import PartSpec
from sfumato.formats.groups import LayerGroup
from sfumato.formats.lora import TensorsByGroup, apply_aliases, check_names, read_adapter_file
from sfumato.methods.adapter_settings import AdapterSettings

GroupsByPart = Mapping[str, Sequence[LayerGroup]]  # part -> every adaptable layer


class AdapterBuilder:
    """Reads the adapter files of a run once and builds its adapters on the layers of a model or of its blueprint."""

    def __init__(self, config: Config) -> None:
        self.network = config.network
        assert config.loop.seed is not None, "the run's seed is drawn before the method is made"
        self.randomness = Randomness(config.loop.seed)
        path = self.network.network_weights
        self.weights: TensorsByGroup = read_adapter_file(path) if path else {}
        self.set_aside: dict[str, int] = {}  # part that does not train -> adapters of --network_weights for it

    def build(self, settings: AdapterSettings, groups: GroupsByPart) -> list[Adapter]:
        """The adapters of every part that trains, new or from --network_weights; UserError where a part gets none."""
        self._match_weights(settings, groups)
        parts = settings.learning_rates.parts
        settings.ranks.check(list_groups(groups, parts))
        adapters: list[Adapter] = []
        for part in parts:
            built = [self._build_adapter(settings, group) for group in groups[part]]
            built = [adapter for adapter in built if adapter is not None]
            if not any(is_trainable(adapter) for adapter in built):
                raise UserError(
                    f"part {part!r} is set to train, but none of its layers has an adapter",
                    code="part-without-adapters",
                )
            adapters += built
        return adapters

    def _build_adapter(self, settings: AdapterSettings, group: LayerGroup) -> LoRA | SplitLoRA | None:
        """None for a group without an adapter. At learning rate 0, only an adapter of the file is built, and frozen."""
        learning_rate = settings.learning_rates.find_learning_rate(group).value
        rank = None if self.network.dim_from_weights else settings.ranks.find_rank(group)
        adapter_class = SplitLoRA if settings.args.split_qkv and len(group.layers) > 1 else LoRA
        tensors = self.weights.get(group.name)
        if tensors is not None:
            adapter = adapter_class.from_tensors(group, tensors)
            if not self.network.dim_from_weights:
                self._check_rank(group, adapter.rank, rank[0] if rank else 0)
        elif rank is None or learning_rate == 0:
            return None
        else:
            generator = self.randomness.generator("init " + group.name)
            adapter = adapter_class(group, rank=rank[0], alpha=rank[1], generator=generator)
        if self.network.scale_weight_norms is not None and not adapter.has_norm_limit:
            raise UserError(
                f"--scale_weight_norms does not work with {adapter_class.__name__}",
                code="norm-limit-unsupported",
                fix="remove --scale_weight_norms",
            )
        adapter.dropout = LoraDropout(
            neuron=self.network.network_dropout or 0.0,
            rank=settings.args.rank_dropout,
            module=settings.args.module_dropout,
        )
        return adapter.requires_grad_(learning_rate != 0)

    def _check_rank(self, group: LayerGroup, rank: int, expected: int) -> None:
        if rank != expected:
            requested = f"the options ask for {expected}" if expected else "the options give it no adapter"
            raise UserError(
                f"{self.network.network_weights}: {group.name} has rank {rank}, {requested}",
                code="lora-rank-mismatch",
                fix="give the ranks that the file was trained with, or --dim_from_weights",
            )

    def _match_weights(self, settings: AdapterSettings, groups: GroupsByPart) -> None:
        """Rename the entries of --network_weights to ours; those of parts that do not train are set aside.

        Raises UserError where an entry belongs to no layer of the model, and where no entry is for a part that trains.
        """
        path = self.network.network_weights
        if path is None:
            return
        self.weights = match_names(path, self.weights, settings.specs, groups)
        for part in settings.specs.keys() - settings.learning_rates.parts.keys():
            frozen = [group.name for group in groups[part] if group.name in self.weights]
            if frozen and len(frozen) == len(self.weights):
                raise UserError(
                    f"{path}: all {len(frozen)} adapters are for the part {part!r}, which does not train in this run",
                    code="weights-of-frozen-part",
                    fix="let it train, or merge the file with --base_weights",
                )
            if frozen:
                self.set_aside[part] = len(frozen)
            self.weights = {name: entry for name, entry in self.weights.items() if name not in frozen}

    def describe_weights(self, adapters: Sequence[Adapter]) -> tuple[list[str], list[str]]:
        """Lines about --network_weights: what of it is not used, and what it does not have."""
        path = self.network.network_weights
        if path is None:
            return [], []
        unused = [
            f"{path}: {count} adapters of {part}, which does not train, are set aside: neither used nor saved"
            for part, count in self.set_aside.items()
        ]
        names = [adapter.group.name for adapter in adapters]
        new = [name for name in names if name not in self.weights]
        start = (
            f"{path}: {len(names) - len(new)} of {len(names)} adapters start from it; not in it: {list_some(new, 2)}"
        )
        return unused, [start] if new else []


def iterate_adapters(
    path: Path, entries: TensorsByGroup, specs: Mapping[str, PartSpec], groups: GroupsByPart
) -> Iterator[LoRA]:
    """The adapters of a file one at a time; UserError for an entry that belongs to no layer of the model.

    specs: of every part that can be adapted. groups: part -> every adaptable layer.
    """
    by_name = {group.name: group for group in list_groups(groups, specs)}
    for name, tensors in match_names(path, entries, specs, groups).items():
        yield LoRA.from_tensors(by_name[name], tensors)


def match_names(
    path: Path, entries: TensorsByGroup, specs: Mapping[str, PartSpec], groups: GroupsByPart
) -> TensorsByGroup:
    """A file's entries under our names; UserError for one that belongs to no layer of the model."""
    for part, spec in specs.items():
        entries = apply_aliases(path, entries, spec.aliases(groups[part]))
    check_names(path, entries, [group.name for group in list_groups(groups, groups)])
    return entries


def list_groups(groups: GroupsByPart, parts: Iterable[str]) -> list[LayerGroup]:
    """The layer groups of these parts."""
    return list(chain.from_iterable(groups[part] for part in parts))


def describe_adapter(adapter: Adapter) -> str:
    """The name, rank and alpha of an adapter, for a log line."""
    assert isinstance(adapter, LoRA | SplitLoRA)
    return f"{adapter.group.name}: rank {adapter.rank}, alpha {adapter.alpha:g}"
