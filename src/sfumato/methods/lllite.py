"""ControlNet-LLLite training: small layers beside the denoiser's own learn to steer it by a control image."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.adapters.control_modules import ControlModules
from sfumato.common.text import list_some, plural
from sfumato.config import Config
from sfumato.data.batch import Extras, Tensors
from sfumato.errors import UserError
from sfumato.families.base import Family
from sfumato.families.blueprint import Blueprint
from sfumato.formats.hashed_file import write_hashed_file
from sfumato.formats.pickled import get_file_suffix
from sfumato.methods.base import METHODS, PlanNotes, TrainablePart
from sfumato.methods.inference_lllite import make_no_lllite_error, show_control_image
from sfumato.methods.new_lllite import Layers, list_lllite_notes, make_control_modules
from sfumato.methods.trained_parts import make_zero_learning_rates_error
from sfumato.optim.groups import ParameterGroup

NAME = "lllite"


@METHODS.register("lllite")
class LLLiteMethod:
    """The model's own weights are frozen; the layers are hooked to the denoiser."""

    modelspec_suffix = "/control-net-lllite"

    def __init__(self, config: Config) -> None:
        self.config = config
        self.modules = nn.ModuleDict()
        self.live_text: frozenset[str] = frozenset()
        self.layers: Layers = {}
        self.reads_latents = False  # as of ControlModules; known once the plan is made
        self.widths = (0, 0)  # those that train: of the options, or of the file; known once the plan is made

    @property
    def trained(self) -> ControlModules:
        found = self.modules[NAME]
        assert isinstance(found, ControlModules)
        return found

    def extend(self, family: type[Family], blueprint: Blueprint) -> Blueprint:
        """Nothing is added; what there is to change is looked up."""
        if family.list_controlled_layers is None:
            raise make_no_lllite_error(blueprint)
        self.layers = family.list_controlled_layers(blueprint)
        return blueprint

    def plan(self, blueprint: Blueprint) -> list[TrainablePart]:
        if not self.config.optim.learning_rate:
            raise make_zero_learning_rates_error("--learning_rate 1e-4")
        made = make_control_modules(self.config, self.layers, blueprint)
        self.widths, self.reads_latents = made.widths, made.reads_latents
        return [
            TrainablePart(
                part=NAME,
                modules=len(made.layers),
                parameters=sum(parameter.numel() for parameter in made.parts.parameters()),
                learning_rate=self.config.optim.learning_rate,
            )
        ]

    def list_notes(self, blueprint: Blueprint) -> PlanNotes:
        return PlanNotes(tuple(list_lllite_notes(self.config, self.layers, blueprint)))

    def full_precision_parts(self, blueprint: Blueprint) -> Collection[str]:
        return ()

    def change_frozen(self, model: Family) -> None:
        """Nothing of that; the caches, which are filled before `prepare`, have to know what is read."""
        if self.reads_latents:
            model.controls_in_latents = {0}

    def prepare(self, model: Family) -> list[ParameterGroup]:
        made = make_control_modules(self.config, self.layers, model.blueprint).to(model.device).train()
        self.modules[NAME] = made
        made.attach(model.denoiser)
        made.strength = self.config.lllite.lllite_multiplier
        model.control_adapters, model.takes_control_mask = 1, made.reads_mask
        learning_rate = self.config.optim.learning_rate
        return [ParameterGroup(name=NAME, parameters=list(made.parameters()), learning_rate=learning_rate)]

    def rewrite_caption(self, text: str) -> str:
        return text

    def before_step(self, step: int) -> None:
        pass

    def set_batch(self, model: Family, extras: Extras) -> None:
        show_control_image([self.trained], model, extras)

    def predict(self, model: Family, noisy: Tensor, t: Tensor, conditioning: Tensors, extras: Extras) -> Tensor:
        return model.predict(noisy, t, conditioning, extras.images)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        self.trained.strength = 0.0
        try:
            yield
        finally:
            self.trained.strength = self.config.lllite.lllite_multiplier

    def sampling(self) -> AbstractContextManager[None]:
        return nullcontext()

    def list_frozen(self) -> Sequence[nn.Module]:
        return ()

    def list_generate_options(self, file: str, blueprint: Blueprint) -> Mapping[str, object]:
        multiplier = self.config.lllite.lllite_multiplier
        strength = {"control_net_multipliers": [multiplier]} if multiplier != 1 else {}
        return {"control_net_lllite_models": [file], **strength} if file else {}

    def after_step(self) -> Mapping[str, Tensor]:
        return {}

    def state_dict(self) -> Tensors:
        return dict(self.trained.parts.state_dict())

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if {name: each.shape for name, each in self.state_dict().items()} != {
            n: each.shape for n, each in state.items()
        }:
            raise UserError(
                "the state is of LLLite layers of other sizes",
                code="state-of-other-lllite",
                fix="start without --resume",
            )
        self.trained.parts.load_state_dict(dict(state))

    def metadata(self) -> Mapping[str, Any]:
        width, image_width = self.widths
        return {
            "ss_network_dim": width,
            "ss_cond_emb_dim": image_width,
            "ss_network_dropout": self.config.network.network_dropout,
        }

    def output_bytes(self, blueprint: Blueprint, dtype: torch.dtype | None) -> int:
        parameters = sum(
            parameter.numel() for parameter in make_control_modules(self.config, self.layers, blueprint).parameters()
        )
        return parameters * (dtype or torch.float32).itemsize

    def file_suffixes(self, blueprint: Blueprint) -> Sequence[str]:
        return (get_file_suffix(self.config.save.save_model_as),)

    def write(self, model: Family, path: Path, metadata: Mapping[str, str], dtype: torch.dtype | None) -> None:
        own = {name: str(value) for name, value in self.trained.file_metadata().items()}
        write_hashed_file(path, self.trained.parts.state_dict(), {**metadata, **own}, dtype)

    def report(self) -> list[str]:
        names = [name for name, parameter in self.trained.parts.named_parameters() if parameter.grad is None]
        return [f"{plural(len(names), 'weight')} got no gradient: {list_some(names)}"] if names else []
