"""ControlNet training: a second network learns to steer the frozen model by a control image."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.common import files
from sfumato.common.text import list_some, plural, strip_paths
from sfumato.config import Config
from sfumato.data.batch import CONTROL, Extras, Tensors
from sfumato.errors import UserError
from sfumato.families.base import Family
from sfumato.families.blueprint import Blueprint
from sfumato.families.control_net import CONTROL_NET
from sfumato.families.control_net_files import add_control_net
from sfumato.formats.checkpoint_writer import catch_disk_full, write_safetensors
from sfumato.formats.keymap import matches
from sfumato.formats.pickled import get_file_suffix, is_pickled, write_pickle
from sfumato.methods.base import METHODS, PlanNotes, TrainablePart
from sfumato.methods.trained_parts import get_trained_dtype, make_zero_learning_rates_error
from sfumato.optim.groups import ParameterGroup

CONFIG_KEY = "sfumato.config"  # metadata of a file: the configurations of its networks, as JSON
FOLDER_FORMATS = ("diffusers", "diffusers_safetensors")
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"


@METHODS.register("control_net")
class ControlNetMethod:
    """The ControlNet is a part of the model; it trains as a whole, and nothing else does."""

    modelspec_suffix = "/control-net"

    def __init__(self, config: Config) -> None:
        self.config = config
        self.modules = nn.ModuleDict()
        self.live_text: frozenset[str] = frozenset()
        self.is_active = True
        self.unread: Sequence[str] = ()  # patterns on weights without an effect

    @property
    def learning_rate(self) -> float:
        optim = self.config.optim
        return optim.learning_rate if optim.control_net_lr is None else optim.control_net_lr

    def extend(self, family: type[Family], blueprint: Blueprint) -> Blueprint:
        seed = self.config.loop.seed
        assert seed is not None, "a plan has a seed"
        return add_control_net(family, blueprint, self.config.model, seed)

    def plan(self, blueprint: Blueprint) -> list[TrainablePart]:
        network = blueprint.networks[CONTROL_NET]
        shapes = {
            name: shape
            for name, shape in network.weights.read_shapes().items()
            if name not in network.spec.constant_tensors
        }
        if not self.learning_rate:
            raise make_zero_learning_rates_error("--learning_rate 1e-5")
        return [
            TrainablePart(
                part=CONTROL_NET,
                modules=len({name.rpartition(".")[0] for name in shapes}),
                parameters=sum(shape.numel() for shape in shapes.values()),
                learning_rate=self.learning_rate,
            )
        ]

    def list_notes(self, blueprint: Blueprint) -> PlanNotes:
        given = self.config.model.controlnet_model_name_or_path
        begins = (
            f"begins as {strip_paths(given)}" if given else "is new: a copy of the denoiser that changes nothing yet"
        )
        return PlanNotes(remarks=(f"the ControlNet {begins}",))

    def full_precision_parts(self, blueprint: Blueprint) -> Collection[str]:
        return (CONTROL_NET,)

    def change_frozen(self, model: Family) -> None:
        pass

    def prepare(self, model: Family) -> list[ParameterGroup]:
        part = model.parts[CONTROL_NET]
        self.modules[CONTROL_NET] = part.module.train()
        assert model.control_net is not None
        self.unread = model.control_net.list_unread(part.network.config)
        parameters = dict(part.module.named_parameters())
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        return [
            ParameterGroup(name=CONTROL_NET, parameters=list(parameters.values()), learning_rate=self.learning_rate)
        ]

    def rewrite_caption(self, text: str) -> str:
        return text

    def before_step(self, step: int) -> None:
        pass

    def set_batch(self, model: Family, extras: Extras) -> None:
        pass

    def predict(self, model: Family, noisy: Tensor, t: Tensor, conditioning: Tensors, extras: Extras) -> Tensor:
        images = extras.images
        if not self.is_active:
            images = {role: image for role, image in images.items() if role != CONTROL}
        return model.predict(noisy, t, conditioning, images)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        self.is_active = False
        try:
            yield
        finally:
            self.is_active = True

    def sampling(self) -> AbstractContextManager[None]:
        return nullcontext()

    def list_frozen(self) -> Sequence[nn.Module]:
        return ()

    def list_generate_options(self, file: str, blueprint: Blueprint) -> Mapping[str, object]:
        return {"controlnet_model_name_or_path": file} if file else {}

    def after_step(self) -> Mapping[str, Tensor]:
        return {}

    def state_dict(self) -> Tensors:
        return {name: parameter.detach() for name, parameter in self.modules[CONTROL_NET].named_parameters()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        ours = dict(self.modules[CONTROL_NET].named_parameters())
        if {name: tensor.shape for name, tensor in ours.items()} != {name: each.shape for name, each in state.items()}:
            raise UserError(
                "the state is of another ControlNet", code="state-of-other-control-net", fix="start without --resume"
            )
        for name, parameter in ours.items():
            parameter.copy_(state[name])

    def metadata(self) -> Mapping[str, Any]:
        given = self.config.model.controlnet_model_name_or_path
        return {"ss_control_net_lr": self.learning_rate, "ss_control_net_name": strip_paths(given) if given else None}

    def output_bytes(self, blueprint: Blueprint, dtype: torch.dtype | None) -> int:
        trained = get_trained_dtype(self.config.memory)
        shapes = blueprint.networks[CONTROL_NET].weights.read_shapes()
        return sum(shape.numel() for shape in shapes.values()) * (dtype or trained).itemsize

    def file_suffixes(self, blueprint: Blueprint) -> Sequence[str]:
        save_model_as = self.config.save.save_model_as
        return ("" if save_model_as in FOLDER_FORMATS else get_file_suffix(save_model_as),)

    def write(self, model: Family, path: Path, metadata: Mapping[str, str], dtype: torch.dtype | None) -> None:
        """One file with diffusers' names, or with --save_model_as diffusers a folder of diffusers."""
        network: Any = self.modules[CONTROL_NET]
        tensors, header = network.state_dict(), {**metadata, "format": "pt"}
        if is_pickled(path):
            write_pickle(path, tensors, dtype=dtype)
        elif path.suffix:
            config = {name: value for name, value in network.config.items() if not name.startswith("_")}
            header[CONFIG_KEY] = json.dumps({CONTROL_NET: config})
            write_safetensors(path, tensors, header, dtype=dtype)
        else:
            with catch_disk_full(path), files.write_folder_atomically(path) as folder:
                write_safetensors(folder / WEIGHTS_NAME, tensors, header, dtype=dtype)
                network.save_config(folder)

    def report(self) -> list[str]:
        names = [
            name
            for name, parameter in self.modules[CONTROL_NET].named_parameters()
            if parameter.grad is None and not any(matches(pattern, name) for pattern in self.unread)
        ]
        return [f"{plural(len(names), 'weight')} got no gradient: {list_some(names)}"] if names else []
