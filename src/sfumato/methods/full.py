"""Full training: trains the model's own weights, those of the denoiser and, on request, of the text encoders.

Nothing is added to the model and nothing hooked; the output is the model's checkpoint, with everything that did not
train copied byte for byte from the file that the model came from. A text encoder that trains and has a file of its own
is saved beside it in the same way.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.common.text import list_some, plural
from sfumato.config import Config
from sfumato.data.batch import Extras, Tensors
from sfumato.errors import UserError
from sfumato.families.base import Family
from sfumato.families.blueprint import Blueprint
from sfumato.families.checkpoint_saving import (
    SourceFiles,
    count_saved_bytes,
    find_ema_keys,
    list_all_weights,
    list_saved_networks,
    save_network_file,
    save_single_file,
)
from sfumato.families.diffusers_folder import is_model_folder, save_folder
from sfumato.formats.keymap import matches
from sfumato.formats.pickled import get_file_suffix
from sfumato.methods.base import METHODS, PlanNotes, TrainablePart
from sfumato.methods.full_learning_rates import TrainedWeights, read_full_learning_rates
from sfumato.methods.trained_parts import check_text_cache, describe_text_encoder_lr, get_trained_dtype
from sfumato.optim.groups import ParameterGroup

log = logging.getLogger(__name__)
MODEL = "model"  # the model's own output, beside those of text encoders


@METHODS.register("full")
class FullMethod:
    """`trained` holds the weights that train; every other weight of the model stays as it was loaded."""

    modelspec_suffix = ""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.modules = nn.ModuleDict()
        self.live_text: frozenset[str] = frozenset()
        self.trained: list[TrainedWeights[nn.Parameter]] = []
        self.unread: list[str] = []  # patterns on weights that the model's features do not depend on

    def extend(self, family: type[Family], blueprint: Blueprint) -> Blueprint:
        return blueprint

    def plan(self, blueprint: Blueprint) -> list[TrainablePart]:
        learning_rates = read_full_learning_rates(self.config, blueprint)
        fix = "remove --cache_text_encoder_outputs or --train_text_encoder"
        check_text_cache(self.config, learning_rates.parts, blueprint, fix)
        self.live_text = frozenset(learning_rates.parts) & frozenset(blueprint.text_parts)
        check_output_paths(self.config, blueprint, self.file_suffixes(blueprint))
        check_saved_networks(blueprint, self._list_inside(blueprint))
        parts: list[TrainablePart] = []
        for name in learning_rates.parts:
            network = blueprint.networks[name]
            for trained in learning_rates.select_weights(network.spec, network.weights.read_shapes().items()):
                modules = {weight.rpartition(".")[0] for weight in trained.weights}
                parts.append(
                    TrainablePart(
                        part=trained.label,
                        modules=len(modules),
                        parameters=sum(shape.numel() for shape in trained.weights.values()),
                        learning_rate=trained.learning_rate,
                    )
                )
        return parts

    def list_notes(self, blueprint: Blueprint) -> PlanNotes:
        optim, parts = self.config.optim, read_full_learning_rates(self.config, blueprint).parts
        return PlanNotes(tuple(describe_text_encoder_lr(optim, blueprint.text_lr_order, parts)))

    def full_precision_parts(self, blueprint: Blueprint) -> Collection[str]:
        return read_full_learning_rates(self.config, blueprint).parts.keys()

    def change_frozen(self, model: Family) -> None:
        pass

    def prepare(self, model: Family) -> list[ParameterGroup]:
        learning_rates = read_full_learning_rates(self.config, model.blueprint)
        for name in learning_rates.parts:
            part = model.parts[name]
            self.modules[name] = part.module.train()
            self.unread += [f"{name}.{layers}" for layers in model.unread_layers(name)]
            self.trained += learning_rates.select_weights(part.spec, part.module.named_parameters())
        for parameter in self._parameters().values():
            parameter.requires_grad_(True)
        beside = self._list_beside(model.blueprint)
        self.origins = {network: SourceFiles.record(model.blueprint, [network]) for network in beside}
        self.origins[MODEL] = SourceFiles.record(model.blueprint, self._list_inside(model.blueprint))
        outdated = find_ema_keys(model.blueprint.source)
        if outdated and "denoiser" in learning_rates.parts:
            log.info("%d tensors of the EMA of the weights before training are not saved", len(outdated))
        groups: list[ParameterGroup] = []
        for trained in self.trained:
            weights = list(trained.weights.values())
            groups.append(ParameterGroup(name=trained.label, parameters=weights, learning_rate=trained.learning_rate))
        return groups

    def rewrite_caption(self, text: str) -> str:
        return text

    def before_step(self, step: int) -> None:
        """Freeze the text encoders at --stop_text_encoder_training."""
        stop = self.config.full.stop_text_encoder_training
        if stop is not None and step >= stop and self.live_text:
            log.info("step %d: %s stops training", step, " and ".join(sorted(self.live_text)))
            for part in self.live_text:
                self.modules[part].requires_grad_(False).eval()
            self.live_text = frozenset()

    def set_batch(self, model: Family, extras: Extras) -> None:
        pass

    def predict(self, model: Family, noisy: Tensor, t: Tensor, conditioning: Tensors, extras: Extras) -> Tensor:
        return model.predict(noisy, t, conditioning, extras.images)

    def disabled(self) -> AbstractContextManager[None]:
        raise UserError(
            "diff_output_preservation, --preserve_reg_images and --masked_prior_preservation_weight need the "
            "predictions of the model before training, but full training changes the model itself; a reference model "
            "would be a second copy of every weight",
            code="full-training-without-reference",
            fix="train an adapter, which can be disabled, or remove these options",
        )

    def sampling(self) -> AbstractContextManager[None]:
        return nullcontext()

    def list_frozen(self) -> Sequence[nn.Module]:
        return ()

    def list_generate_options(self, file: str, blueprint: Blueprint) -> Mapping[str, object]:
        if not file:
            return {}
        beside = {option: name_beside(file, option) for option in self._list_beside(blueprint).values()}
        return {"pretrained_model_name_or_path": file, **beside}

    def after_step(self) -> Mapping[str, Tensor]:
        return {}

    def state_dict(self) -> Tensors:
        state: Tensors = {}
        for part, module in self.modules.items():
            state |= {f"{part}.{name}": weight for name, weight in module.state_dict().items()}
        return {name: state[name] for name in self._parameters()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        ours = self._parameters()
        if ours.keys() != state.keys():
            raise UserError(
                "the state was saved with other parts or blocks in training",
                code="state-of-other-parts",
                fix="start without --resume",
            )
        for name, parameter in ours.items():
            parameter.copy_(state[name])

    def metadata(self) -> Mapping[str, Any]:
        names = ("train_text_encoder", "stop_text_encoder_training", "unet_lr", "text_encoder_lr", "block_lr")
        names += ("learning_rate_te", "learning_rate_te1", "learning_rate_te2", "learning_rate_te3", "train_t5xxl")
        names += ("num_last_block_to_freeze",)
        return {f"ss_{name}": self.config.value(name) for name in names if self.config.is_changed(name)}

    def output_bytes(self, blueprint: Blueprint, dtype: torch.dtype | None) -> int:
        trained, parts = get_trained_dtype(self.config.memory), self.full_precision_parts(blueprint)
        networks = (*self._list_inside(blueprint), *self._list_beside(blueprint))
        return count_saved_bytes(blueprint, networks, parts, dtype, trained)

    def file_suffixes(self, blueprint: Blueprint) -> Sequence[str]:
        if self._saves_folder(blueprint):
            return ("",)
        suffix = get_file_suffix(self.config.save.save_model_as)
        return (suffix, *(name_beside(suffix, option) for option in self._list_beside(blueprint).values()))

    def write(self, model: Family, path: Path, metadata: Mapping[str, str], dtype: torch.dtype | None) -> None:
        trained = self._list_changed()
        for network, option in self._list_beside(model.blueprint).items():
            lost = self._find_lost(network, [network])
            place = path.with_name(name_beside(path.name, option))
            save_network_file(model, network, place, dtype, changed=trained[network], from_memory=lost)
        save = save_folder if self._saves_folder(model.blueprint) else save_single_file
        kept = list_all_weights(model, self._list_inside(model.blueprint))
        lost = self._find_lost(MODEL, kept)
        save(model, path, metadata, dtype, changed=kept if lost else trained, from_memory=lost)

    def report(self) -> list[str]:
        names = [
            name
            for name, parameter in self._parameters().items()
            if parameter.grad is None and not any(matches(pattern, name) for pattern in self.unread)
        ]
        return [f"{plural(len(names), 'weight')} got no gradient: {list_some(names)}"] if names else []

    def _find_lost(self, output: str, kept: Iterable[str]) -> bool:
        """Whether the files that an output copies from have changed; a warning then. kept: the networks in memory."""
        changed = self.origins[output].find_changed()
        if changed:
            log.warning(
                "%s has changed since training began; of the model, what is in memory is saved: %s",
                changed[0],
                ", ".join(kept),
            )
        return bool(changed)

    def _list_inside(self, blueprint: Blueprint) -> Sequence[str]:
        """The networks that a saved model contains."""
        if self._saves_folder(blueprint):
            assert blueprint.pipeline is not None
            return [name for name in blueprint.networks if name in blueprint.pipeline.networks]
        return list_saved_networks(blueprint)

    def _list_beside(self, blueprint: Blueprint) -> dict[str, str]:
        """Of the parts that train and that it does not contain the options that name their files."""
        inside, parts = self._list_inside(blueprint), self.full_precision_parts(blueprint)
        return {part: blueprint.networks[part].option for part in parts if part not in inside}

    def _saves_folder(self, blueprint: Blueprint) -> bool:
        """Whether models are saved as folders: as --save_model_as says, else where the source is one."""
        save_model_as = self.config.save.save_model_as
        if save_model_as is None:
            return blueprint.source.is_folder and blueprint.pipeline is not None
        if save_model_as in ("diffusers", "diffusers_safetensors") and blueprint.pipeline is None:
            raise UserError(
                f"--save_model_as {save_model_as}: models of this kind are saved as one file",
                code="model-folder-unsupported",
                fix="--save_model_as safetensors",
            )
        return save_model_as in ("diffusers", "diffusers_safetensors")

    def _list_changed(self) -> dict[str, set[str]]:
        """Part -> names of the weights that differ from the source file."""
        changed: dict[str, set[str]] = {part: set() for part in self.modules}
        for trained in self.trained:
            changed[trained.part].update(trained.weights)
        return changed

    def _parameters(self) -> dict[str, nn.Parameter]:
        """Everything that trains, by part and name."""
        parameters: dict[str, nn.Parameter] = {}
        for trained in self.trained:
            for name, weight in trained.weights.items():
                parameters[f"{trained.part}.{name}"] = weight
        return parameters


def check_saved_networks(blueprint: Blueprint, networks: Iterable[str]) -> None:
    """Raise UserError where a save would copy one of these networks whose file is not here."""
    for name in networks:
        if name in blueprint.cached_parts:
            raise blueprint.networks[name].make_absent_error(f"{name} is part of the model that is saved")


def name_beside(file: str, option: str) -> str:
    """x_clip_l.safetensors of x.safetensors, as sd-scripts names the file of a text encoder. option: clip_l."""
    start, dot, suffix = file.rpartition(".")
    return f"{start}_{option}{dot}{suffix}"


def check_output_paths(config: Config, blueprint: Blueprint, suffixes: Sequence[str]) -> None:
    """Raise UserError where a save would replace a source, which every save reads, or something that is no model."""
    folder, name = config.save.output_dir, config.save.output_name
    if folder is None:
        return
    ends = "|".join(re.escape(suffix) for suffix in suffixes)
    pattern = re.compile(rf"{re.escape(name)}(-\d+|-step\d+|-best)?(-ema[\d.]*)?({ends})")
    sources = {blueprint.source.path}
    for network in blueprint.networks.values():
        sources.update(network.weights.file.paths())
    for source in sorted(source.resolve() for source in sources):
        if source.parent == folder.resolve() and pattern.fullmatch(source.name):
            raise UserError(
                f"the saved model would replace {source.name}, which training starts from",
                code="output-replaces-source",
                fix="give another --output_name or --output_dir",
            )
    existing = sorted(folder.iterdir()) if "" in suffixes and folder.is_dir() else []
    for path in existing:
        if pattern.fullmatch(path.name) and not is_model_folder(path):
            raise UserError(
                f"the saved model would replace {path}, which is no model",
                code="output-replaces-other",
                fix="give another --output_name or --output_dir",
            )
