"""A model as a folder in diffusers' layout, whether it came from one or from a single file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from sfumato.common import files
from sfumato.families import saving as _saving
from sfumato.families._tokenizers import save_tokenizer
from sfumato.families.base import Component, Family, Pipeline
from sfumato.families.saving import Changed
from sfumato.families.source import read_json
from sfumato.formats.checkpoint import room_for

INDEX = "model_index.json"
WEIGHTS = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".onnx", ".onnx_data", ".h5", ".index.json")


def save_folder(
    model: Family,
    path: Path,
    metadata: Mapping[str, str],
    dtype: torch.dtype | None = None,
    *,
    changed: Changed,
    from_memory: bool = False,
) -> None:
    """The whole model; the metadata stands in the denoiser's file. The arguments are those of `save_single_file`.

    From a folder, everything but weights is copied, and what the folder has beside the model's own networks (a safety
    checker) is left out. From a single file, it is written anew.
    """
    pipeline = model.blueprint.pipeline
    assert pipeline is not None, "the blueprint is asked before"
    copied = model.blueprint.source.is_folder and not from_memory
    with room_for(path), files.atomic_folder(path) as folder:
        index = dict(_copied(model, folder, pipeline) if copied else _new(model, folder, pipeline))
        for name, component in pipeline.networks.items():
            place, own = folder / component.folder, copied and _is_own(model, name)
            facts = {**metadata, "format": "pt"} if name == "denoiser" else {"format": "pt"}
            entries = _entries(model, name, component, changed, own=own)
            _saving.write(place / _weight_name(model, name), entries, facts, dtype)
            if not own:
                _write_config(model, name, place)
            index[component.folder] = _class_of(_saving.module_of(model, name))
        files.write_text(folder / INDEX, json.dumps(_index(pipeline, index), indent=2, sort_keys=True) + "\n")
    _saving.close(model.blueprint)


def is_model_folder(path: Path) -> bool:
    return (path / INDEX).is_file()


def _entries(model: Family, name: str, component: Component, changed: Changed, *, own: bool) -> _saving.Entries:
    """A network's weights under the keys of the folder that it came from, else under those of the layout."""
    names = frozenset(changed.get(name, ()))
    if own:
        yield from _saving.stored(model.blueprint.networks[name].weights.file)
        yield from _saving.renewed(model, name, names)
    else:
        yield from _saving.rewritten(model, name, names, "", component.key_map)


def _is_own(model: Family, name: str) -> bool:
    """Whether a network's weights lie inside the folder that the model came from."""
    source = model.blueprint.source
    return source.is_folder and source.path in model.blueprint.networks[name].weights.file.header.path.parents


def _copied(model: Family, folder: Path, pipeline: Pipeline) -> Iterator[tuple[str, Any]]:
    """Copy everything but weights of the components that are not networks; gives their entries of the index."""
    source = model.blueprint.source.path
    networks = {component.folder: name for name, component in pipeline.networks.items()}
    for name, entry in read_json(source / INDEX).items():
        inside = source / name
        if not inside.is_dir():
            if not isinstance(entry, list):
                yield name, entry
        elif name in networks:
            if _is_own(model, networks[name]):
                shutil.copytree(inside, folder / name, ignore=_weights)
        elif not _weights(str(inside), [each.name for each in inside.iterdir()]):
            shutil.copytree(inside, folder / name)
            yield name, entry
    _tell_objective(model, folder / "scheduler" / "scheduler_config.json")
    for extra in ("README.md", "LICENSE.md"):
        if (source / extra).is_file():
            shutil.copy(source / extra, folder / extra)


def _tell_objective(model: Family, path: Path) -> None:
    """The scheduler must know what the model was trained to predict, which may be news."""
    if path.is_file():
        options = model.objective.scheduler_options()
        known = ("prediction_type", "rescale_betas_zero_snr", "timestep_spacing")
        news = {name: options[name] for name in known if name in options}
        files.write_text(path, json.dumps(read_json(path) | news, indent=2) + "\n")


def _weights(_: str, names: list[str]) -> set[str]:
    return {name for name in names if name.endswith(WEIGHTS)}


def _new(model: Family, folder: Path, pipeline: Pipeline) -> Iterator[tuple[str, Any]]:
    """Write a scheduler and tokenizers; gives their entries of the index."""
    import diffusers

    options = {**model.objective.scheduler_options(), **pipeline.scheduler_options}
    vars(diffusers.schedulers)[pipeline.scheduler](**options).save_pretrained(folder / "scheduler")
    yield "scheduler", ["diffusers", pipeline.scheduler]
    for name, tokenizer in zip(pipeline.tokenizers, model.tokenizers_in_order(), strict=True):
        save_tokenizer(tokenizer, folder / name)
        yield name, ["transformers", type(tokenizer).__name__]


def _index(pipeline: Pipeline, rest: Mapping[str, Any]) -> dict[str, Any]:
    import diffusers

    absent: dict[str, Any] = {name: [None, None] for name in pipeline.absent}
    told = {"_class_name": pipeline.name, "_diffusers_version": diffusers.__version__}
    return {**told, **absent, **pipeline.options, **rest}


def _weight_name(model: Family, name: str) -> str:
    library, _ = _class_of(_saving.module_of(model, name))
    return ("diffusion_pytorch_model" if library == "diffusers" else "model") + ".safetensors"


def _class_of(module: Any) -> list[str]:
    """[library, class] as the index names a network."""
    return [type(module).__module__.partition(".")[0], type(module).__name__]


def _write_config(model: Family, name: str, place: Path) -> None:
    """A network's config.json, as its library writes it."""
    module: Any = _saving.module_of(model, name)
    if _class_of(module)[0] == "diffusers":
        module.save_config(place)
        return
    config = json.loads(module.config.to_json_string(use_diff=False))
    files.write_text(place / "config.json", json.dumps({**config, "architectures": [type(module).__name__]}, indent=2))
