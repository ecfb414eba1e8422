"""Adapter construction: new adapters, and those of --network_weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain

from sfumato.adapters.base import ADAPTERS, Adapter, AdapterRequest, Dropout, is_trainable
from sfumato.adapters.kinds import choose_kinds, create_adapter, list_kinds, read_adapter_file, restore_adapter
from sfumato.adapters.perturbation import Perturbation
from sfumato.common.text import list_some, plural
from sfumato.config import Config
from sfumato.diffusion.randomness import Randomness
from sfumato.errors import UserError
from sfumato.families.adapter_names import match_adapter_file
from sfumato.formats.adapter_file import AdapterFile
from sfumato.formats.adapter_kind import describe_kinds
from sfumato.formats.adapter_layers import GroupAdapter
from sfumato.formats.embedding_file import is_bundled
from sfumato.formats.groups import LayerGroup
from sfumato.formats.keymap import matches
from sfumato.methods.adapter_settings import AdapterSettings

GroupsByPart = Mapping[str, Sequence[LayerGroup]]  # part -> every adaptable layer


class AdapterBuilder:
    """Reads the adapter files of a run once and builds its adapters on the layers of a model or of its blueprint."""

    def __init__(self, config: Config) -> None:
        self.network = config.network
        self.token_string = config.embedding.token_string
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

    def _build_adapter(self, settings: AdapterSettings, group: LayerGroup) -> Adapter | None:
        """None for a group without an adapter. At learning rate 0, only an adapter of the file is built, and frozen."""
        network, options = settings.network, settings.ranks.find_options(group)
        learning_rate = settings.learning_rates.find_learning_rate(group).value
        rank = None if network.dim_from_weights else settings.ranks.find_rank(group)
        kinds = choose_kinds(settings.adapter_kind, options, group)
        own = self.weights.get(group.name)
        if own is not None:
            self._check_kinds(own, kinds)
            adapter = restore_adapter(kinds, group, own.make_tensors())
            if not network.dim_from_weights:
                self._check_rank(group, adapter.known_rank, rank[0] if rank else 0)
        elif rank is None or learning_rate == 0:
            return None
        else:
            generator = self.randomness.generator("init " + group.name)
            request = AdapterRequest(
                rank=rank[0], alpha=rank[1], options=options[settings.adapter_kind], generator=generator
            )
            adapter = create_adapter(kinds, group, request, options)
        if network.scale_weight_norms is not None and not adapter.has_norm_limit:
            raise UserError(
                f"--scale_weight_norms does not work with {describe_kinds(kinds)}",
                code="norm-limit-unsupported",
                fix="remove --scale_weight_norms",
            )
        adapter.configure(options[settings.adapter_kind])
        self._set_up_training(adapter, settings, learning_rate)
        return adapter

    def _set_up_training(self, adapter: Adapter, settings: AdapterSettings, learning_rate: float) -> None:
        """Dropout, perturbation, and what a learning rate trains."""
        args = settings.args
        adapter.set_dropout(
            Dropout(
                neuron=settings.network.network_dropout or 0.0,
                rank=args.rank_dropout,
                module=args.module_dropout,
                scales_rows=args.rank_dropout_scale,
            )
        )
        adapter.requires_grad_(False)
        for _, parameter in adapter.trainable():
            parameter.requires_grad_(learning_rate != 0)
        if args.ggpo_sigma is None or args.ggpo_beta is None or learning_rate == 0:
            return
        if not adapter.has_perturbation:
            raise UserError(
                f"--network_args ggpo_sigma and ggpo_beta do not work with {adapter.label}",
                code="ggpo-unsupported",
                fix="remove them",
            )
        adapter.perturbation = Perturbation(adapter.group, sigma=args.ggpo_sigma, beta=args.ggpo_beta)

    def _check_kinds(self, own: GroupAdapter, kinds: tuple[type[Adapter], ...]) -> None:
        """UserError where the file has adapters of another kind than the options ask for."""
        named = [kind for kind in kinds if kind.files_of or kind.spellings]
        wanted = {ADAPTERS.get(kind.files_of) if kind.files_of else kind for kind in named}
        found = {*own.kinds}
        if found != wanted:
            kinds_here = [(name, kind) for name, kind in list_kinds().items() if kind in found and not kind.is_wrapper]
            names = [kind.replaces or name for name, kind in kinds_here]
            raise UserError(
                f"{self.network.network_weights} is {describe_kinds(own.kinds)}, the options ask for "
                f"{describe_kinds(kinds)}",
                code="network-weights-of-other-kind",
                fix=f"--network_module {' or '.join(names)} with the arguments that the file was trained with; or use "
                "it as it is, with --frozen_lora or --base_weights",
            )

    def _check_rank(self, group: LayerGroup, rank: int | None, expected: int) -> None:
        if rank is not None and rank != expected:
            requested = f"the options ask for {expected}" if expected else "the options give it no adapter"
            raise UserError(
                f"{self.network.network_weights}: {group.name} has rank {rank}, {requested}",
                code="adapter-rank-mismatch",
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
                    f"{self.file.path}: all {plural(len(frozen), 'adapter is', 'adapters are')} for the part "
                    f"{part!r}, which does not train",
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
        path = self.file.path
        words = [key for key in self.file.passed_over if is_bundled(key)]
        others = tuple(key for key in self.file.passed_over if key not in words)
        unused = replace(self.file, passed_over=others).describe_passed_over()
        if words and not self.token_string:
            unused.append(f"{path}: its new words are not in the result; --token_string WORD keeps them")
        unused += [
            f"{path}: {plural(count, 'adapter')} of {part}, which does not train, are set aside: neither used nor saved"
            for part, count in self.set_aside.items()
        ]
        names = [adapter.group.name for adapter in adapters]
        new = [name for name in names if name not in self.weights]
        rest = f"; {len(new)} start from new values, e.g. {list_some(new, 2)}" if new else ""
        remarks = [
            f"{path}: {len(names) - len(new)} of {plural(len(names), 'adapter starts', 'adapters start')} from it{rest}"
        ]
        joined = [own for own in self.weights.values() if len(own.matches) > 1]
        rank = next((each.known_rank for each in adapters if joined and each.group is joined[0].group), None)
        if joined and rank is not None:
            remarks.append(
                f"{path}: {plural(len(joined), 'fused layer')}, e.g. {joined[0].group.name}, have an adapter of their "
                "own for "
                f"each of their layers there; they train as one of rank {rank}"
            )
        return unused, remarks


def list_groups(groups: GroupsByPart, parts: Iterable[str]) -> list[LayerGroup]:
    """The layer groups of these parts."""
    return list(chain.from_iterable(groups[part] for part in parts))


def describe_adapter(adapter: Adapter) -> str:
    """The name, rank and alpha of an adapter, for a log line."""
    rank = "" if adapter.known_rank is None else f"rank {adapter.known_rank}, "
    return f"{adapter.group.name}: {adapter.label}, {rank}alpha {adapter.alpha:g}"


def find_matching_groups(patterns: Iterable[str], groups: Iterable[LayerGroup]) -> set[str]:
    """The names of the groups whose first layer any pattern fits."""
    found = tuple(patterns)
    return {group.name for group in groups if any(matches(pattern, group.paths[0]) for pattern in found)}
