"""Adapter training: LoRA and its relatives on the denoiser, the text encoders, or both."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.adapters.base import AdapterEngine
from sfumato.config import Config
from sfumato.data.batch import Extras, Tensors
from sfumato.families.base import Family
from sfumato.families.blueprint import Blueprint
from sfumato.formats.hashed_file import write_hashed_file
from sfumato.formats.metadata import make_adapter_metadata
from sfumato.formats.pickled import get_file_suffix
from sfumato.methods.adapter_builder import AdapterBuilder, describe_adapter, find_matching_groups
from sfumato.methods.adapter_settings import AdapterSettings, make_adapter_settings
from sfumato.methods.base import METHODS, PlanNotes, TrainablePart
from sfumato.methods.base_weights import BaseWeights, read_base_weights
from sfumato.methods.frozen_adapters import FrozenAdapters, check_text_use, read_frozen_file
from sfumato.methods.trained_embeddings import TrainedEmbeddings
from sfumato.optim.groups import ParameterGroup

log = logging.getLogger(__name__)


@METHODS.register("adapter")
class AdapterMethod:
    """The engine holds the adapters, the builder makes them; the model's own weights are frozen.

    With --token_string the vectors of new words train beside them (pivotal tuning), and are in the same file.
    """

    modelspec_suffix = "/lora"

    def __init__(self, config: Config) -> None:
        self.config = config
        self.builder = AdapterBuilder(config)
        self.engine = AdapterEngine()
        self.embeddings = TrainedEmbeddings(config)
        self.modules = nn.ModuleDict({"adapters": self.engine.adapters, "embeddings": self.embeddings.modules})
        self.live_text: frozenset[str] = frozenset()
        self.saved_numbers = 0  # of all tensors of the file, also of those that do not train; known from the plan
        self.plan_notes = PlanNotes()
        self.readers_noted = False  # whether it was said what other programs do with the file
        self.base_weights = BaseWeights()
        self.frozen = FrozenAdapters()
        self.unread: set[str] = set()  # adapters of layers that the model's features do not depend on

    def extend(self, family: type[Family], blueprint: Blueprint) -> Blueprint:
        return blueprint

    def plan(self, blueprint: Blueprint) -> list[TrainablePart]:
        settings = make_adapter_settings(self.config, blueprint)
        groups = {part: blueprint.networks[part].groups(every=True) for part in settings.specs}
        multipliers = chain(self.config.network.base_weights_multiplier, repeat(1.0))
        files = zip(self.config.network.base_weights, multipliers, strict=False)
        self.base_weights = read_base_weights(files, settings.specs, groups)
        frozen = [read_frozen_file(each, settings.specs, groups) for each in self.config.network.frozen_lora]
        check_text_use(frozen, blueprint.text_parts)
        self.frozen = FrozenAdapters(frozen)
        adapters = self.builder.build(settings, groups)
        embeddings = self.embeddings.plan(blueprint)
        parts = [*settings.learning_rates.list_trainable(adapters), *embeddings]
        tensors = chain.from_iterable(adapter.export_tensors().values() for adapter in adapters)
        self.saved_numbers = sum(tensor.numel() for tensor in tensors) + sum(part.parameters for part in embeddings)
        self.live_text = frozenset(settings.learning_rates.parts) & frozenset(blueprint.text_parts)
        self.live_text |= self.embeddings.live_text
        notes, remarks = self.builder.describe_weights(adapters)
        notes += [note for file in frozen for note in file.notes]
        remarks += [file.make_remark() for file in frozen]
        self.plan_notes = PlanNotes((*settings.notes, *self.base_weights.notes, *notes), tuple(remarks))
        return parts

    def list_notes(self, blueprint: Blueprint) -> PlanNotes:
        return self.plan_notes

    def full_precision_parts(self, blueprint: Blueprint) -> Collection[str]:
        return ()

    def change_frozen(self, model: Family) -> None:
        """Those of --base_weights are merged into every network they are for, whether it trains or not."""
        self.base_weights.register(model)
        self.frozen.register(model)
        self.embeddings.register(model)

    def prepare(self, model: Family) -> list[ParameterGroup]:
        settings = make_adapter_settings(self.config, model.blueprint)
        groups = {name: model.parts[name].groups(every=True) for name in settings.specs}
        adapters = {adapter.group.name: adapter for adapter in self.builder.build(settings, groups)}
        for part in settings.learning_rates.parts:
            self.engine.attach(groups[part], lambda group: adapters.get(group.name))
        for adapter in self.engine:
            adapter.to(model.parts[adapter.group.part].device)  # the layers of a block may be in main memory
        for part in settings.learning_rates.parts:
            self.unread |= find_matching_groups(model.unread_layers(part), groups[part])
        if settings.args.verbose:
            self._log_adapters(settings)
        self.engine.train()
        return [*settings.learning_rates.make_parameter_groups(self.engine), *self.embeddings.prepare()]

    def rewrite_caption(self, text: str) -> str:
        return self.embeddings.words.replace(text)

    def before_step(self, step: int) -> None:
        pass

    def set_batch(self, model: Family, extras: Extras) -> None:
        strength = extras.multiplier
        self.engine.multiplier = 1.0 if strength is None else strength.to(model.device, non_blocking=True)

    def predict(self, model: Family, noisy: Tensor, t: Tensor, conditioning: Tensors, extras: Extras) -> Tensor:
        return model.predict(noisy, t, conditioning, extras.images)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        with self.engine.use_multiplier(0.0), self.embeddings.use_initial():
            yield

    def sampling(self) -> AbstractContextManager[None]:
        return self.frozen.use_for_sampling()

    def list_frozen(self) -> Sequence[nn.Module]:
        return self.frozen.list_modules()

    def list_generate_options(self, file: str, blueprint: Blueprint) -> Mapping[str, object]:
        """Frozen adapters are files like the trained one."""
        frozen = [each for each in self.config.network.frozen_lora if each.is_used(sampling=True)]
        files = [*([file] if file else []), *(str(each.path) for each in frozen)]
        strengths = [*([1.0] if file else []), *(each.strength for each in frozen)]
        options: dict[str, object] = {"network_weights": files} if files else {}
        return options | ({"network_mul": strengths} if set(strengths) - {1.0} else {})

    def after_step(self) -> Mapping[str, Tensor]:
        limit = self.config.network.scale_weight_norms
        norms = {} if limit is None else self.engine.limit_norms(limit)
        perturbed = self.engine.update_perturbations()
        return {
            **{f"max_norm/{name}": value for name, value in norms.items()},
            **{f"norm/{name}": value for name, value in perturbed.items()},
        }

    def state_dict(self) -> Tensors:
        adapters = {f"adapters.{name}": tensor for name, tensor in self.engine.adapters.state_dict().items()}
        return adapters | self.embeddings.export_state()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        adapters = {name: tensor for name, tensor in state.items() if name.startswith("adapters.")}
        self.engine.adapters.load_state_dict({name.removeprefix("adapters."): each for name, each in adapters.items()})
        self.embeddings.load_state({name: tensor for name, tensor in state.items() if name not in adapters})

    def metadata(self) -> Mapping[str, Any]:
        return {**make_adapter_metadata(self.config), **self.embeddings.metadata()}

    def output_bytes(self, blueprint: Blueprint, dtype: torch.dtype | None) -> int:
        return self.saved_numbers * (dtype or torch.float32).itemsize

    def file_suffixes(self, blueprint: Blueprint) -> Sequence[str]:
        return (get_file_suffix(self.config.save.save_model_as),)

    def write(self, model: Family, path: Path, metadata: Mapping[str, str], dtype: torch.dtype | None) -> None:
        tensors = {**self.engine.export_tensors(), **self.embeddings.export_bundle()}
        write_hashed_file(path, tensors, metadata, dtype)
        if not self.readers_noted:
            self.readers_noted = True
            for line in self._find_reader_notes(model):
                log.info("%s: %s", path, line)
        log.debug("%s: %d tensors", path, len(tensors))

    def _find_reader_notes(self, model: Family) -> list[str]:
        """What other programs do not read of the file."""
        lines: list[str] = []
        for name, part in model.parts.items():
            adapted = [adapter.group.paths for adapter in self.engine if adapter.group.part == name]
            lines += part.spec.find_reader_notes(chain.from_iterable(adapted))
        return lines

    def report(self) -> list[str]:
        return self.engine.report(self.unread)

    def _log_adapters(self, settings: AdapterSettings) -> None:
        for adapter in self.engine:
            own = settings.learning_rates.find_learning_rate(adapter.group)
            log.info("%s, learning rate %g (%s)", describe_adapter(adapter), own.value, own.label)
