"""Which timesteps a run trains: the chart of --plot_timesteps, and what --show_timesteps shows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sfumato.common import files
from sfumato.common.text import plural
from sfumato.data.buckets import Size
from sfumato.plan import RunPlan

if TYPE_CHECKING:
    from sfumato.track.timestep_plot import TimestepProfile

WIDEST_BAR = 60  # characters of the most frequent timesteps
SPANS_OF_A_ROW = 2  # of the profile's spans, in text


def draw_timesteps(plan: RunPlan) -> None:
    """The chart that --plot_timesteps asks for."""
    if plan.config.run.plot_timesteps is not None:
        write_timestep_plot(plan, plan.data.sizes_and_offsets, plan.config.run.plot_timesteps)


def report_timesteps(plan: RunPlan) -> Iterator[str]:
    """What --show_timesteps asks for, of the run's images or of one size and offset: lines, or a chart and its path."""
    run = plan.config.run
    samples = plan.data.sizes_and_offsets
    if run.show_timesteps_resolution is not None or run.show_timesteps_offset:
        sizes = plan.data.buckets if run.show_timesteps_resolution is None else {run.show_timesteps_resolution: 1}
        samples = {(size, run.show_timesteps_offset): count for size, count in sizes.items()}
    if run.show_timesteps == "console":
        yield from format_density(measure_run(plan, samples))
    else:
        path = plan.output_dir / f"{plan.config.save.output_name}.timesteps.png"
        write_timestep_plot(plan, samples, path)
        yield f"timesteps drawn in {path}"


def measure_run(plan: RunPlan, samples: Mapping[tuple[Size, float], int]) -> TimestepProfile:
    """samples: how many there are of each size and offset."""
    from sfumato.diffusion.recipe import make_recipe
    from sfumato.track.timestep_plot import measure_timesteps

    config, blueprint = plan.config, plan.blueprint
    recipe = make_recipe(config.noise, config.loss, blueprint.objective, config.model.guidance_scale)
    return measure_timesteps(recipe, blueprint.objective, blueprint.latents, samples)


def write_timestep_plot(plan: RunPlan, samples: Mapping[tuple[Size, float], int], path: Path) -> None:
    """A PNG file; its folder is made."""
    from sfumato.track.timestep_plot import draw_timestep_plot

    sizes = {size for size, _ in samples}
    width, height = next(iter(sizes))
    shown = f"images of {plural(len(sizes), 'size')}" if len(sizes) > 1 else f"images of {width}x{height}"
    chart = draw_timestep_plot(measure_run(plan, samples), subtitle=f"{plan.blueprint.title}, {shown}")
    with files.write_atomically(path) as temporary:
        chart.save(temporary, "PNG", optimize=True)


def format_density(profile: TimestepProfile) -> Iterator[str]:
    """A histogram in text: how often each span of timesteps is trained, 1 where all are equally frequent."""
    spans = len(profile.density)
    rows = [
        sum(profile.density[start : start + SPANS_OF_A_ROW]) / SPANS_OF_A_ROW
        for start in range(0, spans, SPANS_OF_A_ROW)
    ]
    yield "timesteps      density"
    for number, density in enumerate(rows):
        first, last = (1000 * edge // len(rows) for edge in (number, number + 1))
        bar = "#" * round(WIDEST_BAR * density / max(rows))
        yield f"{first:>4} to {last:>4}  {density:>7.3f}  {bar}".rstrip()
