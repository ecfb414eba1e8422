"""`sfumato dataset cache`: fill, count, check and prune the caches without training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sfumato.cli.exits import run_guarded
from sfumato.cli.help import asks_for_help, command_help
from sfumato.common.text import EMPTY
from sfumato.config.base import Options, option
from sfumato.config.command import NO_DRY_RUN, CommandLine, read_command
from sfumato.config.load import load_command_config
from sfumato.config.values import MachineShard

if TYPE_CHECKING:
    from sfumato.config import Config

MAINTENANCE_SKIPS = ("model-missing", "data-missing", "output-missing")  # rules
FILLING_SKIPS = ("output-missing", "sample-prompts-unused")
DISK_OPTIONS = {
    "cache_latents": "cache_latents_to_disk",
    "cache_text_encoder_outputs": "cache_text_encoder_outputs_to_disk",
}


class DatasetCacheOptions(Options):
    """Fills the caches of latents and text encoder outputs without training, and maintains them. Takes the options of
    `sfumato train`; give those of the training, --mixed_precision above all, since an entry is made for the weights as
    they are loaded. Both caches are filled unless --cache_latents or --cache_text_encoder_outputs names one; prompts of
    --sample_prompts are encoded with the captions. Several processes share the work. Machines with caches of their own
    make a part each: copy all their files of `shards` and `networks` into one folder. With --plan, everything is
    checked and shown, and nothing is written.
    """

    stats: bool = option(False, "count what the cache holds, and list the datasets that need it")
    verify: bool = option(False, "read every entry; with a dataset given, every image, too")
    prune: bool = option(False, "list what no current dataset needs, ask, and delete it")
    yes: bool = option(False, "with --prune: do not ask")
    unused_for: float | None = option(
        None, "with --prune: datasets not cached for this many days do not count as current", ge=0
    )
    shard: MachineShard | None = option(None, "make the I-th of N parts, for several machines without a common folder")

    @property
    def tasks(self) -> list[str]:
        """The maintenance that is asked for; nothing means filling."""
        flags = {"--stats": self.stats, "--verify": self.verify, "--prune": self.prune}
        return [flag for flag, given in flags.items() if given]


def main(argv: Sequence[str]) -> int:
    """Run `sfumato dataset cache`."""
    if asks_for_help(argv):
        print(command_help("sfumato dataset cache", DatasetCacheOptions), end="")
        return 0
    return run_cache_command(read_command(argv, DatasetCacheOptions, absent=NO_DRY_RUN))


def run_cache_command(line: CommandLine, *, kinds: Sequence[str] = (), defaults: Mapping[str, Any] = EMPTY) -> int:
    """Fill or maintain the caches; gives the exit code.

    kinds: the caches to fill whatever the options say. defaults: values that a script sets.
    """
    options = line.options(DatasetCacheOptions)
    check_tasks(options, line)
    config = make_cache_config(line, kinds, defaults)
    if options.tasks:
        run = choose_maintenance(options, config)
    elif config.run.plan:
        run = choose_plan(config)
    else:
        from sfumato.tools.dataset_cache import fill_dataset_caches

        def run() -> None:
            fill_dataset_caches(config, machine=options.shard or (0, 1)).close()

    return run_guarded(run, debug=config.log.debug)


def choose_plan(config: Config) -> Callable[[], None]:
    """What would be cached; one process of a launch shows it for all."""
    from sfumato.config.environment import read_launch
    from sfumato.tools.cache_plan import show_cache_plan

    return (lambda: None) if read_launch().rank > 0 else (lambda: show_cache_plan(config))


def choose_maintenance(options: DatasetCacheOptions, config: Config) -> Callable[[], None]:
    """The maintenance that is asked for."""
    from sfumato.tools.cache_maintenance import prune_cache, show_stats, verify_cache

    def prune() -> None:
        prune_cache(config, yes=options.yes, unused_days=options.unused_for)

    tasks = {"--stats": lambda: show_stats(config), "--verify": lambda: verify_cache(config), "--prune": prune}
    return tasks[options.tasks[0]]


def check_tasks(options: DatasetCacheOptions, line: CommandLine) -> None:
    """Add a problem for options that do not go together."""
    tasks, problems = options.tasks, line.problems
    if tasks and line.values.get("plan"):
        problems.add(f"--plan is for filling, not for {tasks[0]}", code="plan-without-filling", fix="remove --plan")
    if len(tasks) > 1:
        problems.add(
            f"{' and '.join(tasks)} are different things to do", code="cache-tasks-conflict", fix="give one of them"
        )
    for flag, given in {"--yes": options.yes, "--unused_for": options.unused_for is not None}.items():
        if given and tasks != ["--prune"]:
            problems.add(f"{flag} only goes with --prune", code="prune-option-without-prune", fix=f"remove {flag}")
    if options.shard and tasks:
        problems.add(f"--shard is for filling, not for {tasks[0]}", code="shard-without-filling", fix="remove --shard")


def make_cache_config(line: CommandLine, kinds: Sequence[str] = (), defaults: Mapping[str, Any] = EMPTY) -> Config:
    """The config, with the wanted caches on disk; maintenance needs neither model nor data."""
    if line.options(DatasetCacheOptions).tasks:
        return load_command_config(line, defaults=defaults, skip_rules=MAINTENANCE_SKIPS)
    config = load_command_config(line, defaults=defaults, skip_rules=FILLING_SKIPS)
    wanted = kinds or [kind for kind in DISK_OPTIONS if config.value(kind)] or list(DISK_OPTIONS)
    to_disk = {DISK_OPTIONS[kind]: True for kind in wanted}
    return load_command_config(line, defaults={**defaults, **to_disk}, skip_rules=FILLING_SKIPS)
