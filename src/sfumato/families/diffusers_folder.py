"""Saves a model as a folder in diffusers' layout, from such a folder or from a single file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from sfumato.common import files
from sfumato.families import checkpoint_saving
from sfumato.families._tokenizers import save_tokenizer
from sfumato.families.base import Family
from sfumato.families.blueprint import Component, Pipeline
from sfumato.families.checkpoint_saving import ChangedWeights, WatchEntries
from sfumato.families.source import MODEL_INDEX, read_json
from sfumato.formats.checkpoint_writer import catch_disk_full
from sfumato.formats.shards import INDEX_NAME, WEIGHT_ENDINGS


def save_folder(
    model: Family,
    path: Path,
    metadata: Mapping[str, str],
    dtype: torch.dtype | None = None,
    *,
    changed: ChangedWeights,
    from_memory: bool = False,
    watch: WatchEntries | None = None,
) -> None:
    """Save the whole model, the metadata in the denoiser's file. The arguments are those of `save_single_file`.

    From a folder, everything but weights is copied; other networks in it, e.g. a safety checker, are skipped. From a
    single file, configurations and tokenizers are written.
    """
    pipeline = model.blueprint.pipeline
    assert pipeline is not None, "callers check the blueprint"
    copied = model.blueprint.source.is_folder and not from_memory
    with catch_disk_full(path), files.write_folder_atomically(path) as folder:
        index = dict(_copy_others(model, folder, pipeline) if copied else _write_others(model, folder, pipeline))
        for name, component in pipeline.networks.items():
            if from_memory and name not in changed:
                continue
            place, own = folder / component.folder, copied and _is_own(model, name)
            header = {**metadata, "format": "pt"} if name == "denoiser" else {"format": "pt"}
            entries, file = _iterate_weights(model, name, component, changed, own=own), _name_weight_file(model, name)
            entries = watch(path / component.folder / file, entries, dtype) if watch else entries
            checkpoint_saving.write_entries(place / file, entries, header, dtype)
            if not own:
                _write_config(model, name, place)
            index[component.folder] = _get_class(model.parts[name].module)
        content = json.dumps(_make_index(pipeline, index), indent=2, sort_keys=True)
        files.write_text(folder / MODEL_INDEX, content + "\n")
    checkpoint_saving.close_files(model.blueprint)


def is_model_folder(path: Path) -> bool:
    return (path / MODEL_INDEX).is_file()


def _iterate_weights(
    model: Family, name: str, component: Component, changed: ChangedWeights, *, own: bool
) -> checkpoint_saving.TensorEntries:
    """A network's tensors under the keys of the folder that it came from, else under those of the layout."""
    names = frozenset(changed.get(name, ()))
    if own:
        yield from checkpoint_saving.iterate_stored(model.blueprint.networks[name].weights.file)
        yield from checkpoint_saving.iterate_changed(model, name, names)
    else:
        yield from checkpoint_saving.iterate_converted(model, name, names, "", component.key_map)


def _is_own(model: Family, name: str) -> bool:
    """Whether a network's weights are inside the folder that the model came from."""
    source = model.blueprint.source
    return source.is_folder and source.path in model.blueprint.networks[name].weights.file.header.path.parents


def _copy_others(model: Family, folder: Path, pipeline: Pipeline) -> Iterator[tuple[str, Any]]:
    """Copy the components that are not networks, and the configurations; yields their entries of the index."""
    source = model.blueprint.source.path
    networks = {component.folder: name for name, component in pipeline.networks.items()}
    for name, entry in read_json(source / MODEL_INDEX).items():
        inside = source / name
        if not inside.is_dir():
            if not isinstance(entry, list):
                yield name, entry
        elif name in networks:
            if _is_own(model, networks[name]):
                shutil.copytree(inside, folder / name, ignore=_select_weight_files)
        elif not _select_weight_files(str(inside), [file.name for file in inside.iterdir()]):
            shutil.copytree(inside, folder / name)
            yield name, entry
    _write_objective(model, folder / "scheduler" / "scheduler_config.json")
    for extra in ("README.md", "LICENSE.md"):
        if (source / extra).is_file():
            shutil.copy(source / extra, folder / extra)


def _write_objective(model: Family, path: Path) -> None:
    """Update the scheduler's configuration to what the model was trained to predict."""
    if path.is_file():
        options = model.objective.scheduler_options()
        changing = ("prediction_type", "rescale_betas_zero_snr", "timestep_spacing")
        changed = {name: options[name] for name in changing if name in options}
        files.write_text(path, json.dumps(read_json(path) | changed, indent=2) + "\n")


def _select_weight_files(_: str, names: list[str]) -> set[str]:
    return {name for name in names if name.endswith(WEIGHT_ENDINGS) or INDEX_NAME.fullmatch(name)}


def _write_others(model: Family, folder: Path, pipeline: Pipeline) -> Iterator[tuple[str, Any]]:
    """Write a scheduler and tokenizers; yields their entries of the index."""
    import diffusers

    options = {**model.objective.scheduler_options(), **pipeline.scheduler_options}
    scheduler = getattr(diffusers, pipeline.scheduler)  # its modules load what they hold when it is asked for
    scheduler(**options).save_pretrained(folder / "scheduler")
    yield "scheduler", ["diffusers", pipeline.scheduler]
    for name, part in zip(pipeline.tokenizers, model.text_parts, strict=True):
        tokenizer = model.tokenizers[part]
        save_tokenizer(tokenizer, folder / name)
        yield name, ["transformers", type(tokenizer).__name__]


def _make_index(pipeline: Pipeline, rest: Mapping[str, Any]) -> dict[str, Any]:
    import diffusers

    absent: dict[str, Any] = {name: [None, None] for name in pipeline.absent}
    about = {"_class_name": pipeline.name, "_diffusers_version": diffusers.__version__}
    return {**about, **absent, **pipeline.options, **rest}


def _name_weight_file(model: Family, name: str) -> str:
    library, _ = _get_class(model.parts[name].module)
    return ("diffusion_pytorch_model" if library == "diffusers" else "model") + ".safetensors"


def _get_class(module: Any) -> list[str]:
    """[library, class] of a network, its entry in the index."""
    return [type(module).__module__.partition(".")[0], type(module).__name__]


def _write_config(model: Family, name: str, place: Path) -> None:
    """A network's config.json, as its library writes it."""
    module: Any = model.parts[name].module
    if _get_class(module)[0] == "diffusers":
        module.save_config(place)
        return
    config = json.loads(module.config.to_json_string(use_diff=False))
    files.write_text(place / "config.json", json.dumps({**config, "architectures": [type(module).__name__]}, indent=2))
