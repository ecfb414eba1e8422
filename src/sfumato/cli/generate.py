"""`sfumato generate`: make images. Imports torch only once everything that was given is understood."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sfumato.cli.exits import run_guarded
from sfumato.cli.generate_files import list_embeddings, list_networks
from sfumato.cli.generate_options import (
    GenerateOptions,
    LargeImageOptions,
    SeriesOptions,
    StartOptions,
    list_defaults,
)
from sfumato.cli.generate_series import Series, list_image_files, read_image_prompts, read_module_prompts
from sfumato.cli.generate_terminal import Terminal
from sfumato.cli.help import asks_for_help, command_help
from sfumato.common.text import EMPTY
from sfumato.config.command import NO_TRIALS, CommandLine, read_command
from sfumato.config.load import load_command_config
from sfumato.config.prompts import Prompt, parse_line, read_prompts
from sfumato.data.find.prompt_images import check_prompt_images
from sfumato.errors import UserError

if TYPE_CHECKING:
    from sfumato.config import Config

GENERATION_SKIPS = (  # rules
    "data-missing", "output-missing", "sample-prompts-unused", "sample-prompts-missing", "control-net-options-unused",
)  # fmt: skip
ALIASES = {
    "ckpt": "pretrained_model_name_or_path", "from_file": "sample_prompts", "sampler": "sample_sampler",
    "batch_size": "sample_batch_size", "guide_image_path": "control_net_image",
}  # fmt: skip
HIGHLIGHTS = (
    "pretrained_model_name_or_path", "sample_prompts", "seed", "sample_sampler", "sample_batch_size", "mixed_precision",
)  # fmt: skip
COMMAND_THEMES = (GenerateOptions, StartOptions, LargeImageOptions, SeriesOptions)
PROMPT_SOURCES = ("--prompt", "--from_file", "--from_module", "--interactive")


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
    config = load_command_config(line, skip_rules=GENERATION_SKIPS, defaults=defaults)
    options, series = line.options(GenerateOptions), plan_series(line, config)
    further = [line.options(theme) for theme in (StartOptions, LargeImageOptions)]
    values = {**prompt_defaults, **list_defaults(options, *further)}
    given = make_prompts(options, config, series)
    lines = (terminal or Terminal()).read() if series.options.interactive else iter([given])
    first = series.list_images([prompt.apply_defaults(values) for prompt in next(lines, [])])
    control = bool(config.model.controlnet_model_name_or_path or options.control_net_lllite_models)
    check_prompt_images(first, control=control)
    networks = list_networks(options, config)
    from sfumato.tools.generate import ImageMaker
    from sfumato.tools.generate_setup import GenerateRequest

    request = GenerateRequest(
        config=config,
        networks=networks,
        embeddings=list_embeddings(options),
        merged=len(networks) if options.network_merge else options.network_merge_n_models or 0,
        outdir=options.outdir,
        float32_parts=options.float32_parts,
        lllite=options.control_net_lllite_models,
        sequential_names=series.options.sequential_file_name,
        original_names=series.options.use_original_file_name,
    )

    def run() -> None:
        maker, made = ImageMaker(request), len(first)
        maker.make(first)
        for prompts in lines:
            more = Series(**{**vars(series), "before": made})
            images = more.list_images([prompt.apply_defaults(values) for prompt in prompts])
            check_prompt_images(images, control=control)
            maker.make(images)
            made += len(images)

    return run_guarded(run, debug=config.log.debug)


def plan_series(line: CommandLine, config: Config) -> Series:
    """What is made of each prompt."""
    start, options = line.options(StartOptions), line.options(SeriesOptions)
    images = list_image_files(start.image_path, "--image_path")
    if options.use_original_file_name and not images:
        raise UserError(
            "--use_original_file_name is about the images of --image_path, which is not given",
            code="original-name-without-image",
            fix="give --image_path, or remove it",
        )
    return Series(
        options=options,
        first_seed=random.SystemRandom().randrange(2**32) if config.loop.seed is None else config.loop.seed,
        images=images,
        masks=list_image_files(start.mask_path, "--mask_path"),
        plain=line.options(GenerateOptions).plain_prompt,
    )


def make_prompts(options: GenerateOptions, config: Config, series: Series) -> list[Prompt]:
    """The prompts as they were given; without any those that the images to start from carry."""
    path, module = config.samples.sample_prompts, series.options.from_module
    given = [options.prompt is not None, path is not None, module is not None, series.options.interactive]
    if sum(given) > 1:
        named = [name for name, is_given in zip(PROMPT_SOURCES, given, strict=True) if is_given]
        raise UserError(f"{' and '.join(named)} both give prompts", code="prompt-given-twice", fix="give one of them")
    if options.plain_prompt and options.prompt is None:
        raise UserError(
            "--plain_prompt is about --prompt, which is not given", code="plain-prompt-without-prompt", fix="remove it"
        )
    if series.options.interactive:
        return []
    if options.prompt is not None:
        text = options.prompt
        return [Prompt(prompt=text) if options.plain_prompt else parse_line(text, where="--prompt")]
    if path is not None:
        prompts = read_prompts(path)
    elif module is not None:
        prompts = read_module_prompts(module, series.options.prompter_module_args)
    else:
        prompts = read_image_prompts(series.images, series.masks)
    if not prompts:
        raise UserError(
            "there is no prompt", code="prompt-missing", fix='give --prompt "a cat", or --from_file prompts.txt'
        )
    return prompts
