"""What a command line of `sfumato generate` asks for, checked before anything is loaded."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sfumato.cli.exits import report_error
from sfumato.cli.generate_files import check_pre_calc, list_embeddings, list_networks
from sfumato.cli.generate_options import (
    PROMPT_THEMES,
    ControlOptions,
    FirstNoiseOptions,
    GenerateOptions,
    SeriesOptions,
    StartOptions,
    list_defaults,
)
from sfumato.cli.generate_series import (
    Series,
    list_image_files,
    read_image_prompts,
    read_module_prompts,
    read_noise_chances,
)
from sfumato.cli.generate_terminal import Terminal
from sfumato.config.command import CommandLine
from sfumato.config.load import load_command_config
from sfumato.config.prompts import Prompt, parse_line, read_prompts
from sfumato.data.find.prompt_images import check_prompt_images
from sfumato.errors import UserError

if TYPE_CHECKING:
    from sfumato.config import Config
    from sfumato.tools.generate_setup import GenerateRequest

GENERATION_SKIPS = (  # rules
    "data-missing", "output-missing", "sample-prompts-unused", "sample-prompts-missing", "control-net-options-unused",
)  # fmt: skip
NEEDED_OPTIONS = {  # option -> of which one has to be given, too
    "prompter_module_args": ("from_module",),
    "noise_offset_range": ("noise_offset_prob",),
    "pyramid_noise_discount_range": ("pyramid_noise_prob",),
    **dict.fromkeys(
        ("network_merge", "network_merge_n_models", "network_pre_calc", "network_show_meta"), ("network_weights",)
    ),
}
PROMPT_SOURCES = ("--prompt", "--from_file", "--from_module", "--interactive")


def prepare_job(
    line: CommandLine, defaults: Mapping[str, Any], prompt_defaults: Mapping[str, Any], terminal: Terminal | None
) -> GenerateJob:
    """Check everything but the model's files."""
    config = load_command_config(line, skip_rules=GENERATION_SKIPS, defaults=defaults)
    options, series = line.options(GenerateOptions), plan_series(line, config)
    control = line.options(ControlOptions)
    beside = list_defaults(*(line.options(theme) for theme in PROMPT_THEMES))
    steps = prompt_defaults.get("sample_steps")  # which models that are distilled to few steps do not have
    values = {**{name: value for name, value in prompt_defaults.items() if name != "sample_steps"}, **beside}
    networks = list_networks(options, config)
    check_pre_calc(options, config)
    given = make_prompts(options, config, series)
    typed = list_typed_images(terminal or Terminal(), series, values) if series.options.interactive else iter(())
    first = next(typed, []) if series.options.interactive else list_checked_images(series, given, values)
    from sfumato.tools.generate_setup import GenerateRequest

    request = GenerateRequest(
        config=config,
        networks=networks,
        embeddings=list_embeddings(options),
        merged=len(networks) if options.network_merge else options.network_merge_n_models or 0,
        outdir=options.outdir,
        calculates_weights=options.network_pre_calc,
        shows_metadata=options.network_show_meta,
        float32_parts=options.float32_parts,
        default_steps=steps,
        vae_tile_size=options.vae_tile_size or 0,
        control_nets=control.control_net_models,
        lllite=control.control_net_lllite_models,
        sequential_names=series.options.sequential_file_name,
        original_names=series.options.use_original_file_name,
        has_sheet=series.options.grid,
        notes=list(list_unused_options(line)),
        progress_file=series.options.progress_file,
    )
    return GenerateJob(request=request, series=series, first=first, typed=typed, debug=config.log.debug)


@dataclass(frozen=True, kw_only=True)
class GenerateJob:
    """What a command line asks for, checked."""

    request: GenerateRequest
    series: Series
    first: Sequence[Prompt]  # a prompt per image, of the prompts that are known
    typed: Iterator[Sequence[Prompt]]  # the same of further prompts, as they are typed
    debug: bool


def list_unused_options(line: CommandLine) -> Iterator[str]:
    """Options that were given without those that they are about; what prompts have of that kind is seen with them."""
    given = {name for name, value in line.own.items() if value} | line.values.keys()
    for name, needed in NEEDED_OPTIONS.items():
        if name in given and not given & set(needed):
            yield f"--{name} has no effect without {' or '.join(f'--{each}' for each in needed)}"


def list_checked_images(series: Series, prompts: Sequence[Prompt], defaults: Mapping[str, Any]) -> list[Prompt]:
    """A prompt per image; UserError where a file that one names cannot be read."""
    images = series.list_images([prompt.apply_defaults(defaults) for prompt in prompts])
    check_prompt_images(images, control=series.num_controls > 0)
    return images


def list_typed_images(terminal: Terminal, series: Series, defaults: Mapping[str, Any]) -> Iterator[Sequence[Prompt]]:
    """Of one prompt after the other; what is wrong with one is reported, and the next is read."""
    count = 0
    for prompts in terminal.read():
        try:
            images = list_checked_images(replace(series, before=count), prompts, defaults)
        except UserError as error:
            report_error(error)
            continue
        count += len(images)
        yield images


def plan_series(line: CommandLine, config: Config) -> Series:
    """What is made of each prompt."""
    start, options, control = line.options(StartOptions), line.options(SeriesOptions), line.options(ControlOptions)
    control_nets = bool(config.model.controlnet_model_name_or_path) + len(control.control_net_models)
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
        controls=[file for path in control.control_net_image for file in list_image_files(path, "--control_net_image")],
        num_controls=max(control_nets, len(control.control_net_lllite_models)),
        noise=read_noise_chances(line.options(FirstNoiseOptions)),
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
