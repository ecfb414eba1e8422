"""`sfumato plan`: what a run will do, before it does it; also how much memory it needs, and what makes it need less.

`sfumato train` and every script show the plan with --plan.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import PlainValidator

from sfumato.cli.exits import run_guarded
from sfumato.cli.help import asks_for_help, training_help
from sfumato.cli.train import is_further_process, run_plan, write_output_config
from sfumato.common.text import GIB
from sfumato.config.base import Metavar, Options, option
from sfumato.config.command import NO_DRY_RUN, CommandLine, read_command
from sfumato.config.environment import read_launch
from sfumato.config.load import load_command_config
from sfumato.config.values import Counts, FilePath

if TYPE_CHECKING:
    from sfumato.config import Config

SUMMARY = "Shows what a run will do, before it does it. Every training command does the same with --plan."
JSON_ALIASES = {"json": "json_file"}


def parse_memory(text: Any) -> int:
    """`24GB`, `24GiB` or `24` -> bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:G|GB|GiB)?", str(text), flags=re.IGNORECASE)
    if not match or float(match[1]) == 0:
        raise ValueError("is not the memory of a card; write e.g. 24GB")
    return int(float(match[1]) * GIB)


DeviceMemory = Annotated[int, PlainValidator(parse_memory), Metavar("24GB")]


class PlanOptions(Options):
    """Shows what `sfumato train` would do with the same options, without training."""

    rehearse: bool = option(
        False, "run every stage once without a GPU and without weights, and list the memory that a GPU needs for it"
    )
    fit: DeviceMemory | None = option(
        None, "find the options with which a run fits the memory of a card and is fastest, by rehearsals"
    )
    apply: FilePath | None = option(
        None, "with --fit: write all options and those that were found to this new file for --config_file"
    )
    published: str | None = option(
        None, "with --rehearse or --fit: a published model by name (flux-dev, sdxl, ...) instead of files"
    )
    device: DeviceMemory | None = option(None, "with --rehearse: the memory of a card; says which stages fit it")
    processes: Counts = option(
        (), "with --rehearse and --fsdp or --deepspeed: also what each of so many processes needs, e.g. 2 4 8"
    )
    json_file: FilePath | None = option(
        None, "with --rehearse or --fit: write the stages to this JSON file, sizes in bytes (also --json)"
    )

    @property
    def rehearses(self) -> bool:
        return self.rehearse or self.fit is not None


def main(argv: Sequence[str]) -> int:
    """Run `sfumato plan`."""
    if is_further_process():
        return 0
    if asks_for_help(argv):
        print(training_help("sfumato plan", SUMMARY, own=(PlanOptions,)), end="")
        return 0
    line = read_command(argv, PlanOptions, aliases=JSON_ALIASES, absent=NO_DRY_RUN)
    options = line.options(PlanOptions)
    check_rehearsal_options(options, line)
    with ExitStack() as stack:
        defaults: dict[str, Any] = {}
        if options.published is not None and not line.problems.found:
            from sfumato.tools.published_run import make_published_options

            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="sfumato-"))
            defaults = make_published_options(options.published, Path(folder), method=line.values.get("method"))
        config = load_command_config(line, defaults=defaults)
        if write_output_config(config):
            return 0
        if not options.rehearses:
            return run_plan(config)
        return run_guarded(lambda: rehearse(config, options), debug=config.log.debug)


def check_rehearsal_options(options: PlanOptions, line: CommandLine) -> None:
    """Add a problem for options that only go with --rehearse or --fit, and for what a rehearsal cannot be."""
    problems = line.problems
    if not options.rehearses:
        given = {
            "--published": options.published,
            "--device": options.device,
            "--processes": options.processes or None,
            "--json": options.json_file,
        }
        for flag in (flag for flag, value in given.items() if value is not None):
            problems.add(
                f"{flag} only goes with --rehearse or --fit", code="plan-option-without-rehearse", fix="add --rehearse"
            )
    elif (processes := read_launch().processes) > 1:
        problems.add(
            f"a rehearsal is one process, and {processes} were launched; --processes counts what each of several needs",
            code="rehearsal-launched",
            fix="run `sfumato plan` without a launcher",
        )
    check_fit_options(options, line)
    if options.published is not None and line.values.get("output_config"):
        problems.add(
            "--output_config would write the paths of a published model, which end with the command",
            code="published-output-config",
            fix="remove --output_config",
        )


def check_fit_options(options: PlanOptions, line: CommandLine) -> None:
    """Add a problem for options that contradict --fit or need it, and for a file that cannot be written at the end."""
    from sfumato.config.write import check_new_config

    problems = line.problems
    if options.fit is None and options.apply is not None:
        problems.add("--apply only goes with --fit", code="apply-without-fit", fix="add e.g. --fit 24GB")
    if options.fit is not None and (options.rehearse or options.device is not None):
        problems.add(
            "--fit rehearses by itself, with other options than --rehearse and --device would",
            code="fit-with-rehearse",
            fix="remove --rehearse and --device",
        )
    if options.fit is not None and options.apply is not None:
        with problems.catch():
            check_new_config(options.apply, option="--apply")


def rehearse(config: Config, options: PlanOptions) -> None:
    """The plan, and its rehearsal or the search for what fits."""
    from sfumato.tools.plan import show_plan

    plan = show_plan(config)
    if options.fit is None:
        from sfumato.tools.rehearse import show_rehearsal

        show_rehearsal(plan, memory=options.device, path=options.json_file, processes=options.processes)
    else:
        from sfumato.tools.fit import show_fit

        show_fit(plan, config, memory=options.fit, apply=options.apply, path=options.json_file)
