"""Adapter training: LoRA and its relatives on the denoiser, the text encoders, or both."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

from torch import Tensor, nn

from sfumato.adapters.base import Adapter, AdapterEngine
from sfumato.adapters.lora import LoRA
from sfumato.config import Config
from sfumato.data.batch import Extras, Tensors
from sfumato.diffusion.randomness import Randomness
from sfumato.errors import UserError
from sfumato.families.base import Blueprint, Family
from sfumato.formats.groups import LayerGroup
from sfumato.formats.lora import check_names, read_adapter_file
from sfumato.methods.base import METHODS, Planned
from sfumato.optim.groups import ParameterGroup


@METHODS.register("adapter")
class AdapterMethod:
    """The engine holds the adapters; this class decides where they go and at which rate they learn."""

    def __init__(self, config: Config) -> None:
        self.network, self.optim = config.network, config.optim
        assert config.loop.seed is not None, "the run's seed is drawn before the method is made"
        self.randomness = Randomness(config.loop.seed)
        self.engine = AdapterEngine()
        self.modules = nn.ModuleDict({"adapters": self.engine.adapters})
        self.live_text: frozenset[str] = frozenset()
        path = self.network.network_weights
        self.weights = read_adapter_file(path) if path else {}

    def plan(self, blueprint: Blueprint) -> list[Planned]:
        rates = self._rates(blueprint.text_parts)
        groups = {part: blueprint.networks[part].groups() for part in rates}
        self._check_weights([group for each in groups.values() for group in each])
        planned = []
        for part, rate in rates.items():
            adapters = [adapter for group in groups[part] if (adapter := self._make(group))]
            count = sum(p.numel() for adapter in adapters for p in adapter.parameters())
            planned.append(Planned(part=part, modules=len(adapters), parameters=count, learning_rate=rate))
        return planned

    def prepare(self, model: Family) -> list[ParameterGroup]:
        model.freeze()
        rates = self._rates(model.text_parts)
        self._check_weights([group for part in rates for group in model.parts[part].groups()])
        for part in rates:
            self.engine.attach(model.parts[part].groups(), self._make)
        self.live_text = frozenset(rates) & frozenset(model.text_parts)
        self.engine.train()
        return [self._parameters(part, rate) for part, rate in rates.items()]

    def caption(self, text: str) -> str:
        return text

    def begin(self, model: Family, extras: Extras) -> None:
        self.engine.multiplier = 1.0 if extras.multiplier is None else extras.multiplier

    def predict(self, model: Family, noisy: Tensor, t: Tensor, conditioning: Tensors, extras: Extras) -> Tensor:
        return model.predict(noisy, t, conditioning)

    def without(self) -> AbstractContextManager[None]:
        return self.engine.scaled(0.0)

    def state_to_save(self) -> Tensors:
        return self.engine.tensors()

    def report(self) -> list[str]:
        return self.engine.report()

    def _rates(self, text_parts: Sequence[str]) -> dict[str, float]:
        """Part -> learning rate of the parts that train; a rate of 0 leaves a part out."""
        optim, network = self.optim, self.network
        rates: dict[str, float] = {}
        if not network.network_train_text_encoder_only:
            rates["denoiser"] = optim.learning_rate if optim.unet_lr is None else optim.unet_lr
        if not network.network_train_unet_only:
            rates |= dict(zip(text_parts, self._text_rates(len(text_parts)), strict=True))
        rates = {part: rate for part, rate in rates.items() if rate}
        if not rates:
            raise UserError("no part of the model trains: every learning rate is 0", fix="--learning_rate 1e-4")
        return rates

    def _text_rates(self, encoders: int) -> Sequence[float]:
        given = self.optim.text_encoder_lr
        if not given:
            return [self.optim.learning_rate] * encoders
        if len(given) == 1:
            return list(given) * encoders
        if len(given) != encoders:
            raise UserError(
                f"--text_encoder_lr has {len(given)} values, this model has {encoders} text encoders",
                fix="give one value, or one for each encoder",
            )
        return given

    def _check_weights(self, groups: Sequence[LayerGroup]) -> None:
        if self.network.network_weights:
            check_names(self.network.network_weights, self.weights, [group.name for group in groups])

    def _make(self, group: LayerGroup) -> Adapter | None:
        """A new adapter, or the one of --network_weights; with --dim_from_weights the file alone decides."""
        entries = self.weights.get(group.name)
        if self.network.dim_from_weights:
            return LoRA.from_tensors(group, entries) if entries else None
        rank = self.network.network_dim or 4
        alpha = self.network.network_alpha or rank
        if entries is None:
            generator = self.randomness.generator("init " + group.name)
            return LoRA(group, rank=rank, alpha=alpha, generator=generator)
        adapter = LoRA.from_tensors(group, entries)
        self._check_rank(group, adapter, rank)
        return adapter

    def _check_rank(self, group: LayerGroup, adapter: LoRA, rank: int) -> None:
        if adapter.rank != rank:
            raise UserError(
                f"{self.network.network_weights}: {group.name} has rank {adapter.rank}, --network_dim is {rank}",
                fix=f"--network_dim {adapter.rank}, or --dim_from_weights",
            )

    def _parameters(self, part: str, rate: float) -> ParameterGroup:
        adapters = [adapter for adapter in self.engine if adapter.group.part == part]
        if not adapters:
            raise UserError(f"the part {part!r} was asked to train, but none of its layers is adapted")
        parameters = [parameter for adapter in adapters for parameter in adapter.parameters()]
        return ParameterGroup(name=part, parameters=parameters, learning_rate=rate)
