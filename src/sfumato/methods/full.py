"""Full training: the model's own weights learn, those of the denoiser and, where asked for, of the text encoders.

Nothing is added to the model and nothing hooked; the output is the model's checkpoint, with everything that did not
train copied byte for byte from the file that the model came from.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.config import Config
from sfumato.data.batch import Extras, Tensors
from sfumato.errors import UserError
from sfumato.families.base import Blueprint, Family
from sfumato.families.folder import is_model_folder, save_folder
from sfumato.families.saving import Origin, averages, everything, save_single_file, size
from sfumato.formats.pickled import ENDINGS
from sfumato.methods.base import METHODS, Planned
from sfumato.methods.full_rates import Chosen, full_rates
from sfumato.optim.groups import ParameterGroup

log = logging.getLogger(__name__)


@METHODS.register("full")
class FullMethod:
    """`chosen` holds what trains; every other weight of the model stays as it was loaded."""

    kind = ""
    reader = "pretrained_model_name_or_path"

    def __init__(self, config: Config) -> None:
        self.config = config
        self.modules = nn.ModuleDict()
        self.live_text: frozenset[str] = frozenset()
        self.chosen: list[Chosen[nn.Parameter]] = []

    def plan(self, blueprint: Blueprint) -> list[Planned]:
        rates = full_rates(self.config, blueprint)
        self._check_text_cache(rates.parts, blueprint)
        check_output(self.config, blueprint, self.ending(blueprint))
        networks = [blueprint.networks[part] for part in rates.parts]
        found = [each for net in networks for each in rates.choose(net.spec, net.weights.shapes().items())]
        return [
            Planned(
                part=each.label,
                modules=len({name.rpartition(".")[0] for name in each.weights}),
                parameters=sum(shape.numel() for shape in each.weights.values()),
                learning_rate=each.rate,
            )
            for each in found
        ]

    def own_weights(self, blueprint: Blueprint) -> Collection[str]:
        return full_rates(self.config, blueprint).parts.keys()

    def prepare(self, model: Family) -> list[ParameterGroup]:
        model.freeze()
        rates = full_rates(self.config, model.blueprint)
        for name in rates.parts:
            part = model.parts[name]
            self.modules[name] = part.module.train()
            self.chosen += rates.choose(part.spec, part.module.named_parameters())
        for parameter in self._parameters().values():
            parameter.requires_grad_(True)
        self.origin = Origin.of(model.blueprint)
        outdated = averages(model.blueprint.source)
        if outdated and "denoiser" in rates.parts:
            log.info("%d tensors of a running average of the weights before training are not saved", len(outdated))
        self.live_text = frozenset(rates.parts) & frozenset(model.text_parts)
        return [
            ParameterGroup(name=each.label, parameters=list(each.weights.values()), learning_rate=each.rate)
            for each in self.chosen
        ]

    def caption(self, text: str) -> str:
        return text

    def before_step(self, step: int) -> None:
        """From --stop_text_encoder_training on, text encoders are read like any that never trained."""
        stop = self.config.full.stop_text_encoder_training
        if stop is not None and step >= stop and self.live_text:
            log.info("step %d: %s stays as it is from now on", step, " and ".join(sorted(self.live_text)))
            for part in self.live_text:
                self.modules[part].requires_grad_(False).eval()
            self.live_text = frozenset()

    def begin(self, model: Family, extras: Extras) -> None:
        pass

    def predict(self, model: Family, noisy: Tensor, t: Tensor, conditioning: Tensors, extras: Extras) -> Tensor:
        return model.predict(noisy, t, conditioning)

    def without(self) -> AbstractContextManager[None]:
        raise UserError(
            "diff_output_preservation, --preserve_reg_images and --masked_prior_preservation_weight hold samples to "
            "what the model said before training, but full training changes the model itself; it would take a second "
            "copy of every weight",
            fix="train an adapter, which can be switched off, or leave them out",
        )

    def after_step(self) -> Mapping[str, Tensor]:
        return {}

    def state(self) -> Tensors:
        return {name: parameter.detach() for name, parameter in self._parameters().items()}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        ours = self._parameters()
        if ours.keys() != state.keys():
            raise UserError("the state was saved with other parts or blocks in training", fix="start without --resume")
        for name, parameter in ours.items():
            parameter.copy_(state[name])

    def metadata(self) -> Mapping[str, Any]:
        names = ("train_text_encoder", "stop_text_encoder_training", "unet_lr", "text_encoder_lr", "block_lr")
        names += ("learning_rate_te", "learning_rate_te1", "learning_rate_te2")
        return {f"ss_{name}": self.config.value(name) for name in names if self.config.changed(name)}

    def output_bytes(self, blueprint: Blueprint, dtype: torch.dtype | None) -> int:
        trained = torch.bfloat16 if self.config.memory.full_bf16 else torch.float32
        return size(blueprint, self.own_weights(blueprint), dtype, trained)

    def ending(self, blueprint: Blueprint) -> str:
        return "" if self._as_folder(blueprint) else ENDINGS.get(self.config.save.save_model_as or "", ".safetensors")

    def write(self, model: Family, path: Path, metadata: Mapping[str, str], dtype: torch.dtype | None) -> None:
        save = save_folder if self._as_folder(model.blueprint) else save_single_file
        lost = self.origin.changed()
        if lost:
            log.warning("%s is not what it was when training began; the save is made from memory alone", lost[0])
            save(model, path, metadata, dtype, changed=everything(model), from_memory=True)
        else:
            save(model, path, metadata, dtype, changed=self._changed())

    def report(self) -> list[str]:
        idle = [name for name, parameter in self._parameters().items() if parameter.grad is None]
        return [f"{len(idle)} weights got no gradient: {', '.join(idle[:5])}"] if idle else []

    def _as_folder(self, blueprint: Blueprint) -> bool:
        """Whether whole models are saved as folders; those that came as one are, unless the user says otherwise."""
        wanted = self.config.save.save_model_as
        if wanted is None:
            return blueprint.source.is_folder and blueprint.pipeline is not None
        if wanted in ("diffusers", "diffusers_safetensors") and blueprint.pipeline is None:
            raise UserError(
                f"--save_model_as {wanted}: models of this kind are saved as one file",
                fix="--save_model_as safetensors",
            )
        return wanted in ("diffusers", "diffusers_safetensors")

    def _changed(self) -> dict[str, set[str]]:
        """Names of the weights of each part that are no longer what the file says."""
        changed: dict[str, set[str]] = {part: set() for part in self.modules}
        for each in self.chosen:
            changed[each.part].update(each.weights)
        return changed

    def _parameters(self) -> dict[str, nn.Parameter]:
        """Everything that trains, by part and name."""
        return {f"{each.part}.{name}": weight for each in self.chosen for name, weight in each.weights.items()}

    def _check_text_cache(self, parts: Collection[str], blueprint: Blueprint) -> None:
        if self.config.cache.cache_text_encoder_outputs and set(parts) >= set(blueprint.text_parts):
            raise UserError(
                "--cache_text_encoder_outputs has nothing to keep: every text encoder trains, so its output changes",
                fix="leave one of --cache_text_encoder_outputs and --train_text_encoder out",
            )


def check_output(config: Config, blueprint: Blueprint, ending: str) -> None:
    """Nothing that a save would take the place of may be the source, which is read at each save, or foreign."""
    source, folder, name = blueprint.source.path.resolve(), config.save.output_dir, config.save.output_name
    if folder is None:
        return
    pattern = re.compile(rf"{re.escape(name)}(-\d+|-step\d+|-best)?(-ema[\d.]*)?{re.escape(ending)}")
    if source.parent == folder.resolve() and pattern.fullmatch(source.name):
        raise UserError(
            f"the saved model would take the place of {source.name}, the one that training starts from",
            fix="give another --output_name or --output_dir",
        )
    there = sorted(folder.iterdir()) if ending == "" and folder.is_dir() else []
    foreign = [each for each in there if pattern.fullmatch(each.name) and not is_model_folder(each)]
    if foreign:
        raise UserError(
            f"the saved model would take the place of {foreign[0]}, which holds something else",
            fix="give another --output_name or --output_dir",
        )
