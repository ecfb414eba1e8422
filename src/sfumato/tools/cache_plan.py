"""What `sfumato dataset cache` would do, before it does it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sfumato.config import Config
from sfumato.config.environment import read_launch
from sfumato.config.precision_rules import LOW_PRECISION
from sfumato.data.find.discover import find_data
from sfumato.data.plans import DataPlan
from sfumato.errors import Problems
from sfumato.families.base import Family
from sfumato.families.blueprint import Blueprint
from sfumato.families.detection import (
    describe_cached_encoders,
    describe_idle_choices,
    describe_model,
    read_size_steps,
    with_base_resolution,
)
from sfumato.families.references import check_reference_folders
from sfumato.methods import make_method
from sfumato.tools.ignored_options import describe_ignored_options
from sfumato.training.plan_report import dataset_lines

# The options that caching uses: all of these groups, and single ones of others.
CACHING_THEMES = ("run", "model", "dataset", "buckets", "captions", "images", "cache", "loader", "log")
CACHING_OPTIONS = ("mixed_precision", *LOW_PRECISION, "sample_prompts", "prompt_weighting")


def show_cache_plan(config: Config) -> None:
    """--plan: print what would be cached, and write nothing. Raises what filling would refuse."""
    plan = make_cache_plan(config, processes=read_launch().processes, remember=False)
    print("\n".join(cache_plan_lines(plan)), flush=True)


@dataclass(frozen=True, kw_only=True)
class CachePlan:
    """All that is known before any weight is read."""

    config: Config  # as it holds for the model
    family: type[Family]
    blueprint: Blueprint
    data: DataPlan


def make_cache_plan(config: Config, *, processes: int, remember: bool = True) -> CachePlan:
    """Read headers and folders; every fault of model and data is raised at once.

    remember: whether the dataset index is written.
    """
    problems = Problems()
    family, blueprint = None, None
    with problems.catch():
        family, blueprint = describe_model(config, with_cached=True)
        seeded = config.with_values({"seed": config.loop.seed or 0})
        blueprint = make_method(seeded).extend(family, blueprint)  # a ControlNet may read its images as latents
        family.load_tokenizers(blueprint, config.model)
    config = with_base_resolution(config, blueprint) if blueprint else config
    steps = read_size_steps(family)
    data = find_data(
        config,
        bucket_step=steps.bucket,
        size_step=steps.single,
        processes=processes,
        remember=remember,
        problems=problems,
    )
    if family is not None and blueprint is not None:
        check_reference_folders(family, blueprint.source, data, problems)
    problems.raise_all()
    assert family is not None
    assert blueprint is not None
    return CachePlan(config=config, family=family, blueprint=blueprint, data=data)


def cache_plan_lines(plan: CachePlan) -> Iterator[str]:
    """The datasets, the notes about them, and the options that caching ignores."""
    yield from dataset_lines(plan.config, plan.data)
    yield f"model: {plan.blueprint.source.name}, {plan.blueprint.title}"
    yield from (f"note: {note}" for note in describe_idle_choices(plan.config, plan.blueprint))
    yield from (f"note: {note}" for note in describe_cached_encoders(plan.config, plan.blueprint))
    yield from (f"note: {note}" for note in (*plan.config.notes, *plan.data.notes))
    yield from describe_ignored_options(plan.config, themes=CACHING_THEMES, options=CACHING_OPTIONS, purpose="caching")
