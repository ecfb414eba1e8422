"""Adapter construction: new adapters, and those of --network_weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain

from sfumato.adapters.base import Adapter, is_trainable
from sfumato.adapters.lora import LoRA, LoraDropout
from sfumato.adapters.split_lora import SplitLoRA
from sfumato.common.text import list_some
from sfumato.config import Config
from sfumato.diffusion.randomness import Randomness
from sfumato.errors import UserError
from sfumato.families.adapter_names import match_adapter_file
from sfumato.families.part import PartSpec
from sfumato.formats.adapter_file import AdapterFile, read_adapter_file
from sfumato.formats.adapter_layers import GroupAdapter
from sfumato.formats.groups import LayerGroup
from sfumato.methods.adapter_settings import AdapterSettings

GroupsByPart = Mapping[str, Sequence[LayerGroup]]  # part -> every adaptable layer


class AdapterBuilder:
    """Reads the adapter files of a run once and builds its adapters on the layers of a model or of its blueprint."""

    def __init__(self, config: Config) -> None:
        self.network = config.network
        assert config.loop.seed is not None, "the run's seed is drawn before the method is made"
        self.randomness = Randomness(config.loop.seed)
        path = self.network.network_weights
        self.file: AdapterFile | None = read_adapter_file(path) if path else None
        self.weights: dict[str, GroupAdapter] = {}  # group -> what the file holds for it
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
                raise self._make_empty_part_error(part, settings)
            adapters += built
        return adapters

    def _make_empty_part_error(self, part: str, settings: AdapterSettings) -> UserError:
        """For a part of which no layer has an adapter that trains; where a file gives the ranks, its parts could."""
        in_file = list(dict.fromkeys(adapter.group.part for adapter in self.weights.values()))
        if not self.network.dim_from_weights or not in_file:
            what, fix = f"part {part!r} is set to train, but none of its layers has an adapter", ""
        else:
            what = f"--dim_from_weights: {self.network.network_weights} has no adapters for the part {part!r}"
            only = "unet" if in_file == ["denoiser"] else "text_encoder"
            trained = f"--network_train_{only}_only trains {', '.join(in_file)} alone"
            fix = f"{trained}; or --network_dim instead of --dim_from_weights, which makes new adapters for {part}"
        return UserError(what, code="part-without-adapters", fix=fix)

    def _build_adapter(self, settings: AdapterSettings, group: LayerGroup) -> LoRA | SplitLoRA | None:
        """None for a group without an adapter. At learning rate 0, only an adapter of the file is built, and frozen."""
        learning_rate = settings.learning_rates.find_learning_rate(group).value
        rank = None if self.network.dim_from_weights else settings.ranks.find_rank(group)
        adapter_class = SplitLoRA if settings.args.split_qkv and len(group.layers) > 1 else LoRA
        own = self.weights.get(group.name)
        if own is not None:
            adapter = adapter_class.from_tensors(group, own.make_tensors())
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
        """Find the layers of --network_weights; what is for parts that do not train is set aside.

        Raises UserError where a name belongs to no layer of the model, and where none is for a part that trains.
        """
        if self.file is None:
            return
        self.weights = match_adapter_file(self.file, settings.specs, groups)
        for part in settings.specs.keys() - settings.learning_rates.parts.keys():
            frozen = [name for name, adapter in self.weights.items() if adapter.group.part == part]
            if frozen and len(frozen) == len(self.weights):
                raise UserError(
                    f"{self.file.path}: all {len(frozen)} adapters are for the part {part!r}, which does not train",
                    code="weights-of-frozen-part",
                    fix="let it train, or merge the file with --base_weights",
                )
            if frozen:
                self.set_aside[part] = len(frozen)
            self.weights = {name: adapter for name, adapter in self.weights.items() if name not in frozen}

    def describe_weights(self, adapters: Sequence[Adapter]) -> tuple[list[str], list[str]]:
        """Lines about --network_weights: what of it is not used, and what it does and does not have."""
        if self.file is None:
            return [], []
        path, unused = self.file.path, self.file.describe_passed_over()
        unused += [
            f"{path}: {count} adapters of {part}, which does not train, are set aside: neither used nor saved"
            for part, count in self.set_aside.items()
        ]
        names = [adapter.group.name for adapter in adapters]
        new = [name for name in names if name not in self.weights]
        rest = f"; {len(new)} start from new values, e.g. {list_some(new, 2)}" if new else ""
        remarks = [f"{path}: {len(names) - len(new)} of {len(names)} adapters start from it{rest}"]
        joined = [adapter for adapter in self.weights.values() if adapter.is_joined]
        if joined and not any(isinstance(adapter, SplitLoRA) for adapter in adapters):
            remarks.append(
                f"{path}: {len(joined)} fused layers, e.g. {joined[0].group.name}, have ranks of their own for each of "
                f"their layers there; they train as one of rank {joined[0].rank}"
            )
        return unused, remarks


def iterate_adapters(file: AdapterFile, specs: Mapping[str, PartSpec], groups: GroupsByPart) -> Iterator[LoRA]:
    """The adapters of a file one at a time; UserError for a layer that the model does not have.

    specs: of every part that can be adapted. groups: part -> every adaptable layer.
    """
    for adapter in match_adapter_file(file, specs, groups).values():
        yield LoRA.from_tensors(adapter.group, adapter.make_tensors())


def list_groups(groups: GroupsByPart, parts: Iterable[str]) -> list[LayerGroup]:
    """The layer groups of these parts."""
    return list(chain.from_iterable(groups[part] for part in parts))


def describe_adapter(adapter: Adapter) -> str:
    """The name, rank and alpha of an adapter, for a log line."""
    assert isinstance(adapter, LoRA | SplitLoRA)
    return f"{adapter.group.name}: rank {adapter.rank}, alpha {adapter.alpha:g}"
