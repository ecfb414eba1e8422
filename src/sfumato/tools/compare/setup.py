"""From the options of a run and those of `sfumato compare` to what is compared; no weight is read."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sfumato.config import Config
from sfumato.config.prompts import Prompt, read_prompts
from sfumato.config.secrets import collect_secrets
from sfumato.data.find.prompt_images import check_prompt_images
from sfumato.errors import UserError
from sfumato.families.detection import describe_model
from sfumato.families.model_options import resolve_options
from sfumato.plan import with_seed
from sfumato.tools.compare.checkpoints import choose_some, find_checkpoints
from sfumato.tools.compare.compare import CompareRequest
from sfumato.tools.compare.data import (
    DEFAULT_PROMPTS,
    RunData,
    find_compared_data,
    list_held_out,
    make_caption_prompts,
    make_neutral_prompts,
    with_size,
)
from sfumato.track.console import configure_logging
from sfumato.track.report_charts import VALIDATION
from sfumato.track.report_curves import METRICS_SUFFIX, Curves
from sfumato.track.report_facts import DESCRIPTION_SUFFIX, EMPTY_DESCRIPTION, read_description

log = logging.getLogger(__name__)
CACHES = ("cache_latents", "cache_latents_to_disk", "cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk")


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """How a run is compared. prompts, neutral_prompts: files. steps, scale: of prompts that do not say them."""

    prompts: Path | None = None
    neutral_prompts: Path | None = None
    images_per_prompt: int = 2
    first_seed: int = 1
    steps: int | None = None
    scale: float | None = None
    max_checkpoints: int = 12
    held_out: Path | None = None
    notes: Sequence[str] = ()


def plan_comparison(config: Config, folder: Path, name: str, wanted: Wanted) -> CompareRequest:
    """Find checkpoints, data and prompts. UserError where there is nothing to compare."""
    configure_logging(config.log, secrets=collect_secrets(config))
    if wanted.held_out is not None:
        list_held_out(wanted.held_out)  # before an hour of images
    config = with_seed(config, 0)  # where it is not known it matters little
    config = config.with_values(dict.fromkeys(CACHES, False))  # few images are encoded, and nothing is written
    path = folder / f"{name}{DESCRIPTION_SUFFIX}"
    description = read_description(path) if path.is_file() else EMPTY_DESCRIPTION
    curves = Curves(folder / f"{name}{METRICS_SUFFIX}")
    curves.read()
    found = find_checkpoints(
        folder,
        name,
        steps_per_epoch=description["steps_per_epoch"],
        last_step=curves.last or description["total"],
        best_step=find_best_step(curves),
    )
    chosen = choose_some(found, wanted.max_checkpoints)
    notes = list(wanted.notes)
    if len(chosen) < len(found):
        notes.append(
            f"{len(chosen)} of {len(found)} checkpoints are compared; --max_checkpoints {len(found)} takes all."
        )
    family, blueprint = describe_model(config)
    config = resolve_options(config, family, blueprint.objective)
    data = find_compared_data(config, family)
    concept, neutral = find_prompts(config, data, wanted)
    check_prompt_images([*concept, *neutral], control=config.run.takes_control)
    seeds = range(wanted.first_seed, wanted.first_seed + wanted.images_per_prompt)
    for note in notes:
        log.info("%s", note)
    return CompareRequest(
        config=config,
        folder=folder,
        name=name,
        model=description["model"] or blueprint.title,
        checkpoints=chosen,
        data=data,
        concept=concept,
        neutral=neutral,
        seeds=seeds,
        held_out=wanted.held_out,
        notes=notes,
    )


def find_best_step(curves: Curves) -> int:
    """Of the lowest validation loss; the last step where there is none."""
    steps, losses = curves.xy(VALIDATION)
    return int(steps[losses.argmin()]) if len(losses) else curves.last


def find_prompts(config: Config, data: RunData, wanted: Wanted) -> tuple[list[Prompt], list[Prompt]]:
    """Those about the concept and the neutral ones, of the trained size where they have none."""
    path = wanted.prompts or config.samples.sample_prompts
    concept = read_prompts(path) if path else make_caption_prompts(data.training, DEFAULT_PROMPTS)
    if not concept:
        raise UserError(
            "there is no prompt: the run had none, and there are no captions",
            code="compare-without-prompts",
            fix="give --prompts FILE with a prompt in each line",
        )
    neutral = read_prompts(wanted.neutral_prompts) if wanted.neutral_prompts else make_neutral_prompts(data)
    defaults = {"sample_steps": wanted.steps, "scale": wanted.scale}
    given = {name: value for name, value in defaults.items() if value is not None}
    found = [[prompt.apply_defaults(given) for prompt in prompts] for prompts in (concept, neutral)]
    concept, neutral = (with_size(prompts, config, data) for prompts in found)
    return [*concept], [*neutral]
