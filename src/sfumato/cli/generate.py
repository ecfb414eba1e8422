"""`sfumato generate`: make images. Imports torch only once everything that was given is understood."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from sfumato.cli.exits import report_error, run_guarded
from sfumato.cli.generate_axes import list_plot_models, read_axes
from sfumato.cli.generate_job import prepare_job
from sfumato.cli.generate_options import PROMPT_THEMES, SeriesOptions
from sfumato.cli.generate_terminal import Terminal
from sfumato.cli.help import asks_for_help, command_help
from sfumato.common.text import EMPTY
from sfumato.config.command import NO_TRIALS, CommandLine, read_command
from sfumato.errors import UserError

ALIASES = {
    "ckpt": "pretrained_model_name_or_path", "from_file": "sample_prompts", "sampler": "sample_sampler",
    "batch_size": "sample_batch_size", "guide_image_path": "control_net_image",
}  # fmt: skip
HIGHLIGHTS = (
    "pretrained_model_name_or_path", "sample_prompts", "seed", "sample_sampler", "sample_batch_size", "mixed_precision",
)  # fmt: skip
COMMAND_THEMES = (*PROMPT_THEMES, SeriesOptions)


def main(argv: Sequence[str]) -> int:
    """Run `sfumato generate`."""
    if asks_for_help(argv):
        print(command_help("sfumato generate", *COMMAND_THEMES, highlights=HIGHLIGHTS, aliases=ALIASES), end="")
        return 0
    return run_generate(read_command(argv, *COMMAND_THEMES, aliases=ALIASES, absent=NO_TRIALS))


def run_generate(
    line: CommandLine,
    *,
    defaults: Mapping[str, Any] = EMPTY,
    prompt_defaults: Mapping[str, Any] = EMPTY,
    terminal: Terminal | None = None,
) -> int:
    """Run it with a command line that was read. defaults: of options that a launcher sets. prompt_defaults: of
    prompts, after the options beside them. terminal: how it reads prompts that are typed.
    """
    job = prepare_job(line, defaults, prompt_defaults, terminal)
    axes = read_axes(job.series.options.xy)
    if axes:
        from sfumato.tools.generate_plot import make_plot

        variants = list(list_plot_models(line, axes, lambda one: prepare_job(one, defaults, prompt_defaults, None)))
        return run_guarded(lambda: make_plot(job.request, axes, variants), debug=job.debug)
    from sfumato.tools.generate import ImageMaker

    def run() -> None:
        maker = ImageMaker(job.request)
        if not job.series.options.interactive:
            maker.make(job.first)
        for images in chain([job.first], job.typed) if job.series.options.interactive else ():
            try:
                maker.make(images)
            except UserError as error:  # of this prompt; the next one may be right
                report_error(error)
        maker.finish()

    return run_guarded(run, debug=job.debug)
