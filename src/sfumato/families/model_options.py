"""The options of a run as they hold for its model: what the checkpoint declares, and what the family does not read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from sfumato.config import Config
from sfumato.config.noise_rules import ON_NOISE, ON_V, SAMPLERS_NEEDING_SIGNAL
from sfumato.config.schema import vocabulary
from sfumato.diffusion.objective import Objective, RectifiedFlow, VariancePreserving
from sfumato.diffusion.weightings import SCHEMES
from sfumato.errors import Problems, UserError
from sfumato.families.base import FAMILIES, Family
from sfumato.families.blueprint import Blueprint
from sfumato.families.source import Source

# What sd-scripts ignores on models of rectified flow, but for what the script of a family reads.
NOISE_AND_WEIGHTS = frozenset(
    {"min_snr_gamma", "noise_offset", "noise_offset_random_strength", "adaptive_noise_scale"}
    | {"multires_noise_iterations", "multires_noise_discount", "ip_noise_gamma", "ip_noise_gamma_random_strength"}
)
FORMULA_THEMES = ("noise", "loss")  # whose options act on any objective unless they are taken out
TIMESTEP_LIMITS = frozenset({"min_timestep", "max_timestep"})  # whoever asks for a range gets it
NEUTRAL = {"max_timestep": 1000, "clip_skip": 1}  # option -> the value that asks for nothing, beside 0
NETWORK_FOLDERS = ("unet", "transformer")


def resolve_options(config: Config, family: type[Family], objective: Objective) -> Config:
    """The config with the checkpoint's own prediction and schedule, and without formulas that do not act on it."""
    known = vocabulary()
    idle = [name for name in list_idle_options(config, family) if known[name].theme in FORMULA_THEMES]
    values: dict[str, Any] = {
        name: known[name].default for name in (*idle, *list_dropped_options(config, family, objective))
    }
    if isinstance(objective, VariancePreserving):
        values["v_parameterization"] = objective.predicts == "v"
        values["zero_terminal_snr"] = objective.zero_terminal_snr
    return config.with_values(values)


def asks_for(config: Config, name: str) -> bool:
    """Whether an option asks for something; front ends write numbers that do not, since their forms have a field."""
    value = config.value(name)
    is_zero = value == 0 and not isinstance(value, bool)
    return config.is_changed(name) and not is_zero and value != NEUTRAL.get(name)


def list_idle_options(config: Config, family: type[Family]) -> list[str]:
    """Options that the user changed, which other families read and this one does not."""
    read_by_some = frozenset[str]().union(*(FAMILIES.get(name).options for name in FAMILIES.names))
    return sorted(name for name in read_by_some - family.options if asks_for(config, name))


def list_ignored_by_sd_scripts(config: Config, family: type[Family], objective: Objective) -> frozenset[str]:
    """The options that act on this model here and that sd-scripts ignores."""
    if not isinstance(objective, RectifiedFlow):
        return frozenset()
    weights = {"weighting_scheme"} if config.noise.weighting_scheme in SCHEMES else set[str]()
    if objective.space == "sigma_scaled":  # whose loss alone it weights
        weights = set()
    return (NOISE_AND_WEIGHTS | TIMESTEP_LIMITS | weights) - family.sd_scripts_reads


def list_dropped_options(config: Config, family: type[Family], objective: Objective) -> list[str]:
    """Options that sd-scripts ignores with this family, in a run that one of its launchers started."""
    if not is_launched(config):
        return []
    ignored = list_ignored_by_sd_scripts(config, family, objective)
    return sorted(name for name in ignored - TIMESTEP_LIMITS if asks_for(config, name))


def is_launched(config: Config) -> bool:
    """Whether a launcher with the name of one of sd-scripts' scripts began the run."""
    return config.source("method") == "launcher"


def describe_idle_options(config: Config, family: type[Family], objective: Objective) -> Iterator[str]:
    """Lines about options without an effect on this model; errors with --strict."""
    idle = list_idle_options(config, family)
    if idle:
        verb = "has" if len(idle) == 1 else "have"
        yield f"{join_flags(idle)} {verb} no effect on a model of the family {family.name}"
    dropped = list_dropped_options(config, family, objective)
    if dropped:
        yield (
            f"{join_flags(dropped)}: no effect, since sd-scripts ignores this on models of the family {family.name}; "
            "`sfumato train` applies it"
        )


def describe_further_options(config: Config, family: type[Family], objective: Objective) -> Iterator[str]:
    """A line about options that act here and that sd-scripts ignores on this family."""
    dropped = list_dropped_options(config, family, objective)
    ignored = list_ignored_by_sd_scripts(config, family, objective)
    applied = sorted(name for name in ignored if asks_for(config, name) and name not in dropped)
    if applied:
        yield f"{join_flags(applied)}: applied; sd-scripts ignores this on models of the family {family.name}"


def join_flags(names: list[str]) -> str:
    return ", ".join(f"--{name}" for name in names)


def check_objective_options(config: Config, objective: Objective, problems: Problems) -> None:
    """Add a problem for each loss weight that is for another prediction, and for a sampler that cannot work."""
    if objective.predicts == "epsilon" and config.loss.scale_v_pred_loss_like_noise_pred:
        problems.add(
            f"--{ON_V} is for a model that predicts v",
            code="v-loss-weight-for-noise-prediction",
            fix="remove it, or give --v_parameterization",
        )
    if objective.predicts == "v" and config.loss.v_pred_like_loss is not None:
        problems.add(
            f"--{ON_NOISE} is for a model that predicts noise",
            code="noise-loss-weight-for-v-prediction",
            fix="remove it",
        )
    with problems.catch():
        check_sampler(config, objective)


def check_sampler(config: Config, objective: Objective) -> None:
    """Raise UserError for a sampler that needs a signal to start from where the schedule ends in pure noise."""
    if not (isinstance(objective, VariancePreserving) and objective.zero_terminal_snr):
        return
    sampler = config.samples.sample_sampler
    if sampler.removeprefix("k_") in SAMPLERS_NEEDING_SIGNAL:
        raise UserError(
            f"--sample_sampler {sampler} cannot start from pure noise, which zero terminal SNR requires",
            code="sampler-cannot-start-from-noise",
            fix="give --sample_sampler ddim, euler, euler_a, dpmsolver or dpmsolver++",
        )


def read_base_resolution(blueprint: Blueprint) -> tuple[int, int] | None:
    """(width, height) in pixels that a checkpoint declares: in a file's metadata or in a folder's configuration."""
    source = blueprint.source
    return _read_sample_size(source, blueprint.latents.downscale) if source.is_folder else _read_metadata_size(source)


def _read_metadata_size(source: Source) -> tuple[int, int] | None:
    metadata = source.file.header.metadata
    for key in ("modelspec.resolution", "ss_resolution"):
        match = re.fullmatch(r"\(?\s*(\d{2,5})\s*(?:[x×,]\s*(\d{2,5})\s*)?\)?", metadata.get(key, ""))
        if match:
            return int(match[1]), int(match[2] or match[1])
    return None


def _read_sample_size(source: Source, downscale: int) -> tuple[int, int] | None:
    for folder in NETWORK_FOLDERS:
        size = source.read_config(folder).get("sample_size") if source.has_network(folder) else None
        if isinstance(size, int) and size > 0:
            return size * downscale, size * downscale
    return None
