"""--plan: what a run will do, before it does it."""

from __future__ import annotations

from collections.abc import Iterable

from sfumato.config import Config
from sfumato.config.environment import read_launch
from sfumato.config.listing import option_lines
from sfumato.plan import RunPlan, make_run_plan, with_seed
from sfumato.training.plan_report import plan_lines, resume_lines
from sfumato.training.timestep_report import draw_timesteps, report_timesteps


def show_plan(config: Config) -> RunPlan:
    """Print everything; the options come before torch is imported. Raises what `train` would refuse.

    Writes nothing but the chart of --plot_timesteps. A model named on the hub is downloaded: its headers are needed.
    """
    config = with_seed(config)
    print_lines(option_lines(config))
    plan = make_run_plan(config, processes=read_launch().processes, remember=False)
    print_lines((*plan_lines(plan), *resume_lines(plan)))
    draw_timesteps(plan)
    return plan


def show_timesteps(config: Config) -> None:
    """Show which timesteps a run would train, and train nothing."""
    plan = make_run_plan(with_seed(config), processes=read_launch().processes, remember=False)
    print_lines(report_timesteps(plan))


def print_lines(lines: Iterable[str]) -> None:
    print("\n".join(lines), flush=True)
