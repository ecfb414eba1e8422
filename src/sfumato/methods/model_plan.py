"""What of a run depends on the checkpoint's headers alone: family, options as they hold for it, and what trains."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from sfumato.config import Config
from sfumato.config.output_rules import samples_enabled
from sfumato.config.prompts import read_prompts
from sfumato.data.find.prompt_images import check_prompt_images
from sfumato.data.plans import DataPlan
from sfumato.errors import Problems
from sfumato.families.base import Family
from sfumato.families.blueprint import Blueprint
from sfumato.families.detection import (
    describe_cached_encoders,
    describe_idle_choices,
    describe_model,
    with_base_resolution,
)
from sfumato.families.model_options import (
    check_objective_options,
    describe_further_options,
    describe_idle_options,
    read_base_resolution,
    resolve_options,
)
from sfumato.families.references import check_pairs, check_reference_folders, describe_references
from sfumato.methods import make_method
from sfumato.methods.base import Method, TrainablePart
from sfumato.methods.leco import cache_prompts
from sfumato.methods.new_words import check_words_are_new, check_words_in_captions, describe_init_words


class ModelPlan(NamedTuple):
    """What of a run depends on the checkpoint's headers alone."""

    config: Config  # as it holds for this model
    family: type[Family]
    blueprint: Blueprint
    method: Method
    parts: tuple[TrainablePart, ...]
    notes: tuple[str, ...]  # errors with --strict
    remarks: tuple[str, ...]  # facts that are no fault


def plan_model(config: Config, problems: Problems) -> ModelPlan:
    """Find the family, describe the checkpoint, ask the method what will train."""
    family, blueprint = describe_model(config, with_cached=True)
    notes = (
        *blueprint.notes,
        *describe_idle_choices(config, blueprint),
        *describe_idle_options(config, family, blueprint.objective),
        *dropout_notes(config, family, blueprint),
    )
    remarks = (
        *blueprint.declared,
        *describe_cached_encoders(config, blueprint),
        *describe_further_options(config, family, blueprint.objective),
    )
    config = resolve_options(config, family, blueprint.objective)
    check_objective_options(config, blueprint.objective, problems)
    init_notes: list[str] = []
    with problems.catch():
        tokenizers = family.load_tokenizers(blueprint, config.model)
        check_words_are_new(config, tokenizers, problems)
        init_notes = describe_init_words(config, tokenizers)
    config = with_base_resolution(config, blueprint)
    if config.leco.prompts_file:
        config = cache_prompts(config)
    method = make_method(config)
    blueprint = method.extend(family, blueprint)
    parts = tuple(method.plan(blueprint))
    for part in method.live_text.intersection(blueprint.cached_parts):
        problems.found.append(blueprint.networks[part].make_absent_error(f"{part} trains"))
    said = method.list_notes(blueprint)
    notes, remarks = (*notes, *said.notes), (*remarks, *said.remarks, *init_notes)
    for note in notes if config.log.strict else ():
        problems.add(note, code="checkpoint-note-strict")
    return ModelPlan(config, family, blueprint, method, parts, notes, remarks)


def check_data(model: ModelPlan, data: DataPlan, problems: Problems) -> None:
    """Add a problem for what the data has and the model does not take, and for images of prompts."""
    if model.config.run.has_pairs:
        check_pairs(data, problems)
    else:
        check_reference_folders(model.family, model.blueprint.source, data, problems)
    check_words_in_captions(model.config, data, problems)
    check_inpainting(model, data, problems)
    if model.config.samples.sample_prompts is not None and samples_enabled(model.config):
        with problems.catch():
            prompts = read_prompts(model.config.samples.sample_prompts)
            check_prompt_images(prompts, control=model.config.run.takes_control)


def check_inpainting(model: ModelPlan, data: DataPlan, problems: Problems) -> None:
    """Add a problem where the options and the checkpoint do not agree on inpainting, or cached latents prevent it."""
    config, inpaints = model.config, model.blueprint.inpaints
    if config.dataset.train_inpainting and not inpaints:
        problems.add(
            f"--train_inpainting: {model.blueprint.source.name} takes no mask",
            code="inpainting-model-missing",
            fix="give a checkpoint for inpainting, whose denoiser sees a mask, or remove it",
        )
    if inpaints and config.run.has_pairs:
        problems.add(
            f"{model.blueprint.source.name} is for inpainting, and pairs of images are for plain models",
            code="inpainting-with-pairs",
            fix="start from the plain text-to-image checkpoint",
        )
    if inpaints and config.run.takes_control:
        problems.add(
            f"{model.blueprint.source.name} is for inpainting, and control networks are trained for plain models",
            code="inpainting-with-control-images",
            fix="start from the plain text-to-image checkpoint",
        )
    unmasked = find_unmasked(data) if inpaints and config.cache.cache_latents else None
    if unmasked is not None:
        problems.add(
            f"--cache_latents: {unmasked} has no mask of its own, and masks that are drawn need the image",
            code="inpainting-with-cached-latents",
            fix="remove --cache_latents, or give every image a mask: --masked_loss and --conditioning_data_dir",
        )


def find_unmasked(data: DataPlan) -> str | None:
    """The path of the first image that has neither a mask file nor is asked for its alpha channel."""
    for _, subset, item in data.iterate_used():
        rules = subset.settings.images
        if not rules.alpha_mask and not (rules.masked_loss and item.conditioning is not None):
            return item.image.path
    return None


def describe_data(model: ModelPlan, data: DataPlan) -> Iterator[str]:
    """Lines about what the model makes of the data."""
    yield from describe_resolution(model, data)
    yield from describe_references(model.family, data)
    if model.blueprint.inpaints and not model.config.dataset.train_inpainting:
        yield "the checkpoint is one for inpainting: it sees a mask, drawn at random, and the masked image"


def describe_resolution(model: ModelPlan, data: DataPlan) -> Iterator[str]:
    """A line where the checkpoint's own resolution is used, and one where training has another."""
    base = read_base_resolution(model.blueprint)
    if base is None:
        return
    name, size = model.blueprint.source.name, "x".join(map(str, base))
    used = [dataset.settings.resolution for dataset in data.datasets]
    if model.config.source("resolution") == "default" and base in used:
        yield f"{name} declares a resolution of {size}, which is used (--resolution: another)"
    elif all(width * height != base[0] * base[1] for width, height in used):
        yield f"{name} declares a resolution of {size}; no dataset has it"


def dropout_notes(config: Config, family: type[Family], blueprint: Blueprint) -> Iterator[str]:
    """Dropout rates of text encoders that this checkpoint does not have."""
    for option, part in ((f"{part}_dropout_rate", part) for part in config.captions.text_dropout):
        if option in family.options and part not in blueprint.text_parts:
            yield f"--{option} has no effect: there is no text encoder {part}"
