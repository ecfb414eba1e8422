"""Adapter training: LoRA and its relatives on the denoiser, the text encoders, or both."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.adapters.base import Adapter, AdapterEngine, merge, trains
from sfumato.adapters.lora import Dropout, LoRA
from sfumato.adapters.split_lora import SplitLoRA
from sfumato.config import Config
from sfumato.data.batch import Extras, Tensors
from sfumato.diffusion.randomness import Randomness
from sfumato.errors import UserError
from sfumato.families.base import Blueprint, Family, PartSpec
from sfumato.formats.checkpoint import write_safetensors
from sfumato.formats.groups import LayerGroup
from sfumato.formats.hashes import with_hashes
from sfumato.formats.lora import check_names, read_adapter_file, renamed
from sfumato.formats.metadata import adapter_metadata
from sfumato.formats.pickled import ENDINGS, is_pickled, write_flat
from sfumato.methods.adapter_ranks import DEFAULT_RANK
from sfumato.methods.adapter_rates import PLUS
from sfumato.methods.adapter_rule import AdapterRule, make_rule
from sfumato.methods.base import METHODS, Planned
from sfumato.optim.groups import ParameterGroup

log = logging.getLogger(__name__)
Entries = Mapping[str, dict[str, Tensor]]  # of an adapter file: group name -> suffix -> tensor
Groups = Mapping[str, Sequence[LayerGroup]]  # part -> every adaptable layer


@METHODS.register("adapter")
class AdapterMethod:
    """The engine holds the adapters; this class decides where they go and at which rate they learn."""

    kind = "/lora"
    reader = "network_weights"

    def __init__(self, config: Config) -> None:
        self.config, self.network = config, config.network
        assert config.loop.seed is not None, "the run's seed is drawn before the method is made"
        self.randomness = Randomness(config.loop.seed)
        self.engine = AdapterEngine()
        self.modules = nn.ModuleDict({"adapters": self.engine.adapters})
        self.live_text: frozenset[str] = frozenset()
        path = self.network.network_weights
        self.weights: Entries = read_adapter_file(path) if path else {}
        strengths = chain(self.network.base_weights_multiplier, repeat(1.0))
        files = zip(self.network.base_weights, strengths, strict=False)
        self.base = [(path, strength, read_adapter_file(path)) for path, strength in files]

    def plan(self, blueprint: Blueprint) -> list[Planned]:
        rule = make_rule(self.config, blueprint)
        groups = {part: blueprint.networks[part].groups(every=True) for part in rule.specs}
        for _ in self._base_adapters(rule, groups):
            pass  # each is checked as it is made
        adapters = list(self._adapters(rule, groups))
        modules = Counter(rule.rates.of(adapter.group).label for adapter in adapters)
        return [
            Planned(
                part=row.name,
                modules=modules[row.name.removesuffix(PLUS)],
                parameters=sum(parameter.numel() for parameter in row.parameters),
                learning_rate=row.learning_rate,
            )
            for row in rule.rates.groups(adapters)
        ]

    def own_weights(self, blueprint: Blueprint) -> Collection[str]:
        return ()

    def prepare(self, model: Family) -> list[ParameterGroup]:
        model.freeze()
        rule = make_rule(self.config, model.blueprint)
        groups = {name: part.groups(every=True) for name, part in model.parts.items()}
        for adapter, strength in self._base_adapters(rule, groups):
            merge(adapter, strength)
        self.base = []
        adapters = {adapter.group.name: adapter for adapter in self._adapters(rule, groups)}
        for part in rule.rates.parts:
            self.engine.attach(groups[part], lambda group: adapters.get(group.name))
        for note in rule.notes:
            log.warning("%s", note)
        if rule.args.verbose:
            self._tell(rule)
        self.live_text = frozenset(rule.rates.parts) & frozenset(model.text_parts)
        self.engine.train()
        return rule.rates.groups(self.engine)

    def caption(self, text: str) -> str:
        return text

    def before_step(self, step: int) -> None:
        pass

    def begin(self, model: Family, extras: Extras) -> None:
        given = extras.multiplier
        self.engine.multiplier = 1.0 if given is None else given.to(model.device, non_blocking=True)

    def predict(self, model: Family, noisy: Tensor, t: Tensor, conditioning: Tensors, extras: Extras) -> Tensor:
        return model.predict(noisy, t, conditioning)

    def without(self) -> AbstractContextManager[None]:
        return self.engine.scaled(0.0)

    def after_step(self) -> Mapping[str, Tensor]:
        limit = self.network.scale_weight_norms
        found = {} if limit is None else self.engine.limit_norms(limit)
        return {f"max_norm/{name}": value for name, value in found.items()}

    def state(self) -> Tensors:
        return dict(self.modules.state_dict())

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.modules.load_state_dict(dict(state))

    def metadata(self) -> Mapping[str, Any]:
        return adapter_metadata(self.config, default_rank=DEFAULT_RANK)

    def output_bytes(self, blueprint: Blueprint, dtype: torch.dtype | None) -> int:
        return sum(row.parameters for row in self.plan(blueprint)) * (dtype or torch.float32).itemsize

    def ending(self, blueprint: Blueprint) -> str:
        return ENDINGS.get(self.config.save.save_model_as or "", ".safetensors")

    def write(self, model: Family, path: Path, metadata: Mapping[str, str], dtype: torch.dtype | None) -> None:
        """The adapter file, with the field's two hashes where it is safetensors."""
        tensors = self.engine.tensors()
        if is_pickled(path):
            write_flat(path, tensors, dtype=dtype)
            return
        write_safetensors(path, tensors, with_hashes(metadata, tensors, dtype=dtype), dtype=dtype)
        log.debug("%s: %d tensors", path, len(tensors))

    def report(self) -> list[str]:
        return self.engine.report()

    def _adapters(self, rule: AdapterRule, groups: Groups) -> Iterator[Adapter]:
        """The adapters of every part that trains, new or from --network_weights."""
        self._match_weights(rule, groups)
        rule.ranks.check([group for part in rule.rates.parts for group in groups[part]])
        for part in rule.rates.parts:
            made = [adapter for group in groups[part] if (adapter := self._make(rule, group))]
            if not any(trains(adapter) for adapter in made):
                raise UserError(f"the part {part!r} was asked to train, but none of its layers is adapted")
            yield from made

    def _make(self, rule: AdapterRule, group: LayerGroup) -> Adapter | None:
        """None where the group gets no adapter. One at rate 0 exists only if the file has it, and stays as it is."""
        entries, rate = self.weights.get(group.name), rule.rates.of(group).value
        ranks = None if self.network.dim_from_weights else rule.ranks.of(group)
        kind = SplitLoRA if rule.args.split_qkv and len(group.layers) > 1 else LoRA
        if entries is not None:
            adapter = kind.from_tensors(group, entries)
            if not self.network.dim_from_weights:
                self._check_rank(group, adapter.rank, ranks[0] if ranks else 0)
        elif ranks is None or rate == 0:
            return None
        else:
            generator = self.randomness.generator("init " + group.name)
            adapter = kind(group, rank=ranks[0], alpha=ranks[1], generator=generator)
        if self.network.scale_weight_norms is not None and not adapter.limited:
            raise UserError(f"--scale_weight_norms does not work with {type(adapter).__name__}", fix="leave it out")
        adapter.dropout = Dropout(
            neuron=self.network.network_dropout or 0.0, rank=rule.args.rank_dropout, module=rule.args.module_dropout
        )
        return adapter.requires_grad_(rate != 0)

    def _check_rank(self, group: LayerGroup, rank: int, wanted: int) -> None:
        if rank != wanted:
            asked = f"the options ask for {wanted}" if wanted else "the options leave it out"
            raise UserError(
                f"{self.network.network_weights}: {group.name} has rank {rank}, {asked}",
                fix="give the ranks that the file was trained with, or --dim_from_weights",
            )

    def _match_weights(self, rule: AdapterRule, groups: Groups) -> None:
        """Names of other layouts become ours; every name in the file must belong to a layer of a part that trains."""
        path = self.network.network_weights
        if path is None:
            return
        self.weights = matched(path, self.weights, rule.specs, groups)
        for part in rule.specs.keys() - rule.rates.parts.keys():
            idle = [group.name for group in groups[part] if group.name in self.weights]
            if idle:
                raise UserError(
                    f"{path} has {len(idle)} adapters for the part {part!r}, which does not train in this run",
                    fix="let it train, or merge the file with --base_weights",
                )

    def _base_adapters(self, rule: AdapterRule, groups: Groups) -> Iterator[tuple[Adapter, float]]:
        """What --base_weights merge into the model before training, with the strength of each file."""
        known = {group.name: group for part in rule.specs for group in groups[part]}
        for path, strength, entries in self.base:
            for name, tensors in matched(path, entries, rule.specs, groups).items():
                yield LoRA.from_tensors(known[name], tensors), strength

    def _tell(self, rule: AdapterRule) -> None:
        for adapter in self.engine:
            assert isinstance(adapter, LoRA | SplitLoRA)
            rate = rule.rates.of(adapter.group)
            log.info(
                "%s: rank %d, alpha %g, rate %g (%s)",
                adapter.group.name, adapter.rank, adapter.alpha, rate.value, rate.label,
            )  # fmt: skip


def matched(path: Path, entries: Entries, specs: Mapping[str, PartSpec], groups: Groups) -> Entries:
    """A file's entries under our names; one that belongs to no layer of the model is a UserError.

    specs: of every part that can be adapted. groups: part -> every adaptable layer.
    """
    for part, spec in specs.items():
        entries = renamed(path, entries, spec.aliases(groups[part]))
    check_names(path, entries, [group.name for each in groups.values() for group in each])
    return entries
