"""Samplers by their names in sd-scripts, as schedulers of diffusers."""

from __future__ import annotations

import importlib.util
import inspect
from typing import Any

from sfumato.common.registry import did_you_mean
from sfumato.diffusion.objective import Objective
from sfumato.errors import UserError

FLOW_SCHEDULER = "FlowMatchEulerDiscreteScheduler"
SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {  # sd-scripts' names -> diffusers' scheduler and its options
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1}),
    "lms": ("LMSDiscreteScheduler", {"steps_offset": 1}),
    "euler": ("EulerDiscreteScheduler", {"steps_offset": 1}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {"steps_offset": 1}),
    "heun": ("HeunDiscreteScheduler", {"steps_offset": 1}),
    "dpm_2": ("KDPM2DiscreteScheduler", {"steps_offset": 1}),
    "dpm_2_a": ("KDPM2AncestralDiscreteScheduler", {"steps_offset": 1}),
    "dpmsolver": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    "dpmsolver++": ("DPMSolverMultistepScheduler", {"steps_offset": 1}),
    "dpmsingle": ("DPMSolverSinglestepScheduler", {}),
}


def has_zero_offset(name: str, objective: Objective) -> bool:
    """Whether a sampler's time grid can begin one step earlier: with this noise schedule it has such an offset."""
    _, options = SAMPLERS.get(name.removeprefix("k_"), ("", {}))
    spacing = objective.scheduler_options().get("timestep_spacing")
    return "steps_offset" in options and objective.predicts != "velocity" and spacing != "trailing"


def make_scheduler(name: str, objective: Objective, *, zero_offset: bool = False) -> Any:
    """A new diffusers scheduler for the objective; sd-scripts' names, with or without the k_ prefix.

    zero_offset: its time grid begins one step earlier, at timestep 0, where it has such an offset. Flow models always
    use Euler steps over the family's own time grid.
    """
    from diffusers import schedulers

    if objective.predicts == "velocity":
        return getattr(schedulers, FLOW_SCHEDULER)(**objective.scheduler_options())
    if name.removeprefix("k_") not in SAMPLERS:
        raise UserError(f"unknown sampler {name!r}", code="sampler-unknown", fix=did_you_mean(name, SAMPLERS))
    scheduler_name, options = SAMPLERS[name.removeprefix("k_")]
    if scheduler_name == "LMSDiscreteScheduler" and importlib.util.find_spec("scipy") is None:
        raise UserError(f"the sampler {name} needs scipy", code="sampler-needs-scipy", fix="pip install scipy")
    scheduler, options = getattr(schedulers, scheduler_name), objective.scheduler_options() | options
    if zero_offset and "steps_offset" in options:
        options["steps_offset"] = 0
    if unknown := options.keys() - inspect.signature(scheduler).parameters.keys():
        raise UserError(
            f"sampler {name} does not support this model's noise schedule ({', '.join(sorted(unknown))})",
            code="sampler-unsupported",
            fix="--sample_sampler euler, or ddim, euler_a, dpmsolver++",
        )
    return scheduler(**options)
