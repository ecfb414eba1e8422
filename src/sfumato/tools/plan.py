"""`sfumato plan`: what a run will do, before it does it."""

from __future__ import annotations

from collections.abc import Iterable

from sfumato.config import Config
from sfumato.config.listing import option_lines
from sfumato.data.find.discover import find_data
from sfumato.errors import Problems
from sfumato.plan import make_run_plan, with_seed
from sfumato.training.plan_report import data_lines, draw_timesteps, model_lines


def show_plan(config: Config) -> None:
    """Print everything; options and data come before torch is imported. Raises what `train` would refuse."""
    config = with_seed(config)
    print_lines(option_lines(config))
    problems = Problems()
    data = find_data(config, bucket_step=1, problems=problems)
    print_lines(data_lines(config, data))
    problems.raise_all()
    plan = make_run_plan(config, processes=1)
    print_lines(model_lines(plan))
    draw_timesteps(plan)


def print_lines(lines: Iterable[str]) -> None:
    print("\n".join(lines), flush=True)
